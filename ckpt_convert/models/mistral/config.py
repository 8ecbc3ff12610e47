"""Dense Mistral models: the sizes in Hugging Face's config.json; ``mistral.params`` translates it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.config import base_dims

CLASS_KV_HEADS = 8
"""The default of transformers' MistralConfig for num_key_value_heads."""


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes in a Mistral config.json under the tables' symbols; tied is 0 or 1, and there are no biases.

    Raises ConfigError for a missing or unusable size, and for sizes that do not divide.
    """
    return {**base_dims(config, kv_heads_default=CLASS_KV_HEADS), "attention_bias": 0, "mlp_bias": 0}
