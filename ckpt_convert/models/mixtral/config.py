"""Mixtral: the sizes in Hugging Face's config.json; ``mixtral.params`` translates it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.config import CONFIG, optional_int
from ckpt_convert.models.mistral import config as mistral_config

CLASS_EXPERTS = 8
"""The default of transformers' MixtralConfig."""


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of a Mixtral config.json; raises ConfigError."""
    return {
        **mistral_config.dims(config),
        "n_experts": optional_int(config, "num_local_experts", CONFIG, CLASS_EXPERTS),
    }
