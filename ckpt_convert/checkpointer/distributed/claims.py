"""Which rank holds which slice of a model, and which of those that hold the same slice writes which part of it.

Placements do not say everything: under FSDP2 over tensor parallelism, norms live on a sub-mesh and are replicated on
every tensor-parallel rank, and pipeline stages have different layers. So the ranks exchange what they hold, once for
each layout of the model. Rank 0 divides it among them and proves that every element is written exactly once.

Of 100,000 tensors on 1,000 ranks few are different: each rank sends its different slices and, run-length coded, which
tensor has which of them. Tensors that are alike on every rank are a group, and all else is done once for each group.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from ckpt_convert.checkpointer.distributed.ranks import Ranks, packed, unpacked
from ckpt_convert.checkpointer.distributed.slices import Slice, nothing, slice_of
from ckpt_convert.dtypes import torch_name
from ckpt_convert.errors import UsageError
from ckpt_convert.storage.checksums import digest
from ckpt_convert.tensors.cover import covers
from ckpt_convert.wording import first_few

Numbers = np.ndarray[Any, np.dtype[np.int32]]

SAME, OTHER, NAMES = b"same", b"other", b"names"
"""Nothing has changed since the last time; other slices, under the same keys; other keys on different ranks."""

_TABLE = 1 << 22
"""Entries of a lookup table, at most; where more would be needed, numbers are sorted instead."""


class Held(NamedTuple):
    """What one rank has of a tensor: its dtype, in torch's words, and which slice."""

    dtype: str
    part: Slice


class Claim(NamedTuple):
    """What one rank holds: ``kinds`` are different, and ``which`` has the number of one for each name, or -1."""

    names: tuple[str, ...]
    kinds: tuple[Held, ...]
    which: Numbers


class Share(NamedTuple):
    """What one rank writes of what it holds: the share of this number, of so many that hold the same."""

    number: int
    holders: int


class Division(NamedTuple):
    """Who writes what: ``groups`` has for each name the number of its group, ``shares`` each rank's for each group.

    ``tensors`` has the dtype and shape of each group's.
    """

    names: tuple[str, ...]
    groups: Numbers
    tensors: list[tuple[str, tuple[int, ...]]]
    shares: list[list[Share]]


class Owned(NamedTuple):
    """What this process writes of a tensor: ``tensor`` has the values in its memory, ``part`` says which they are."""

    tensor: torch.Tensor
    part: Slice


class Claims:
    """What this process writes of a model's tensors; worked out together with the other ranks, once for each layout.

    ``by_rows``: those that hold the same share its rows, even if there are too few for all, and never its columns.
    """

    def __init__(self, ranks: Ranks, *, by_rows: bool = False) -> None:
        self._ranks = ranks
        self._by_rows = by_rows
        self._agreed = ""
        self._known: dict[Any, int] = {}
        self._placements: dict[Any, int] = {}
        self._numbered: dict[tuple[int, int], tuple[object, int]] = {}
        """Different placements on a mesh by number; and those of the last tensors with theirs, by ``id``: to compare
        and to hash them takes torch a quarter of a second for 45,000 tensors."""
        self._kinds: list[Held] = []
        self._sizes: list[tuple[int, ...]] = []
        self._parts: dict[tuple[int, Share], _Part | None] = {}
        self._division = Division((), np.empty(0, np.int32), [], [[]])

    def of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Owned]:
        """What this process writes of each tensor of the model: also of those that only other ranks have, nothing.

        Every rank asks at the same time. Raises UsageError, on all of them, for what cannot be divided.
        """
        claim, held = self._claim(tensors)
        names, data = "\n".join(claim.names), packed([_kinds_as_json(claim.kinds), _runs(claim.which)])
        mine = digest(names.encode() + data)
        said = b"%d %s" % (mine == self._agreed, digest(names.encode()).encode())
        state = self._ranks.round("comparing who holds what", lambda: said, _what_differs)
        if state != SAME:
            listed = list(claim.names) if state == NAMES else None
            answer = self._ranks.round(
                "dividing what is written",
                lambda: packed([listed, *unpacked(data)]),
                lambda every: _answers(divide([_claim_of(one, claim.names) for one in every]), listed is not None),
            )
            self._division = _division_of(answer, claim.names)
            self._agreed = mine
        with torch.no_grad():
            return self._owned(claim, held, self._division)

    def _owned(self, claim: Claim, held: Sequence[torch.Tensor], division: Division) -> dict[str, Owned]:
        there = dict(zip(claim.names, zip(held, claim.which.tolist(), strict=True), strict=True))
        (mine,) = division.shares
        out = {}
        for key, group in zip(division.names, division.groups.tolist(), strict=True):
            if key not in there:
                out[key] = _nothing(*division.tensors[group])
                continue
            local, kind = there[key]
            of = kind, mine[group]
            if of not in self._parts:
                self._parts[of] = _part(claim.kinds[kind], mine[group], self._by_rows)
            part = self._parts[of]
            out[key] = _nothing(*division.tensors[group]) if part is None else part.of(local)
        return out

    @torch.no_grad()
    def _claim(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Claim, list[torch.Tensor]]:
        """What this rank holds, and the tensors in its memory.

        Tensors of one placement, shape and dtype hold the same, so each is looked at once.
        """
        before, self._numbered = self._numbered, {}
        which, local = [], []
        for key, tensor in tensors.items():
            place: tuple[Any, ...] = (tensor.shape, tensor.dtype)
            here = tensor
            if isinstance(tensor, DTensor):
                here = tensor.to_local()
                placed = tensor.placements, tensor.device_mesh
                these = id(placed[0]), id(placed[1])
                numbered = before.get(these)
                if numbered is None:
                    numbered = placed, self._placements.setdefault(placed, len(self._placements))
                self._numbered[these] = numbered
                place = (*place, numbered[1])
            number = self._known.get(place)
            if number is None or hasattr(tensor, "ds_id") or here.shape != self._sizes[number]:
                held = Held(torch_name(tensor.dtype), slice_of(key, tensor))
                number = self._known[place] = len(self._kinds)
                self._kinds.append(held)
                self._sizes.append(held.part.local_shape)
            which.append(number)
            local.append(here)
        return Claim(tuple(tensors), tuple(self._kinds), np.array(which, np.int32)), local


