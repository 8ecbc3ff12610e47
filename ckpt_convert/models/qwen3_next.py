"""Qwen3-Next: Qwen3.5's layers of linear and of full attention, and Qwen2's routed experts with one shared expert.

Linear attention has one fused projection for q, k, v and z, and one for b and a, with rows grouped by key head: its q
and k, then the v and z of the value heads that it serves. Full attention is partial rotary. There is no other column
with another row order.

hf: what transformers 5.23 saves for qwen3_next; the MTP layers (mtp.*), which transformers omits, are as vLLM's
qwen3_next_mtp reads them (commit 055e47c).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.builders import linear
from ckpt_convert.models.core.config import CONFIG, base_dims, optional_count, optional_int
from ckpt_convert.models.core.picking import columns, named
from ckpt_convert.models.core.table import Family
from ckpt_convert.models.parts.decoder import ATTENTION, EMBEDDING, OUTPUT
from ckpt_convert.models.parts.experts import DENSE_FFN, EXPERTS, NORM, ROUTER, by_step
from ckpt_convert.models.qwen2_moe import SHARED
from ckpt_convert.models.qwen3_5.config import delta_dims, text_sets
from ckpt_convert.models.qwen3_5.table import FULL_ATTENTION, LINEAR_ATTENTION, MTP, mtp_layer

_LINEAR_ATTENTION = (
    *linear(
        "delta.qkvz", ("delta_qkvz_dim", "dim"), layer_set="linear", hf="model.layers.{layer}.linear_attn.in_proj_qkvz"
    ),
    *linear("delta.ba", ("2*n_delta_v", "dim"), layer_set="linear", hf="model.layers.{layer}.linear_attn.in_proj_ba"),
    *named(
        LINEAR_ATTENTION,
        "delta.q.convolution",
        "delta.k.convolution",
        "delta.v.convolution",
        "delta.decay",
        "delta.step.bias",
        "delta.norm",
        "delta.o",
    ),
)

_NORMS = (*named(ATTENTION, "attention_norm"), *NORM)
_MOE = (*ROUTER, *EXPERTS, *SHARED)


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of the table; defaults are those of transformers' Qwen3NextConfig.

    delta_qkvz_dim: the number of rows of the fused projection of linear attention.
    """
    delta = delta_dims(config, CONFIG)
    keys, values = (delta[f"n_delta_{part}"] * delta[f"delta_{part}_dim"] for part in "kv")
    return {
        **base_dims({"head_dim": 256, **config}, kv_heads_default=2),
        **delta,
        "n_mtp": optional_count(config, "num_nextn_predict_layers", CONFIG, 1),
        "delta_qkvz_dim": 2 * keys + 2 * values,
        "n_experts": optional_count(config, "num_experts", CONFIG, 512),
        "expert_dim": optional_int(config, "moe_intermediate_size", CONFIG, 512),
        "shared_dim": optional_int(config, "shared_expert_intermediate_size", CONFIG, 512),
    }


def sets(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The layer sets: those with full and with linear attention, and those with experts."""
    return {**text_sets(config), **by_step(config, optional_count(config, "num_experts", CONFIG, 512))}


QWEN3_NEXT = Family(
    name="qwen3_next",
    title="Qwen3-Next",
    model_types=("qwen3_next",),
    dims=dims,
    sets=sets,
    indices={"layer": "n_layers", "mtp": "n_mtp", "expert": "n_experts"},
    rows=columns(
        (
            *EMBEDDING,
            *_NORMS,
            *FULL_ATTENTION,
            *_LINEAR_ATTENTION,
            *DENSE_FFN,
            *_MOE,
            *OUTPUT,
            *MTP,
            *mtp_layer((*_NORMS, *FULL_ATTENTION, *_MOE), "mtp"),
        ),
        "hf",
    ),
)
