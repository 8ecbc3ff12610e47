"""Mistral 3: the sizes in Hugging Face's config.json, of its text, its vision tower and the projector between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import CONFIG, base_dims, optional_bool, optional_int, optional_mapping

TEXT, VISION = "text_config", "vision_config"

TEXT_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e9,
    "sliding_window": None,
}
"""The text of transformers' Mistral3Config where the file has no text_config at all."""

VISION_DEFAULTS: Mapping[str, Any] = {"image_size": 1540, "patch_size": 14}
"""What its vision tower has besides PixtralVisionConfig's defaults where the file has no vision_config."""

CLASS_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "patch_size": 16,
}
"""transformers' PixtralVisionConfig."""


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text, with the classes' defaults."""
    if config.get(TEXT) is None:
        return TEXT_DEFAULTS
    return {"num_key_value_heads": 8, **optional_mapping(config, TEXT, CONFIG)}


def vision_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the vision tower, with the classes' defaults."""
    if config.get(VISION) is None:
        return {**CLASS_VISION, **VISION_DEFAULTS}
    given = optional_mapping(config, VISION, CONFIG)
    return {**CLASS_VISION, **{name: value for name, value in given.items() if value is not None}}


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The symbols of text, vision tower and projector.

    v_taken: the width of what the projector takes, of one layer of the vision tower or of several side by side.
    v_merged: that of spatial_merge_size² patches. Tied only where the file says so: the releases do not say it and have
    an output of their own, although the default of transformers' class is true.
    """
    text, vision, where = text_part(config), vision_part(config), f"{CONFIG}: {VISION}"
    tied = any(optional_bool(part, "tie_word_embeddings", CONFIG, False) for part in (config, text))
    dim, merge = optional_int(vision, "hidden_size", where, 1024), optional_int(config, "spatial_merge_size", CONFIG, 2)
    heads = optional_int(vision, "num_attention_heads", where, 16)
    if dim % heads:
        raise ConfigError(f"{where}: hidden_size must be a multiple of num_attention_heads, found {dim} and {heads}")
    return {
        **base_dims(text, where=f"{CONFIG}: {TEXT}"),
        "tied": int(tied),
        "v_dim": dim,
        "v_heads": heads,
        "v_head_dim": dim // heads,
        "v_ffn_dim": optional_int(vision, "intermediate_size", where, 4096),
        "v_layers": optional_int(vision, "num_hidden_layers", where, 24),
        "v_channels": optional_int(vision, "num_channels", where, 3),
        "v_patch": optional_int(vision, "patch_size", where, 16),
        "v_taken": dim * n_taken(config),
        "v_merged": dim * merge * merge,
        "projector_bias": int(optional_bool(config, "multimodal_projector_bias", CONFIG, False)),
    }


def n_taken(config: Mapping[str, Any]) -> int:
    """How many layers of the vision tower the projector is given."""
    layers = config.get("vision_feature_layer")
    return len(layers) if isinstance(layers, list) and layers else 1
