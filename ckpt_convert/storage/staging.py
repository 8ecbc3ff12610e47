"""Writing a directory that appears under its name complete or not at all.

Everything is written into ``.NAME.partial`` beside the destination, flushed to disk, and renamed. The partial
directory is locked while it is written, so a second writer of the same destination is refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from ckpt_convert.errors import NotEnoughSpaceError, OutputExistsError
from ckpt_convert.storage.lock import Lock
from ckpt_convert.storage.names import WEIGHT_SUFFIXES, partial_of, replaced_of
from ckpt_convert.storage.reader import pread_into

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system says when the disk, the quota or the size limit of a file is used up."""


def check_destination(destination: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse a destination that is there already, or where writing would touch the source.

    Raises OutputExistsError.
    """
    if len(os.fsencode(partial_of(destination.absolute()).name)) > 253:
        raise OutputExistsError(f"{destination}: the name is too long for the file system; choose a shorter one")
    target = destination.resolve()
    origin = source.resolve()
    if origin.name in (partial_of(target).name, replaced_of(target).name) and origin.parent == target.parent:
        raise OutputExistsError(
            f"{source}: has the name that {destination} has while it is written; rename it, or choose another output"
        )
    beside = origin.is_file() and target == origin.parent
    if beside or target == origin or (origin.is_dir() and target.is_relative_to(origin)):
        raise OutputExistsError(
            f"{destination}: lies inside the source {source}; the source is never written, choose another place"
        )
    if origin.is_relative_to(target):
        raise OutputExistsError(
            f"{destination}: holds the source {source}, which writing it would replace; choose another place"
        )
    if destination.is_symlink() and not destination.exists():
        raise OutputExistsError(f"{destination}: is a link that leads nowhere; remove it or choose another name")
    if destination.exists():
        if not destination.is_dir():
            raise OutputExistsError(f"{destination}: is a file, but the output is a directory; choose another name")
        names = [entry.name for entry in destination.iterdir()]
        if names and not overwrite:
            raise OutputExistsError(
                f"{destination}: exists already; pass --overwrite to replace it, or choose another name"
            )
        if names and not any(name == "ckpt_convert" or name.endswith(WEIGHT_SUFFIXES) for name in names):
            raise OutputExistsError(
                f"{destination}: holds no checkpoint, so --overwrite does not remove it; choose another name"
            )


def check_space(destination: Path, needed: int) -> None:
    """Refuse to start what cannot end: raises NotEnoughSpaceError when fewer than ``needed`` bytes are free."""
    free = shutil.disk_usage(existing_parent(destination)).free
    if free < needed:
        raise NotEnoughSpaceError(
            f"{destination}: the output needs {needed:,} bytes, but the disk has {free:,} free; "
            "free some space or choose another disk (nothing was written)"
        )


def existing_parent(path: Path) -> Path:
    """The nearest directory above ``path`` that exists."""
    parent = path.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    return parent


class Staging:
    """The partial directory of one destination, locked; a context manager that leaves it when left early.

    ``resume`` keeps what an earlier attempt left there, otherwise that is removed first.
    """

    def __init__(self, destination: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        # Of a link to a directory, the directory is replaced and the link stays.
        self.destination = destination.resolve() if destination.is_dir() else destination.absolute()
        self.overwrite = overwrite
        self.path = partial_of(self.destination)
        self._aside = replaced_of(self.destination)
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire()
        self._tidy()
        self._refuse_existing()
        self.resumed = resume and any(self.path.iterdir())
        if not resume:
            clear(self.path)

    def _tidy(self) -> None:
        """Put back, or remove, the old output that an earlier run had moved aside when it was killed."""
        if not self._aside.exists():
            return
        if self.destination.exists():
            shutil.rmtree(self._aside)
        else:
            os.rename(self._aside, self.destination)

    def _refuse_existing(self) -> None:
        if not self.overwrite and self.destination.exists() and any(self.destination.iterdir()):
            self.discard()
            raise OutputExistsError(
                f"{self.destination}: exists already; pass --overwrite to replace it, or choose another name"
            )

    def _acquire(self) -> Lock:
        while True:
            if self.path.is_symlink() or self.path.is_file():
                raise OutputExistsError(
                    f"{self.path}: is in the way of writing {self.destination}; remove it or choose another name"
                )
            self.path.mkdir(exist_ok=True)
            lock = Lock.directory(
                self.path,
                f"{self.destination}: another process is writing it (it holds {self.path.name}); "
                "wait for it, or choose another destination",
            )
            # Between opening and locking, the holder before us may have renamed or removed the directory.
            if lock.is_at(self.path):
                return lock
            lock.close()

    def file(self, name: str, size: int) -> StagedFile:
        """Open a file of ``size`` bytes for writing at any place; directories in its name are made."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return StagedFile(path, size)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file at once."""
        with self.file(name, len(data)) as file:
            file.write(0, memoryview(data))
            file.sync()

    def keep_only(self, names: Iterable[str]) -> None:
        """Remove every file but these: what lies beside the weights is written again."""
        kept = {self.path / name for name in names}
        for path in list(self.path.rglob("*")):
            if path not in kept and (path.is_symlink() or not path.is_dir()):
                path.unlink()

    def allocated(self) -> int:
        """Bytes that the partial directory takes on the disk already."""
        return sum(path.stat().st_blocks * 512 for path in self.path.rglob("*") if path.is_file())

    def keeps(self, error: BaseException) -> bool:
        """Whether the partial directory is worth keeping after this error: it is, where resuming may succeed."""
        return isinstance(error, NotEnoughSpaceError) and any(self.path.iterdir())

    def commit(self) -> None:
        """Give the directory its name: flush directories, rename, flush the parent; what was there is replaced."""
        for folder, _, _ in os.walk(self.path):
            sync_directory(Path(folder))
        replaced = self.destination.exists() and any(self.destination.iterdir())
        if replaced:
            if not self.overwrite:
                raise OutputExistsError(f"{self.destination}: appeared while it was being written; it was left alone")
            os.rename(self.destination, self._aside)
        try:
            os.rename(self.path, self.destination)
        except BaseException:
            if replaced:
                os.rename(self._aside, self.destination)
            raise
        sync_directory(self.destination.parent)
        if replaced:
            shutil.rmtree(self._aside, ignore_errors=True)
        self.release()

    def discard(self) -> None:
        """Remove the partial directory."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Give up the lock, leaving the partial directory as it is."""
        self._lock.close()

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class StagedFile:
    """A file of known size, written at any place and from several threads."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        os.ftruncate(self._fd, size)

    def write(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], offset + done)

    def readinto(self, offset: int, buffer: memoryview) -> int:
        return pread_into(self._fd, buffer, offset)

    def start_writeback(self, offset: int, nbytes: int) -> None:
        """Let the system begin to write these bytes to disk, so that the flush at the end has less to wait for."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def explain_full_disk(staging: Staging, advice: str | None = None) -> Iterator[None]:
    """Turn the system's "no space" into NotEnoughSpaceError, which says what is left and how to go on (``advice``)."""
    advice = advice or f"what is done lies in {staging.path.name}, free some space and run again with --resume"
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise NotEnoughSpaceError(
            f"{staging.destination}: {os.strerror(error.errno or 0)} while writing {error.filename or 'the output'}; "
            f"{advice}"
        ) from error


def clear(directory: Path) -> None:
    """Remove everything in a directory, but not the directory."""
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to disk, where the system can."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)
