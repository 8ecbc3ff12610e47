"""OLMo 2: norms after attention and MLP instead of before, and norms over all of q and all of k.

hf: what transformers 5.23 saves. The weights of the q and k norms have the RoPE layout of the rows of q and k.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.builders import rms_norm
from ckpt_convert.models.core.config import CONFIG, base_dims, optional_bool
from ckpt_convert.models.core.picking import columns, named
from ckpt_convert.models.core.table import Family, Key
from ckpt_convert.models.parts.decoder import ATTENTION, ATTENTION_BIAS, EMBEDDING, FFN, OUTPUT

_QK_NORM = (
    *rms_norm(
        "attention.q_norm",
        "n_heads*head_dim",
        heads="n_heads",
        hf=Key("model.layers.{layer}.self_attn.q_norm", rope="half"),
    ),
    *rms_norm(
        "attention.k_norm",
        "n_kv_heads*head_dim",
        heads="n_kv_heads",
        hf=Key("model.layers.{layer}.self_attn.k_norm", rope="half"),
    ),
)

POST_NORM = rms_norm("attention.post_norm", hf="model.layers.{layer}.post_attention_layernorm")
FFN_POST_NORM = rms_norm("ffn.post_norm", hf="model.layers.{layer}.post_feedforward_layernorm")


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of the table."""
    return {
        **base_dims(config),
        "attention_bias": int(optional_bool(config, "attention_bias", CONFIG, False)),
    }


OLMO2 = Family(
    name="olmo2",
    title="OLMo 2",
    model_types=("olmo2",),
    dims=dims,
    rows=columns(
        (
            *EMBEDDING,
            *named(ATTENTION, "attention.q", "attention.k", "attention.v", "attention.o"),
            *ATTENTION_BIAS,
            *_QK_NORM,
            *POST_NORM,
            *named(FFN, "ffn.gate", "ffn.down", "ffn.up"),
            *FFN_POST_NORM,
            *OUTPUT,
        ),
        "hf",
    ),
)
