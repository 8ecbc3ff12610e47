"""Translates tokenizer files between formats where that is exact; their kind is detected from their bytes.

Weights do not depend on them, so a tokenizer that cannot be translated does not stop a conversion: the file is kept
unchanged, and a notice gives the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ckpt_convert.errors import InputError
from ckpt_convert.tokenizer.hugging_face import TOKENIZER_CONFIG, TOKENIZER_JSON, TOKENIZER_MODEL
from ckpt_convert.tokenizer.sentencepiece_model import parse_model, sentencepiece_to_hf, user_defined
from ckpt_convert.tokenizer.spec import TiktokenSpec
from ckpt_convert.tokenizer.tiktoken_model import (
    hf_to_tiktoken,
    parse_ranks,
    tiktoken_to_hf,
    unexpressed_specials,
)
from ckpt_convert.wording import first_few

__all__ = [
    "TOKENIZER_CONFIG",
    "TOKENIZER_JSON",
    "TOKENIZER_MODEL",
    "GeneratedTokenizer",
    "generated_for_hf",
    "generated_for_meta",
    "hf_to_tiktoken",
    "sentencepiece_to_hf",
    "tiktoken_to_hf",
    "tokenizer_kind",
]

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n?")
_PIECE_FIELD = b"\x0a"


@dataclass(frozen=True)
class GeneratedTokenizer:
    """Translated tokenizer files by name, and notices about them or about why there are none."""

    files: dict[str, bytes]
    notices: tuple[str, ...] = ()


def tokenizer_kind(data: bytes) -> Literal["tiktoken", "sentencepiece", "unknown"]:
    """Detect the kind of a tokenizer.model from its first bytes; only its translation checks the rest."""
    first_line = data[: data.find(b"\n", 0, 1 << 16) + 1] or data[: 1 << 16]
    if _TIKTOKEN_LINE.fullmatch(first_line):
        return "tiktoken"
    # A ModelProto begins with its first piece, which begins with its text.
    if data.startswith(_PIECE_FIELD) and data[2:4].find(_PIECE_FIELD) >= 0:
        return "sentencepiece"
    return "unknown"


def tokenizer_json_kind(data: bytes) -> Literal["tiktoken", "sentencepiece", "unknown"]:
    """Detect what a tokenizer.json was made from; byte_fallback shows that it was a SentencePiece model."""
    if re.search(rb'"byte_fallback"\s*:\s*true', data):
        return "sentencepiece"
    return "tiktoken" if re.search(rb'"type"\s*:\s*"ByteLevel"', data) else "unknown"


def generated_for_hf(spec: TiktokenSpec, data: bytes, vocab_size: int | None = None) -> GeneratedTokenizer:
    """Make Hugging Face tokenizer files from a tokenizer.model; ``vocab_size`` is the number of embedding rows.

    For input that cannot be translated, returns no files, and the reason as a notice.
    """
    found = tokenizer_kind(data)
    try:
        other = spec.other_tokenizers.get(len(parse_ranks(data))) if found == "tiktoken" else None
        if other is not None:
            reason = f"{TOKENIZER_MODEL} is {other}'s, whose pattern and special tokens are not those of {spec.title}"
            return _nothing(TOKENIZER_JSON, f"{reason}; take {TOKENIZER_JSON} from the model's page on the Hub")
        if found == "tiktoken":
            files = tiktoken_to_hf(spec, data, vocab_size=vocab_size)
            notices = _tiktoken_notices(spec, data, vocab_size)
        elif found == "sentencepiece":
            files, notices = sentencepiece_to_hf(data, vocab_size=vocab_size), _sentencepiece_notices(data, vocab_size)
        else:
            reason = f"{TOKENIZER_MODEL}: expected tiktoken ranks or a SentencePiece model, found {data[:16]!r}"
            return _nothing(TOKENIZER_JSON, reason)
    except InputError as error:
        return _nothing(TOKENIZER_JSON, str(error))
    return GeneratedTokenizer(files, notices)


def generated_for_meta(spec: TiktokenSpec, files: Mapping[str, bytes]) -> GeneratedTokenizer:
    """Make Meta's tokenizer.model from Hugging Face tokenizer files (name → bytes).

    Makes nothing if there is a tokenizer.model among them. For input that cannot be translated, returns no files, and
    the reason as a notice.
    """
    if TOKENIZER_MODEL in files:
        return GeneratedTokenizer({})
    if TOKENIZER_JSON not in files:
        return _nothing(TOKENIZER_MODEL, f"there is no {TOKENIZER_JSON} to make it from")
    source = files[TOKENIZER_JSON]
    try:
        model, unexpressed = hf_to_tiktoken(spec, source), unexpressed_specials(spec, source)
    except InputError as error:
        return _nothing(TOKENIZER_MODEL, str(error))
    notices: tuple[str, ...] = ()
    if unexpressed:
        notices = (
            f"{TOKENIZER_MODEL} holds no special tokens, and Meta's loader names them by itself: "
            f"{first_few(unexpressed, 8, ' …')} of {TOKENIZER_JSON} "
            f"{'is' if len(unexpressed) == 1 else 'are'} unknown to it",
        )
    return GeneratedTokenizer({TOKENIZER_MODEL: model}, notices)


def _nothing(name: str, reason: str) -> GeneratedTokenizer:
    return GeneratedTokenizer({}, (f"no {name} was made: {reason}",))


def _tiktoken_notices(spec: TiktokenSpec, data: bytes, vocab_size: int | None) -> tuple[str, ...]:
    tokens = len(parse_ranks(data))
    notices = [
        f"{TOKENIZER_JSON}: {TOKENIZER_MODEL} holds no names of special tokens, nor a chat template; "
        f"{spec.names_from}'s names were taken, with {spec.eos} as the end (instruct models end a turn with "
        f"{spec.end_of_turn})"
    ]
    if tokens != spec.n_ranks:
        notices.append(
            f"{TOKENIZER_JSON}: {TOKENIZER_MODEL} has {tokens} tokens where {spec.title}'s has {spec.n_ranks}; "
            f"it was taken to split text by {spec.title}'s pattern"
        )
    return (*notices, *_padding_notice(tokens + spec.n_special_tokens, vocab_size))


def _sentencepiece_notices(data: bytes, vocab_size: int | None) -> tuple[str, ...]:
    model = parse_model(data)
    symbols = user_defined(model)
    notices = []
    if symbols and model.dummy_prefix:
        notices.append(
            f"{TOKENIZER_JSON}: has {len(symbols)} user-defined symbols ({', '.join(symbols[:4])}, …); around one of "
            f"them in a text, spaces come out as Hugging Face tokenizers do it, not as {TOKENIZER_MODEL} does"
        )
    return (*notices, *_padding_notice(len(model.pieces), vocab_size))


def _padding_notice(tokens: int, vocab_size: int | None) -> tuple[str, ...]:
    if vocab_size is None or vocab_size <= tokens:
        return ()
    return (f"{TOKENIZER_JSON}: has {tokens} tokens, the embedding {vocab_size} rows; the rows behind have no token",)
