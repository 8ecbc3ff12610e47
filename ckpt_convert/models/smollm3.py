"""SmolLM3: Llama's layout, key for key; which layers have no RoPE is in the config only.

hf: what transformers 5.23 saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.granite import GRANITE
from ckpt_convert.models.llama import config as llama_config


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of the table; by default tied, and 4 key/value heads."""
    return llama_config.dims({"num_key_value_heads": 4, "tie_word_embeddings": True, **config})


SMOLLM3 = GRANITE.replace(name="smollm3", title="SmolLM3", model_types=("smollm3",), dims=dims)
