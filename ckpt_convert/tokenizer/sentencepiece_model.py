"""Translates the SentencePiece tokenizer.model of Llama 1, Llama 2 and Mistral to tokenizer.json (one way only).

Fields are those of `sentencepiece_model.proto` of google/sentencepiece, parsed here directly: less code than a
dependency, and every length is checked. SentencePiece merges the adjacent pair whose union has the highest score; a BPE
does the same if its merges are all splits of every piece into two pieces, in the order of the scores.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckpt_convert.errors import ConfigError
from ckpt_convert.tokenizer.hugging_face import (
    TOKENIZER_MODEL,
    Json,
    added_tokens,
    check_fits,
    corrupt_model,
    merge_lines,
    prepend_post_processor,
    tokenizer_files,
)
from ckpt_convert.wording import MORE, first_few

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
_BPE = 2
# Finding the splits of a piece takes quadratic time; SentencePiece's own limit for training is 512.
_LONGEST_PIECE = 4096

_Value = int | bytes


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary: its text, its score, and what it is for."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """The parts of a SentencePiece model that determine ids; an id below 0 means that there is no such token."""

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    whitespace_suffix: bool
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    normalizer: str
    has_charsmap: bool
    dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def parse_model(data: bytes) -> SentencePieceModel:
    """Read a serialized ModelProto.

    Raises CorruptFileError if the bytes are no ModelProto, or if pieces are duplicated, too long, without a finite
    score, or lack the tokens that the trainer's settings name.
    """
    pieces: list[Piece] = []
    trainer: dict[int, _Value] = {}
    normalizer: dict[int, _Value] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(len(pieces), _bytes(value)))
        elif number == 2:
            trainer.update(_fields(_bytes(value)))
        elif number == 3:
            normalizer.update(_fields(_bytes(value)))
    model = SentencePieceModel(
        pieces=tuple(pieces),
        model_type=_int(trainer, 3, 1),
        byte_fallback=bool(_int(trainer, 35, 0)),
        whitespace_suffix=bool(_int(trainer, 24, 0)),
        unk_id=_int(trainer, 40, 0),
        bos_id=_int(trainer, 41, 1),
        eos_id=_int(trainer, 42, 2),
        pad_id=_int(trainer, 43, -1),
        normalizer=_text(_bytes(normalizer.get(1, b""))),
        has_charsmap=bool(_bytes(normalizer.get(2, b""))),
        dummy_prefix=bool(_int(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_int(normalizer, 4, 1)),
        escape_whitespaces=bool(_int(normalizer, 5, 1)),
    )
    _check_pieces(model)
    return model


def _fields(data: bytes) -> Iterator[tuple[int, _Value]]:
    """The fields of a protobuf message: integers, or the bytes of length-delimited and fixed-width fields."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise corrupt_model(f"expected a protobuf message, found wire type {wire} at byte {at}")
        if size > len(data) - at:
            raise corrupt_model(f"expected {size} bytes from byte {at} on, found {len(data) - at}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise corrupt_model("expected a whole number, found the end of the message")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), at
    raise corrupt_model(f"expected a number of at most 10 bytes, found more before byte {at}")


def _int(fields: Mapping[int, _Value], number: int, default: int) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise corrupt_model(f"expected a number in field {number}, found bytes")
    return value - 2**64 if value >= 2**63 else value


def _bytes(value: _Value) -> bytes:
    if not isinstance(value, bytes):
        raise corrupt_model(f"expected bytes, found the number {value}")
    return value


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise corrupt_model(f"expected UTF-8 text, found {data[:40]!r}") from None


def _piece(index: int, data: bytes) -> Piece:
    fields = dict(_fields(data))
    score = _bytes(fields.get(2, b"\0\0\0\0"))
    text = _text(_bytes(fields.get(1, b"")))
    if len(score) != 4 or not text or len(text) > _LONGEST_PIECE:
        raise corrupt_model(
            f"expected a text of 1 to {_LONGEST_PIECE} characters and a score in piece {index}, found {data[:40]!r}"
        )
    return Piece(text, struct.unpack("<f", score)[0], _int(fields, 3, _NORMAL))


def _check_pieces(model: SentencePieceModel) -> None:
    twice = [text for text, count in Counter(piece.text for piece in model.pieces).items() if count > 1]
    if not model.pieces or twice:
        raise corrupt_model(f"expected pieces, each once, found {len(model.pieces)}, repeated: {twice[:4]}")
    odd = [piece.text for piece in model.pieces if not math.isfinite(piece.score)]
    if odd:
        raise corrupt_model(f"expected a finite score for each piece, found none for {odd[:4]}")
    unknown = [index for index, piece in enumerate(model.pieces) if piece.type == _UNKNOWN]
    if unknown != [model.unk_id]:
        raise corrupt_model(f"expected one unknown piece, {model.unk_id}, found {unknown[:4]}")
    for role, index in (("bos", model.bos_id), ("eos", model.eos_id), ("pad", model.pad_id)):
        if index >= len(model.pieces) or (index >= 0 and model.pieces[index].type != _CONTROL):
            raise corrupt_model(f"expected a control piece for {role}, found id {index} of {len(model.pieces)} pieces")
    spelled = {f"<0x{byte:02X}>" for byte in range(256)}
    if model.byte_fallback and spelled != {piece.text for piece in model.pieces if piece.type == _BYTE}:
        raise corrupt_model("expected a piece for each of the 256 bytes, since bytes are the fallback, found others")


def _joinable(model: SentencePieceModel) -> dict[str, float]:
    """The scores of the pieces that take part in merges.

    Control and byte pieces do not: text that spells them is text. Nor do pieces with a space, since spaces in text are
    replaced before it is split.
    """
    return {piece.text: piece.score for piece in model.pieces if piece.type == _NORMAL and " " not in piece.text}


def user_defined(model: SentencePieceModel) -> list[str]:
    """The symbols that SentencePiece extracts from text before it merges anything."""
    return [piece.text for piece in model.pieces if piece.type == _USER_DEFINED]


def score_merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """All splits of every normal piece into two, by the score of the piece, then the longer left and right part first.

    The lengths only matter for equal scores, see ``_tied``.
    """
    scores = _joinable(model)
    merges = [
        (text[:at], text[at:])
        for text in scores
        for at in range(1, len(text))
        if text[:at] in scores and text[at:] in scores
    ]
    return sorted(merges, key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0]), -len(pair[1])))


