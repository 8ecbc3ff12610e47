"""Llama 3's tokenizer, the default for a tokenizer.model of tiktoken ranks."""

from __future__ import annotations

from ckpt_convert.tokenizer.spec import TiktokenSpec

_NAMES_3 = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
_NAMES_31 = {**_NAMES_3, 4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
_NAMES_OF_CODE = {**_NAMES_31, 5: "<|step_id|>", 11: "<|image|>"}

LLAMA_3 = TiktokenSpec(
    title="Llama 3",
    n_ranks=128_000,
    pattern=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    n_special_tokens=256,
    special_names=_NAMES_31,
    names_from="Llama 3.1",
    bos=_NAMES_31[0],
    eos=_NAMES_31[1],
    end_of_turn=_NAMES_31[9],
    alternative_names=(_NAMES_3, _NAMES_OF_CODE),
    other_tokenizers={200_000: "Llama 4"},
)
"""Pattern and number of special tokens are those of ``llama_models/llama3/tokenizer.py``, the number of Llama 4's ranks
that of ``llama4/tokenizer.py``, which has 2,048 special tokens behind them. tokenizer.model does not hold the names.
Those of Llama 3.1 on the Hub are taken: Llama 3 and ``llama_models`` call a few ids differently, but no id moves."""
