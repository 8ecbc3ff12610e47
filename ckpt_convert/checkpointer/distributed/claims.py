"""Who holds what of a model, and which of those that hold the same writes which part of it.

What placements say is not all: under FSDP2 over tensor parallelism norms lie on a part of the mesh, with a copy on
every tensor-parallel rank, and pipeline stages have other layers. So the ranks tell each other what they hold, once for
each layout of the model; the first rank shares it out, and sees that nothing is left over or written twice.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from ckpt_convert.checkpointer.distributed.ranks import Ranks
from ckpt_convert.checkpointer.distributed.slices import Slice, local_of, nothing, slice_of
from ckpt_convert.dtypes import torch_name
from ckpt_convert.errors import UsageError
from ckpt_convert.storage.checksums import digest
from ckpt_convert.tensors.cover import covers

SAME, OTHER = b"same", b"other"


class Held(NamedTuple):
    """What one rank has of a tensor: its dtype, in torch's words, and which part."""

    dtype: str
    part: Slice


class Share(NamedTuple):
    """What one rank writes of what it holds: the share of this number, of so many that hold the same."""

    number: int
    holders: int


class Owned(NamedTuple):
    """What this process writes of a tensor: ``tensor`` has the values in its memory, ``part`` says which they are."""

    tensor: torch.Tensor
    part: Slice


class Claims:
    """What this process writes of a model's tensors; worked out together with the other ranks, once for each layout."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._agreed = ""
        self._names: list[tuple[str, Held]] = []
        self._shares: list[Share] = []

    def of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Owned]:
        """What this process writes of each tensor of the model: also of those that only other ranks have, nothing.

        Every rank asks at the same time. Raises UsageError for what cannot be shared out, on all of them.
        """
        held = {key: Held(torch_name(tensor.dtype), slice_of(key, tensor)) for key, tensor in tensors.items()}
        data = _packed([[key, one.dtype, one.part.shape, one.part.axes] for key, one in held.items()])
        mine = digest(data)
        same = self._ranks.round("comparing who holds what", lambda: _said(mine == self._agreed), _whether_all)
        if same != SAME:
            answer = self._ranks.round("sharing out what is written", lambda: data, _shared_out)
            names, shares = _unpacked(answer)
            self._names = [(key, Held(dtype, _slice(shape, axes))) for key, dtype, shape, axes in names]
            self._shares = [Share(number, holders) for number, holders, times in shares for _ in range(times)]
            self._agreed = mine
        known = self._names or list(held.items())
        return {
            key: _owned(tensors.get(key), held.get(key, one), share)
            for (key, one), share in zip(known, self._shares, strict=True)
        }


def share_out(every: Sequence[Mapping[str, Held]]) -> tuple[list[tuple[str, Held]], list[list[Share]]]:
    """All tensors by name, and for each rank its share of each of them; ``every`` is what each rank holds.

    Raises UsageError where ranks contradict each other, and for tensors of which something is held by nobody, or twice
    in different slices.
    """
    names: dict[str, Held] = {}
    holders: dict[str, dict[Slice, list[int]]] = {}
    problems = []
    for rank, held in enumerate(every):
        for key, one in held.items():
            known = names.setdefault(key, one)
            if (known.dtype, known.part.shape) != (one.dtype, one.part.shape):
                there, here = (f"{have.dtype} {list(have.part.shape)}" for have in (known, one))
                problems.append(f"{key}: rank {rank} has {here}, ranks before it {there}")
            holders.setdefault(key, {}).setdefault(one.part, []).append(rank)
    problems += [text for key, one in names.items() for text in _uncovered(key, one.part.shape, holders[key])]
    if problems:
        raise UsageError("the ranks do not hold one model together:" + "".join(f"\n    {one}" for one in problems[:20]))
    shares = [[Share(0, 0)] * len(names) for _ in every]
    for number, key in enumerate(names):
        for ranks in holders[key].values():
            for place, rank in enumerate(ranks):
                shares[rank][number] = Share(place, len(ranks))
    return list(names.items()), shares


def _uncovered(key: str, shape: tuple[int, ...], holders: Mapping[Slice, Sequence[int]]) -> Iterator[str]:
    """What is wrong where the slices of a tensor that ranks hold do not make it up, each element once."""
    boxes = [(region.origin, region.shape) for part in holders for region in part.regions()]
    if 0 not in shape and not covers(boxes, shape):
        parts = "; ".join(f"rank {ranks[0]} {_text(part)}" for part, ranks in list(holders.items())[:4])
        yield f"{key} {list(shape)}: its slices leave something out, or overlap in part ({parts})"


def _text(part: Slice) -> str:
    return "×".join("+".join(f"{start}:{stop}" for start, stop in axis) or "nothing" for axis in part.axes)


def _owned(tensor: torch.Tensor | None, held: Held, share: Share) -> Owned:
    """The part of a held slice that is a rank's share: rows of it, or columns where there are too few."""
    if tensor is None or not share.holders:
        part = nothing(held.part.shape)
        return Owned(torch.empty(part.local_shape, dtype=getattr(torch, held.dtype)), part)
    local, sizes = local_of(tensor), held.part.local_shape
    if share.holders == 1:
        return Owned(local, held.part)
    if not sizes:
        return Owned(local, held.part) if not share.number else _owned(None, held, share)
    axis = next((axis for axis, size in enumerate(sizes) if size >= share.holders), sizes.index(max(sizes)))
    start, stop = (sizes[axis] * number // share.holders for number in (share.number, share.number + 1))
    return Owned(local.narrow(axis, start, stop - start), held.part.narrow(axis, start, stop))


def _whether_all(said: Sequence[bytes]) -> list[bytes]:
    return [_said(all(one == SAME for one in said))]


def _said(same: bool) -> bytes:
    return SAME if same else OTHER


def _shared_out(said: Sequence[bytes]) -> list[bytes]:
    """The answer to each rank: the names where not all have the same, and the shares, equal ones in a row as one."""
    every = [_held(one) for one in said]
    names, shares = share_out(every)
    alike = all(list(held) == [key for key, _ in names] for held in every)
    listed = [] if alike else [[key, one.dtype, one.part.shape, nothing(one.part.shape).axes] for key, one in names]
    return [_packed([listed, [[*share, len(list(run))] for share, run in groupby(mine)]]) for mine in shares]


def _held(data: bytes) -> dict[str, Held]:
    return {key: Held(dtype, _slice(shape, axes)) for key, dtype, shape, axes in _unpacked(data)}


def _slice(shape: Sequence[int], axes: Sequence[Sequence[Sequence[int]]]) -> Slice:
    return Slice(tuple(shape), tuple(tuple((start, stop) for start, stop in axis) for axis in axes))


def _packed(content: Any) -> bytes:
    return zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 1)


def _unpacked(data: bytes) -> Any:
    return json.loads(zlib.decompress(data))
