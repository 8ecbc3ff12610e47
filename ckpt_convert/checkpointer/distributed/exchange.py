"""Turning slices of columns into slices of rows before a save: a rank then writes long runs of bytes.

Files have tensors row by row, so what a rank has of columns is as many short runs as there are rows: it would write
them one by one. The ranks that share rows exchange them once, over the mesh of the tensor, in the training's thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Literal, cast

import torch
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ckpt_convert.checkpointer.distributed.slices import local_of

Writers = Literal["auto", "direct", "exchange"]

SHORT = 1 << 16
"""Bytes of a run that is worth to be written by itself."""


@torch.no_grad()
def exchanged(tensors: Mapping[str, torch.Tensor], writers: Writers) -> dict[str, torch.Tensor]:
    """The tensors as they are written: those that are split by columns split by rows, with the same values.

    "direct" exchanges nothing, "exchange" all of these, and "auto" those whose runs are short. It is called by all
    ranks, for the same tensors in one order.
    """
    return {key: _by_rows(one) if _is_exchanged(one, writers) else one for key, one in tensors.items()}


def _is_exchanged(tensor: torch.Tensor, writers: Writers) -> bool:
    """Whether a tensor is split by columns, in a way that its mesh can change; the same on all of its ranks."""
    if writers == "direct" or not isinstance(tensor, DTensor) or tensor.dim() < 2:
        return False
    kinds = tensor.placements
    if any(isinstance(one, _StridedShard) for one in kinds) or not any(_is_by_columns(one) for one in kinds):
        return False
    ways = prod(size for size, one in zip(tensor.device_mesh.shape, kinds, strict=True) if isinstance(one, Shard))
    columns = [size for size, one in zip(tensor.device_mesh.shape, kinds, strict=True) if _is_by_columns(one)]
    run = prod(tensor.shape[1:]) * tensor.element_size() // prod(columns)
    return tensor.shape[0] >= ways and (writers == "exchange" or run < SHORT)


def _is_by_columns(placement: Placement) -> bool:
    return isinstance(placement, Shard) and placement.dim > 0


def _by_rows(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    placements = [Shard(0) if _is_by_columns(one) else one for one in tensor.placements]
    found = cast(DTensor, tensor.detach()).redistribute(placements=placements)
    local_of(found)  # it is there once the exchange is over
    return found
