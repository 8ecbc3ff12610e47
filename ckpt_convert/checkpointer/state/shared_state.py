"""The training state of a run of several ranks: one directory of torch.distributed.checkpoint that all of them write.

Each writes what it owns of the tensors of the optimizer, as the boxes that they are, and what only it has: its random
numbers, its place in the data, and whatever else is not the same on all of them, such as an object of the user that
counts what this rank has seen. The first one writes the description and the metadata of all of it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import xxhash
from torch.distributed.tensor import DTensor

from ckpt_convert.checkpoint.record import TRAINING_STATE
from ckpt_convert.checkpointer.distributed.claims import Claims, Owned
from ckpt_convert.checkpointer.distributed.ranks import Ranks, packed, unpacked
from ckpt_convert.checkpointer.live.selection import MODEL
from ckpt_convert.checkpointer.state import dcp_files, rng, stages
from ckpt_convert.checkpointer.state.dcp_files import Piece
from ckpt_convert.checkpointer.state.serialize import SerializedState
from ckpt_convert.checkpointer.state.training_state import (
    DESCRIPTION,
    GRADIENTS,
    OPTIMIZER,
    RNG,
    SHARED_VERSION,
    Files,
    StateReader,
    is_of_each_rank,
    open_state,
    prefix_of,
)
from ckpt_convert.containers.dcp import DCP_INDEX
from ckpt_convert.dtypes import torch_name
from ckpt_convert.errors import CorruptFileError
from ckpt_convert.storage.checksums import digest
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.workspace import Folder
from ckpt_convert.tensors.cover import covers

log = logging.getLogger("ckpt_convert")


@dataclass(frozen=True)
class SharedState:
    """What one rank has of a state: ``parts`` describe those that all have, by name, ``own`` those of this rank alone.

    ``tensors`` are what it writes of all of them.
    """

    rank: int
    count: int
    parts: Mapping[str, Any]
    own: Mapping[str, Any]
    tensors: Mapping[str, Owned]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that all ranks write."""
        return sum(tensor.element_size() * prod(part.shape) for tensor, part in self.tensors.values())

    @property
    def optimizer_names(self) -> str:
        """A checksum of the names of the parameters that this rank's optimizer has."""
        return digest("\n".join(stages.names_in(self.parts.get(OPTIMIZER, {}))).encode())

    @property
    def names(self) -> list[str]:
        """The files that are written."""
        ranks = [dcp_files.data_name(rank) for rank in range(self.count)]
        return [*ranks, dcp_files.data_name(0, 1), DCP_INDEX]


def share(state: Mapping[str, SerializedState], ranks: Ranks, claims: Claims) -> SharedState:
    """Find out which rank writes what of a state; all ranks ask at the same time."""
    apart = _differences(state, ranks)
    own = {name for name in state if is_of_each_rank(name) or name in apart}
    tensors: dict[str, torch.Tensor] = {}
    for name, one in state.items():
        for at, tensor in one.tensors.items():
            is_own = is_of_each_rank(name) or at in apart.get(name, ())
            tensors[prefix_of(name, ranks.rank if is_own else None) + at] = tensor
    skeletons = {name: one.skeleton for name, one in state.items()}
    return SharedState(
        ranks.rank,
        ranks.count,
        {name: one for name, one in skeletons.items() if name not in own},
        {name: one for name, one in skeletons.items() if name in own},
        claims.of(tensors),
    )


def _differences(state: Mapping[str, SerializedState], ranks: Ranks) -> dict[str, list[str]]:
    """The parts of a state that are not the same on all ranks, each with its tensors that are not.

    Optimizers are put together by the names of parameters, and what is split over processes is one tensor for all.
    """
    digests = {
        name: {"": digest(json.dumps(one.skeleton, sort_keys=True).encode())}
        | {at: _digest(tensor) for at, tensor in one.tensors.items() if not isinstance(tensor, DTensor)}
        for name, one in state.items()
        if not is_of_each_rank(name) and name not in (OPTIMIZER, MODEL)
    }
    mine = json.dumps(digests, sort_keys=True).encode()
    what = "comparing the state of the ranks"
    if ranks.round(what, digest(mine).encode, lambda said: [b"same" if len(set(said)) == 1 else b"other"]) == b"same":
        return {}
    found: dict[str, list[str]] = unpacked(ranks.round(what, lambda: packed(digests), _compared))
    return found


