"""Qwen3.5: the sizes and layers in Hugging Face's config.json; defaults are those of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import (
    CONFIG,
    base_dims,
    optional_bool,
    optional_count,
    optional_int,
    optional_mapping,
)

TEXT = f"{CONFIG}: text_config"
VISION = f"{CONFIG}: vision_config"

FULL, LINEAR = "full_attention", "linear_attention"


def text_dims(config: Mapping[str, Any], where: str = CONFIG) -> dict[str, int]:
    """The config dimensions of the text model; defaults are those of transformers."""
    return {
        **base_dims({"head_dim": 256, **config}, kv_heads_default=4, where=where),
        **delta_dims(config, where),
    }


def text_dims_moe(config: Mapping[str, Any], where: str = CONFIG) -> dict[str, int]:
    """The config dimensions of the text model with experts in every layer."""
    width = optional_int(config, "moe_intermediate_size", where, 512)
    return {
        **base_dims({"head_dim": 256, **config, "intermediate_size": width}, kv_heads_default=2, where=where),
        **delta_dims(config, where),
        "n_experts": optional_int(config, "num_experts", where, 256),
        "expert_dim": width,
        "shared_dim": optional_int(config, "shared_expert_intermediate_size", where, 512),
    }


def delta_dims(config: Mapping[str, Any], where: str) -> dict[str, int]:
    """The config dimensions of linear attention, and others that all text models share."""
    return {
        "attention_bias": int(optional_bool(config, "attention_bias", where, False)),
        "n_mtp": optional_count(config, "mtp_num_hidden_layers", where, 1),
        "n_delta_k": optional_int(config, "linear_num_key_heads", where, 16),
        "n_delta_v": optional_int(config, "linear_num_value_heads", where, 32),
        "delta_k_dim": optional_int(config, "linear_key_head_dim", where, 128),
        "delta_v_dim": optional_int(config, "linear_value_head_dim", where, 128),
        "delta_kernel": optional_int(config, "linear_conv_kernel_dim", where, 4),
    }


def vision_dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of the vision encoder, from the whole config."""
    part = optional_mapping(config, "vision_config", CONFIG)
    dim = optional_int(part, "hidden_size", VISION, 1152)
    merge = optional_int(part, "spatial_merge_size", VISION, 2)
    return {
        "n_blocks": optional_count(part, "depth", VISION, 27),
        "v_dim": dim,
        "v_ffn_dim": optional_int(part, "intermediate_size", VISION, 4304),
        "v_channels": optional_int(part, "in_channels", VISION, 3),
        "v_frames": optional_int(part, "temporal_patch_size", VISION, 2),
        "v_patch": optional_int(part, "patch_size", VISION, 16),
        "v_positions": optional_int(part, "num_position_embeddings", VISION, 2304),
        "v_merged": dim * merge * merge,
        "v_out": optional_int(part, "out_hidden_size", VISION, 3584),
    }


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of text and vision; tie_word_embeddings is at the top level."""
    return {**text_dims(_text(config), TEXT), **vision_dims(config), "tied": _tied(config)}


def dims_moe(config: Mapping[str, Any]) -> dict[str, int]:
    """As ``dims``, with experts."""
    return {**text_dims_moe(_text(config), TEXT), **vision_dims(config), "tied": _tied(config)}


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return optional_mapping(config, "text_config", CONFIG)


def _tied(config: Mapping[str, Any]) -> int:
    return int(optional_bool(config, "tie_word_embeddings", CONFIG, False))


def text_sets(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The layer sets with full and with linear attention, from layer_types or full_attention_interval."""
    layers = range(base_dims({"head_dim": 256, "intermediate_size": 1, **config})["n_layers"])
    every = optional_int(config, "full_attention_interval", CONFIG, 4)
    types = config.get("layer_types")
    if types is None:
        types = [LINEAR if (at + 1) % every else FULL for at in layers]
    if not isinstance(types, list) or len(types) != len(layers) or not set(types) <= {FULL, LINEAR}:
        raise ConfigError(
            f"{CONFIG}: layer_types must name {FULL} or {LINEAR} for each of {len(layers)} layers, found "
            f"{types!r:.80}; correct {CONFIG}"
        )
    return {
        "full": [at for at in layers if types[at] == FULL],
        "linear": [at for at in layers if types[at] == LINEAR],
    }


def sets(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """As ``text_sets``, for text_config."""
    return text_sets(_text(config))
