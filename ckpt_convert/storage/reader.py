"""Local files open for reading, and messages for the errors of the system."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from ckpt_convert.errors import CorruptFileError, UnreadableError, UnsafeFileError
from ckpt_convert.storage.base import Entry, source_changed

DEFAULT_WORKERS = max(2, min(4, os.cpu_count() or 2))
"""Two workers keep a disk busy; more than four only help where many cores feed a very fast one."""


class FileIdentity(NamedTuple):
    """Identifies a file and its content: a file that was changed or replaced has another identity.

    Permissions and access times are not part of it.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileIdentity:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    @property
    def etag(self) -> str:
        return f"{self.size:x}-{self.mtime_ns:x}"

    def change(self, now: Entry, /) -> str | None:
        """A description of what has changed in the content since; None if size and time are the same."""
        if now.size != self.size:
            return f"it had {self.size:,} bytes and has {now.size:,} now"
        if isinstance(now, FileIdentity) and now.mtime_ns != self.mtime_ns:
            what = "written to" if now[:2] == self[:2] else "replaced"
            return f"it was {what} at {_time(now.mtime_ns)}, and was of {_time(self.mtime_ns)} before"
        return None


def _time(mtime_ns: int) -> str:
    seconds, fraction = divmod(mtime_ns, 10**9)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}.{fraction:09d}"


@contextlib.contextmanager
def reading(path: object = None, operation: str = "read") -> Iterator[None]:
    """Turn OSError into UnreadableError, which names the file and the operation that failed."""
    try:
        yield
    except OSError as error:
        raise unreadable_error(error, path, operation) from error


def unreadable_error(error: OSError, path: object = None, operation: str = "read") -> UnreadableError:
    """The UnreadableError for a failed call; ``path`` is named if the error does not name a file itself."""
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
    """A local file, open for reading ranges.

    ``expected`` is its entry when it was first seen. Raises UnsafeFileError for anything but a regular file (a pipe
    would never end), UnreadableError if it cannot be opened, SourceChangedError if it is not as expected.
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
                raise source_changed(path, "it was removed") from None
            found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            self.close()
            raise UnsafeFileError(
                f"{self.name}: is not a regular file; move it elsewhere, and put the file itself there"
            )
        self.identity = FileIdentity.of(found)
        self.size = self.identity.size
        if expected is not None and (what := expected.change(self.identity)) is not None:
            self.close()
            raise source_changed(path, what)

    def __reduce__(self) -> tuple[partial[LocalFile], tuple[()]]:
        """Another process opens the file itself, since descriptors are not shared; it must still be the same file."""
        return partial(LocalFile, self.path, self.name, expected=self.identity), ()

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

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1  # closed once, even if closing fails: the number may be reused by then
            with contextlib.suppress(OSError):  # nothing can be lost by reading
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


def pread_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Read once into the buffer; returns the number of bytes, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    data = os.pread(fd, len(buffer), offset)  # macOS before 11 has no preadv
    buffer[: len(data)] = data
    return len(data)