def sentencepiece_to_hf(data: bytes, *, vocab_size: int | None = None) -> dict[str, bytes]:
    """Make tokenizer.json and tokenizer_config.json from a SentencePiece tokenizer.model with Llama's settings.

    Ids equal SentencePiece's with the begin token prepended, except for text that spells an added token: as in Hugging
    Face tokenizers, a control token such as ``</s>`` is recognized in text, and after any added token, including
    user-defined symbols, a prefix space is added as at the beginning. ``vocab_size`` (the embedding's rows) may be
    larger than the number of pieces. Raises CorruptFileError for a malformed file; ConfigError, with every reason, if
    a BPE could give other ids than SentencePiece, or if the embedding has fewer rows.
    """
    model = parse_model(data)
    check_fits(len(model.pieces), vocab_size)
    merges = score_merges(model)
    problems = [*_setting_problems(model), *_piece_problems(model, merges)]
    if problems:
        raise ConfigError(
            f"{TOKENIZER_MODEL}: expected SentencePiece BPE with Llama's settings, found: "
            + "; ".join(problems)
            + f". Keep {TOKENIZER_MODEL} and load it with SentencePiece"
        )
    ids = {piece.text: index for index, piece in enumerate(model.pieces)}
    special = [text for text in ids if model.pieces[ids[text]].type in (_CONTROL, _UNKNOWN)]
    symbols = user_defined(model)
    roles = {"bos_token": model.bos_id, "eos_token": model.eos_id, "pad_token": model.pad_id, "unk_token": model.unk_id}
    named = {role: model.pieces[index].text for role, index in roles.items() if index >= 0}
    bos = named.get("bos_token")
    pipeline: Json = {
        "added_tokens": added_tokens(ids, special=special, plain=symbols),
        "normalizer": _normalizer(model),
        "pre_tokenizer": None,
        "post_processor": prepend_post_processor(bos, ids[bos]) if bos is not None else None,
        "decoder": _decoder(model),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": named["unk_token"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merge_lines(merges),
        },
    }
    return tokenizer_files(pipeline, named, padding_side="left")


