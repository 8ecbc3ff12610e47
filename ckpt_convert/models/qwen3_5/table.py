"""Qwen3.5: three layers of linear attention (a gated delta net) to one of full attention, dense or with experts, and a
vision encoder.

The rows of q in full attention hold, for each head, its query and then its output gate. Linear attention makes q, k and
v in one projection and runs them through one convolution each, which hf keeps as one tensor and torchtitan as three.
RoPE turns a part of each head, halves in every layout, so nothing is reordered.

hf: what transformers 5.23 saves for qwen3_5_text, qwen3_5, qwen3_5_moe_text and qwen3_5_moe. Its own models with
experts have a key for each expert's matrix; the releases, and ``QWEN3_5_MOE``, have a layer's experts in two tensors,
as transformers has them in memory. The layers that predict further tokens (mtp.*), which transformers leaves out, are
as vLLM reads them; a release may have their experts in either way. torchtitan: the state-dict adapter for qwen3_5 of
torchtitan 0.3.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckpt_convert.models.core.picking import affine, columns, named
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.parts.decoder import ATTENTION, EMBEDDING, OUTPUT
from ckpt_convert.models.parts.experts import DENSE_FFN, EXPERTS, LOAD_BALANCE, NORM, ROUTER
from ckpt_convert.models.qwen3_5 import config

FULL_ATTENTION = (
    Row(
        "attention.q_gate",
        ("n_heads*2*head_dim", "dim"),
        only="full",
        hf=Key("model.layers.{layer}.self_attn.q_proj.weight"),
        torchtitan=Key("layers.{layer}.attn.wq.weight"),
    ),
    Row(
        "attention.k",
        ("n_kv_heads*head_dim", "dim"),
        only="full",
        hf=Key("model.layers.{layer}.self_attn.k_proj.weight"),
        torchtitan=Key("layers.{layer}.attn.wk.weight"),
    ),
    Row(
        "attention.v",
        ("n_kv_heads*head_dim", "dim"),
        only="full",
        hf=Key("model.layers.{layer}.self_attn.v_proj.weight"),
        torchtitan=Key("layers.{layer}.attn.wv.weight"),
    ),
    Row(
        "attention.o",
        ("dim", "n_heads*head_dim"),
        only="full",
        hf=Key("model.layers.{layer}.self_attn.o_proj.weight"),
        torchtitan=Key("layers.{layer}.attn.wo.weight"),
    ),
    Row(
        "attention.q_norm",
        ("head_dim",),
        only="full",
        hf=Key("model.layers.{layer}.self_attn.q_norm.weight"),
        torchtitan=Key("layers.{layer}.attn.q_norm.weight"),
    ),
    Row(
        "attention.k_norm",
        ("head_dim",),
        only="full",
        hf=Key("model.layers.{layer}.self_attn.k_norm.weight"),
        torchtitan=Key("layers.{layer}.attn.k_norm.weight"),
    ),
    Row(
        "attention.q_gate.bias",
        ("n_heads*2*head_dim",),
        only="full",
        when="attention_bias",
        hf=Key("model.layers.{layer}.self_attn.q_proj.bias"),
    ),
    Row(
        "attention.k.bias",
        ("n_kv_heads*head_dim",),
        only="full",
        when="attention_bias",
        hf=Key("model.layers.{layer}.self_attn.k_proj.bias"),
    ),
    Row(
        "attention.v.bias",
        ("n_kv_heads*head_dim",),
        only="full",
        when="attention_bias",
        hf=Key("model.layers.{layer}.self_attn.v_proj.bias"),
    ),
    Row(
        "attention.o.bias",
        ("dim",),
        only="full",
        when="attention_bias",
        hf=Key("model.layers.{layer}.self_attn.o_proj.bias"),
    ),
)

LINEAR_ATTENTION = (
    Row(
        "delta.q",
        ("n_delta_k*delta_k_dim", "dim"),
        only="linear",
        hf=Key("model.layers.{layer}.linear_attn.in_proj_qkv.weight", fused=0),
        torchtitan=Key("layers.{layer}.attn.in_proj_q.weight"),
    ),
    Row(
        "delta.k",
        ("n_delta_k*delta_k_dim", "dim"),
        only="linear",
        hf=Key("model.layers.{layer}.linear_attn.in_proj_qkv.weight", fused=0),
        torchtitan=Key("layers.{layer}.attn.in_proj_k.weight"),
    ),
    Row(
        "delta.v",
        ("n_delta_v*delta_v_dim", "dim"),
        only="linear",
        hf=Key("model.layers.{layer}.linear_attn.in_proj_qkv.weight", fused=0),
        torchtitan=Key("layers.{layer}.attn.in_proj_v.weight"),
    ),
    Row(
        "delta.q.convolution",
        ("n_delta_k*delta_k_dim", "1", "delta_kernel"),
        only="linear",
        hf=Key("model.layers.{layer}.linear_attn.conv1d.weight", fused=0),
        torchtitan=Key("layers.{layer}.attn.conv_q.weight"),
    ),
    Row(
        "delta.k.convolution",
        ("n_delta_k*delta_k_dim", "1", "delta_kernel"),
        only="linear",
        hf=Key("model.layers.{layer}.linear_attn.conv1d.weight", fused=0),
        torchtitan=Key("layers.{layer}.attn.conv_k.weight"),
    ),
    Row(
        "delta.v.convolution",
        ("n_delta_v*delta_v_dim", "1", "delta_kernel"),
        only="linear",
        hf=Key("model.layers.{layer}.linear_attn.conv1d.weight", fused=0),
        torchtitan=Key("layers.{layer}.attn.conv_v.weight"),
    ),
    Row(
        "delta.z",
        ("n_delta_v*delta_v_dim", "dim"),
        only="linear",
        hf=Key("model.layers.{layer}.linear_attn.in_proj_z.weight"),
        torchtitan=Key("layers.{layer}.attn.in_proj_z.weight"),
    ),
    Row(
        "delta.a",
        ("n_delta_v", "dim"),
        only="linear",
        hf=Key("model.layers.{layer}.linear_attn.in_proj_a.weight"),
        torchtitan=Key("layers.{layer}.attn.in_proj_a.weight"),
    ),
    Row(
        "delta.b",
        ("n_delta_v", "dim"),
        only="linear",
        hf=Key("model.layers.{layer}.linear_attn.in_proj_b.weight"),
        torchtitan=Key("layers.{layer}.attn.in_proj_b.weight"),
    ),
    Row(
        "delta.decay",
        ("n_delta_v",),
        only="linear",
        hf=Key("model.layers.{layer}.linear_attn.A_log"),
        torchtitan=Key("layers.{layer}.attn.A_log"),
    ),
    Row(
        "delta.step.bias",
        ("n_delta_v",),
        only="linear",
        hf=Key("model.layers.{layer}.linear_attn.dt_bias"),
        torchtitan=Key("layers.{layer}.attn.dt_bias"),
    ),
    Row(
        "delta.norm",
        ("delta_v_dim",),
        only="linear",
        hf=Key("model.layers.{layer}.linear_attn.norm.weight"),
        torchtitan=Key("layers.{layer}.attn.norm.weight"),
    ),
    Row(
        "delta.o",
        ("dim", "n_delta_v*delta_v_dim"),
        only="linear",
        hf=Key("model.layers.{layer}.linear_attn.out_proj.weight"),
        torchtitan=Key("layers.{layer}.attn.out_proj.weight"),
    ),
)

FFN = tuple(row.replace(only=None) for row in DENSE_FFN)

SHARED = (
    Row(
        "moe.shared.gate",
        ("shared_dim", "dim"),
        hf=Key("model.layers.{layer}.mlp.shared_expert.gate_proj.weight"),
        torchtitan=Key("layers.{layer}.moe.shared_experts.w1.weight"),
    ),
    Row(
        "moe.shared.up",
        ("shared_dim", "dim"),
        hf=Key("model.layers.{layer}.mlp.shared_expert.up_proj.weight"),
        torchtitan=Key("layers.{layer}.moe.shared_experts.w3.weight"),
    ),
    Row(
        "moe.shared.down",
        ("dim", "shared_dim"),
        hf=Key("model.layers.{layer}.mlp.shared_expert.down_proj.weight"),
        torchtitan=Key("layers.{layer}.moe.shared_experts.w2.weight"),
    ),
    Row(
        "moe.shared.weight",
        ("1", "dim"),
        hf=Key("model.layers.{layer}.mlp.shared_expert_gate.weight"),
        torchtitan=Key("layers.{layer}.moe.shared_experts.gate.weight"),
    ),
)

EXPERTS_ANYWHERE = tuple(row.replace(only=None) for row in EXPERTS)
MOE = (*(row.replace(only=None) for row in (*ROUTER, *LOAD_BALANCE)), *EXPERTS_ANYWHERE, *SHARED)

FUSED = {
    "moe.experts.gate": Key("model.layers.{layer}.mlp.experts.gate_up_proj", fused=0),
    "moe.experts.up": Key("model.layers.{layer}.mlp.experts.gate_up_proj", fused=0),
    "moe.experts.down": Key("model.layers.{layer}.mlp.experts.down_proj"),
}
"""A layer's experts in two tensors: [experts, gate rows and then up rows, in] and [experts, out, in]."""


