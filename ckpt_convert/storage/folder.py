"""An open directory into which files are written: links are not followed, and all files written are recorded.

Everything goes through the directory's descriptor, so that renaming the directory meanwhile cannot redirect a write;
at the end, its content is compared with the record.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import NamedTuple

from ckpt_convert.storage.place import Place, as_place
from ckpt_convert.storage.reader import pread_into
from ckpt_convert.storage.system import LARGE, PAGE, Advice, file_system_type, reserve, sync_directory, writing

_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_DIRECT_ON = {"ext2", "ext3", "ext4", "xfs", "overlay"}
"""File systems on which files are written past the page cache where that is asked for.

Of others, some take such writes for those of other sizes, some copy them anyway, and some are slower.
"""

_FILE = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)

_RESERVED = 1 << 20
"""The size from which reserving the blocks of a file is worth a system call."""


class _Identity(NamedTuple):
    """Identifies a file and its content."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    links: int

    @classmethod
    def of(cls, found: os.stat_result) -> _Identity:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_nlink)


_FLUSHED = 1 << 18
"""Bytes of a write that the system is told to write to the disk at once."""

_COPIED = 1 << 17
"""Bytes that the system copies to the page cache at a time, from a multiple of it to the next.

So it takes memory for them in one piece. For more it takes larger pieces, which a virtual machine that returns its free
memory to the host may have only from there, at up to a second for a GB."""


@dataclass
class _Ledger:
    """Shared by a folder and its subfolders: the files written, and those that are held back."""

    written: dict[str, _Identity | None] = field(default_factory=dict)
    kept_back: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    continued: bool = False


