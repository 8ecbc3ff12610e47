"""Gemma, Gemma 2 and Gemma 3 (text): Llama's layout with an independent head_dim and tied embeddings.

Gemma 2 adds norms after attention and MLP, so ``post_attention_layernorm``, Llama's name for the norm before the MLP,
is that after attention here; Gemma 3 adds a norm over each head of q and k. Norm weights are the same in every format:
that Gemma multiplies by 1 + weight is up to the model's code.

hf: what transformers 5.23 saves. native: the converters for Gemma and Gemma 2 of torchtune 0.6.1, whose rows are
interleaved. torchtune has no Gemma 3, torchtitan none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.builders import rms_norm
from ckpt_convert.models.core.config import CONFIG, base_dims, optional_bool
from ckpt_convert.models.core.picking import columns, named
from ckpt_convert.models.core.table import Family
from ckpt_convert.models.parts.decoder import ATTENTION, ATTENTION_BIAS, EMBEDDING, FFN, OUTPUT

GEMMA3_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
}
"""transformers' Gemma3TextConfig: releases with vision store only what differs from it."""


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """Gemma's config dimensions; head_dim is 256 and key/value heads 16 if absent."""
    return _dims({"head_dim": 256, "num_key_value_heads": 16, "tie_word_embeddings": True, **config})


def dims2(config: Mapping[str, Any]) -> dict[str, int]:
    """Gemma 2's config dimensions; head_dim is 256 and key/value heads 4 if absent."""
    return _dims({"head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True, **config})


def dims3(config: Mapping[str, Any], where: str = CONFIG) -> dict[str, int]:
    """Gemma 3's config dimensions, from its text config (``where`` in messages)."""
    return _dims({**GEMMA3_DEFAULTS, **config}, where)


def _dims(config: Mapping[str, Any], where: str = CONFIG) -> dict[str, int]:
    return {
        **base_dims(config, where=where),
        "attention_bias": int(optional_bool(config, "attention_bias", where, False)),
    }


_QKVO = named(ATTENTION, "attention.q", "attention.k", "attention.v", "attention.o")
_GATE_DOWN_UP = named(FFN, "ffn.gate", "ffn.down", "ffn.up")

_POST_NORM = rms_norm(
    "attention.post_norm", hf="model.layers.{layer}.post_attention_layernorm", native="layers.{layer}.sa_scale"
)
_FFN_NORM = rms_norm("ffn_norm", hf="model.layers.{layer}.pre_feedforward_layernorm", native="layers.{layer}.mlp_norm")
_FFN_POST_NORM = rms_norm(
    "ffn.post_norm", hf="model.layers.{layer}.post_feedforward_layernorm", native="layers.{layer}.mlp_scale"
)
_NORM = rms_norm("norm", hf="model.norm", native="norm.rms_norm")

_QK_NORM = (
    *rms_norm("attention.q_norm", "head_dim", hf="model.layers.{layer}.self_attn.q_norm"),
    *rms_norm("attention.k_norm", "head_dim", hf="model.layers.{layer}.self_attn.k_norm"),
)

GEMMA = Family(
    name="gemma",
    title="Gemma",
    model_types=("gemma",),
    dims=dims,
    rows=columns((*EMBEDDING, *ATTENTION, *ATTENTION_BIAS, *FFN, *OUTPUT), "hf", "native"),
)

GEMMA2 = Family(
    name="gemma2",
    title="Gemma 2",
    model_types=("gemma2",),
    dims=dims2,
    rows=columns(
        (
            *EMBEDDING,
            *named(ATTENTION, "attention_norm"),
            *_QKVO,
            *ATTENTION_BIAS,
            *_POST_NORM,
            *_FFN_NORM,
            *_GATE_DOWN_UP,
            *_FFN_POST_NORM,
            *_NORM,
            *named(OUTPUT, "output"),
        ),
        "hf",
        "native",
    ),
)

GEMMA3_TEXT = Family(
    name="gemma3_text",
    title="Gemma 3, text only",
    model_types=("gemma3_text",),
    dims=dims3,
    rows=columns(
        (
            *EMBEDDING,
            *named(ATTENTION, "attention_norm"),
            *_QKVO,
            *ATTENTION_BIAS,
            *_QK_NORM,
            *_POST_NORM,
            *_FFN_NORM,
            *_GATE_DOWN_UP,
            *_FFN_POST_NORM,
            *OUTPUT,
        ),
        "hf",
    ),
)
