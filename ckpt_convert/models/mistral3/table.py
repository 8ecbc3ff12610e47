"""Mistral 3 (Mistral Small 3.1 and later): Mistral's text, Pixtral's vision tower, and a projector that merges patches.

hf: what transformers 5.23 saves for mistral3, which are the keys of the releases; in memory it has all but the output
under ``model.``. meta: the modules of mistral-inference 1.6.0, for which Mistral's own files of a release are. The RoPE
layout of the vision tower is that of the text: half-split in hf, interleaved in meta.
"""

from __future__ import annotations

from dataclasses import replace

from ckpt_convert.models.core.builders import linear, rms_norm
from ckpt_convert.models.core.picking import columns, prefixed
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.mistral.table import MISTRAL, MISTRAL_PARAMS
from ckpt_convert.models.mistral3 import config, params

_TEXT = prefixed(columns(MISTRAL.rows, "hf", "meta"), hf="language_model.")

_SQUARE = ("v_dim", "v_dim")
_LAYER = prefixed(
    (
        *rms_norm("vision.attention_norm", "v_dim", hf="attention_norm", meta="attention_norm"),
        *linear(
            "vision.attention.q",
            _SQUARE,
            heads="v_heads",
            hf=Key("attention.q_proj", rope="half"),
            meta=Key("attention.wq", rope="interleaved"),
        ),
        *linear(
            "vision.attention.k",
            _SQUARE,
            heads="v_heads",
            hf=Key("attention.k_proj", rope="half"),
            meta=Key("attention.wk", rope="interleaved"),
        ),
        *linear("vision.attention.v", _SQUARE, hf="attention.v_proj", meta="attention.wv"),
        *linear("vision.attention.o", _SQUARE, hf="attention.o_proj", meta="attention.wo"),
        *rms_norm("vision.ffn_norm", "v_dim", hf="ffn_norm", meta="ffn_norm"),
        *linear("vision.ffn.gate", ("v_ffn_dim", "v_dim"), hf="feed_forward.gate_proj", meta="feed_forward.w1"),
        *linear("vision.ffn.down", ("v_dim", "v_ffn_dim"), hf="feed_forward.down_proj", meta="feed_forward.w2"),
        *linear("vision.ffn.up", ("v_ffn_dim", "v_dim"), hf="feed_forward.up_proj", meta="feed_forward.w3"),
    ),
    hf="vision_tower.transformer.layers.{block}.",
    meta="vision_encoder.transformer.layers.{block}.",
)
_PATCH = ("v_dim", "v_channels", "v_patch", "v_patch")
_VISION = (
    *linear("vision.patch", _PATCH, hf="vision_tower.patch_conv", meta="vision_encoder.patch_conv"),
    *rms_norm("vision.norm", "v_dim", hf="vision_tower.ln_pre", meta="vision_encoder.ln_pre"),
    *_LAYER,
)

_PROJECTOR = (
    *rms_norm("projector.norm", "v_dim", hf="multi_modal_projector.norm", meta="pre_mm_projector_norm"),
    *linear(
        "projector.merge",
        ("v_dim", "v_merged"),
        hf="multi_modal_projector.patch_merger.merging_layer",
        meta="patch_merger.merging_layer",
    ),
    *linear(
        "projector.in",
        ("dim", "v_taken"),
        bias="projector_bias",
        hf="multi_modal_projector.linear_1",
        meta="vision_language_adapter.w_in",
    ),
    *linear(
        "projector.out",
        ("dim", "dim"),
        bias="projector_bias",
        hf="multi_modal_projector.linear_2",
        meta="vision_language_adapter.w_out",
    ),
)


def _in_memory(row: Row) -> Row:
    """The row with its key in transformers' model."""
    if row.hf is None:
        return row
    if row.name == "output":
        return row.replace(in_memory=row.hf.unprefixed("language_model."))
    if row.hf.template.startswith("language_model."):
        return row.replace(in_memory=row.hf.unprefixed("language_model.model.").prefixed("model.language_model."))
    return row.replace(in_memory=row.hf.prefixed("model."))


MISTRAL3 = Family(
    name="mistral3",
    title="Mistral Small 3.1 and 3.2 and what shares their architecture, with vision",
    model_types=("mistral3",),
    dims=config.dims,
    indices={"layer": "n_layers", "block": "v_layers"},
    params=replace(MISTRAL_PARAMS, evidence=params.is_params, from_hf=params.hf_to_params, to_hf=params.params_to_hf),
    rows=tuple(_in_memory(row) for row in (*_TEXT, *_VISION, *_PROJECTOR)),
)
