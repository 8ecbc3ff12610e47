"""gpt-oss: attention with biases and a learned sink for each head, and experts with biases in every layer.

A layer's experts are stacked in every layout, and an expert's gate and up are fused with interleaved rows (gate 0, up
0, gate 1, …). hf: what transformers 5.23 saves for gpt_oss, [experts, in, out]; the releases store the experts as
MXFP4, which dequantizes to these. torchtitan: the parameters of gpt_oss in torchtitan 0.3.0, [experts, out, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.builders import linear
from ckpt_convert.models.core.config import CONFIG, base_dims, optional_bool, optional_int
from ckpt_convert.models.core.picking import columns, with_rope
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.parts.decoder import ATTENTION, EMBEDDING, OUTPUT
from ckpt_convert.models.parts.experts import LOAD_BALANCE, NORM

ATTENTION_BIAS = (
    Row(
        "attention.q.bias",
        ("n_heads*head_dim",),
        heads="n_heads",
        enabled_by="attention_bias",
        hf=Key("model.layers.{layer}.self_attn.q_proj.bias", rope="half"),
        torchtitan=Key("layers.{layer}.attention.qkv_linear.wq.bias", rope="half"),
    ),
    Row(
        "attention.k.bias",
        ("n_kv_heads*head_dim",),
        heads="n_kv_heads",
        enabled_by="attention_bias",
        hf=Key("model.layers.{layer}.self_attn.k_proj.bias", rope="half"),
        torchtitan=Key("layers.{layer}.attention.qkv_linear.wk.bias", rope="half"),
    ),
    Row(
        "attention.v.bias",
        ("n_kv_heads*head_dim",),
        enabled_by="attention_bias",
        hf=Key("model.layers.{layer}.self_attn.v_proj.bias"),
        torchtitan=Key("layers.{layer}.attention.qkv_linear.wv.bias"),
    ),
    Row(
        "attention.o.bias",
        ("dim",),
        enabled_by="attention_bias",
        hf=Key("model.layers.{layer}.self_attn.o_proj.bias"),
        torchtitan=Key("layers.{layer}.attention.wo.bias"),
    ),
)

SINKS = (
    Row(
        "attention.sinks",
        ("n_heads",),
        hf=Key("model.layers.{layer}.self_attn.sinks"),
        torchtitan=Key("layers.{layer}.attention.sinks"),
    ),
)

EXPERTS = (
    *linear(
        "moe.router",
        ("n_experts", "dim"),
        hf="model.layers.{layer}.mlp.router",
        torchtitan="layers.{layer}.moe.router.gate",
    ),
    Row(
        "moe.router.bias",
        ("n_experts",),
        hf=Key("model.layers.{layer}.mlp.router.bias"),
        torchtitan=Key("layers.{layer}.moe.router.gate.bias"),
    ),
    Row(
        "moe.experts.gate_up",
        ("n_experts", "2*ffn_dim", "dim"),
        hf=Key("model.layers.{layer}.mlp.experts.gate_up_proj", transposed=True),
        torchtitan=Key("layers.{layer}.moe.routed_experts.inner_experts.mlp1_weight_EGD"),
    ),
    Row(
        "moe.experts.gate_up.bias",
        ("n_experts", "2*ffn_dim"),
        hf=Key("model.layers.{layer}.mlp.experts.gate_up_proj_bias"),
        torchtitan=Key("layers.{layer}.moe.routed_experts.inner_experts.mlp1_bias_EG"),
    ),
    Row(
        "moe.experts.down",
        ("n_experts", "dim", "ffn_dim"),
        hf=Key("model.layers.{layer}.mlp.experts.down_proj", transposed=True),
        torchtitan=Key("layers.{layer}.moe.routed_experts.inner_experts.mlp2_weight_EDF"),
    ),
    Row(
        "moe.experts.down.bias",
        ("n_experts", "dim"),
        hf=Key("model.layers.{layer}.mlp.experts.down_proj_bias"),
        torchtitan=Key("layers.{layer}.moe.routed_experts.inner_experts.mlp2_bias_ED"),
    ),
)


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of the table; defaults are those of transformers."""
    return {
        **base_dims({"head_dim": 64, **config}, kv_heads_default=8),
        "attention_bias": int(optional_bool(config, "attention_bias", CONFIG, True)),
        "n_experts": optional_int(config, "num_local_experts", CONFIG, 128),
    }


GPT_OSS = Family(
    name="gpt_oss",
    title="gpt-oss",
    model_types=("gpt_oss",),
    dims=dims,
    rows=columns(
        with_rope(
            (
                *EMBEDDING,
                *ATTENTION,
                *ATTENTION_BIAS,
                *SINKS,
                *NORM,
                *EXPERTS,
                *(row.replace(layer_set=None) for row in LOAD_BALANCE),
                *OUTPUT,
            ),
            "half",
        ),
        "hf",
        "torchtitan",
    ),
)
