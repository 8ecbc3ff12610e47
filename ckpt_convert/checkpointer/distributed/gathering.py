"""Small tensors that are split over processes, as a whole: what of a model is not written slice by slice.

``DTensor.full_tensor`` gives every tensor to every process, with a collective for each axis of its mesh. Here one
collective has all of them, each element is sent by one of those that hold it, and the first process may get all alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ckpt_convert.checkpointer.distributed.claims import Owned
from ckpt_convert.checkpointer.distributed.ranks import Ranks
from ckpt_convert.checkpointer.distributed.slices import local_of, windows
from ckpt_convert.errors import UsageError


@torch.no_grad()
def gather(owned: Mapping[str, Owned], ranks: Ranks, *, to_all: bool) -> dict[str, torch.Tensor]:
    """The whole tensors, in new memory on the CPU: on every rank, or on the first one, and then {} on the others.

    All ranks call it, in the training's thread, with what each of them owns.
    """
    mine = [(key, part, _dense(tensor)) for key, (tensor, part) in owned.items() if tensor.numel()]
    every: list[Any] | None = [None] * ranks.count if to_all or ranks.is_first else None
    if to_all:
        dist.all_gather_object(every, mine, group=ranks.process_group)
    else:
        dist.gather_object(mine, every, group=ranks.process_group, group_dst=0)
    if every is None:
        return {}
    out = {key: torch.empty(part.shape, dtype=tensor.dtype) for key, (tensor, part) in owned.items()}
    for key, part, values in (one for of_rank in every for one in of_rank):
        for into, piece in windows(part, out[key], values):
            into.copy_(piece)
    return out


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, in memory of its own: all of a tensor's memory would be sent."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


@torch.no_grad()
def with_whole_rows(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process has whole rows: one that is split by columns is split by rows instead.

    All processes of its mesh call it, in the training's thread. Raises UsageError where that is not possible.
    """
    if not isinstance(tensor, DTensor) or not any(_is_by_columns(one) for one in tensor.placements):
        return tensor
    if any(isinstance(one, _StridedShard) for one in tensor.placements):
        raise UsageError(
            f"{key}: has the placements {tensor.placements}, and to merge DoRA, whole rows are needed; save the "
            "adapter alone (merged=False), or shard it by rows (Shard(0))"
        )
    placements = [Shard(0) if _is_by_columns(one) else one for one in tensor.placements]
    found = cast(DTensor, tensor.detach()).redistribute(placements=placements)
    local_of(found)  # it is there once the exchange is over
    return found


def _is_by_columns(placement: Placement) -> bool:
    return isinstance(placement, Shard | _StridedShard) and placement.dim > 0