MTP = (
    Row("mtp.embedding_norm", ("dim",), optional="mtp", hf=Key("mtp.pre_fc_norm_embedding.weight")),
    Row("mtp.hidden_norm", ("dim",), optional="mtp", hf=Key("mtp.pre_fc_norm_hidden.weight")),
    Row("mtp.projection", ("dim", "2*dim"), optional="mtp", hf=Key("mtp.fc.weight")),
    Row("mtp.norm", ("dim",), optional="mtp", hf=Key("mtp.norm.weight")),
)


def mtp_layer(rows: Iterable[Row], group: str) -> Iterator[Row]:
    """A layer's rows in the layers that predict further tokens, which all have full attention."""
    for row in rows:
        if row.hf is None:
            continue
        key = row.hf.renamed("model.layers.{layer}", "mtp.layers.{mtp}")
        each = "expert" if "expert" in row.placeholders else None
        yield Row(f"{group}.{row.name}", row.shape, hf=key, when=row.when, optional=group, each=each)


def _affine(name: str, shape: tuple[str, ...], hf: str, torchtitan: str, fused: int | None = None) -> tuple[Row, Row]:
    """A weight of the vision encoder and its bias."""
    key = Key(f"model.visual.{hf}", fused=fused)
    return affine(name, shape, hf=key, torchtitan=f"vision_encoder.{torchtitan}")


