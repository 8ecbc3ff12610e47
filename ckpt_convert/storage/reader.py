"""Reading byte ranges: the only way in which containers and conversions see the bytes of a file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from ckpt_convert.errors import CorruptFileError, UnreadableError, UnsafeFileError
from ckpt_convert.storage.base import Entry, changed, read

WORKERS = max(2, min(4, os.cpu_count() or 2))
"""Workers by default: two keep a disk busy; more than four only help where many cores feed a very fast one."""


class Identity(NamedTuple):
    """Which file this is, and since when it is as it is: a file that was changed or replaced has another one.

    Permissions and access times are no part of it.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Identity:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    @property
    def etag(self) -> str:
        return f"{self.size:x}-{self.mtime_ns:x}"

    def change(self, now: Entry, /) -> str | None:
        """What has changed since in the content, in words; None where size and time are what they were."""
        if now.size != self.size:
            return f"it had {self.size:,} bytes and has {now.size:,} now"
        if isinstance(now, Identity) and now.mtime_ns != self.mtime_ns:
            what = "written to" if now[:2] == self[:2] else "replaced"
            return f"it was {what} at {_time(now.mtime_ns)}, and was of {_time(self.mtime_ns)} before"
        return None


def _time(mtime_ns: int) -> str:
    seconds, fraction = divmod(mtime_ns, 10**9)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}.{fraction:09d}"


def identify(path: Path) -> Identity:
    """The identity of what a path leads to; raises UnreadableError, SourceChangedError where nothing is there."""
    with reading(path, "looked at"):
        try:
            return Identity.of(os.stat(path))
        except (FileNotFoundError, NotADirectoryError):
            raise changed(path, "it was removed") from None


def permitted(path: Path) -> int:
    """The permissions that a copy may have: nobody else may do with it what they could not do with the original.

    Raises as ``identify`` does.
    """
    with reading(path, "looked at"):
        try:
            return stat.S_IMODE(os.stat(path).st_mode) & 0o777 | 0o700
        except (FileNotFoundError, NotADirectoryError):
            raise changed(path, "it was removed") from None


