"""Llama 1 to 3.3: the sizes in Hugging Face's config.json; ``llama.params`` translates it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.config import CONFIG, base_dims, optional_bool


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of a Llama config.json; flags (tied, attention_bias, mlp_bias) are 0 or 1.

    Raises ConfigError for a missing or invalid size, and for sizes that do not divide.
    """
    return {
        **base_dims(config),
        "attention_bias": int(optional_bool(config, "attention_bias", CONFIG, False)),
        "mlp_bias": int(optional_bool(config, "mlp_bias", CONFIG, False)),
    }
