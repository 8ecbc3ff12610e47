"""GLM-4-0414: fused gate_up, norms before and after attention and MLP, biases on q, k and v.

hf: what transformers 5.23 saves. RoPE is interleaved and rotates the first half of each head; as there is no other
column, the rows are not marked as rotating.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.builders import rms_norm
from ckpt_convert.models.core.config import CONFIG, base_dims, optional_bool
from ckpt_convert.models.core.picking import columns, fused, named, with_rope
from ckpt_convert.models.core.table import Family
from ckpt_convert.models.parts.decoder import ATTENTION, ATTENTION_BIAS, EMBEDDING, FFN, OUTPUT

_POST_NORM = rms_norm("attention.post_norm", hf="model.layers.{layer}.post_self_attn_layernorm")
_FFN_POST_NORM = rms_norm("ffn.post_norm", hf="model.layers.{layer}.post_mlp_layernorm")


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of the table; if absent, head_dim is 128, key/value heads 2, biases on."""
    return {
        **base_dims({"head_dim": 128, **config}, kv_heads_default=2),
        "attention_bias": int(optional_bool({"attention_bias": True, **config}, "attention_bias", CONFIG, False)),
    }


GLM4 = Family(
    name="glm4",
    title="GLM-4-0414",
    model_types=("glm4",),
    dims=dims,
    rows=with_rope(
        columns(
            (
                *EMBEDDING,
                *ATTENTION,
                *named(ATTENTION_BIAS, "attention.q.bias", "attention.k.bias", "attention.v.bias"),
                *_POST_NORM,
                *named(FFN, "ffn_norm"),
                *fused(named(FFN, "ffn.gate", "ffn.up"), hf="model.layers.{layer}.mlp.gate_up_proj.weight"),
                *named(FFN, "ffn.down"),
                *_FFN_POST_NORM,
                *OUTPUT,
            ),
            "hf",
        ),
        None,
    ),
)
