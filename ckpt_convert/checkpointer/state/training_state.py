"""Writing, reading and checking a ``training_state/`` directory: everything that resuming needs except the weights.

It is a directory of torch.distributed.checkpoint, so ``torch.distributed.checkpoint.load`` reads its tensors. What is
no tensor is described in one of them, JSON as bytes under the key ``DESCRIPTION``. Reading unpickles nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ckpt_convert.analysis.check.training import compare_files
from ckpt_convert.checkpointer.distributed.slices import Region, local_of, slice_of
from ckpt_convert.checkpointer.state import stages
from ckpt_convert.checkpointer.state.dcp_files import DcpWriter
from ckpt_convert.checkpointer.state.deserialize import rebuild, tensor_keys
from ckpt_convert.checkpointer.state.serialize import SerializedState, path_segment
from ckpt_convert.containers.dcp import DCP_INDEX, dcp
from ckpt_convert.dtypes import DTYPES
from ckpt_convert.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptFileError,
    InputError,
    UsageError,
)
from ckpt_convert.storage.base import RangeReader
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.reader import DEFAULT_WORKERS, reading
from ckpt_convert.storage.workspace import Folder
from ckpt_convert.tensors.header import StoredTensor

VERSION = 1
SHARED_VERSION = 2
"""The version of a state that several ranks have written: in ``ranks`` it has what each of them had of its own."""
DESCRIPTION = "ckpt_convert.json"
"""The key of the tensor whose bytes describe the state."""

_WAY_OUT = "copy the checkpoint again, or resume from another one"

OPTIMIZER = "optimizer"
"""The part with the state of the optimizers."""

RNG = "rng"
"""The part with the random numbers."""

GRADIENTS = "gradients"
"""The part with the gradients of an update that is not complete yet."""

Files = dict[str, dict[str, Any]]

Like = Callable[[str, tuple[int, ...]], "torch.Tensor | None"]
"""Gives, for a key and a shape, a tensor that is split over processes as the one that is read is to be."""


class _OfRank(NamedTuple):
    """The description of what one rank had of its own."""

    rank: int
    skeleton: Any


def write_state(
    folder: Folder, packed: Mapping[str, SerializedState] | SerializedState, workers: int = DEFAULT_WORKERS
) -> Files:
    """Write a state, or several by name, into a new folder; its files are on disk afterwards.

    Returns size (bytes) and checksum (xxh3_64, hex) of each file by name. No copy of the state is made: of tensors
    that are not on the CPU, or not contiguous, one at a time. ``workers`` threads write large tensors.
    """
    if isinstance(packed, SerializedState):
        content: dict[str, Any] = {"version": VERSION, "tree": packed.skeleton}
        tensors = dict(packed.tensors)
    else:
        content = {"version": VERSION, "parts": {name: one.skeleton for name, one in packed.items()}}
        tensors = {prefix_of(name) + at: tensor for name, one in packed.items() for at, tensor in one.tensors.items()}
    if DESCRIPTION in tensors:
        raise UsageError(f"{DESCRIPTION!r} is the name of the description of the state; call yours something else")
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    described = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return DcpWriter(folder, workers).save({DESCRIPTION: described} | tensors)


def prefix_of(name: str, rank: int | None = None) -> str:
    """How the keys of the tensors of a part begin; with ``rank``, of a part that one rank of several has."""
    return f"{path_segment(name)}/" if rank is None else f"ranks/{rank}/{path_segment(name)}/"


def is_of_each_rank(name: str) -> bool:
    """Whether each of several ranks has a part of its own: its random numbers, and its place in the data."""
    return name.partition("/")[0] in (RNG, "dataloader")


def check_state(directory: Place, files: Mapping[str, Mapping[str, Any]], checksums: bool = True) -> list[str]:
    """Compare the directory with the result of ``write_state``; returns the problems.

    Without ``checksums`` only names and sizes are compared, and no file is read.
    """

    return [finding.text for finding in compare_files(directory, files, checksums)]


def read_state(directory: Place, parts: Iterable[str] | None = None) -> Any:
    """Read the state, or a dict of the named ``parts`` (None: all of them), on the CPU.

    Raises CheckpointNotFoundError when there is none, UsageError for a part that was not written, ConfigError for one
    of a newer version, and CorruptFileError for a damaged one.
    """
    return open_state(directory).read(parts)


@dataclass(frozen=True)
class StateReader:
    """A reader of a state whose description was read, but no tensor.

    ``parts`` are the names that it was written under, None for a single state; ``tensors`` all tensors by path, a
    part's ones below its name.
    """

    place: Place
    parts: tuple[str, ...] | None
    tensors: Mapping[str, tuple[tuple[RangeReader, StoredTensor], ...]]
    _skeletons: Any
    ranks: tuple[Mapping[str, Any], ...] = ()
    """For each of the ranks that wrote it, the parts that it had of its own; nothing where one process wrote it."""

    @property
    def written_by(self) -> int:
        """How many ranks have written it."""
        return len(self.ranks) or 1

    def of_rank(self, rank: int, count: int) -> StateReader:
        """The state as one of so many ranks goes on with it: with what the same rank of as many had of its own.

        After another number of ranks that is what the first one had, without its random numbers and gradients.
        """
        if self.parts is None:
            return self
        if self.written_by == count:
            return self._with_own(rank if self.ranks else None)
        found = self.of_first()
        left = {RNG} | ({GRADIENTS} & {name for own in self.ranks for name in own})
        return replace(found, parts=tuple(name for name in found.parts or () if name not in left))

    def of_first(self) -> StateReader:
        """The state as the first of the ranks had it that wrote it."""
        return self._with_own(0 if self.ranks else None)

    def without_parameters(self, names: Collection[str]) -> StateReader:
        """The state without what the optimizers have for these parameters, which is not read then."""
        if not names or OPTIMIZER not in (self.parts or ()):
            return self
        kept = stages.without(self._skeletons[OPTIMIZER], names)
        return replace(self, _skeletons={**self._skeletons, OPTIMIZER: kept})

    def _with_own(self, rank: int | None) -> StateReader:
        own = {} if rank is None else {name: _OfRank(rank, one) for name, one in self.ranks[rank].items()}
        return replace(self, parts=(*(self.parts or ()), *own), _skeletons=self._skeletons | own)

    def read(self, parts: Iterable[str] | None = None, like: Like | None = None) -> Any:
        """The state, or a dict of some of its parts; only their tensors are read.

        Of a tensor for which ``like`` gives one that is split over processes, this process reads its part.
        """
        if self.parts is None:
            if parts is not None:
                raise UsageError(f"{self.place}: has no parts, so none of them can be asked for; read all of it")
            return self._tree(self._skeletons, "")
        wanted = self.parts if parts is None else tuple(parts)
        unknown = [name for name in wanted if name not in self.parts]
        if unknown:
            raise UsageError(f"{self.place}: has no part {', '.join(unknown)}; it has: {', '.join(self.parts)}")
        return {name: self._part(name, like) for name in wanted}

    def _part(self, name: str, like: Like | None) -> Any:
        skeleton = self._skeletons[name]
        if isinstance(skeleton, _OfRank):
            return self._tree(skeleton.skeleton, prefix_of(name), like, prefix_of(name, skeleton.rank))
        return self._tree(skeleton, prefix_of(name), like)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        _, stored = self._pieces(key)[0]
        return stored.box.shape if stored.box is not None else stored.shape

    def tensor(self, key: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read one tensor: a new one, or ``into`` a tensor of the same shape, cast and moved where that differs.

        Of one that is split over processes, this process reads its part.
        """
        pieces = self._pieces(key)
        shape = self.shape(key)
        if into is not None and tuple(into.shape) != shape:
            raise UsageError(f"{self.place}: {key!r} is of shape {list(shape)}, which does not fit {list(into.shape)}")
        if len(pieces) == 1 and into is None:
            return self._piece(*pieces[0])
        out = into if into is not None else torch.empty(shape, dtype=self._dtype(*pieces[0]))
        local, wanted = local_of(out), list(slice_of(key, out).regions())
        with torch.no_grad():
            for reader, stored in pieces:
                origin = stored.box.origin if stored.box is not None else (0,) * len(shape)
                common = [one for region in wanted if (one := _common(region, origin, stored.shape)) is not None]
                if common:
                    piece = self._piece(reader, stored)
                for region in common:
                    from_, to = piece, local
                    for axis, size in enumerate(region.shape):
                        from_ = from_.narrow(axis, region.origin[axis] - origin[axis], size)
                        to = to.narrow(axis, region.local[axis], size)
                    to.copy_(from_)
        return out

    def _tree(self, skeleton: Any, prefix: str, like: Like | None = None, own: str | None = None) -> Any:
        """The tree of a description; ``own`` is the prefix of what one rank has of its own, ``prefix`` of the rest."""

        def tensor(key: str) -> torch.Tensor:
            split = like(key, self.shape(key)) if like is not None else None
            if split is None:
                return self.tensor(key)
            return self.tensor(
                key, into=torch.empty_like(split, dtype=self._dtype(*self._pieces(key)[0]), device="cpu")
            )

        try:
            tensors = {
                at: tensor(own + at if own is not None and own + at in self.tensors else prefix + at)
                for at in tensor_keys(skeleton)
            }
            return rebuild(skeleton, tensors)
        except CorruptFileError as error:
            raise CorruptFileError(f"{self.place}: {error}") from error

    def _pieces(self, key: str) -> tuple[tuple[RangeReader, StoredTensor], ...]:
        found = self.tensors.get(key)
        if found is None:
            raise CorruptFileError(f"{self.place}: {key!r} should be there, but is not; {_WAY_OUT}")
        return found

    def _dtype(self, reader: RangeReader, stored: StoredTensor) -> torch.dtype:
        dtype = DTYPES.get(stored.dtype)
        if dtype is None or not dtype.torch or stored.packed is not None:
            raise CorruptFileError(f"{reader.name}: {stored.key!r} is of dtype {stored.dtype}, which is never written")
        found: torch.dtype = getattr(torch, dtype.torch)
        return found

    def _piece(self, reader: RangeReader, stored: StoredTensor) -> torch.Tensor:
        out = torch.empty(stored.shape, dtype=self._dtype(reader, stored))
        if out.numel():
            reader.readinto(stored.offset, out.reshape(-1).view(torch.uint8).numpy().data)
        return out


