"""Qwen3, dense: Qwen2 with a norm over each head of q and k, an independent head_dim, and biases only if configured.

hf: what transformers 5.23 saves; native: the converter of torchtune's development head (commit bd2a0fc; no release has
Qwen3); torchtitan: the state-dict adapter for qwen3 of torchtitan 0.3.0. Both keep the RoPE layout. A tied output is
omitted by native and written by torchtitan; Hugging Face's own releases do either, by size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.builders import rms_norm
from ckpt_convert.models.core.config import CONFIG, base_dims, optional_bool
from ckpt_convert.models.core.picking import named, with_rope
from ckpt_convert.models.core.table import Family
from ckpt_convert.models.parts.decoder import ATTENTION, ATTENTION_BIAS, EMBEDDING, FFN, OUTPUT
from ckpt_convert.models.qwen2 import QKV_BIAS

QK_NORM = (
    *rms_norm(
        "attention.q_norm",
        "head_dim",
        hf="model.layers.{layer}.self_attn.q_norm",
        native="layers.{layer}.attn.q_norm",
        torchtitan="layers.{layer}.attention.q_norm",
    ),
    *rms_norm(
        "attention.k_norm",
        "head_dim",
        hf="model.layers.{layer}.self_attn.k_norm",
        native="layers.{layer}.attn.k_norm",
        torchtitan="layers.{layer}.attention.k_norm",
    ),
)

QKVO_BIAS = (
    *(row.replace(enabled_by="attention_bias") for row in QKV_BIAS),
    *named(ATTENTION_BIAS, "attention.o.bias"),
)


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of the table; head_dim is 128 and key/value heads 32 if absent."""
    return {
        **base_dims({"head_dim": 128, **config}, kv_heads_default=32),
        "attention_bias": int(optional_bool(config, "attention_bias", CONFIG, False)),
    }


QWEN3 = Family(
    name="qwen3",
    title="Qwen3, dense",
    model_types=("qwen3",),
    dims=dims,
    rows=with_rope((*EMBEDDING, *ATTENTION, *QK_NORM, *QKVO_BIAS, *FFN, *OUTPUT), "half"),
)
