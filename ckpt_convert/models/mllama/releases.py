"""The releases of Llama 3.2 Vision, and which of them has the shape of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.config import require_int
from ckpt_convert.models.mllama.config import TEXT, cross_part, text_part

RELEASES = {(4096, 32, 8): ("Llama 3.2 11B Vision", 1), (8192, 80, 20): ("Llama 3.2 90B Vision", 8)}
"""Name and model-parallel size, by dim, self-attention layers and cross-attention layers."""


def release(config: Mapping[str, Any]) -> str | None:
    """The name of the release with the shape of this config.json."""
    found = _release(config)
    return found[0] if found else None


def model_parallel(config: Mapping[str, Any]) -> int | None:
    """The model-parallel size of the release with this shape."""
    found = _release(config)
    return found[1] if found else None


def _release(config: Mapping[str, Any]) -> tuple[str, int] | None:
    text = text_part(config)
    layers = require_int(text, "num_hidden_layers", TEXT)
    cross = len(cross_part(text, layers))
    return RELEASES.get((require_int(text, "hidden_size", TEXT), layers - cross, cross))
