"""Qwen2.5-VL: Qwen2.5's text, and a vision encoder with gated MLPs.

hf: what transformers 5.23 saves for qwen2_5_vl, with the keys of the releases: the text as in Qwen2.5, the vision
encoder under ``visual.``. In memory, transformers has both under ``model.``. The releases have the text's sizes at the
top of config.json, transformers 5.23 in text_config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_convert.models.core.builders import linear, rms_norm
from ckpt_convert.models.core.config import (
    CONFIG,
    base_dims,
    optional_bool,
    optional_count,
    optional_int,
    optional_mapping,
)
from ckpt_convert.models.core.picking import columns, with_rope
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.parts.decoder import ATTENTION, EMBEDDING, FFN, OUTPUT
from ckpt_convert.models.qwen2 import QKV_BIAS

_TEXT, _VISION = "text_config", "vision_config"


def _vision() -> Iterator[Row]:
    """The vision encoder; QKV is fused in every layout."""
    patch = ("v_dim", "v_channels", "v_frames", "v_patch", "v_patch")
    block = "visual.blocks.{block}"
    yield Row("vision.patch", patch, hf=Key("visual.patch_embed.proj.weight"))
    yield from rms_norm("vision.attention_norm", "v_dim", hf=f"{block}.norm1")
    yield from linear("vision.attention.qkv", ("3*v_dim", "v_dim"), bias=True, hf=f"{block}.attn.qkv")
    yield from linear("vision.attention.o", ("v_dim", "v_dim"), bias=True, hf=f"{block}.attn.proj")
    yield from rms_norm("vision.ffn_norm", "v_dim", hf=f"{block}.norm2")
    yield from linear("vision.ffn.gate", ("v_ffn_dim", "v_dim"), bias=True, hf=f"{block}.mlp.gate_proj")
    yield from linear("vision.ffn.up", ("v_ffn_dim", "v_dim"), bias=True, hf=f"{block}.mlp.up_proj")
    yield from linear("vision.ffn.down", ("v_dim", "v_ffn_dim"), bias=True, hf=f"{block}.mlp.down_proj")
    yield from rms_norm("vision.merger.norm", "v_dim", hf="visual.merger.ln_q")
    yield from linear("vision.merger.up", ("v_merged", "v_merged"), bias=True, hf="visual.merger.mlp.0")
    yield from linear("vision.merger.down", ("v_out", "v_merged"), bias=True, hf="visual.merger.mlp.2")


def _in_memory(row: Row) -> Row:
    """The row with its key in transformers' model; that of lm_head is unchanged."""
    if row.hf is None or row.hf.template.startswith("lm_head."):
        return row
    if row.hf.template.startswith("visual."):
        return row.replace(in_memory=row.hf.prefixed("model."))
    return row.replace(in_memory=row.hf.unprefixed("model.").prefixed("model.language_model."))


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of text and vision; defaults are those of transformers' Qwen2_5_VLConfig."""
    text = config if config.get(_TEXT) is None else optional_mapping(config, _TEXT, CONFIG)
    where = CONFIG if text is config else f"{CONFIG}: {_TEXT}"
    tied = any(optional_bool(part, "tie_word_embeddings", CONFIG, False) for part in (config, text))
    vision, place = optional_mapping(config, _VISION, CONFIG), f"{CONFIG}: {_VISION}"
    dim = optional_int(vision, "hidden_size", place, 3584)
    merge = optional_int(vision, "spatial_merge_size", place, 2)
    return {
        **base_dims(text, kv_heads_default=8, where=where),
        "tied": int(tied),
        "n_blocks": optional_count(vision, "depth", place, 32),
        "v_dim": dim,
        "v_ffn_dim": optional_int(vision, "intermediate_size", place, 3420),
        "v_channels": optional_int(vision, "in_channels", place, 3),
        "v_frames": optional_int(vision, "temporal_patch_size", place, 2),
        "v_patch": optional_int(vision, "patch_size", place, 14),
        "v_merged": dim * merge * merge,
        "v_out": optional_int(vision, "out_hidden_size", place, 3584),
    }


_TEXT_ROWS = columns(with_rope((*EMBEDDING, *ATTENTION, *QKV_BIAS, *FFN, *OUTPUT), "half"), "hf")

QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    title="Qwen2.5-VL",
    model_types=("qwen2_5_vl",),
    dims=dims,
    indices={"layer": "n_layers", "block": "n_blocks"},
    rows=tuple(_in_memory(row) for row in (*_TEXT_ROWS, *_vision())),
)
