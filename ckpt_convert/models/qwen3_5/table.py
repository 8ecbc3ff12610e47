"""Qwen3.5: three layers of linear attention (a gated delta net) to one of full attention, dense or with experts, and a
vision encoder.

The rows of q in full attention are, for each head, its query and then its output gate. Linear attention has a fused
projection for q, k and v and a convolution for each, which hf stores as one tensor and torchtitan as three. RoPE is
partial and half-split in every layout, so nothing is reordered.

hf: what transformers 5.23 saves for qwen3_5_text, qwen3_5, qwen3_5_moe_text and qwen3_5_moe. It saves one key for each
expert's matrix; the releases, and ``QWEN3_5_MOE``, have a layer's experts stacked in two tensors, as transformers has
them in memory. The MTP layers (mtp.*), which transformers omits, are as vLLM reads them; releases have their experts in
either form. torchtitan: the state-dict adapter for qwen3_5 of torchtitan 0.3.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckpt_convert.models.core.builders import layer_norm, linear, rms_norm
from ckpt_convert.models.core.picking import columns, named, prefixed
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.parts.decoder import ATTENTION, EMBEDDING, OUTPUT
from ckpt_convert.models.parts.experts import DENSE_FFN, EXPERTS, LOAD_BALANCE, NORM, ROUTER
from ckpt_convert.models.qwen3_5 import config

FULL_ATTENTION = (
    *linear(
        "attention.q_gate",
        ("n_heads*2*head_dim", "dim"),
        layer_set="full",
        hf="model.layers.{layer}.self_attn.q_proj",
        torchtitan="layers.{layer}.attn.wq",
    ),
    *linear(
        "attention.k",
        ("n_kv_heads*head_dim", "dim"),
        layer_set="full",
        hf="model.layers.{layer}.self_attn.k_proj",
        torchtitan="layers.{layer}.attn.wk",
    ),
    *linear(
        "attention.v",
        ("n_kv_heads*head_dim", "dim"),
        layer_set="full",
        hf="model.layers.{layer}.self_attn.v_proj",
        torchtitan="layers.{layer}.attn.wv",
    ),
    *linear(
        "attention.o",
        ("dim", "n_heads*head_dim"),
        layer_set="full",
        hf="model.layers.{layer}.self_attn.o_proj",
        torchtitan="layers.{layer}.attn.wo",
    ),
    *rms_norm(
        "attention.q_norm",
        "head_dim",
        layer_set="full",
        hf="model.layers.{layer}.self_attn.q_norm",
        torchtitan="layers.{layer}.attn.q_norm",
    ),
    *rms_norm(
        "attention.k_norm",
        "head_dim",
        layer_set="full",
        hf="model.layers.{layer}.self_attn.k_norm",
        torchtitan="layers.{layer}.attn.k_norm",
    ),
    Row(
        "attention.q_gate.bias",
        ("n_heads*2*head_dim",),
        layer_set="full",
        enabled_by="attention_bias",
        hf=Key("model.layers.{layer}.self_attn.q_proj.bias"),
    ),
    Row(
        "attention.k.bias",
        ("n_kv_heads*head_dim",),
        layer_set="full",
        enabled_by="attention_bias",
        hf=Key("model.layers.{layer}.self_attn.k_proj.bias"),
    ),
    Row(
        "attention.v.bias",
        ("n_kv_heads*head_dim",),
        layer_set="full",
        enabled_by="attention_bias",
        hf=Key("model.layers.{layer}.self_attn.v_proj.bias"),
    ),
    Row(
        "attention.o.bias",
        ("dim",),
        layer_set="full",
        enabled_by="attention_bias",
        hf=Key("model.layers.{layer}.self_attn.o_proj.bias"),
    ),
)

LINEAR_ATTENTION = (
    *linear(
        "delta.q",
        ("n_delta_k*delta_k_dim", "dim"),
        layer_set="linear",
        hf=Key("model.layers.{layer}.linear_attn.in_proj_qkv", fused=0),
        torchtitan="layers.{layer}.attn.in_proj_q",
    ),
    *linear(
        "delta.k",
        ("n_delta_k*delta_k_dim", "dim"),
        layer_set="linear",
        hf=Key("model.layers.{layer}.linear_attn.in_proj_qkv", fused=0),
        torchtitan="layers.{layer}.attn.in_proj_k",
    ),
    *linear(
        "delta.v",
        ("n_delta_v*delta_v_dim", "dim"),
        layer_set="linear",
        hf=Key("model.layers.{layer}.linear_attn.in_proj_qkv", fused=0),
        torchtitan="layers.{layer}.attn.in_proj_v",
    ),
    *linear(
        "delta.q.convolution",
        ("n_delta_k*delta_k_dim", "1", "delta_kernel"),
        layer_set="linear",
        hf=Key("model.layers.{layer}.linear_attn.conv1d", fused=0),
        torchtitan="layers.{layer}.attn.conv_q",
    ),
    *linear(
        "delta.k.convolution",
        ("n_delta_k*delta_k_dim", "1", "delta_kernel"),
        layer_set="linear",
        hf=Key("model.layers.{layer}.linear_attn.conv1d", fused=0),
        torchtitan="layers.{layer}.attn.conv_k",
    ),
    *linear(
        "delta.v.convolution",
        ("n_delta_v*delta_v_dim", "1", "delta_kernel"),
        layer_set="linear",
        hf=Key("model.layers.{layer}.linear_attn.conv1d", fused=0),
        torchtitan="layers.{layer}.attn.conv_v",
    ),
    *linear(
        "delta.z",
        ("n_delta_v*delta_v_dim", "dim"),
        layer_set="linear",
        hf="model.layers.{layer}.linear_attn.in_proj_z",
        torchtitan="layers.{layer}.attn.in_proj_z",
    ),
    *linear(
        "delta.a",
        ("n_delta_v", "dim"),
        layer_set="linear",
        hf="model.layers.{layer}.linear_attn.in_proj_a",
        torchtitan="layers.{layer}.attn.in_proj_a",
    ),
    *linear(
        "delta.b",
        ("n_delta_v", "dim"),
        layer_set="linear",
        hf="model.layers.{layer}.linear_attn.in_proj_b",
        torchtitan="layers.{layer}.attn.in_proj_b",
    ),
    Row(
        "delta.decay",
        ("n_delta_v",),
        layer_set="linear",
        hf=Key("model.layers.{layer}.linear_attn.A_log"),
        torchtitan=Key("layers.{layer}.attn.A_log"),
    ),
    Row(
        "delta.step.bias",
        ("n_delta_v",),
        layer_set="linear",
        hf=Key("model.layers.{layer}.linear_attn.dt_bias"),
        torchtitan=Key("layers.{layer}.attn.dt_bias"),
    ),
    *rms_norm(
        "delta.norm",
        "delta_v_dim",
        layer_set="linear",
        hf="model.layers.{layer}.linear_attn.norm",
        torchtitan="layers.{layer}.attn.norm",
    ),
    *linear(
        "delta.o",
        ("dim", "n_delta_v*delta_v_dim"),
        layer_set="linear",
        hf="model.layers.{layer}.linear_attn.out_proj",
        torchtitan="layers.{layer}.attn.out_proj",
    ),
)

FFN = tuple(row.replace(layer_set=None) for row in DENSE_FFN)

SHARED = (
    *linear(
        "moe.shared.gate",
        ("shared_dim", "dim"),
        hf="model.layers.{layer}.mlp.shared_expert.gate_proj",
        torchtitan="layers.{layer}.moe.shared_experts.w1",
    ),
    *linear(
        "moe.shared.up",
        ("shared_dim", "dim"),
        hf="model.layers.{layer}.mlp.shared_expert.up_proj",
        torchtitan="layers.{layer}.moe.shared_experts.w3",
    ),
    *linear(
        "moe.shared.down",
        ("dim", "shared_dim"),
        hf="model.layers.{layer}.mlp.shared_expert.down_proj",
        torchtitan="layers.{layer}.moe.shared_experts.w2",
    ),
    *linear(
        "moe.shared.weight",
        ("1", "dim"),
        hf="model.layers.{layer}.mlp.shared_expert_gate",
        torchtitan="layers.{layer}.moe.shared_experts.gate",
    ),
)

EXPERTS_ANYWHERE = tuple(row.replace(layer_set=None) for row in EXPERTS)
MOE = (*(row.replace(layer_set=None) for row in (*ROUTER, *LOAD_BALANCE)), *EXPERTS_ANYWHERE, *SHARED)

FUSED = {
    "moe.experts.gate": Key("model.layers.{layer}.mlp.experts.gate_up_proj", fused=0),
    "moe.experts.up": Key("model.layers.{layer}.mlp.experts.gate_up_proj", fused=0),
    "moe.experts.down": Key("model.layers.{layer}.mlp.experts.down_proj"),
}
"""A layer's stacked experts: fused gate_up [experts, gate rows then up rows, in], and down [experts, out, in]."""