def names_elsewhere(names: Collection[str], ranks: Ranks | None) -> set[str]:
    """Names that other ranks have, and this one does not; every rank asks at the same time."""
    if ranks is None:
        return set()
    mine = json.dumps(sorted(names)).encode()
    what = "comparing the names of what each rank has"
    if ranks.round(what, digest(mine).encode, lambda said: [SAME if len(set(said)) == 1 else OTHER]) == SAME:
        return set()
    return set(unpacked(ranks.round(what, lambda: packed(sorted(names)), _union))) - set(names)


def _union(every: Sequence[bytes]) -> list[bytes]:
    return [packed(sorted({name for one in every for name in unpacked(one)}))]


def divide(every: Sequence[Claim]) -> Division:
    """Who writes what of what each rank holds; those that hold the same slice share it.

    Raises UsageError where ranks contradict each other, and for tensors of which something is held by nobody, or twice
    in different slices. Its time is linear in the number of tensors times that of ranks.
    """
    names, rows = _aligned(every)
    groups, first = _groups(rows, len(names))
    tensors: list[tuple[str, tuple[int, ...]]] = []
    shares = [[Share(0, 0)] * len(first) for _ in every]
    problems: list[str] = []
    sizes = np.bincount(groups, minlength=len(first)).tolist()
    for group, at in enumerate(first):
        key = names[at] if sizes[group] == 1 else f"{names[at]}, and {sizes[group] - 1} more that are held alike"
        holders: dict[Slice, list[int]] = {}
        known: Held | None = None
        for rank, (claim, row) in enumerate(zip(every, rows, strict=True)):
            if row[at] < 0:
                continue
            one = claim.kinds[row[at]]
            known = known or one
            if (known.dtype, known.part.shape) != (one.dtype, one.part.shape):
                there, here = (f"{have.dtype} {list(have.part.shape)}" for have in (known, one))
                problems.append(f"{key}: rank {rank} has {here}, ranks before it {there}")
                break
            holders.setdefault(one.part, []).append(rank)
        if known is None:
            continue
        tensors.append((known.dtype, known.part.shape))
        problems += _uncovered(key, known.part.shape, holders)
        for ranks in holders.values():
            for place, rank in enumerate(ranks):
                shares[rank][group] = Share(place, len(ranks))
    if problems:
        raise UsageError("the ranks do not hold one model together:" + "".join(f"\n    {one}" for one in problems[:20]))
    return Division(names, groups, tensors, shares)


def _aligned(every: Sequence[Claim]) -> tuple[tuple[str, ...], list[Numbers]]:
    """All names, and for each rank the number of what it has of each of them."""
    if all(claim.names == every[0].names for claim in every):
        return every[0].names, [claim.which for claim in every]
    places = {key: at for at, key in enumerate(dict.fromkeys(chain.from_iterable(claim.names for claim in every)))}
    rows = []
    for claim in every:
        row = np.full(len(places), -1, np.int32)
        row[[places[key] for key in claim.names]] = claim.which
        rows.append(row)
    return tuple(places), rows


