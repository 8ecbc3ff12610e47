"""Llama 4: the sizes and layers in Hugging Face's config.json; ``llama4.params`` translates it.

The config.json of the text model alone ("llama4_text") equals text_config of the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import (
    CONFIG,
    PARAMS,
    base_dims,
    optional_bool,
    optional_count,
    optional_mapping,
    require_int,
)

TEXT = f"{CONFIG}: text_config"
VISION = f"{CONFIG}: vision_config"
VISION_ARGS = f"{PARAMS}: vision_args"
MOE_ARGS = f"{PARAMS}: moe_args"
TARGET = "a Llama 4 params.json"

MOST_LAYERS = 10_000
"""A limit on the number of layers from an untrusted file, before lists of that length are made."""

_TEXT_DEFAULTS = {
    "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
    "num_experts_per_tok": 1, "num_local_experts": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "attention_chunk_size": 8192, "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1,
    "use_qk_norm": True, "interleave_moe_layer_step": 1, "no_rope_layer_interval": 4,
}  # fmt: skip
"""Defaults of transformers' Llama4TextConfig."""

_VISION_DEFAULTS = {
    "hidden_size": 768, "num_hidden_layers": 34, "num_attention_heads": 16, "num_channels": 3,
    "intermediate_size": 5632, "vision_output_dim": 7680, "image_size": 448, "patch_size": 14,
    "pixel_shuffle_ratio": 0.5, "projector_input_dim": 4096, "projector_output_dim": 4096,
}  # fmt: skip
"""Defaults of transformers' Llama4VisionConfig."""


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of both models; raises ConfigError for missing or invalid values."""
    text, where = text_part(config)
    if optional_bool(text, "tie_word_embeddings", where, False):
        raise ConfigError(f"{where}: tie_word_embeddings must be false for Llama 4, found true; correct {CONFIG}")
    sizes = {
        **base_dims(text, where=where),
        "dense_dim": require_int(text, "intermediate_size_mlp", where),
        "n_experts": optional_count(text, "num_local_experts", where, 16),
        "attention_bias": int(optional_bool(text, "attention_bias", where, False)),
    }
    if config.get("model_type") == "llama4_text":
        return sizes
    vision = vision_part(config)
    patch, image = require_int(vision, "patch_size", VISION), require_int(vision, "image_size", VISION)
    adapter = require_int(vision, "projector_output_dim", VISION)
    require_adapter_dim(vision, "projector_input_dim", CONFIG)
    return {
        **sizes,
        "patch": patch,
        "n_tokens": (image // patch) ** 2 + 1,
        "channels": require_int(vision, "num_channels", VISION),
        "vision_dim": require_int(vision, "hidden_size", VISION),
        "vision_ffn": require_int(vision, "intermediate_size", VISION),
        "vision_layers": require_int(vision, "num_hidden_layers", VISION),
        "adapter_dim": adapter,
        # With transformers' defaults, the projector is wider than the adapter's output; it is a text-only model then.
        "projected_dim": require_int(vision, "vision_output_dim", VISION),
    }


def require_adapter_dim(vision: Mapping[str, Any], key: str, where: str) -> int:
    """A size that must equal the vision adapter's output; raises ConfigError otherwise."""
    adapter, size = (require_int(vision, name, VISION) for name in ("projector_output_dim", key))
    if size != adapter:
        raise ConfigError(f"{VISION}: {key} must be projector_output_dim ({adapter}), found {size}; correct {where}")
    return size


def sets(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The layer sets with and without experts."""
    text, where = text_part(config)
    layers = number_of_layers(text, "num_hidden_layers", where)
    moe = moe_layers(text, where, layers)
    return {"moe": moe, "dense": [layer for layer in range(layers) if layer not in moe]}


def number_of_layers(content: Mapping[str, Any], key: str, where: str) -> int:
    """The number of layers; raises ConfigError if it exceeds the limit."""
    layers = require_int(content, key, where)
    if layers > MOST_LAYERS:
        raise ConfigError(
            f"{where}: {key} must be a whole number from 1 to {MOST_LAYERS}, found {layers}; correct {where}"
        )
    return layers


def moe_layers(text: Mapping[str, Any], where: str, layers: int) -> list[int]:
    """The layers with experts, ascending: from the list, else from the interval; raises ConfigError."""
    said = text.get("moe_layers")
    if said is None:
        step = require_int(text, "interleave_moe_layer_step", where)
        return list(range(step - 1, layers, step))
    sound = isinstance(said, list) and all(type(layer) is int and 0 <= layer < layers for layer in said)
    if not sound or len(set(said)) < len(said):
        raise ConfigError(
            f"{where}: moe_layers must be numbers of layers from 0 to {layers - 1}, each once, found "
            f"{str(said)[:80]}; correct {CONFIG}"
        )
    return sorted(said)


def text_part(config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The text model's config, with transformers' defaults, and its name in messages."""
    if config.get("model_type") == "llama4_text":
        return {**_TEXT_DEFAULTS, **config}, CONFIG
    return {**_TEXT_DEFAULTS, **optional_mapping(config, "text_config", CONFIG)}, TEXT


def vision_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The vision model's config, with transformers' defaults."""
    return {**_VISION_DEFAULTS, **optional_mapping(config, "vision_config", CONFIG)}