MTP = (
    *rms_norm("mtp.embedding_norm", optional="mtp", hf="mtp.pre_fc_norm_embedding"),
    *rms_norm("mtp.hidden_norm", optional="mtp", hf="mtp.pre_fc_norm_hidden"),
    *linear("mtp.projection", ("dim", "2*dim"), optional="mtp", hf="mtp.fc"),
    *rms_norm("mtp.norm", optional="mtp", hf="mtp.norm"),
)


def mtp_layer(rows: Iterable[Row], group: str) -> Iterator[Row]:
    """The rows of a layer in the MTP layers, which all have full attention."""
    for row in rows:
        if row.hf is None:
            continue
        key = row.hf.renamed("model.layers.{layer}", "mtp.layers.{mtp}")
        each = "expert" if "expert" in row.placeholders else None
        yield Row(
            f"{group}.{row.name}", row.shape, hf=key, enabled_by=row.enabled_by, optional=group, stacked_over=each
        )


def vision() -> Iterator[Row]:
    """The vision encoder; the patch embedding is a convolution in hf and a matrix in torchtitan."""
    patch = ("v_dim", "v_channels", "v_frames", "v_patch", "v_patch")
    qkv, square = Key("blocks.{block}.attn.qkv", fused=0), ("v_dim", "v_dim")
    titan = "layers.{block}"
    rows = (
        *linear(
            "vision.patch",
            ("v_dim", "v_channels*v_frames*v_patch*v_patch"),
            bias=True,
            hf=Key("patch_embed.proj", shape=patch),
            torchtitan="patch_embed",
        ),
        Row("vision.positions", ("v_positions", "v_dim"), hf=Key("pos_embed.weight"), torchtitan=Key("pos_embed")),
        *layer_norm("vision.attention_norm", "v_dim", hf="blocks.{block}.norm1", torchtitan=f"{titan}.norm1"),
        *linear("vision.attention.q", square, bias=True, hf=qkv, torchtitan=f"{titan}.attn.wq"),
        *linear("vision.attention.k", square, bias=True, hf=qkv, torchtitan=f"{titan}.attn.wk"),
        *linear("vision.attention.v", square, bias=True, hf=qkv, torchtitan=f"{titan}.attn.wv"),
        *linear(
            "vision.attention.o", square, bias=True, hf="blocks.{block}.attn.proj", torchtitan=f"{titan}.attn.proj"
        ),
        *layer_norm("vision.ffn_norm", "v_dim", hf="blocks.{block}.norm2", torchtitan=f"{titan}.norm2"),
        *linear(
            "vision.ffn.up",
            ("v_ffn_dim", "v_dim"),
            bias=True,
            hf="blocks.{block}.mlp.linear_fc1",
            torchtitan=f"{titan}.mlp.linear_fc1",
        ),
        *linear(
            "vision.ffn.down",
            ("v_dim", "v_ffn_dim"),
            bias=True,
            hf="blocks.{block}.mlp.linear_fc2",
            torchtitan=f"{titan}.mlp.linear_fc2",
        ),
        *layer_norm("vision.merger.norm", "v_dim", hf="merger.norm", torchtitan="merger.norm"),
        *linear(
            "vision.merger.up",
            ("v_merged", "v_merged"),
            bias=True,
            hf="merger.linear_fc1",
            torchtitan="merger.linear_fc1",
        ),
        *linear(
            "vision.merger.down",
            ("v_out", "v_merged"),
            bias=True,
            hf="merger.linear_fc2",
            torchtitan="merger.linear_fc2",
        ),
    )
    yield from prefixed(rows, hf="model.visual.", torchtitan="vision_encoder.")


