"""Config settings and keys that most transformers models share, for models without a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SIZES = {
    "n_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "dim": ("hidden_size", "n_embd", "d_model"),
    "n_heads": ("num_attention_heads", "n_head", "num_heads"),
    "n_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "ffn_dim": ("intermediate_size", "n_inner", "d_ff"),
    "n_experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"),
    "vocab_size": ("vocab_size",),
}
"""The config.json settings of each size, by its name in our tables; the first one that is present counts."""

EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight", "wte.weight", "word_embeddings.weight")
"""Suffixes of the key of an input embedding."""

QUANTIZATION_CONFIGS = ("quantization_config", "compression_config")
"""The config.json settings that hold a quantization config."""

CODE_DTYPES = frozenset(("F8_E4M3", "F8_E5M2", "I32", "I8", "U8"))
"""The dtypes that the codes of quantized tensors have."""

_TEXT = ("text_config", "llm_config", "language_config", "decoder")


def size_of(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these settings that is a positive integer."""
    for name in names:
        value = config.get(name)
        if type(value) is int and 0 < value < 1 << 53:
            return value
    return None


def setting_name(config: Mapping[str, Any], symbol: str) -> str:
    """The setting in which the config has a size; the most common name where it has none."""
    return next((name for name in SIZES[symbol] if size_of(config, name) is not None), SIZES[symbol][0])


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the language model: its sub-config in a multimodal config without layers at the top level."""
    if size_of(config, *SIZES["n_layers"]) is None:
        for name in _TEXT:
            inner = config.get(name)
            if isinstance(inner, Mapping):
                return inner
    return config


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization config in config.json, {} where there is none."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name in QUANTIZATION_CONFIGS:
            found = part.get(name)
            if isinstance(found, Mapping) and found:
                return found
    return {}
