"""Qwen2 and Qwen2.5: Llama's layout with biases on q, k and v.

hf: what transformers 5.23 saves. native: the converter for Qwen2 of torchtune 0.6.1, which keeps the biases and the
RoPE layout (its Qwen is half-split, as Hugging Face's) and omits a tied output. Meta and torchtitan have no layout for
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.config import base_dims
from ckpt_convert.models.core.picking import columns, with_rope
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.parts.decoder import ATTENTION, EMBEDDING, FFN, OUTPUT

QKV_BIAS = (
    Row(
        "attention.q.bias",
        ("n_heads*head_dim",),
        heads="n_heads",
        hf=Key("model.layers.{layer}.self_attn.q_proj.bias", rope="half"),
        native=Key("layers.{layer}.attn.q_proj.bias", rope="half"),
    ),
    Row(
        "attention.k.bias",
        ("n_kv_heads*head_dim",),
        heads="n_kv_heads",
        hf=Key("model.layers.{layer}.self_attn.k_proj.bias", rope="half"),
        native=Key("layers.{layer}.attn.k_proj.bias", rope="half"),
    ),
    Row(
        "attention.v.bias",
        ("n_kv_heads*head_dim",),
        hf=Key("model.layers.{layer}.self_attn.v_proj.bias"),
        native=Key("layers.{layer}.attn.v_proj.bias"),
    ),
)


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of the table; key/value heads are 32 if absent, as in transformers."""
    return base_dims(config, kv_heads_default=32)


QWEN2 = Family(
    name="qwen2",
    title="Qwen2 and Qwen2.5",
    model_types=("qwen2",),
    dims=dims,
    rows=columns(with_rope((*EMBEDDING, *ATTENTION, *QKV_BIAS, *FFN, *OUTPUT), "half"), "hf", "native"),
)