def under_language_model(rows: Iterable[Row]) -> Iterator[Row]:
    """The text's rows with their keys in a model with a vision encoder."""
    for row in rows:
        yield row.replace(hf=row.hf and _moved(row.hf), in_memory=row.in_memory and _moved(row.in_memory))


def _moved(key: Key) -> Key:
    """The key if the text model is a submodule; keys outside of it (lm_head, mtp) are unchanged."""
    if not key.template.startswith("model."):
        return key
    return key.unprefixed("model.").prefixed("model.language_model.")


def _text_rows(*feed_forward: Row) -> tuple[Row, ...]:
    norms = (*named(ATTENTION, "attention_norm"), *NORM)
    rows = (
        *EMBEDDING,
        *norms,
        *FULL_ATTENTION,
        *LINEAR_ATTENTION,
        *feed_forward,
        *OUTPUT,
        *MTP,
        *mtp_layer((*norms, *FULL_ATTENTION, *(row for row in feed_forward if row not in EXPERTS_ANYWHERE)), "mtp"),
        *mtp_layer((row for row in feed_forward if row in EXPERTS_ANYWHERE), "mtp_split"),
        *mtp_layer(_fused(row for row in feed_forward if row in EXPERTS_ANYWHERE), "mtp_fused"),
    )
    return columns(rows, "hf", "torchtitan")