def _normalizer(model: SentencePieceModel) -> Json:
    """Not the Metaspace pre-tokenizer, which adds no prefix to text that begins with a space; SentencePiece does."""
    spaces: Json = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prefix: list[Json] = [{"type": "Prepend", "prepend": _SPACE}] if model.dummy_prefix else []
    return {"type": "Sequence", "normalizers": [*prefix, spaces]}


def _decoder(model: SentencePieceModel) -> Json:
    spaces: Json = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    prefix: list[Json] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.dummy_prefix else []
    return {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *prefix]}


def _setting_problems(model: SentencePieceModel) -> Iterator[str]:
    if model.model_type != _BPE:
        yield f"a model of type {_MODEL_TYPES.get(model.model_type, model.model_type)} instead of BPE"
    if model.has_charsmap:
        yield f"the normalizer {model.normalizer!r} instead of identity, which changes text before it is split"
    if model.remove_extra_whitespaces:
        yield "`remove_extra_whitespaces`, which drops spaces"
    if not model.escape_whitespaces:
        yield f"no `escape_whitespaces`, so spaces do not become {_SPACE}"
    if model.whitespace_suffix:
        yield "`treat_whitespace_as_suffix`, so a space belongs to the word before it"


def _piece_problems(model: SentencePieceModel, merges: list[tuple[str, str]]) -> Iterator[str]:
    unused = [piece.text for piece in model.pieces if piece.type == _UNUSED]
    if unused:
        yield f"unused pieces, which come apart again after joining: {first_few(map(repr, unused), 4, MORE)}"
    spaced = [text for text in user_defined(model) if not {" ", _SPACE}.isdisjoint(text)]
    if spaced:
        yield f"user-defined symbols with spaces in them: {first_few(map(repr, spaced), 4, MORE)}"
    scores = _joinable(model)
    alone = sorted({char for text in scores for char in text} - set(scores))
    if alone:
        yield f"pieces made of characters that are no pieces: {first_few(map(repr, alone), 4, MORE)}"
    tied = _tied({left + right: scores[left + right] for left, right in merges})
    if tied:
        yield f"pieces with equal scores, whose order only SentencePiece knows: {first_few(map(repr, tied), 4, MORE)}"


def _tied(joined: Mapping[str, float]) -> list[str]:
    """The pieces with equal scores for which no fixed order of merges is equivalent.

    Of pairs with equal scores, SentencePiece merges the leftmost. Mistral's runs of spaces have one score, but do have
    an equivalent order: merging a run from the left leaves pieces of which none is longer than its predecessor, so
    that the leftmost pair is also the one with the longest left, then right part. That holds for runs of one character
    that all have this score, if no other piece contains two of that character.
    """
    by_score: dict[float, list[str]] = {}
    for text, score in joined.items():
        by_score.setdefault(score, []).append(text)
    return [text for texts in by_score.values() if len(texts) > 1 and not _runs(texts, joined) for text in texts]


def _runs(texts: list[str], joined: Mapping[str, float]) -> bool:
    char, *others = set("".join(texts))
    return not others and sum(char * 2 in text for text in joined) == len(texts)