@dataclass(frozen=True)
class Folder:
    """A directory, open as ``fd``, or the folder ``inside`` it.

    mode: limits the permissions of files and folders, in addition to the umask.
    rank: how late a file of this name is written: 0 at once, others in ``complete``, the highest rank last.
    advice: ends the messages of errors.
    """

    fd: int
    root: Path
    mode: int = 0o777
    rank: Callable[[str], int] = lambda name: 0
    advice: Advice = field(default_factory=Advice)
    inside: str = ""
    _is_direct: bool = False
    _ledger: _Ledger = field(default_factory=_Ledger)

    @classmethod
    @contextlib.contextmanager
    def at(cls, path: Path) -> Iterator[Folder]:
        """Open an existing directory to write into it; raises OSError."""
        fd = os.open(path, _DIRECTORY)
        try:
            yield cls(fd, path)
        finally:
            os.close(fd)

    @classmethod
    @contextlib.contextmanager
    def joined(cls, path: Path, advice: Advice) -> Iterator[Folder]:
        """Open a directory that another process writes, to write into the files that it created; raises OSError."""
        with cls.at(path) as folder:
            folder._ledger.continued = True
            yield replace(folder, advice=advice)

    @property
    def place(self) -> Place:
        """Where the files written can be read."""
        return as_place(self.root / self.inside)

    @property
    def sends_parts(self) -> bool:
        """No: every write goes to the file."""
        return False

    def with_mode(self, mode: int) -> Folder:
        """The same folder, for files with at most these permissions."""
        return replace(self, mode=self.mode & mode)

    def past_cache(self) -> Folder:
        """The same folder, for files that nobody reads soon: large writes go past the page cache, where that works."""
        return replace(self, _is_direct=hasattr(os, "O_DIRECT") and file_system_type(self.root) in _DIRECT_ON)

    def comes_last(self, name: str) -> bool:
        """Whether a file of this name is held back until all others are written."""
        return self.rank(self._full(name)) > 0

    def subfolder(self, name: str) -> Folder:
        """A subfolder, created with its first file and written as if it were a directory of its own."""
        return replace(self, inside=self._full(name))

    def file(self, name: str, size: int | None) -> StagedFile:
        """Open a file for writing at any offset, or for appending (None); folders in its name are created."""
        full = self._full(name)
        with self.writing(full, "made"):
            fd = self._open(full)
        return StagedFile(self, full, fd, size or 0, past_cache=self._is_direct)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file: at once and flushed, or in ``complete`` if ``comes_last``."""
        full = self._full(name)
        if self.comes_last(name):
            with self._ledger.lock:
                self._ledger.kept_back[full] = data, self.mode
        else:
            self._write(full, data)

    def complete(self) -> None:
        """Write the files held back, in the order of their ranks."""
        with self._ledger.lock:
            waiting = sorted(self._ledger.kept_back.items(), key=lambda item: (self.rank(item[0]), item[0]))
            self._ledger.kept_back.clear()
        for full, (data, mode) in waiting:
            replace(self, mode=mode)._write(full, data)

    def kept_back(self, name: str) -> bytes | None:
        """The content of a file that is held back."""
        with self._ledger.lock:
            data, _ = self._ledger.kept_back.get(self._full(name), (None, 0))
        return data

    @property
    def nbytes(self) -> int:
        """Total bytes of the files written."""
        return sum(found.size for found in self._ledger.written.values() if found is not None)

    def contents(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every file and folder by name, a folder after its content; links are not followed. Raises OSError."""
        yield from _walk(self.fd)

    def keep_only(self, names: Iterable[str], besides: str) -> None:
        """Keep only these files of an earlier attempt, to be continued, and ``besides``; raises OSError."""
        kept = {*names, besides}
        self._ledger.continued = True
        for name, found in self.contents():
            if not stat.S_ISDIR(found.st_mode):
                if name not in kept:
                    os.unlink(name, dir_fd=self.fd)
            else:
                with contextlib.suppress(OSError):  # it is not empty
                    os.rmdir(name, dir_fd=self.fd)

    def changes(self, besides: Iterable[str] = ()) -> list[str]:
        """Differences from what was written: files gone, changed or replaced, and foreign files.

        ``besides`` are foreign names to be ignored. Raises OSError.
        """
        there = dict(self.contents())
        written = self._ledger.written
        out = []
        for name, identity in written.items():
            found = there.get(name)
            if found is None:
                out.append(f"{name} is gone")
            elif _Identity.of(found) != identity:
                out.append(f"{name} was changed or replaced")
        folders = {str(parent) for name in written for parent in PurePosixPath(name).parents}
        return out + [f"{name} was put there" for name in there if name not in {*written, *folders, *besides}]

    def is_written(self, name: str, found: os.stat_result) -> bool:
        """Whether this is the very file that was written under this name, even if its content has changed."""
        identity = self._ledger.written.get(name)
        return identity is not None and identity[:2] == (found.st_dev, found.st_ino)

    def sync(self) -> None:
        """Flush the folders to disk; raises OSError."""
        for name, found in self.contents():
            if stat.S_ISDIR(found.st_mode):
                with _opened(name, self.fd) as fd:
                    sync_directory(fd)
        sync_directory(self.fd)

    def writing(self, full: str, operation: str) -> contextlib.AbstractContextManager[None]:
        return writing(self.root / full, operation, self.advice)

    def note(self, full: str, fd: int | None) -> None:
        """Record a file's identity from its open descriptor, or by its name once it is closed."""
        if fd is not None:
            found = os.fstat(fd)
        else:  # some network file systems set size and time only when a file is closed
            try:
                found = os.stat(full, dir_fd=self.fd, follow_symlinks=False)
            except FileNotFoundError:
                return  # ``changes`` will report it
            if not self.is_written(full, found):
                return
        with self._ledger.lock:
            self._ledger.written[full] = _Identity.of(found)

    def _write(self, full: str, data: bytes) -> None:
        with self.writing(full, "made"):
            fd = self._open(full)
        with StagedFile(self, full, fd, len(data)) as file:
            file.write(0, memoryview(data))
            file.sync()

    def _full(self, name: str) -> str:
        return f"{self.inside}/{name}" if self.inside else name

    def _open(self, full: str) -> int:
        """Open a new file, or one of an earlier attempt; anything else of its name is removed."""
        *folders, last = PurePosixPath(full).parts
        with contextlib.ExitStack() as stack:
            at = self.fd
            for folder in folders:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder, 0o777 & self.mode, dir_fd=at)
                at = stack.enter_context(_opened(folder, at))
            known = self._ledger.continued or full in self._ledger.written
            there = lstat(last, at)
            if there is not None and known and not is_regular_file(there):
                remove_entry(last, there, at)
                there = None
            flags = _FILE if there is not None and known else _FILE | os.O_EXCL
            fd = os.open(last, flags, 0o666 & self.mode, dir_fd=at)
            try:
                self.note(full, fd)
                mode = stat.S_IMODE(os.fstat(fd).st_mode)
                if mode & ~self.mode:  # of an earlier attempt
                    os.fchmod(fd, mode & self.mode)
            except BaseException:
                os.close(fd)
                if flags & os.O_EXCL:  # a file that is not recorded would count as foreign
                    with contextlib.suppress(OSError):
                        os.unlink(last, dir_fd=at)
                raise
            return fd