def _groups(rows: Sequence[Numbers], count: int) -> tuple[Numbers, list[int]]:
    """Names that have the same numbers in all rows: for each name the number of its group, and the first one of each.

    Row by row, each group is split by what its names have there.
    """
    groups, number = np.zeros(count, np.int64), 1
    for row in rows:
        width = int(row.max(initial=-1)) + 2
        pairs = groups * width + row + 1
        if number * width > _TABLE:
            found, groups = np.unique(pairs, return_inverse=True)
            number = len(found)
            continue
        there = np.zeros(number * width, bool)
        there[pairs] = True
        groups = (np.cumsum(there) - 1)[pairs]
        number = int(there.sum())
    return groups.astype(np.int32), np.unique(groups, return_index=True)[1].tolist()


def _uncovered(key: str, shape: tuple[int, ...], holders: Mapping[Slice, Sequence[int]]) -> Iterator[str]:
    """What is wrong where the slices of a tensor that ranks hold do not make it up, each element once."""
    boxes = [(region.origin, region.shape) for part in holders for region in part.regions()]
    if 0 not in shape and not covers(boxes, shape):
        parts = first_few([f"rank {ranks[0]} {_text(part)}" for part, ranks in holders.items()], 4, " and others")
        yield f"{key} {list(shape)}: its slices leave something out, or overlap in part ({parts})"


def _text(part: Slice) -> str:
    return "×".join("+".join(f"{start}:{stop}" for start, stop in axis) or "nothing" for axis in part.axes)


class _Part(NamedTuple):
    """A rank's share of a held slice; ``where`` it is in the tensor in memory (axis, start, count), None for all."""

    part: Slice
    where: tuple[int, int, int] | None

    def of(self, local: torch.Tensor) -> Owned:
        return Owned(local.detach() if self.where is None else local.narrow(*self.where), self.part)


def _part(held: Held, share: Share, by_rows: bool) -> _Part | None:
    """A rank's share: rows of the slice, or columns where there are too few; None for nothing."""
    sizes = held.part.local_shape
    if share.holders == 1 or (share.holders and not sizes and not share.number):
        return _Part(held.part, None)
    if not share.holders or not sizes:
        return None
    enough = (axis for axis, size in enumerate(sizes) if size >= share.holders)
    axis = 0 if by_rows else next(enough, sizes.index(max(sizes)))
    start, stop = (sizes[axis] * number // share.holders for number in (share.number, share.number + 1))
    return _Part(held.part.narrow(axis, start, stop), (axis, start, stop - start))


def _nothing(dtype: str, shape: tuple[int, ...]) -> Owned:
    part = nothing(shape)
    return Owned(torch.empty(part.local_shape, dtype=getattr(torch, dtype)), part)


# What ranks send


def _what_differs(said: Sequence[bytes]) -> list[bytes]:
    unchanged, names = zip(*(one.split(b" ") for one in said), strict=True)
    if set(unchanged) == {b"1"}:
        return [SAME]
    return [OTHER if len(set(names)) == 1 else NAMES]


def _claim_of(data: bytes, names: tuple[str, ...]) -> Claim:
    """What a rank says it holds; its ``names`` are those of the rank that asks, unless it says others."""
    listed, kinds, runs = unpacked(data)
    held = tuple(Held(dtype, _slice(shape, axes)) for dtype, shape, axes in kinds)
    return Claim(names if listed is None else tuple(listed), held, _numbers(runs))


def _answers(division: Division, with_names: bool) -> list[bytes]:
    """The answer to each rank: what is the same for all, and its own shares."""
    common = packed([division.names if with_names else None, _runs(division.groups), division.tensors])
    return [len(common).to_bytes(8, "little") + common + packed(shares) for shares in division.shares]


def _division_of(answer: bytes, names: tuple[str, ...]) -> Division:
    """An answer of ``_answers``, with the shares of this rank alone."""
    end = 8 + int.from_bytes(answer[:8], "little")
    listed, runs, tensors = unpacked(answer[8:end])
    mine = [Share(*share) for share in unpacked(answer[end:])]
    sizes = [(dtype, tuple(shape)) for dtype, shape in tensors]
    return Division(names if listed is None else tuple(listed), _numbers(runs), sizes, [mine])


def _kinds_as_json(kinds: Sequence[Held]) -> list[Any]:
    return [[one.dtype, one.part.shape, one.part.axes] for one in kinds]


def _slice(shape: Sequence[int], axes: Sequence[Sequence[Sequence[int]]]) -> Slice:
    return Slice(tuple(shape), tuple(tuple((start, stop) for start, stop in axis) for axis in axes))


def _runs(numbers: Numbers) -> list[list[int]]:
    """The numbers run-length coded: each with how often it follows itself."""
    ends = np.flatnonzero(np.diff(numbers, append=-2))
    return [numbers[ends].tolist(), np.diff(ends, prepend=-1).tolist()]


def _numbers(runs: Sequence[Sequence[int]]) -> Numbers:
    values, counts = runs
    return np.repeat(np.array(values, np.int32), np.array(counts, np.int64))
