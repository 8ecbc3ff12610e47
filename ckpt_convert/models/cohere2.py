"""Command R7B and Command A (Cohere 2): attention and MLP in parallel, with one norm for both.

hf: what transformers 5.23 saves. Unlike most of Hugging Face's models, its RoPE layout is interleaved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.config import CONFIG, base_dims, optional_bool
from ckpt_convert.models.core.picking import columns, named, with_rope
from ckpt_convert.models.core.table import Family
from ckpt_convert.models.parts.decoder import ATTENTION, ATTENTION_BIAS, EMBEDDING, FFN, OUTPUT


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of the table; tied by default."""
    return {
        **base_dims({"tie_word_embeddings": True, **config}),
        "attention_bias": int(optional_bool(config, "attention_bias", CONFIG, False)),
    }


COHERE2 = Family(
    name="cohere2",
    title="Command R7B and Command A",
    model_types=("cohere2",),
    dims=dims,
    rows=with_rope(
        columns(
            (
                *EMBEDDING,
                *ATTENTION,
                *ATTENTION_BIAS,
                *named(FFN, "ffn.gate", "ffn.down", "ffn.up"),
                *OUTPUT,
            ),
            "hf",
        ),
        "interleaved",
    ),
)