def _common(region: Region, origin: Sequence[int], shape: Sequence[int]) -> Region | None:
    """The intersection of two boxes, None if it is empty."""
    starts = [max(one, other) for one, other in zip(region.origin, origin, strict=True)]
    ends = [min(a + m, b + n) for a, m, b, n in zip(region.origin, region.shape, origin, shape, strict=True)]
    if any(start >= end for start, end in zip(starts, ends, strict=True)):
        return None
    sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
    local = tuple(at + start - first for at, start, first in zip(region.local, starts, region.origin, strict=True))
    return Region(tuple(starts), sizes, local)


def open_state(directory: Place) -> StateReader:
    """Read the description of a state; raises as ``read_state`` does."""
    directory = directory.listed()
    if not (directory / DCP_INDEX).is_regular_file():
        raise CheckpointNotFoundError(
            f"{directory}: should hold {DCP_INDEX}, which is written last, but does not; the save was cut short or the "
            "directory was removed, so resume from another checkpoint"
        )
    with reading(directory):
        files, _ = dcp.read_dcp_directory(directory)
    pieces: dict[str, list[tuple[RangeReader, StoredTensor]]] = {}
    for file in files:
        for stored in file.header.tensors:
            pieces.setdefault(stored.key, []).append((file.reader, stored))
    tensors = {key: tuple(found) for key, found in pieces.items()}
    content = _description(directory, tensors)
    parts = content.get("parts")
    if parts is None and "tree" in content:
        return StateReader(directory, None, tensors, content["tree"])
    if not isinstance(parts, dict):
        raise CorruptFileError(
            f"{directory}: {DESCRIPTION} should hold the parts of the state, but does not; {_WAY_OUT}"
        )
    ranks = content.get("ranks") or ()
    return StateReader(directory, tuple(parts), tensors, parts, tuple(ranks))


def _description(
    directory: Place, tensors: Mapping[str, tuple[tuple[RangeReader, StoredTensor], ...]]
) -> dict[str, Any]:
    if DESCRIPTION not in tensors:
        raise InputError(
            f"{directory}: has no {DESCRIPTION!r}, so it was not written by a Checkpointer; load it with "
            "torch.distributed.checkpoint instead"
        )
    raw = StateReader(directory, None, tensors, None).tensor(DESCRIPTION)
    try:
        content = json.loads(raw.numpy().tobytes())
        version = content["version"]
        if not isinstance(version, int):
            raise TypeError(f"its version is {version!r}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptFileError(
            f"{directory}: {DESCRIPTION} is no description of a state ({error}); {_WAY_OUT}"
        ) from error
    if version > SHARED_VERSION:
        raise ConfigError(
            f"{directory}: is of version {version}, and this ckpt-convert knows versions up to {SHARED_VERSION}; "
            "update it"
        )
    return dict(content)
