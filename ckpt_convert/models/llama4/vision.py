"""Llama 4: its vision model in params.json (``vision_args``), from and to config.json's ``vision_config``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import CONFIG, optional_mapping, require_int, require_number
from ckpt_convert.models.llama4.config import TARGET, VISION, VISION_ARGS, require_adapter_dim, vision_part


def vision_args(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = vision_part(config)
    width, ffn = require_int(vision, "hidden_size", VISION), require_int(vision, "intermediate_size", VISION)
    ratio = require_number(vision, "pixel_shuffle_ratio", VISION)
    if require_int(vision, "num_channels", VISION) != 3:
        raise ConfigError(f"{VISION}: num_channels must be 3 for {TARGET}, found {vision['num_channels']}")
    if int(width // ratio**2) != ffn:
        raise ConfigError(
            f"{VISION}: intermediate_size must be hidden_size / pixel_shuffle_ratio² ({int(width // ratio**2)}) for "
            f"{TARGET}, found {ffn}; the adapter behind the vision model takes that many"
        )
    image, patch = require_int(vision, "image_size", VISION), require_int(vision, "patch_size", VISION)
    mlp_ratio = ffn / width
    return {
        "image_size": {"height": image, "width": image},
        "patch_size": {"height": patch, "width": patch},
        "dim": width,
        "n_layers": require_int(vision, "num_hidden_layers", VISION),
        "n_heads": require_int(vision, "num_attention_heads", VISION),
        "mlp_ratio": mlp_ratio,
        "output_dim": require_adapter_dim(vision, "vision_output_dim", CONFIG),
        "pixel_shuffle_ratio": ratio,
    }


def vision_config(args: Mapping[str, Any]) -> dict[str, Any]:
    width = require_int(args, "dim", VISION_ARGS)
    output = require_int(args, "output_dim", VISION_ARGS)
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    return {
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": width,
        "image_size": _side(args, "image_size"),
        "initializer_range": 0.02,
        "intermediate_size": int(require_number(args, "mlp_ratio", VISION_ARGS) * width),
        "model_type": "llama4_vision_model",
        "multi_modal_projector_bias": False,
        "norm_eps": 1e-5,
        "num_attention_heads": require_int(args, "n_heads", VISION_ARGS),
        "num_channels": 3,
        "num_hidden_layers": require_int(args, "n_layers", VISION_ARGS),
        "patch_size": _side(args, "patch_size"),
        "pixel_shuffle_ratio": require_number(args, "pixel_shuffle_ratio", VISION_ARGS),
        "projector_dropout": 0.0,
        "projector_input_dim": output,
        "projector_output_dim": output,
        "rope_parameters": rope,
        "rope_theta": 10000,
        "vision_feature_select_strategy": "default",
        "vision_output_dim": output,
    }


def _side(args: Mapping[str, Any], key: str) -> int:
    """The side of a square given as height and width."""
    size = optional_mapping(args, key, VISION_ARGS)
    height, width = (require_int(size, side, f"{VISION_ARGS}: {key}") for side in ("height", "width"))
    if height != width:
        raise ConfigError(f"{VISION_ARGS}: {key} must be a square, found {height} by {width}; config.json has one side")
    return height
