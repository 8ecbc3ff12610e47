"""Llama 4: the sizes and layers in Hugging Face's config.json; ``llama4.params`` translates it.

A config.json of the text model alone ("llama4_text") is what the whole model's has as text_config.
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
"""What nobody has more of: the number is believed before a list of that length is made."""

_TEXT_DEFAULTS = {
    "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
    "num_experts_per_tok": 1, "num_local_experts": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "attention_chunk_size": 8192, "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1,
    "use_qk_norm": True, "interleave_moe_layer_step": 1, "no_rope_layer_interval": 4,
}  # fmt: skip
"""What transformers' Llama4TextConfig takes for keys that are absent."""

_VISION_DEFAULTS = {
    "hidden_size": 768, "num_hidden_layers": 34, "num_attention_heads": 16, "num_channels": 3,
    "intermediate_size": 5632, "vision_output_dim": 7680, "image_size": 448, "patch_size": 14,
    "pixel_shuffle_ratio": 0.5, "projector_input_dim": 4096, "projector_output_dim": 4096,
}  # fmt: skip
"""What transformers' Llama4VisionConfig takes for keys that are absent."""


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of both models under the table's symbols; raises ConfigError for what is missing or unusable."""
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
        # transformers' defaults give the projector more than the adapter hands it: a model of texts all the same
        "projected_dim": require_int(vision, "vision_output_dim", VISION),
    }


def require_adapter_dim(vision: Mapping[str, Any], key: str, where: str) -> int:
    """A size that has to be that of what the vision adapter makes; raises ConfigError for another one."""
    adapter, size = (require_int(vision, name, VISION) for name in ("projector_output_dim", key))
    if size != adapter:
        raise ConfigError(f"{VISION}: {key} must be projector_output_dim ({adapter}), found {size}; correct {where}")
    return size


def sets(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The numbers of the layers with experts, and of those without."""
    text, where = text_part(config)
    layers = number_of_layers(text, "num_hidden_layers", where)
    moe = moe_layers(text, where, layers)
    return {"moe": moe, "dense": [layer for layer in range(layers) if layer not in moe]}


def number_of_layers(content: Mapping[str, Any], key: str, where: str) -> int:
    """How many layers there are; raises ConfigError for more than anybody has."""
    layers = require_int(content, key, where)
    if layers > MOST_LAYERS:
        raise ConfigError(
            f"{where}: {key} must be a whole number from 1 to {MOST_LAYERS}, found {layers}; correct {where}"
        )
    return layers


def moe_layers(text: Mapping[str, Any], where: str, layers: int) -> list[int]:
    """The numbers of the layers with experts, ascending: as listed, else every so many; raises ConfigError."""
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
    """The text model's part, with transformers' defaults, and what messages call it."""
    if config.get("model_type") == "llama4_text":
        return {**_TEXT_DEFAULTS, **config}, CONFIG
    return {**_TEXT_DEFAULTS, **optional_mapping(config, "text_config", CONFIG)}, TEXT


def vision_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The vision model's part, with transformers' defaults."""
    return {**_VISION_DEFAULTS, **optional_mapping(config, "vision_config", CONFIG)}
