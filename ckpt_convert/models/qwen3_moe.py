"""Qwen3 with experts: Qwen3's attention, and in most layers a router with experts instead of the MLP.

hf: what transformers 5.23 saves for qwen3_moe; torchtitan: the state-dict adapter for qwen3 of torchtitan 0.3.0, which
keeps the RoPE layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import CONFIG, base_dims, optional_bool, optional_count, optional_int
from ckpt_convert.models.core.picking import columns, with_rope
from ckpt_convert.models.core.table import Family
from ckpt_convert.models.parts import experts
from ckpt_convert.models.parts.decoder import ATTENTION, EMBEDDING, OUTPUT
from ckpt_convert.models.parts.experts import DENSE_FFN, EXPERTS, INDICES, LOAD_BALANCE, NORM, ROUTER
from ckpt_convert.models.qwen3 import QK_NORM, QKVO_BIAS


def n_experts(config: Mapping[str, Any]) -> int:
    """The number of experts: num_experts, or num_local_experts, as transformers 5 saves it.

    Raises ConfigError if there are both and they differ.
    """
    names = [name for name in ("num_experts", "num_local_experts") if config.get(name) is not None]
    found = {optional_count(config, name, CONFIG, 128) for name in names} or {128}
    if len(found) > 1:
        said = " and ".join(str(config[name]) for name in names)
        raise ConfigError(f"{CONFIG}: {' and '.join(names)} must be one number, found {said}; correct {CONFIG}")
    return found.pop()


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of the table; defaults are those of transformers."""
    return {
        **base_dims(config, kv_heads_default=4),
        "attention_bias": int(optional_bool(config, "attention_bias", CONFIG, False)),
        "n_experts": n_experts(config),
        "expert_dim": optional_int(config, "moe_intermediate_size", CONFIG, 768),
    }


def sets(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The layer sets with and without experts, from decoder_sparse_step and mlp_only_layers."""
    return experts.by_step(config, n_experts(config))


QWEN3_MOE = Family(
    name="qwen3_moe",
    title="Qwen3 with experts",
    model_types=("qwen3_moe",),
    dims=dims,
    sets=sets,
    indices=INDICES,
    rows=columns(
        with_rope(
            (
                *EMBEDDING,
                *ATTENTION,
                *QK_NORM,
                *QKVO_BIAS,
                *NORM,
                *DENSE_FFN,
                *ROUTER,
                *EXPERTS,
                *LOAD_BALANCE,
                *OUTPUT,
            ),
            "half",
        ),
        "hf",
        "torchtitan",
    ),
)
