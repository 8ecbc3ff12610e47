"""CLIP's text encoder, alone or in a whole CLIP model.

hf: CLIPModel and CLIPTextModel of transformers 5.23; native: CLIPTextEncoder of torchtune 0.6.1, with the keys of its
converter. Native has only the text encoder: the vision tower, the projections, logit_scale and the position_ids of
older releases are passed through. There is no RoPE: positions are an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.builders import layer_norm, linear
from ckpt_convert.models.core.config import CONFIG, optional_int, optional_mapping
from ckpt_convert.models.core.table import Family, Key, Row


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes in a CLIP config.json, or in that of its text model alone (then there is no vision tower).

    Defaults are those of transformers' CLIPTextConfig, CLIPVisionConfig and CLIPConfig. A ``text_config_dict``, which
    old releases have beside text_config, wins over it, as in transformers.
    """
    text, where = config, CONFIG
    if config.get("model_type") == "clip":
        text, where = _part(config, "text_config")
    sizes = {
        "vocab_size": optional_int(text, "vocab_size", where, 49408),
        "n_positions": optional_int(text, "max_position_embeddings", where, 77),
        "dim": optional_int(text, "hidden_size", where, 512),
        "n_layers": optional_int(text, "num_hidden_layers", where, 12),
        "n_heads": optional_int(text, "num_attention_heads", where, 8),
        "ffn_dim": optional_int(text, "intermediate_size", where, 2048),
        "projection_dim": optional_int(config, "projection_dim", CONFIG, 512),
        "tied": 0,
    }
    return {**sizes, **_vision(config)}


def _part(config: Mapping[str, Any], key: str) -> tuple[Mapping[str, Any], str]:
    """A part of a CLIP config and its name in messages."""
    old = f"{key}_dict"
    name = old if config.get(old) is not None else key
    return optional_mapping(config, name, CONFIG), f"{CONFIG}: {name}"


