"""Translates a tokenizer.model of tiktoken ranks to tokenizer.json and back.

``TiktokenSpec`` has what the file lacks: the pattern that splits text, and the special tokens after the ranks. tiktoken
keeps a pre-token that is in the vocabulary whole, and otherwise merges the adjacent pair whose union has the lowest
rank. A byte-level BPE does the same if its merges are all splits of every token into two tokens, in the order of the
ranks, and `ignore_merges` is set.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.tokenizer.hugging_face import (
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    Json,
    added_tokens,
    check_fits,
    corrupt_model,
    merge_lines,
    prepend_post_processor,
    tokenizer_files,
)
from ckpt_convert.tokenizer.spec import TiktokenSpec
from ckpt_convert.wording import MORE, first_few

# Finding the splits of a token takes quadratic time; the longest known token has 128 bytes.
_LONGEST_TOKEN = 4096


def byte_alphabet() -> tuple[str, ...]:
    """The character for each byte in a byte-level BPE: itself if printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return tuple(table[byte] for byte in range(256))


def split_merges(ranks: Mapping[str, int]) -> list[tuple[str, str]]:
    """All splits of every token into two tokens, by the rank of the token, then of its parts."""
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        splits = [(ranks[left], ranks[right], left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += [(left, right) for _, _, left, right in sorted(splits)]
    return merges


def _pre_tokenizer(spec: TiktokenSpec) -> Json:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": spec.pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }


# -- tokenizer.model to tokenizer.json


def parse_ranks(data: bytes) -> list[bytes]:
    """The tokens of a tiktoken file, in the order of their ranks.

    Raises CorruptFileError for a line that is not `base64 rank`, a duplicate token, missing ranks, or a byte without a
    token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        token, rank = _parse_line(number, line)
        if token in ranks:
            raise corrupt_model(f"line {number}: expected each token once, found {token!r} a second time")
        ranks[token] = rank
    by_rank = sorted(ranks, key=ranks.__getitem__)
    for expected, token in enumerate(by_rank):
        if ranks[token] != expected:
            raise corrupt_model(
                f"expected the ranks 0 to {len(ranks) - 1}, each once, found {ranks[token]} for {expected}"
            )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise corrupt_model(f"expected a token for each of the 256 bytes, found none for {_some(missing)}")
    return by_rank


def _parse_line(number: int, line: bytes) -> tuple[bytes, int]:
    fields = line.split()
    try:
        if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) > 9:
            raise ValueError
        token = base64.b64decode(fields[0], validate=True)
    except (ValueError, binascii.Error):
        raise corrupt_model(f"line {number}: expected `base64 rank`, found {line[:80]!r}") from None
    if not 0 < len(token) <= _LONGEST_TOKEN:
        raise corrupt_model(f"line {number}: expected a token of 1 to {_LONGEST_TOKEN} bytes, found {len(token)}")
    return token, int(fields[1])


def tiktoken_to_hf(spec: TiktokenSpec, data: bytes, *, vocab_size: int | None = None) -> dict[str, bytes]:
    """Make tokenizer.json and tokenizer_config.json from a tokenizer.model of tiktoken ranks.

    The special tokens follow the tokens of the file. ``vocab_size`` (the embedding's rows) may be larger than both
    together; the rest is padding. Raises CorruptFileError for a malformed file, ConfigError if the embedding has fewer
    rows, or if the number of tokens is that of another tokenizer.
    """
    tokens = parse_ranks(data)
    if (other := spec.other_tokenizers.get(len(tokens))) is not None:
        raise ConfigError(
            f"{TOKENIZER_MODEL}: expected {spec.title}'s tokens, found {len(tokens)}, which are {other}'s: it splits "
            "text by another pattern and has other special tokens; "
            f"take {TOKENIZER_JSON} from the model's Hugging Face release"
        )
    check_fits(len(tokens) + spec.n_special_tokens, vocab_size)
    alphabet = byte_alphabet()
    vocab = {"".join([alphabet[byte] for byte in token]): rank for rank, token in enumerate(tokens)}
    specials = {name: len(tokens) + index for index, name in enumerate(spec.special_token_names(spec.special_names))}
    begin, end = spec.bos, spec.eos
    pipeline: Json = {
        "added_tokens": added_tokens(specials, special=specials),
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(spec),
        "post_processor": prepend_post_processor(begin, specials[begin]),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": merge_lines(split_merges(vocab)),
        },
    }
    return tokenizer_files(pipeline, {"bos_token": begin, "eos_token": end})


# -- tokenizer.json to tokenizer.model


def hf_to_tiktoken(spec: TiktokenSpec, tokenizer_json: bytes) -> bytes:
    """Make tokenizer.model from tokenizer.json, byte for byte as Meta wrote it.

    Raises ConfigError, with every reason, unless the file is a byte-level BPE that tokenizes as tiktoken does with the
    spec's pattern; also for malformed JSON, missing ids, and tokens outside the byte alphabet.
    """
    document = _load(tokenizer_json)
    vocab = _base_vocab(document)
    problems = [*_pipeline_problems(spec, document), *_vocab_problems(vocab), *_merge_problems(document, vocab)]
    if problems:
        raise ConfigError(
            f"{TOKENIZER_JSON}: expected a tokenizer that {spec.title}'s {TOKENIZER_MODEL} can express, found: "
            + "; ".join(problems)
            + f". Put the model's own {TOKENIZER_MODEL} beside it, or convert without a tokenizer"
        )
    byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
    tokens = (bytes([byte_of[char] for char in token]) for token in sorted(vocab, key=vocab.__getitem__))
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def unexpressed_specials(spec: TiktokenSpec, tokenizer_json: bytes) -> list[str]:
    """The added tokens that Meta's loader will not know: it names its own, and tokenizer.model holds none.

    Raises ConfigError for malformed JSON.
    """
    document = _load(tokenizer_json)
    base = len(_base_vocab(document))
    lists = [spec.special_token_names(names) for names in (spec.special_names, *spec.alternative_names)]
    known = [{names[index] for names in lists} for index in range(spec.n_special_tokens)]
    return [
        f"{name} ({index})"
        for name, index in sorted(_added_tokens(document).items(), key=lambda item: item[1])
        if not base <= index < base + spec.n_special_tokens or name not in known[index - base]
    ]


def _load(tokenizer_json: bytes) -> Json:
    try:
        document = json.loads(tokenizer_json)
    except (ValueError, RecursionError) as error:
        raise _malformed("a JSON object", str(error)) from None
    if not isinstance(document, dict):
        raise _malformed("a JSON object", type(document).__name__)
    return document


def _malformed(expected: str, found: str) -> ConfigError:
    return ConfigError(f"{TOKENIZER_JSON}: expected {expected}, found {found}; copy or download it again")


def _added_tokens(document: Json) -> dict[str, int]:
    entries = document.get("added_tokens") or []
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int
        for entry in entries
    ):
        raise _malformed("`added_tokens` with an `id` and a `content` each", _short(entries))
    return {entry["content"]: entry["id"] for entry in entries}


def _model(document: Json) -> Json:
    model = document.get("model")
    if not isinstance(model, dict):
        raise _malformed("an object `model`", _short(model))
    return model


def _base_vocab(document: Json) -> dict[str, int]:
    """The model's own vocabulary; some files repeat the added tokens in it."""
    vocab = _model(document).get("vocab")
    if not isinstance(vocab, dict) or not all(type(index) is int for index in vocab.values()):
        raise _malformed("an object `model.vocab` of ids", _short(vocab))
    added = _added_tokens(document)
    return {token: index for token, index in vocab.items() if added.get(token) != index}


def _pipeline_problems(spec: TiktokenSpec, document: Json) -> Iterator[str]:
    model = _model(document)
    if model.get("type") != "BPE":
        yield f"a model of type {_short(model.get('type'))} instead of BPE"
    if model.get("ignore_merges") is not True:
        yield "no `ignore_merges`, so a word that is a token could still come apart"
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            yield f"`{key}` {_short(model[key])}, which tiktoken has not"
    if document.get("normalizer") is not None:
        yield f"a normalizer {_short(document['normalizer'])}, which tiktoken has not"
    if _without_offsets(document.get("pre_tokenizer")) != _without_offsets(_pre_tokenizer(spec)):
        yield f"a pre-tokenizer other than {spec.title}'s pattern and bytes: {_short(document.get('pre_tokenizer'))}"


def _without_offsets(value: object) -> object:
    """Drop `trim_offsets`, which changes reported offsets, never ids."""
    if isinstance(value, dict):
        return {key: _without_offsets(item) for key, item in value.items() if key != "trim_offsets"}
    if isinstance(value, list):
        return [_without_offsets(item) for item in value]
    return value


def _vocab_problems(vocab: Mapping[str, int]) -> Iterator[str]:
    ids = set(vocab.values())
    if len(ids) != len(vocab):
        yield f"{len(vocab) - len(ids)} ids of more than one token"
    outside = sorted(ids - set(range(len(vocab))))
    if outside:
        holes = sorted(set(range(len(vocab))) - ids)
        yield f"holes in the ids of the {len(vocab)} base tokens: {_some(holes)} missing, {_some(outside)} beyond"
    alphabet = set(byte_alphabet())
    foreign = [token for token in vocab if not token or not alphabet.issuperset(token)]
    if foreign:
        yield f"tokens with characters outside the byte alphabet: {_some(foreign)}"
    lacking = sorted(char for char in alphabet if char not in vocab)
    if lacking:
        yield f"no token for the bytes spelled {_some(lacking)}"
    longest = max(map(len, vocab), default=0)
    if longest > _LONGEST_TOKEN:
        yield f"a token of {longest} bytes, more than {_LONGEST_TOKEN}"


def _merge_problems(document: Json, vocab: Mapping[str, int]) -> Iterator[str]:
    merges = _merges(document)
    if any(len(token) > _LONGEST_TOKEN for token in vocab):
        return  # reported above, and too long to split
    expected = set(split_merges(vocab))
    extra, lacking = set(merges) - expected, expected - set(merges)
    if extra or lacking:
        yield (
            f"merges that do not follow from the ids: {len(lacking)} of {len(expected)} splits are not merges "
            f"({_some(sorted(lacking))}), {len(extra)} merges are no splits ({_some(sorted(extra))})"
        )
        return
    ranks = [vocab[left + right] for left, right in merges]
    if len(merges) != len(expected) or ranks != sorted(ranks):
        yield "merges that are repeated, or not in the order of the ids"


def _merges(document: Json) -> list[tuple[str, str]]:
    merges = _model(document).get("merges")
    if not isinstance(merges, list):
        raise _malformed("a list `model.merges`", _short(merges))
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise _malformed("pairs in `model.merges`", _short(merge))
        pairs.append((parts[0], parts[1]))
    return pairs


def _some(items: list[Any]) -> str:
    return first_few(map(repr, items), 4, MORE) or "none"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 200 else text[:200] + "…"
