"""A writer of torch.distributed.checkpoint's directories without copies and with checksums.

torch's FileSystemWriter keeps every tensor that it had to move or clone until the file is complete: for state on an
accelerator, or staged as views of one buffer, that is a second copy of all of it. It also writes a random id and the
directory's absolute path into the metadata. Everything else is torch's: planner, metadata, file names.

The archives in the file have no CRC-32 of their tensors, which takes torch longer than writing them: no reader checks
it, and the checksum of the file covers them.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import IO, Any, NamedTuple, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

# _StorageInfo is private by name, but every ``.metadata`` is a pickle that names it: it can neither move nor change.
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.utils.serialization import config

from ckpt_convert.containers.dcp import DCP_INDEX, DCP_SUFFIX
from ckpt_convert.storage import checksums
from ckpt_convert.storage.checksums import digest
from ckpt_convert.storage.workspace import Folder, StagedFile
from ckpt_convert.tensors.pool import map_threaded
from ckpt_convert.tensors.runs import RunWriter

DATA = f"__0_0{DCP_SUFFIX}"
NAMES = (DATA, DCP_INDEX)
"""The files that are written."""
_SMALL = 1 << 16
"""Bytes that are worth a write of their own: torch.save makes dozens of calls for each tensor, however small it is."""
_CHUNK = 8 << 20
"""Bytes that one thread writes: of a tensor with more, several do, while the checksum is computed.

