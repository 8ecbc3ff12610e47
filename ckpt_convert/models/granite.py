"""Granite 3 (dense): Llama's layout, key for key; its multipliers are in the config only.

hf: what transformers 5.23 saves.
"""

from __future__ import annotations

from ckpt_convert.models.core.picking import columns
from ckpt_convert.models.core.table import Family
from ckpt_convert.models.llama import config as llama_config
from ckpt_convert.models.parts.decoder import ATTENTION, ATTENTION_BIAS, EMBEDDING, FFN, FFN_BIAS, OUTPUT

GRANITE = Family(
    name="granite",
    title="Granite 3, dense",
    model_types=("granite",),
    dims=llama_config.dims,
    rows=columns((*EMBEDDING, *ATTENTION, *ATTENTION_BIAS, *FFN, *FFN_BIAS, *OUTPUT), "hf"),
)
