"""The releases of Llama 4, one row each, with facts that their files do not contain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_convert.models.llama4.config import dims


@dataclass(frozen=True)
class Release:
    """A released model: its name and shape, its model-parallel size, and its base model's max_position_embeddings."""

    name: str
    dim: int
    layers: int
    experts: int
    mp: int
    max_positions: int


RELEASES = (
    Release("Llama 4 Scout", 5120, 48, 16, 8, 262144),
    Release("Llama 4 Maverick", 5120, 48, 128, 8, 262144),
)


def release(config: Mapping[str, Any]) -> str | None:
    """The name of the release with the shape of this config.json."""
    found = find(dims(config))
    return found.name if found else None


def model_parallel(config: Mapping[str, Any]) -> int | None:
    """The model-parallel size of the release with this shape."""
    found = find(dims(config))
    return found.mp if found else None


def find(sizes: Mapping[str, int]) -> Release | None:
    """The release with these config dimensions."""
    shape = sizes["dim"], sizes["n_layers"], sizes["n_experts"]
    return next((row for row in RELEASES if (row.dim, row.layers, row.experts) == shape), None)
