"""What generated Hugging Face tokenizer files have in common.

The JSON is written without the `tokenizers` package, whose output differs between versions, so that the same conversion
gives the same bytes. Merges are "left right" strings, which every version reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ckpt_convert.errors import ConfigError, CorruptFileError

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_MODEL = "tokenizer.model"

# What transformers writes if no limit is known: the limit depends on the model, not on the tokenizer.
_NO_LIMIT = int(1e30)

Json = dict[str, Any]


def corrupt_model(what: str) -> CorruptFileError:
    """The error for a malformed tokenizer.model of any kind."""
    return CorruptFileError(f"{TOKENIZER_MODEL}: {what}; copy or download it again")


def check_fits(tokens: int, vocab_size: int | None) -> None:
    """Raise ConfigError if there are more tokens than embedding rows; the embedding may have padding rows."""
    if vocab_size is not None and vocab_size < tokens:
        raise ConfigError(
            f"{TOKENIZER_MODEL}: expected at most {vocab_size} tokens, one for each row of the embedding, found "
            f"{tokens} (special tokens included); it belongs to another model, put the model's own beside it"
        )


def merge_lines(merges: Iterable[tuple[str, str]]) -> list[str]:
    """Merges as strings, as in tokenizer.json."""
    return [f"{left} {right}" for left, right in merges]


def added_tokens(ids: Mapping[str, int], *, special: Iterable[str], plain: Iterable[str] = ()) -> list[Json]:
    """The ``added_tokens`` section, sorted by id: tokens that are matched in text before it is split.

    Decoding can skip the special ones; the plain ones are text.
    """
    is_special = dict.fromkeys(plain, False) | dict.fromkeys(special, True)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": ids[content], "content": content, **flags, "special": is_special[content]}
        for content in sorted(is_special, key=ids.__getitem__)
    ]


def prepend_post_processor(token: str, index: int) -> Json:
    """The post-processor that prepends one special token to each sequence."""

    def special(type_id: int) -> Json:
        return {"SpecialToken": {"id": token, "type_id": type_id}}

    def sequence(name: str, type_id: int) -> Json:
        return {"Sequence": {"id": name, "type_id": type_id}}

    return {
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def tokenizer_files(pipeline: Json, named: Mapping[str, str], **settings: object) -> dict[str, bytes]:
    """Render tokenizer.json from its sections and tokenizer_config.json from the special tokens' roles.

    The class is PreTrainedTokenizerFast, which uses tokenizer.json unchanged: transformers 5 rebuilds `LlamaTokenizer`,
    which then loses one of two leading spaces.
    """
    document = {"version": "1.0", "truncation": None, "padding": None, **pipeline}
    config = {
        **named,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": _NO_LIMIT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **settings,
    }
    return {
        TOKENIZER_JSON: (json.dumps(document, ensure_ascii=False) + "\n").encode(),
        TOKENIZER_CONFIG: (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode(),
    }