def _vision(config: Mapping[str, Any]) -> dict[str, int]:
    if config.get("model_type") != "clip":
        return {"vision": 0, "n_vision_layers": 0}
    vision, where = _part(config, "vision_config")
    patch = optional_int(vision, "patch_size", where, 32)
    return {
        "vision": 1,
        "n_vision_layers": optional_int(vision, "num_hidden_layers", where, 12),
        "vision_dim": optional_int(vision, "hidden_size", where, 768),
        "vision_ffn_dim": optional_int(vision, "intermediate_size", where, 3072),
        "channels": optional_int(vision, "num_channels", where, 3),
        "patch_size": patch,
        "n_patches": (optional_int(vision, "image_size", where, 224) // patch) ** 2 + 1,
    }


_HF = "text_model.encoder.layers.{layer}"
_VISION = "vision_model.encoder.layers.{vision_layer}"
_OPTIONAL_VISION: dict[str, Any] = {"enabled_by": "vision", "optional": True}
_LAYER: dict[str, Any] = {"enabled_by": "vision", "optional": "vision"}  # all of a layer, or nothing

_TEXT = (
    Row(
        "tok_embeddings",
        ("vocab_size", "dim"),
        hf=Key("text_model.embeddings.token_embedding.weight"),
        native=Key("token_embedding.weight"),
    ),
    Row(
        "position_embedding",
        ("n_positions", "dim"),
        hf=Key("text_model.embeddings.position_embedding.weight"),
        native=Key("position_embedding"),
    ),
    Row("position_ids", ("1", "n_positions"), derived=True, hf=Key("text_model.embeddings.position_ids")),
    *layer_norm("attention_norm", hf=f"{_HF}.layer_norm1", native="layers.{layer}.sa_norm"),
    *linear(
        "attention.q", ("dim", "dim"), bias=True, hf=f"{_HF}.self_attn.q_proj", native="layers.{layer}.attn.q_proj"
    ),
    *linear(
        "attention.k", ("dim", "dim"), bias=True, hf=f"{_HF}.self_attn.k_proj", native="layers.{layer}.attn.k_proj"
    ),
    *linear(
        "attention.v", ("dim", "dim"), bias=True, hf=f"{_HF}.self_attn.v_proj", native="layers.{layer}.attn.v_proj"
    ),
    *linear(
        "attention.o",
        ("dim", "dim"),
        bias=True,
        hf=f"{_HF}.self_attn.out_proj",
        native="layers.{layer}.attn.output_proj",
    ),
    *layer_norm("ffn_norm", hf=f"{_HF}.layer_norm2", native="layers.{layer}.mlp_norm"),
    *linear("ffn.up", ("ffn_dim", "dim"), bias=True, hf=f"{_HF}.mlp.fc1", native="layers.{layer}.mlp.w1"),
    *linear("ffn.down", ("dim", "ffn_dim"), bias=True, hf=f"{_HF}.mlp.fc2", native="layers.{layer}.mlp.w2"),
    *layer_norm("norm", hf="text_model.final_layer_norm", native="final_norm"),
)

_REST = (
    *linear("projection", ("projection_dim", "dim"), optional=True, hf="text_projection"),
    Row("logit_scale", (), **_OPTIONAL_VISION, hf=Key("logit_scale")),
    Row("vision.class", ("vision_dim",), **_OPTIONAL_VISION, hf=Key("vision_model.embeddings.class_embedding")),
    Row(
        "vision.patch",
        ("vision_dim", "channels", "patch_size", "patch_size"),
        **_OPTIONAL_VISION,
        hf=Key("vision_model.embeddings.patch_embedding.weight"),
    ),
    Row(
        "vision.position_embedding",
        ("n_patches", "vision_dim"),
        **_OPTIONAL_VISION,
        hf=Key("vision_model.embeddings.position_embedding.weight"),
    ),
    Row(
        "vision.position_ids",
        ("1", "n_patches"),
        enabled_by="vision",
        derived=True,
        hf=Key("vision_model.embeddings.position_ids"),
    ),
    *layer_norm("vision.pre_norm", "vision_dim", hf="vision_model.pre_layrnorm", **_OPTIONAL_VISION),  # sic
    *layer_norm("vision.attention_norm", "vision_dim", hf=f"{_VISION}.layer_norm1", **_LAYER),
    *linear("vision.attention.q", ("vision_dim", "vision_dim"), bias=True, hf=f"{_VISION}.self_attn.q_proj", **_LAYER),
    *linear("vision.attention.k", ("vision_dim", "vision_dim"), bias=True, hf=f"{_VISION}.self_attn.k_proj", **_LAYER),
    *linear("vision.attention.v", ("vision_dim", "vision_dim"), bias=True, hf=f"{_VISION}.self_attn.v_proj", **_LAYER),
    *linear(
        "vision.attention.o", ("vision_dim", "vision_dim"), bias=True, hf=f"{_VISION}.self_attn.out_proj", **_LAYER
    ),
    *layer_norm("vision.ffn_norm", "vision_dim", hf=f"{_VISION}.layer_norm2", **_LAYER),
    *linear("vision.ffn.up", ("vision_ffn_dim", "vision_dim"), bias=True, hf=f"{_VISION}.mlp.fc1", **_LAYER),
    *linear("vision.ffn.down", ("vision_dim", "vision_ffn_dim"), bias=True, hf=f"{_VISION}.mlp.fc2", **_LAYER),
    *layer_norm("vision.norm", "vision_dim", hf="vision_model.post_layernorm", **_OPTIONAL_VISION),
    Row("vision.projection", ("projection_dim", "vision_dim"), **_OPTIONAL_VISION, hf=Key("visual_projection.weight")),
)

CLIP = Family(
    name="clip",
    title="CLIP's text encoder, also in a whole CLIP model",
    model_types=("clip", "clip_text_model"),
    rows=(*_TEXT, *_REST),
    dims=dims,
    indices={"layer": "n_layers", "vision_layer": "n_vision_layers"},
)


def _bare(row: Row) -> Row:
    """The row as in a text model that transformers 5 saves alone: without ``text_model.``."""
    return row.replace(hf=row.hf and row.hf.unprefixed("text_model."))


CLIP_TEXT = CLIP.replace(
    name="clip_text",
    title="CLIP's text encoder as transformers 5 saves it alone",
    model_types=("clip_text_model",),
    rows=tuple(map(_bare, _TEXT)),
    indices={"layer": "n_layers"},
)