def _digest(tensor: torch.Tensor) -> str:
    """A checksum of the values of a tensor."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_hexdigest(values.numpy().data)


def _compared(every: Sequence[bytes]) -> list[bytes]:
    found: dict[str, list[str]] = {}
    digests = [unpacked(one) for one in every]
    for name in dict.fromkeys(name for one in digests for name in one):
        parts = [one.get(name, {}) for one in digests]
        if any(part != parts[0] for part in parts):
            places = dict.fromkeys(at for part in parts for at in part if at)
            found[name] = [at for at in places if len({part.get(at) for part in parts}) > 1]
    return [packed(found)]


def make_files(folder: Folder, count: int) -> None:
    """Make the files that other ranks write."""
    for rank in range(count):
        folder.file(dcp_files.data_name(rank), 0).close()


def write_own(folder: Folder, state: SharedState, optimizer_names: str, workers: int) -> dict[str, Any]:
    """Write what one rank owns; returns what the first one, whose ``optimizer_names`` these are, has to know of it.

    ``workers`` threads write large tensors.
    """
    name = dcp_files.data_name(state.rank)
    boxes = list(_boxes(state.tensors))
    places, written = dcp_files.write_data(folder, name, (tensor for _, tensor in boxes), workers)
    pieces = [[*box, name, *at] for (box, _), at in zip(boxes, places, strict=True)]
    stage = {} if state.optimizer_names == optimizer_names else {OPTIMIZER: state.parts.get(OPTIMIZER)}
    return {"own": state.own, "pieces": pieces, "file": written, **stage}


def finish(folder: Folder, state: SharedState, reports: Sequence[Mapping[str, Any]]) -> Files:
    """Describe what all ranks have written; size and checksum of each file by name."""
    files: Files = {}
    for rank, report in enumerate(reports):
        name = dcp_files.data_name(rank)
        folder.file(name, report["file"]["size"]).close()  # as its rank has left it
        files[name] = dict(report["file"])
    parts = {**state.parts, **_optimizer(state, reports)}
    content = {"version": SHARED_VERSION, "parts": parts, "ranks": [report["own"] for report in reports]}
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    described = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    name = dcp_files.data_name(0, 1)
    (place,), files[name] = dcp_files.write_data(folder, name, [described], 1)
    every = [Piece(*piece) for report in reports for piece in report["pieces"]]
    pieces = list({(one.key, 0 in one.shape or tuple(one.origin)): one for one in every}.values())
    _check(pieces)
    pieces.append(Piece(DESCRIPTION, "uint8", described.shape, (0,), described.shape, name, *place))
    files[DCP_INDEX] = dcp_files.write_metadata(folder, pieces)
    return files


def _optimizer(state: SharedState, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The description of the optimizer with the parameters of all ranks, if they do not all have the same."""
    every = [state.parts.get(OPTIMIZER), *(report.get(OPTIMIZER) for report in reports)]
    there = [one for one in every if one is not None]
    return {OPTIMIZER: stages.merge(there)} if len(there) > 1 else {}


def _boxes(tensors: Mapping[str, Owned]) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """The boxes that this rank writes: key, dtype, shape of the whole, origin and sizes, and the tensor."""
    for key, (tensor, part) in tensors.items():
        if 0 in part.shape:  # every rank says so, and the first one hears it once
            nowhere = (0,) * len(part.shape)
            yield (key, torch_name(tensor.dtype), part.shape, nowhere, part.shape), tensor.new_empty(part.shape)
        for origin, sizes, local in part.regions():
            window = tensor
            for axis, (start, size) in enumerate(zip(local, sizes, strict=True)):
                window = window.narrow(axis, start, size)
            yield (key, torch_name(tensor.dtype), part.shape, origin, sizes), window


def _check(pieces: Sequence[Piece]) -> None:
    """Raise CorruptFileError where what was written does not make up a tensor."""
    boxes: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    shapes = {}
    for piece in pieces:
        boxes.setdefault(piece.key, []).append((tuple(piece.origin), tuple(piece.sizes)))
        shapes[piece.key] = tuple(piece.shape)
    wrong = [key for key, found in boxes.items() if 0 not in shapes[key] and not covers(found, shapes[key])]
    if wrong:
        raise CorruptFileError(
            f"{wrong[0]}: what the ranks have written of it leaves something out, or overlaps; hand over the same "
            "optimizers on all ranks, made after the model was sharded"
        )


def open_for(step: Place, ranks: Ranks | None, elsewhere: Collection[str] = ()) -> StateReader:
    """Open the state of a saved step for one of several ranks, or for a process that is alone.

    What the optimizers have for the parameters that are ``elsewhere``, on other ranks, is left out.
    """
    state = open_state(step / TRAINING_STATE)
    if is_of_others(state, ranks) and (ranks is None or ranks.is_first):
        for name in sorted({name for own in state.ranks for name in own if not is_of_each_rank(name)}):
            left = "they are left out" if name == GRADIENTS else "all go on with that of the first one"
            log.warning("%s: was not the same on the %d processes that saved it; %s", name, state.written_by, left)
    return state.of_rank(0 if ranks is None else ranks.rank, _count(ranks)).without_parameters(elsewhere)


def is_of_others(state: StateReader, ranks: Ranks | None) -> bool:
    """Whether another number of ranks has written a state."""
    return state.written_by != _count(ranks)


def derived_rng(state: StateReader, ranks: Ranks | None) -> dict[str, Any]:
    """The random numbers of a rank where another number of them have saved theirs."""
    if ranks is None or ranks.is_first:
        text = "%s: was saved by %d processes, and this run has %d: random numbers are derived from those of before"
        log.info(text, state.place, state.written_by, _count(ranks))
    before = state.of_first().read([RNG])[RNG]
    return rng.derived(before, 0 if ranks is None else ranks.rank, _count(ranks))


def _count(ranks: Ranks | None) -> int:
    return 1 if ranks is None else ranks.count
