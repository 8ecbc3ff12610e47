"""EXAONE 4: norms after attention and MLP as in OLMo 2, but the q and k norms are per head.

hf: what transformers 5.23 saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.config import base_dims
from ckpt_convert.models.core.picking import columns, named
from ckpt_convert.models.core.table import Family
from ckpt_convert.models.olmo2 import FFN_POST_NORM, POST_NORM
from ckpt_convert.models.parts.decoder import ATTENTION, EMBEDDING, FFN, OUTPUT
from ckpt_convert.models.qwen3 import QK_NORM


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of the table; key/value heads are 32 if absent, as in transformers."""
    return base_dims(config, kv_heads_default=32)


EXAONE4 = Family(
    name="exaone4",
    title="EXAONE 4",
    model_types=("exaone4",),
    dims=dims,
    rows=columns(
        (
            *EMBEDDING,
            *named(ATTENTION, "attention.q", "attention.k", "attention.v", "attention.o"),
            *QK_NORM,
            *POST_NORM,
            *named(FFN, "ffn.gate", "ffn.down", "ffn.up"),
            *FFN_POST_NORM,
            *OUTPUT,
        ),
        "hf",
    ),
)
