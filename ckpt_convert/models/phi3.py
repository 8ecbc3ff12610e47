"""Phi-3, Phi-3.5 and Phi-4 (including Phi-4-mini): Llama's layout with fused QKV and fused gate_up.

hf: what transformers 5.23 saves. native: the converter of torchtune 0.6.1 for Phi-3 mini and Phi-4 14B, which splits
both and keeps the RoPE layout: torchtune's Phi-3 is half-split, as Hugging Face's. Phi-4-mini (tied, partial rotary) is
written in the same layout; torchtune itself has no such model.
"""

from __future__ import annotations

from ckpt_convert.models.core.config import base_dims
from ckpt_convert.models.core.picking import columns, fused, named, with_rope
from ckpt_convert.models.core.table import Family
from ckpt_convert.models.parts.decoder import ATTENTION, EMBEDDING, FFN, OUTPUT

PHI3 = Family(
    name="phi3",
    title="Phi-3, Phi-3.5, Phi-4 and Phi-4-mini",
    model_types=("phi3",),
    dims=base_dims,
    rows=with_rope(
        columns(
            (
                *EMBEDDING,
                *named(ATTENTION, "attention_norm"),
                *fused(
                    named(ATTENTION, "attention.q", "attention.k", "attention.v"),
                    hf="model.layers.{layer}.self_attn.qkv_proj.weight",
                ),
                *named(ATTENTION, "attention.o"),
                *named(FFN, "ffn_norm"),
                *fused(named(FFN, "ffn.gate", "ffn.up"), hf="model.layers.{layer}.mlp.gate_up_proj.weight"),
                *named(FFN, "ffn.down"),
                *OUTPUT,
            ),
            "hf",
            "native",
        ),
        "half",
    ),
)