Measured: one thread copies 1.5 GB a second to the page cache, less than a disk may take."""


class DcpWriter:
    """Writes one state from one process into a directory."""

    def __init__(self, folder: Folder, workers: int) -> None:
        self._folder = folder
        self._workers = workers

    def save(self, state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
        """Write and flush everything; the size and checksum of each file, by name.

        The steps are those of ``torch.distributed.checkpoint.save`` without its warning, which could only be silenced
        for all threads at once. The last field of the metadata stays empty: it would be the path of a directory yet to
        be renamed, and an id that makes no two saves alike.
        """
        planner = DefaultSavePlanner()
        planner.set_up_planner(dict(state), None, True)
        plans, metadata = planner.create_global_plan([planner.create_local_plan()])
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data, written = self._write(planner.finish_plan(plans[0]), planner)
        data = pickle.dumps(metadata)
        self._folder.write(DCP_INDEX, data)
        return {DCP_INDEX: {"size": len(data), "checksum": digest(data)}, DATA: written}

    def _write(self, plan: SavePlan, planner: SavePlanner) -> tuple[dict[MetadataIndex, _StorageInfo], dict[str, Any]]:
        """Write the tensors; returns the location of each, and the size and checksum of their file."""

        def tensor(item: WriteItem) -> torch.Tensor:
            found = planner.resolve_data(item)
            if not isinstance(found, torch.Tensor):
                raise TypeError(f"{item.index.fqn}: only tensors are written, not {type(found).__name__}")
            return found

        places, written = write_data(self._folder, DATA, map(tensor, plan.items), self._workers)
        return {item.index: _StorageInfo(DATA, *at) for item, at in zip(plan.items, places, strict=True)}, written


class Piece(NamedTuple):
    """A box of a tensor, written as one record: ``shape`` is that of the whole tensor, ``length`` bytes at ``offset``.

    ``dtype`` is in torch's words.
    """

    key: str
    dtype: str
    shape: Sequence[int]
    origin: Sequence[int]
    sizes: Sequence[int]
    file: str
    offset: int
    length: int


def data_name(rank: int, number: int = 0) -> str:
    """The file in which torch.distributed.checkpoint writes what a rank has."""
    return f"__{rank}_{number}{DCP_SUFFIX}"


def write_data(
    folder: Folder, name: str, tensors: Iterable[torch.Tensor], workers: int
) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """Write and flush a file of tensors: (offset, bytes) of each, and the size and checksum of the file.

    ``workers`` threads write large tensors.
    """
    places = []
    with folder.file(name, None) as staged:
        file = _File(staged, 0 if folder.sends_parts else workers)
        for tensor in tensors:
            start = file.size
            _save_tensor(_dense(tensor), file)
            places.append((start, file.size - start))
        file.finish()
        staged.sync()
    return places, {"size": file.size, "checksum": file.digest.hexdigest()}


def write_metadata(folder: Folder, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Write the metadata of what several ranks have written; its size and checksum."""
    tensors: dict[str, Any] = {}
    storage = {}
    for piece in pieces:
        properties = TensorProperties(dtype=getattr(torch, piece.dtype))
        known = tensors.setdefault(piece.key, TensorStorageMetadata(properties, torch.Size(piece.shape), []))
        origin = torch.Size(piece.origin)
        storage[MetadataIndex(piece.key, origin, len(known.chunks))] = _StorageInfo(
            piece.file, piece.offset, piece.length
        )
        known.chunks.append(ChunkStorageMetadata(origin, torch.Size(piece.sizes)))
    names = {key: (key,) for key in tensors}
    data = pickle.dumps(Metadata(tensors, names, storage, None, CURRENT_DCP_VERSION))
    folder.write(DCP_INDEX, data)
    return {"size": len(data), "checksum": digest(data)}


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, contiguous, with a storage of its own bytes only (torch.save writes whole storages)."""
    dense = tensor.detach().cpu().contiguous()
    if dense.untyped_storage().nbytes() == dense.nbytes or not dense.numel():
        return dense if dense.numel() else dense.clone()
    view = torch.from_numpy(dense.reshape(-1).view(torch.uint8).numpy())  # the same memory, under a narrower storage
    return view.view(dense.dtype).reshape(dense.shape)


def _save_tensor(tensor: torch.Tensor, file: _File) -> None:
    """``torch.save`` that raises the system's error, not torch's error about the truncated archive."""
    try:
        with config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
            torch.save(tensor, cast(IO[bytes], file))
    except Exception:
        if file.failed is None:
            raise
    if file.failed is not None:
        raise file.failed


class _File:
    """A file written from front to back: the part of a Python file that torch.save uses. ``finish`` ends it."""

    def __init__(self, staged: StagedFile, workers: int) -> None:
        """``workers`` threads write what is large; 0: everything is appended, for a store that uploads it in parts."""
        self.digest = checksums.new(checksums.XXH3)
        self.failed: BaseException | None = None
        self._staged = staged
        self._small = bytearray()
        self._written = 0
        self._writers = [RunWriter() for _ in range(workers + 1)] if workers else []

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            if len(view) >= _SMALL:
                self.finish()
                self._write(view)
            else:
                self._small += view
                if len(self._small) >= _SMALL:
                    self.finish()
        except BaseException as error:
            self.failed = error
            raise
        return len(view)

    @property
    def size(self) -> int:
        return self._written + len(self._small)

    def finish(self) -> None:
        """Write what small writes have left."""
        data, self._small = self._small, bytearray()
        if data:
            self._write(memoryview(data))

    def _write(self, view: memoryview) -> None:
        if not self._writers:
            self.digest.update(view)
            self._staged.append(view)
        elif len(view) <= _CHUNK:
            self.digest.update(view)
            self._staged.write(self._written, view)
        else:
            self._write_large(view)
        self._written += len(view)

    def _write_large(self, view: memoryview) -> None:
        start, end = self._written, self._written + len(view)
        cuts = [start, *range(start // _CHUNK * _CHUNK + _CHUNK, end, _CHUNK), end]
        writes = [partial(self._write_run, at, view[at - start : to - start]) for at, to in pairwise(cuts)]
        map_threaded(lambda act: act(), [partial(self.digest.update, view), *writes], len(self._writers))

    def _write_run(self, offset: int, data: memoryview) -> None:
        writer = self._writers.pop()
        try:
            writer.begin(self._staged, offset)
            writer.write(data)
            writer.end()
        finally:
            self._writers.append(writer)

    def flush(self) -> None:
        """No-op: what is small waits for the next tensor's, or for ``finish``."""
