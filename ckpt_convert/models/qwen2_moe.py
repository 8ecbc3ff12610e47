"""Qwen1.5 and Qwen2 with experts: Qwen2's attention, routed experts, and one shared expert with its own gate.

hf: what transformers 5.23 saves for qwen2_moe. There is no other layout for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.builders import linear
from ckpt_convert.models.core.config import CONFIG, base_dims, optional_bool, optional_count, optional_int
from ckpt_convert.models.core.picking import columns, with_rope
from ckpt_convert.models.core.table import Family
from ckpt_convert.models.parts import experts
from ckpt_convert.models.parts.decoder import ATTENTION, EMBEDDING, OUTPUT
from ckpt_convert.models.parts.experts import DENSE_FFN, EXPERTS, INDICES, NORM, ROUTER
from ckpt_convert.models.qwen2 import QKV_BIAS

SHARED = (
    *linear(
        "moe.shared.gate", ("shared_dim", "dim"), layer_set="moe", hf="model.layers.{layer}.mlp.shared_expert.gate_proj"
    ),
    *linear(
        "moe.shared.up", ("shared_dim", "dim"), layer_set="moe", hf="model.layers.{layer}.mlp.shared_expert.up_proj"
    ),
    *linear(
        "moe.shared.down", ("dim", "shared_dim"), layer_set="moe", hf="model.layers.{layer}.mlp.shared_expert.down_proj"
    ),
    *linear("moe.shared.weight", ("1", "dim"), layer_set="moe", hf="model.layers.{layer}.mlp.shared_expert_gate"),
)


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of the table; defaults are those of transformers."""
    return {
        **base_dims(config, kv_heads_default=16),
        "qkv_bias": int(optional_bool(config, "qkv_bias", CONFIG, True)),
        "n_experts": optional_count(config, "num_experts", CONFIG, 60),
        "expert_dim": optional_int(config, "moe_intermediate_size", CONFIG, 1408),
        "shared_dim": optional_int(config, "shared_expert_intermediate_size", CONFIG, 5632),
    }


def sets(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The layer sets with and without experts, from decoder_sparse_step and mlp_only_layers."""
    return experts.by_step(config, optional_count(config, "num_experts", CONFIG, 60))


QWEN2_MOE = Family(
    name="qwen2_moe",
    title="Qwen1.5 and Qwen2 with experts",
    model_types=("qwen2_moe",),
    dims=dims,
    sets=sets,
    indices=INDICES,
    rows=columns(
        with_rope(
            (
                *EMBEDDING,
                *ATTENTION,
                *(row.replace(enabled_by="qkv_bias") for row in QKV_BIAS),
                *NORM,
                *DENSE_FFN,
                *ROUTER,
                *EXPERTS,
                *SHARED,
                *OUTPUT,
            ),
            "half",
        ),
        "hf",
    ),
)