def exists(path: Path) -> bool:
    """Whether a path leads to something; what the system fails to say is no answer, but raises UnreadableError."""
    with reading(path, "looked at"):
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def walk(directory: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk``, which passes over what cannot be listed, as if nothing were there; here that is UnreadableError."""

    def failed(error: OSError) -> None:
        raise unreadable(error, directory, "listed")

    return os.walk(directory, onerror=failed)


def identities(directory: Path, *folders: str) -> dict[Path, Identity]:
    """Every file of a directory as it is now, and every file below some of its ``folders``; links are followed."""
    found: dict[Path, Identity] = {}
    there = [directory / name for name in folders if exists(directory / name)]
    places = [directory, *(Path(place) for folder in there for place, _, _ in walk(folder))]
    for place in places:
        with os.scandir(place) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # a link that leads nowhere
                    if entry.is_file():
                        found[place / entry.name] = Identity.of(entry.stat())
    return found


def compare(files: Mapping[Path, Identity]) -> list[str]:
    """Hold files against what they were: those that are the same, in size and time, but lie in another place.

    Raises SourceChangedError for one that was changed, replaced or removed.
    """
    moved = []
    for path, before in files.items():
        now = identify(path)
        what = before.change(now)
        if what is not None:
            raise changed(path, what)
        if now != before:
            moved.append(f"{path}: was replaced by a copy of the same size and time while it was read")
    return moved


@contextlib.contextmanager
def reading(path: object = None, operation: str = "read") -> Iterator[None]:
    """Turn what the system says of a file that is read into UnreadableError, naming the file and what was tried."""
    try:
        yield
    except OSError as error:
        raise unreadable(error, path, operation) from error


def unreadable(error: OSError, path: object = None, operation: str = "read") -> UnreadableError:
    """The error for a file-system call that failed on ``path``, where the error does not name it itself."""
    if error.errno in (errno.EACCES, errno.EPERM):
        advice = "look at its permissions"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        advice = "close other files, or allow more of them (ulimit -n)"
    elif error.errno in (errno.ENOENT, errno.ENOTDIR):
        advice = "it, or a directory above it, is not there (any more)"
    elif error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        advice = "give another path"
    else:
        advice = "the disk or the connection to it failed, which may pass: try again, and look at the system's log"
    what = os.strerror(error.errno) if error.errno else str(error)
    return UnreadableError(f"{error.filename or path or 'a file'}: cannot be {operation}: {what}; {advice}")


class LocalFile:
    """A local file, opened for reading ranges.

    ``expected`` is what it was when it was first looked at. Raises UnsafeFileError for anything but a regular file (a
    pipe would never end), UnreadableError where the system does not give it, SourceChangedError where it is another.
    """

    def __init__(self, path: Path, name: str | None = None, *, expected: Entry | None = None) -> None:
        self.path = path
        self.name = name or str(path)
        with reading(path, "opened"):
            try:
                # Without O_NONBLOCK, opening a pipe waits until somebody writes to it.
                self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
            except (FileNotFoundError, NotADirectoryError):
                if expected is None:
                    raise
                raise changed(path, "it was removed") from None
            found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            self.close()
            raise UnsafeFileError(f"{self.name}: is no regular file; move it elsewhere, and put the file itself there")
        self.identity = Identity.of(found)
        self.size = self.identity.size
        if expected is not None and (what := expected.change(self.identity)) is not None:
            self.close()
            raise changed(path, what)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        if self._fd < 0:
            raise ValueError(f"{self.name}: is closed")
        done = 0
        while done < len(buffer):
            with reading(self.name):
                got = pread_into(self._fd, buffer[done:], offset + done)
            if got == 0:
                raise CorruptFileError(
                    f"{self.name}: ends at byte {offset + done}, {len(buffer) - done} bytes too early; "
                    "it was cut while it was being read"
                )
            done += got

    def read_many(self, ranges: Sequence[tuple[int, memoryview]]) -> None:
        for offset, buffer in ranges:
            self.readinto(offset, buffer)

    def blocks(self, size: int = 1 << 20) -> Iterator[memoryview]:
        """All of the file, ``size`` bytes at a time; each is good until the next one."""
        buffer = memoryview(bytearray(min(size, self.size)))
        for offset in range(0, self.size, size):
            block = buffer[: min(size, self.size - offset)]
            self.readinto(offset, block)
            yield block

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1  # closed once, also where closing fails: the number may be another's by then
            with contextlib.suppress(OSError):  # what was read was read
                os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            with contextlib.suppress(OSError):
                self.close()

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FilePool:
    """Files that are opened when they are read, and kept open, though only so many: there may be thousands of them.

    Each is what it was when it was first identified, or reading it raises SourceChangedError.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._idle: list[LocalFile] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def open(self, path: Path, expected: Identity) -> Iterator[LocalFile]:
        """One of the open files of this path, or a new one; nobody else has it meanwhile."""
        with self._lock:
            at = next((at for at, file in enumerate(self._idle) if file.path == path), None)
            file = self._idle.pop(at) if at is not None else None
        file = file or LocalFile(path, expected=expected)
        try:
            yield file
        finally:
            with self._lock:
                self._idle.append(file)
                spare = self._idle.pop(0) if len(self._idle) > self._most else None
            if spare is not None:
                spare.close()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for file in idle:
            file.close()


def read_file(path: Path, most: int, *, expected: Entry | None = None) -> bytes:
    """A small file, whole; raises what LocalFile does, and UnsafeFileError for one of more than ``most`` bytes."""
    with LocalFile(path, expected=expected) as file:
        if file.size > most:
            raise UnsafeFileError(
                f"{path}: has {file.size:,} bytes, where a file of its kind has {most:,} at most; "
                "is this the right file?"
            )
        return read(file, 0, file.size)


def pread_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Read what the system gives at once into the buffer; returns the number of bytes, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    data = os.pread(fd, len(buffer), offset)  # macOS before 11 has no preadv
    buffer[: len(data)] = data
    return len(data)
