"""Which part of a tensor this process holds, as ranges of indices on each axis.

``torch.distributed.tensor`` has a function for it, ``compute_local_shape_and_global_offset``. It gives one offset for
each axis, so it has no answer for slices of several ranges, and in torch 2.13 it is wrong for FSDP2 over tensor
parallelism where the rows do not divide evenly (7 rows on 3 x 2). So it is worked out here, and held against the shape
of the local tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from math import prod
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

# Private by name, but the placements of every parameter under FSDP2 x TP are made of it.
from torch.distributed.tensor.placement_types import _StridedShard

from ckpt_convert.errors import UsageError

Range = tuple[int, int]
"""(start, stop) on one axis."""

Ranges = tuple[Range, ...]


class Region(NamedTuple):
    """A box of a tensor, at ``origin`` in it and at ``local`` in the tensor of the process that holds it."""

    origin: tuple[int, ...]
    shape: tuple[int, ...]
    local: tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """The part of a tensor of ``shape`` that one process holds: on each axis ranges, one after another in its memory.

    Most slices have one range on each axis; a strided one has several.
    """

    shape: tuple[int, ...]
    axes: tuple[Ranges, ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in which a process has it."""
        return tuple(_length(ranges) for ranges in self.axes)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.local_shape == self.shape

    def narrow(self, axis: int, start: int, stop: int) -> Slice:
        """The part of it from one index of its local tensor to another."""
        cut = _cut(self.axes[axis], start, stop)
        return Slice(self.shape, (*self.axes[:axis], cut, *self.axes[axis + 1 :]))

    def regions(self) -> Iterator[Region]:
        """The boxes that it is made of; none where it is empty."""
        for ranges, places in self._cells():
            if None not in places:
                yield Region(_starts(ranges), _lengths(ranges), tuple(at for at in places if at is not None))

    def outside(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(origin, shape) of boxes that make up the rest of the tensor."""
        if not prod(self.local_shape):
            yield (0,) * len(self.shape), self.shape
        for ranges, places in self._cells():
            if None in places:
                yield _starts(ranges), _lengths(ranges)

    def _cells(self) -> Iterator[tuple[Ranges, tuple[int | None, ...]]]:
        """The tensor cut where the part begins and ends, with the place of each box in the local tensor on each axis.

        That is None where the box is outside of the part. Nothing of a part that is empty.
        """
        if prod(self.local_shape):
            for cells in product(*(_cut_at(size, axis) for size, axis in zip(self.shape, self.axes, strict=True))):
                yield tuple(one for one, _ in cells), tuple(at for _, at in cells)


def whole(shape: Sequence[int]) -> Slice:
    """All of a tensor."""
    return Slice(tuple(shape), tuple(((0, size),) for size in shape))


def nothing(shape: Sequence[int]) -> Slice:
    """No element of a tensor; of one without axes, too."""
    return Slice(tuple(shape), ((),) * max(1, len(shape)))


def windows(part: Slice, whole: torch.Tensor, local: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each box of a part, the views of it in the whole tensor and in the local one."""
    for origin, shape, at in part.regions():
        yield _window(whole, origin, shape), _window(local, at, shape)


def _window(tensor: torch.Tensor, origin: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    for axis, (start, size) in enumerate(zip(origin, shape, strict=True)):
        tensor = tensor.narrow(axis, start, size)
    return tensor


@torch.no_grad()
def copy_slice(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy from a whole tensor what this process holds of the target."""
    for values, into in windows(slice_of("", target), source, local_of(target)):
        into.copy_(values)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has in memory of a tensor; no copy."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def slice_of(key: str, tensor: torch.Tensor) -> Slice:
    """The part of a tensor that this process holds; all of it, unless it is a DTensor.

    Raises UsageError, which names ``key``, for a tensor of which no process has the values (partial sums), and for one
    whose local tensor is not what its placements say.
    """
    if hasattr(tensor, "ds_id"):  # as DeepSpeed marks the parameters that ZeRO-3 has partitioned
        raise UsageError(
            f"{key}: is partitioned by DeepSpeed ZeRO-3, and nothing says which part this process has; gather it "
            "(deepspeed.zero.GatheredParameters), or train with FSDP2 (fully_shard)"
        )
    if not isinstance(tensor, DTensor):
        return whole(tensor.shape)
    shape, mesh = tuple(tensor.shape), tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return nothing(shape)
    found = Slice(shape, _axes(key, shape, tensor.placements, tuple(mesh.shape), coordinate))
    local = tuple(tensor.to_local().shape)
    if found.local_shape != local:
        raise UsageError(
            f"{key}: its placements {tensor.placements} on a mesh of {list(mesh.shape)} give {list(found.local_shape)} "
            f"to the process at {list(coordinate)}, which has {list(local)}; make it with fully_shard, "
            "parallelize_module or distribute_tensor"
        )
    return found


def _axes(
    key: str, shape: tuple[int, ...], placements: Sequence[Any], mesh: Sequence[int], coordinate: Sequence[int]
) -> tuple[Ranges, ...]:
    """What the process at ``coordinate`` holds on each axis: placements are applied one after another."""
    axes: list[Ranges] = [((0, size),) for size in shape]
    late = [dim for dim in range(len(placements)) if _is_applied_late(dim, placements, mesh)]
    for dim in (*(dim for dim in range(len(placements)) if dim not in late), *late):
        placement, count, index = placements[dim], mesh[dim], coordinate[dim]
        if isinstance(placement, Replicate):
            continue
        if isinstance(placement, Partial) or not isinstance(placement, Shard | _StridedShard):
            raise UsageError(
                f"{key}: has the placement {placement!r}, of which no process has the values; redistribute it to "
                "Replicate or Shard"
            )
        groups = placement._split_factor_int() if isinstance(placement, _StridedShard) and dim not in late else 1
        parts = [_chunk(axes[placement.dim], groups, group) for group in range(groups)]
        axes[placement.dim] = _joined([one for part in parts for one in _chunk(part, count, index)])
    return tuple(axes)


def _is_applied_late(dim: int, placements: Sequence[Any], mesh: Sequence[int]) -> bool:
    """Whether a placement comes after those to its right, as FSDP2 shards what tensor parallelism has sharded.

    It is a ``_StridedShard`` whose factor is the number of those shards. Only where they divide evenly is that the
    same as what it says by itself: the axis in as many groups, and a chunk of each.
    """
    placement = placements[dim]
    if not isinstance(placement, _StridedShard):
        return False
    right = [
        mesh[other]
        for other in range(dim + 1, len(placements))
        if isinstance(placements[other], Shard)
        and not isinstance(placements[other], _StridedShard)
        and placements[other].dim == placement.dim
    ]
    return bool(right) and placement._split_factor_int() == prod(right)


def _chunk(ranges: Ranges, count: int, index: int) -> Ranges:
    """What ``torch.chunk`` gives to this index; nothing to the last ones where there are fewer chunks."""
    length = _length(ranges)
    size = -(-length // count)
    return _cut(ranges, min(index * size, length), min((index + 1) * size, length))


def _cut(ranges: Ranges, start: int, stop: int) -> Ranges:
    """The elements ``start`` to ``stop`` of ranges one after another."""
    out = []
    at = 0
    for first, last in ranges:
        low, high = max(start, at), min(stop, at + last - first)
        if low < high:
            out.append((first + low - at, first + high - at))
        at += last - first
    return tuple(out)


def _joined(ranges: Sequence[Range]) -> Ranges:
    """The same ranges, those that follow each other as one."""
    out: list[Range] = []
    for start, stop in ranges:
        if out and out[-1][1] == start:
            out[-1] = out[-1][0], stop
        else:
            out.append((start, stop))
    return tuple(out)


def _cut_at(size: int, ranges: Ranges) -> Iterator[tuple[Range, int | None]]:
    """The ranges with their places in the local tensor, and what is between them with None, in order."""
    places = accumulate((stop - start for start, stop in ranges), initial=0)
    at = 0
    for (start, stop), place in sorted(zip(ranges, places, strict=False)):
        if at < start:
            yield (at, start), None
        yield (start, stop), place
        at = stop
    if at < size:
        yield (at, size), None


def _starts(ranges: Ranges) -> tuple[int, ...]:
    return tuple(start for start, _ in ranges)


def _lengths(ranges: Ranges) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in ranges)


def _length(ranges: Ranges) -> int:
    return sum(_lengths(ranges))
