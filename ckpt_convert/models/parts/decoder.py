"""Parts of Llama's table that the tables of other decoders are made of.

Meta's column is left out: only Llama and Mistral have one.
"""

from __future__ import annotations

from ckpt_convert.models.core.picking import columns, named
from ckpt_convert.models.llama.table import LLAMA

_ROWS = columns(LLAMA.rows, "hf", "native", "torchtitan")

EMBEDDING = named(_ROWS, "tok_embeddings")
ATTENTION = named(_ROWS, "attention_norm", "attention.q", "attention.k", "attention.v", "attention.o")
ATTENTION_BIAS = named(_ROWS, "attention.q.bias", "attention.k.bias", "attention.v.bias", "attention.o.bias")
"""Where ``attention_bias`` says so, and only in Hugging Face's layout."""

FFN = named(_ROWS, "ffn_norm", "ffn.gate", "ffn.down", "ffn.up")
FFN_BIAS = named(_ROWS, "ffn.gate.bias", "ffn.up.bias", "ffn.down.bias")
"""Where ``mlp_bias`` says so, and only in Hugging Face's layout."""

OUTPUT = named(_ROWS, "norm", "output")
