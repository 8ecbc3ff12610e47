"""Rows of Llama's table that other decoders share, without the meta column, which only Llama and Mistral have."""

from __future__ import annotations

from ckpt_convert.models.core.picking import columns, named
from ckpt_convert.models.llama.table import LLAMA

_ROWS = columns(LLAMA.rows, "hf", "native", "torchtitan")

EMBEDDING = named(_ROWS, "tok_embeddings")
ATTENTION = named(_ROWS, "attention_norm", "attention.q", "attention.k", "attention.v", "attention.o")
ATTENTION_BIAS = named(_ROWS, "attention.q.bias", "attention.k.bias", "attention.v.bias", "attention.o.bias")
"""Enabled by ``attention_bias``, in Hugging Face's layout alone."""

FFN = named(_ROWS, "ffn_norm", "ffn.gate", "ffn.down", "ffn.up")
FFN_BIAS = named(_ROWS, "ffn.gate.bias", "ffn.up.bias", "ffn.down.bias")
"""Enabled by ``mlp_bias``, in Hugging Face's layout alone."""

OUTPUT = named(_ROWS, "norm", "output")
