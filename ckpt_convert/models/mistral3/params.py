"""Mistral 3: between Hugging Face's config.json and the params.json of Mistral's own files, with ``vision_encoder``.

The text is described as in the files of a dense Mistral.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import (
    CONFIG,
    PARAMS,
    ConfigOptions,
    Translated,
    check_not_quantized,
    check_silu,
    optional_bool,
    optional_int,
    optional_mapping,
    optional_number,
    optional_str,
    require_int,
    unused_keys,
)
from ckpt_convert.models.core.params import Weights, lost_positions, took_positions
from ckpt_convert.models.core.rope import read_rope
from ckpt_convert.models.mistral import params as mistral_params
from ckpt_convert.models.mistral3.config import TEXT, VISION, dims, text_part, vision_part

TARGET = "Mistral's params.json"
MERGE = "patch_merge"
"""What vision_encoder calls a projector that merges patches, which Pixtral's does not."""

POSITIONS = 131072
"""max_position_embeddings where params.json does not say it, as in all releases."""

VISION_THETA = 10000.0
"""RoPE's base in the vision tower where the file does not say it: mistral-inference's default, and transformers'."""

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size",
)  # fmt: skip
"""The sizes of the vision tower, which have the same names in both files."""

KNOWN = frozenset((
    *SIZES, "rope_theta", "image_token_id", "adapter_bias", "spatial_merge_size", "add_pre_mm_projector_layer_norm",
    "mm_projector_id", "image_break_token_id", "image_end_token_id",
    "max_image_size",  # of the image processor
))  # fmt: skip


def is_params(params: Mapping[str, Any]) -> str | None:
    """What in a params.json says that it is a Mistral 3's, in words, or None."""
    vision = params.get("vision_encoder")
    merges = isinstance(vision, Mapping) and vision.get("mm_projector_id") == MERGE
    ours = merges and mistral_params.is_params(_text(params)) is not None
    return f"{PARAMS} has a vision_encoder that merges patches" if ours else None


def hf_to_params(config: Mapping[str, Any], options: ConfigOptions | None = None) -> Translated:
    """The params.json of Mistral's own files for this config.json.

    Raises ConfigError for a config that mistral-inference cannot run, naming the field.
    """
    sizes, text = dims(config), dict(text_part(config))
    check_not_quantized(config, ("quantization_config",), CONFIG, TARGET)
    positions = optional_int(text, "max_position_embeddings", f"{CONFIG}: {TEXT}", POSITIONS)
    text |= {"tie_word_embeddings": bool(sizes["tied"]), "max_position_embeddings": None}
    dense = mistral_params.hf_to_params(text, options)
    lost = lost_positions(positions, POSITIONS)
    return Translated({**dense.content, "vision_encoder": _vision_encoder(config, sizes)}, (*dense.notices, *lost))


def params_to_hf(params: Mapping[str, Any], weights: Weights, options: ConfigOptions | None = None) -> Translated:
    """The config.json for a params.json of Mistral's own files; raises ConfigError for what transformers cannot run."""
    options = options or ConfigOptions()
    notices: tuple[str, ...] = ()
    if options.max_positions is None and not {"max_position_embeddings", "max_seq_len"} & params.keys():
        options, notices = replace(options, max_positions=POSITIONS), took_positions(POSITIONS, ", as in the releases")
    dense = mistral_params.params_to_hf(_text(params), weights, options)
    vision, where = optional_mapping(params, "vision_encoder", PARAMS), f"{PARAMS}: vision_encoder"
    _check_projector(vision, where)
    tied = dense.content["tie_word_embeddings"]
    text = {key: value for key, value in dense.content.items() if key not in ("architectures", "tie_word_embeddings")}
    theta = optional_number(vision, "rope_theta", where) or VISION_THETA
    config: dict[str, Any] = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": optional_int(vision, "image_token_id", where, 10),
        "model_type": "mistral3",
        "multimodal_projector_bias": optional_bool(vision, "adapter_bias", where, True),
        "projector_hidden_act": "gelu",
        "spatial_merge_size": optional_int(vision, "spatial_merge_size", where, 1),
        "text_config": text,
        "tie_word_embeddings": tied,
        "vision_config": {
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "model_type": "pixtral",
            **{name: require_int(vision, name, where) for name in SIZES},
            "rope_parameters": {"rope_theta": theta, "rope_type": "axial"},
            "rope_theta": theta,
        },
        "vision_feature_layer": -1,
    }
    config["vision_config"] = dict(sorted(config["vision_config"].items()))
    return Translated(config, (*dense.notices, *notices, *unused_keys(vision, KNOWN, where, CONFIG)))


def _text(params: Mapping[str, Any]) -> dict[str, Any]:
    """The params without the vision tower, as a dense Mistral's."""
    return {key: value for key, value in params.items() if key != "vision_encoder"}


def _vision_encoder(config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    vision, where = {"image_size": 1024, **vision_part(config)}, f"{CONFIG}: {VISION}"
    check_silu(vision, "hidden_act", where, TARGET)
    if config.get("vision_feature_layer", -1) != -1:
        found = config["vision_feature_layer"]
        raise ConfigError(f"{CONFIG}: vision_feature_layer must be -1 for {TARGET}, found {found!r:.80}")
    if (act := optional_str(config, "projector_hidden_act", CONFIG, "gelu")) != "gelu":
        raise ConfigError(f'{CONFIG}: projector_hidden_act must be "gelu" for {TARGET}, found {act!r}')
    theta = read_rope(vision).theta
    content: dict[str, Any] = {name: require_int(vision, name, where) for name in SIZES}
    return content | {
        "rope_theta": VISION_THETA if theta is None else theta,
        "image_token_id": optional_int(config, "image_token_index", CONFIG, 10),
        "image_break_token_id": 12,  # as in all releases; no config.json says these two
        "image_end_token_id": 13,
        "adapter_bias": bool(sizes["projector_bias"]),
        "mm_projector_id": MERGE,
        "spatial_merge_size": optional_int(config, "spatial_merge_size", CONFIG, 2),
        "add_pre_mm_projector_layer_norm": True,
        "max_image_size": content["image_size"],
    }


def _check_projector(vision: Mapping[str, Any], where: str) -> None:
    if (found := optional_str(vision, "mm_projector_id", where, "")) != MERGE:
        raise ConfigError(f"{where}: mm_projector_id must be {MERGE!r} for Mistral3Config, found {found!r}")
    if not optional_bool(vision, "add_pre_mm_projector_layer_norm", where, False):
        raise ConfigError(
            f"{where}: add_pre_mm_projector_layer_norm must be true for Mistral3Config, whose projector has a norm"
        )