def _fused(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows with a layer's experts stacked."""
    return tuple(
        row.replace(hf=FUSED[row.name], in_memory=None, stacked_over="expert") if row.name in FUSED else row
        for row in rows
    )


TEXT_INDICES = {"layer": "n_layers", "mtp": "n_mtp"}
INDICES = {**TEXT_INDICES, "block": "n_blocks"}

UNVERIFIED = {
    "torchtitan": "the adapter takes the axes of the experts' tensors in another order than the releases have them; "
    "the parameters of torchtitan's model say which is which"
}

QWEN3_5_TEXT = Family(
    name="qwen3_5_text",
    title="Qwen3.5, its text model",
    model_types=("qwen3_5_text",),
    dims=config.text_dims,
    sets=config.text_sets,
    indices=TEXT_INDICES,
    rows=columns(_text_rows(*FFN), "hf"),
)

QWEN3_5 = Family(
    name="qwen3_5",
    title="Qwen3.5",
    model_types=("qwen3_5",),
    dims=config.dims,
    sets=config.sets,
    indices=INDICES,
    rows=(*under_language_model(_text_rows(*FFN)), *vision()),
)

QWEN3_5_MOE = Family(
    name="qwen3_5_moe",
    title="Qwen3.5 with experts",
    model_types=("qwen3_5_moe",),
    dims=config.dims_moe,
    sets=config.sets,
    indices={**INDICES, "expert": "n_experts"},
    rows=(*under_language_model(_fused(_text_rows(*MOE))), *vision()),
    unverified=UNVERIFIED,
)

QWEN3_5_MOE_SPLIT = QWEN3_5_MOE.replace(
    name="qwen3_5_moe_split",
    title="Qwen3.5 with experts that have keys of their own",
    rows=(*under_language_model(_text_rows(*MOE)), *vision()),
)