def vision() -> Iterator[Row]:
    """The vision encoder: its patches are a convolution in hf and a matrix in torchtitan."""
    hf, titan = "blocks.{block}", "layers.{block}"
    yield Row(
        "vision.patch",
        ("v_dim", "v_channels*v_frames*v_patch*v_patch"),
        hf=Key("model.visual.patch_embed.proj.weight", shape=("v_dim", "v_channels", "v_frames", "v_patch", "v_patch")),
        torchtitan=Key("vision_encoder.patch_embed.weight"),
    )
    yield Row(
        "vision.patch.bias",
        ("v_dim",),
        hf=Key("model.visual.patch_embed.proj.bias"),
        torchtitan=Key("vision_encoder.patch_embed.bias"),
    )
    yield Row(
        "vision.positions",
        ("v_positions", "v_dim"),
        hf=Key("model.visual.pos_embed.weight"),
        torchtitan=Key("vision_encoder.pos_embed"),
    )
    yield from _affine("vision.attention_norm", ("v_dim",), f"{hf}.norm1", f"{titan}.norm1")
    yield from _affine("vision.attention.q", ("v_dim", "v_dim"), f"{hf}.attn.qkv", f"{titan}.attn.wq", fused=0)
    yield from _affine("vision.attention.k", ("v_dim", "v_dim"), f"{hf}.attn.qkv", f"{titan}.attn.wk", fused=0)
    yield from _affine("vision.attention.v", ("v_dim", "v_dim"), f"{hf}.attn.qkv", f"{titan}.attn.wv", fused=0)
    yield from _affine("vision.attention.o", ("v_dim", "v_dim"), f"{hf}.attn.proj", f"{titan}.attn.proj")
    yield from _affine("vision.ffn_norm", ("v_dim",), f"{hf}.norm2", f"{titan}.norm2")
    yield from _affine("vision.ffn.up", ("v_ffn_dim", "v_dim"), f"{hf}.mlp.linear_fc1", f"{titan}.mlp.linear_fc1")
    yield from _affine("vision.ffn.down", ("v_dim", "v_ffn_dim"), f"{hf}.mlp.linear_fc2", f"{titan}.mlp.linear_fc2")
    yield from _affine("vision.merger.norm", ("v_dim",), "merger.norm", "merger.norm")
    yield from _affine("vision.merger.up", ("v_merged", "v_merged"), "merger.linear_fc1", "merger.linear_fc1")
    yield from _affine("vision.merger.down", ("v_out", "v_merged"), "merger.linear_fc2", "merger.linear_fc2")


def under_language_model(rows: Iterable[Row]) -> Iterator[Row]:
    """The text's rows under the keys that they have beside a vision encoder."""
    for row in rows:
        yield row.replace(hf=row.hf and _moved(row.hf), in_memory=row.in_memory and _moved(row.in_memory))


def _moved(key: Key) -> Key:
    """The key where the text model is a part: what lies outside of it (lm_head, mtp) stays where it is."""
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
    """The rows with a layer's experts together."""
    return tuple(
        row.replace(hf=FUSED[row.name], in_memory=None, each="expert") if row.name in FUSED else row for row in rows
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
