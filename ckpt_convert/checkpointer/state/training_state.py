"""Writing, reading and checking a ``training_state/`` directory: everything that resuming needs beside the weights.

It is a directory of torch.distributed.checkpoint, so ``torch.distributed.checkpoint.load`` reads its tensors. What is
no tensor is described in one of them, JSON as bytes under the key ``DESCRIPTION``. Reading unpickles nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_convert.analysis.check.training import compare_files
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
from ckpt_convert.storage.reader import reading
from ckpt_convert.storage.workspace import Folder
from ckpt_convert.tensors.header import StoredTensor

VERSION = 1
DESCRIPTION = "ckpt_convert.json"
"""The key of the tensor whose bytes describe the state."""

_WAY_OUT = "copy the checkpoint again, or resume from another one"

Files = dict[str, dict[str, Any]]


def write_state(folder: Folder, packed: Mapping[str, SerializedState] | SerializedState) -> Files:
    """Write a state, or several by name, into a new folder; its files are on disk afterwards.

    Returns size (bytes) and checksum (xxh3_64, hex) of each file by name. No copy of the state is made: of tensors
    that are not on the CPU, or not contiguous, one at a time.
    """
    if isinstance(packed, SerializedState):
        content: dict[str, Any] = {"version": VERSION, "tree": packed.skeleton}
        tensors = dict(packed.tensors)
    else:
        content = {"version": VERSION, "parts": {name: one.skeleton for name, one in packed.items()}}
        tensors = {
            f"{path_segment(name)}/{at}": tensor for name, one in packed.items() for at, tensor in one.tensors.items()
        }
    if DESCRIPTION in tensors:
        raise UsageError(f"{DESCRIPTION!r} is the name of the description of the state; call yours something else")
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    return DcpWriter(folder).save({DESCRIPTION: torch.frombuffer(bytearray(text), dtype=torch.uint8)} | tensors)


def check_state(directory: Place, files: Mapping[str, Mapping[str, Any]], checksums: bool = True) -> list[str]:
    """Compare the directory with what ``write`` returned; the problems, none when all is well.

    Without ``checksums`` only names and sizes are looked at, and no file is read.
    """

    return [finding.text for finding in compare_files(directory, files, checksums)]


def read_state(directory: Place, parts: Iterable[str] | None = None) -> Any:
    """Give back what was written: the state, or a dict of those named ``parts`` (None: all of them), on the CPU.

    Raises CheckpointNotFoundError when there is none, UsageError for a part that was not written, ConfigError for one
    of a newer version, and CorruptFileError for a damaged one.
    """
    return open_state(directory).read(parts)


@dataclass(frozen=True)
class StateReader:
    """A state whose description was read; no tensor was.

    ``parts`` are the names that it was written under, None for a single state; ``tensors`` all tensors by path, a
    part's ones below its name.
    """

    place: Place
    parts: tuple[str, ...] | None
    tensors: Mapping[str, tuple[tuple[RangeReader, StoredTensor], ...]]
    _skeletons: Any

    def read(self, parts: Iterable[str] | None = None) -> Any:
        """The state, or a dict of some of its parts; only their tensors are read."""
        if self.parts is None:
            if parts is not None:
                raise UsageError(f"{self.place}: has no parts, so none of them can be asked for; read all of it")
            return self._tree(self._skeletons, "")
        wanted = self.parts if parts is None else tuple(parts)
        unknown = [name for name in wanted if name not in self.parts]
        if unknown:
            raise UsageError(f"{self.place}: has no part {', '.join(unknown)}; it has: {', '.join(self.parts)}")
        return {name: self._tree(self._skeletons[name], path_segment(name) + "/") for name in wanted}

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        _, stored = self._pieces(key)[0]
        return stored.box.shape if stored.box is not None else stored.shape

    def tensor(self, key: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read one tensor: a new one, or ``into`` a tensor of the same shape, cast and moved where that differs."""
        pieces = self._pieces(key)
        shape = self.shape(key)
        if into is not None and tuple(into.shape) != shape:
            raise UsageError(f"{self.place}: {key!r} is of shape {list(shape)}, which does not fit {list(into.shape)}")
        if len(pieces) == 1 and into is None:
            return self._piece(*pieces[0])
        first = self._piece(*pieces[0])
        out = torch.empty(shape, dtype=first.dtype) if into is None else into
        with torch.no_grad():
            for number, (reader, stored) in enumerate(pieces):
                window = out
                for axis, start in enumerate(stored.box.origin if stored.box is not None else ()):
                    window = window.narrow(axis, start, stored.shape[axis])
                window.copy_(first if number == 0 else self._piece(reader, stored))
        return out

    def _tree(self, skeleton: Any, prefix: str) -> Any:
        try:
            tensors = {at: self.tensor(prefix + at) for at in tensor_keys(skeleton)}
            return rebuild(skeleton, tensors)
        except CorruptFileError as error:
            raise CorruptFileError(f"{self.place}: {error}") from error

    def _pieces(self, key: str) -> tuple[tuple[RangeReader, StoredTensor], ...]:
        found = self.tensors.get(key)
        if found is None:
            raise CorruptFileError(f"{self.place}: {key!r} should be there, but is not; {_WAY_OUT}")
        return found

    def _piece(self, reader: RangeReader, stored: StoredTensor) -> torch.Tensor:
        dtype = DTYPES.get(stored.dtype)
        if dtype is None or not dtype.torch or stored.packed is not None:
            raise CorruptFileError(f"{reader.name}: {stored.key!r} is of dtype {stored.dtype}, which is never written")
        out = torch.empty(stored.shape, dtype=getattr(torch, dtype.torch))
        if out.numel():
            reader.readinto(stored.offset, out.reshape(-1).view(torch.uint8).numpy().data)
        return out


def open_state(directory: Place) -> StateReader:
    """Read the description of a state; raises as ``read`` does."""
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
    return StateReader(directory, tuple(parts), tensors, parts)


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
    if version > VERSION:
        raise ConfigError(
            f"{directory}: is of version {version}, and this ckpt-convert knows versions up to {VERSION}; update it"
        )
    return dict(content)
