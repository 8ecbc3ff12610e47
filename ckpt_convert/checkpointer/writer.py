"""A writer of torch.distributed.checkpoint's directories that copies nothing and sums what it writes.

torch's own FileSystemWriter keeps every tensor of a file that it had to move or to clone until the file is done: for
state on an accelerator, or staged as views of one buffer, that is a second copy of all of it. It also puts a random id
and the directory's absolute path into the metadata. Everything else here is torch's: planner, metadata, file names.

The archives in the file have no CRC-32 of their tensors, which takes torch longer than writing them: nothing that reads
them looks at it, and the checksum of the file covers them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
import xxhash
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

# _StorageInfo is private by name, but every ``.metadata`` is a pickle that names it: it can neither move nor change.
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config

from ckpt_convert.convert.containers.dcp_metadata import FILE

DATA = "__0_0.distcp"
_BLOCK = 1 << 20
"""Bytes handed to the system at once; it starts to write each to disk while the next is being copied.

As measured: with 8 MB, which no processor's nearer caches hold from summing to copying, a file was never written
sooner, and often took twice as long."""


class Writer(FileSystemWriter):
    """Writes one state from one process into a directory."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, sync_files=True)
        self._directory = directory
        self._files: dict[str, dict[str, Any]] = {}

    def save(self, state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
        """Write and flush everything; the size and checksum of each file, by name.

        The steps are those of ``torch.distributed.checkpoint.save`` without its warning, which could only be silenced
        for all threads at once.
        """
        try:
            return self._save(state)
        except OSError as error:
            raise _named(error, self._directory / FILE) from error

    def _save(self, state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
        planner = DefaultSavePlanner()
        planner.set_up_planner(dict(state), None, True)
        self.set_up_storage_writer(True)
        plan = self.prepare_local_plan(planner.create_local_plan())
        plans, metadata = planner.create_global_plan([plan])
        plan = planner.finish_plan(self.prepare_global_plan(plans)[0])
        results = self.write_data(plan, planner).wait()
        self.finish(metadata, [results])
        path = self._directory / FILE
        data = path.read_bytes()
        self._files[FILE] = {"size": len(data), "checksum": xxhash.xxh3_64_hexdigest(data)}
        handle = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        return dict(sorted(self._files.items()))

    def storage_meta(self) -> StorageMeta | None:
        """Nothing: the path is that of a directory yet to be renamed, and an id makes no two saves alike."""
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with _File(self._directory / DATA) as file:
            for item in plan.items:
                start = file.size
                tensor = planner.resolve_data(item)
                if not isinstance(tensor, torch.Tensor):
                    raise TypeError(f"{item.index.fqn}: only tensors are written, not {type(tensor).__name__}")
                _save_tensor(_dense(tensor), file)
                length = file.size - start
                results.append(WriteResult(item.index, length, _StorageInfo(DATA, start, length)))
            file.sync()
            self._files[DATA] = {"size": file.size, "checksum": file.digest.hexdigest()}
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, dense, and with a storage of its own bytes only (torch.save writes whole storages)."""
    dense = tensor.detach().cpu().contiguous()
    if dense.untyped_storage().nbytes() == dense.nbytes or not dense.numel():
        return dense if dense.numel() else dense.clone()
    view = torch.from_numpy(dense.reshape(-1).view(torch.uint8).numpy())  # the same memory, under a narrower storage
    return view.view(dense.dtype).reshape(dense.shape)


def _save_tensor(tensor: torch.Tensor, file: _File) -> None:
    """``torch.save``, but what fails is what the system said, not what torch makes of an archive that is cut short."""
    try:
        with config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
            torch.save(tensor, cast(IO[bytes], file))
    except Exception:
        if file.failed is None:
            raise
    if file.failed is not None:
        raise file.failed


def _named(error: OSError, path: Path) -> OSError:
    """The error with the file that it is about, where the system named none."""
    return error if error.filename else OSError(error.errno, error.strerror or str(error), str(path))


class _File:
    """A file written from front to back: the part of a Python file that torch.save uses."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self.digest = xxhash.xxh3_64()
        self.failed: OSError | None = None
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), _BLOCK):
                self._block(view[start : start + _BLOCK])
        except OSError as error:
            self.failed = self.failed or _named(error, self._path)
            raise self.failed from error
        return len(view)

    def _block(self, block: memoryview) -> None:
        self.digest.update(block)
        done = 0
        while done < len(block):
            done += os.write(self._fd, block[done:])
        if len(block) == _BLOCK and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, self.size, len(block), os.POSIX_FADV_DONTNEED)
        self.size += len(block)

    def flush(self) -> None:
        """Nothing is held back."""

    def sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise _named(error, self._path) from error

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