class StagedFile:
    """A file of known size, written at any offset and from several threads.

    A large write of whole pages, from an address that begins one, goes past the page cache if the file was opened so:
    the system then copies nothing, and gives no memory for it. Of any other the system begins to write to the disk at
    once what is large, which shortens the flush at the end.
    """

    def __init__(self, folder: Folder, name: str, fd: int, size: int, *, past_cache: bool = False) -> None:
        self.name = name
        self._folder = folder
        self._fd = fd
        self._direct = -1
        # Linux lets one thread at a time copy to the cache of a file, and others spin meanwhile; on a lock they sleep.
        self._turn = threading.Lock()
        try:
            with folder.writing(name, "made"):
                os.ftruncate(fd, size)
                if size >= _RESERVED and os.fstat(fd).st_blocks * 512 < size:
                    reserve(fd, size)
            if past_cache:
                self._direct = _reopened(fd)
        except BaseException:
            self._close()
            raise

    @property
    def is_past_cache(self) -> bool:
        return self._direct >= 0

    def write(self, offset: int, data: memoryview) -> None:
        with self._folder.writing(self.name, "written"):
            done = self._written_past_cache(offset, data)
            with self._turn:
                while done < len(data):
                    at = offset + done
                    part = data[done : done + _COPIED - at % _COPIED]
                    done += os.pwrite(self._fd, part, at)
            if done >= _FLUSHED and not self.is_past_cache and hasattr(os, "posix_fadvise"):
                with contextlib.suppress(OSError):  # the flush is what counts
                    os.posix_fadvise(self._fd, offset, done, os.POSIX_FADV_DONTNEED)

    def _written_past_cache(self, offset: int, data: memoryview) -> int:
        """Write past the page cache if that is possible; the number of bytes that were written, from the first one."""
        if not self.is_past_cache or len(data) < LARGE or (offset | len(data) | _address(data)) % PAGE:
            return 0
        try:
            return os.pwrite(self._direct, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return 0  # its blocks are larger than a page

    def append(self, data: memoryview) -> None:
        """Write at the end, for a file that is written sequentially."""
        done = 0
        with self._folder.writing(self.name, "written"):
            while done < len(data):
                done += os.write(self._fd, data[done:])

    def readinto(self, offset: int, buffer: memoryview) -> int:
        with self._folder.writing(self.name, "read again"):
            return pread_into(self._fd, buffer, offset)

    def sync(self) -> None:
        with self._folder.writing(self.name, "flushed to disk"):
            os.fsync(self._fd)

    def close(self) -> None:
        """Close the file; idempotent. Raises UnwritableError, as some systems report failed writes only now."""
        if self._fd >= 0:
            with self._folder.writing(self.name, "closed"):
                self._close()
                self._folder.note(self.name, None)

    def _close(self) -> None:
        # Not closed again if closing fails: the descriptors may be reused by then.
        direct, self._direct = self._direct, -1
        fd, self._fd = self._fd, -1
        try:
            if direct >= 0:
                os.close(direct)
        finally:
            os.close(fd)

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def remove_all(fd: int, rank: Callable[[str], int], but: str | None = None) -> None:
    """Remove everything in an open directory except the file ``but``; raises OSError.

    Files that are written last are removed first, so that the rest never looks like a model.
    """
    contents = [(name, stat.S_ISDIR(found.st_mode)) for name, found in _walk(fd) if name != but]
    for name, is_folder in sorted(contents, key=lambda one: (one[1], 0 if one[1] else -rank(one[0]))):
        (os.rmdir if is_folder else os.unlink)(name, dir_fd=fd)


def is_regular_file(found: os.stat_result) -> bool:
    """Whether this is a regular file without other hard links, which writing it would change, too."""
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


@contextlib.contextmanager
def _opened(name: str, within: int) -> Iterator[int]:
    fd = os.open(name, _DIRECTORY, dir_fd=within)
    try:
        yield fd
    finally:
        os.close(fd)


def _reopened(fd: int) -> int:
    """A second descriptor of an open file, for writes past the page cache; -1 where there is none."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return -1


def _address(data: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) if not data.readonly else 1


def lstat(name: str, within: int) -> os.stat_result | None:
    """The status of a name in an open directory, None if missing; links are not followed. Raises OSError."""
    try:
        return os.stat(name, dir_fd=within, follow_symlinks=False)
    except FileNotFoundError:
        return None


def remove_entry(name: str, found: os.stat_result, within: int) -> None:
    """Remove a file or a tree in an open directory, given its ``lstat``; raises OSError."""
    if stat.S_ISDIR(found.st_mode):
        shutil.rmtree(name, dir_fd=within)
    else:
        os.unlink(name, dir_fd=within)


def _walk(fd: int, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    for name in sorted(os.listdir(fd)):
        found = lstat(name, fd)
        if found is None:
            continue
        if stat.S_ISDIR(found.st_mode):
            with _opened(name, fd) as inner:
                yield from _walk(inner, f"{prefix}{name}/")
        yield prefix + name, found
