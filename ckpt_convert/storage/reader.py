"""Reading byte ranges: the only way in which containers and conversions see the bytes of a file."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

from ckpt_convert.errors import CorruptFileError

WORKERS = max(2, min(4, os.cpu_count() or 2))
"""Workers by default: two keep a disk busy; more than four only help where many cores feed a very fast one."""


class RangeReader(Protocol):
    """A file of known size that can be read anywhere, from several threads at once."""

    @property
    def name(self) -> str:
        """How messages call the file."""

    @property
    def size(self) -> int:
        """Bytes in the file."""

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (writable, one byte an item) from ``offset`` on.

        Raises CorruptFileError when the file ends before the buffer is full.
        """


@runtime_checkable
class Closing(Protocol):
    """A reader that holds a file open until it is closed."""

    def close(self) -> None: ...


def read(reader: RangeReader, offset: int, nbytes: int) -> bytes:
    """Return exactly ``nbytes`` bytes from ``offset`` on.

    Raises CorruptFileError, before anything is allocated, when the range does not lie within the file.
    """
    if offset < 0 or nbytes < 0 or offset + nbytes > reader.size:
        raise CorruptFileError(
            f"{reader.name}: bytes {offset} to {offset + nbytes} are needed, but the file has {reader.size}; "
            "it is truncated or its header is wrong, so download or copy it again"
        )
    buffer = bytearray(nbytes)
    reader.readinto(offset, memoryview(buffer))
    return bytes(buffer)


class LocalFile:
    """A local file, opened for reading ranges."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or str(path)
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.size = os.fstat(self._fd).st_size

    def readinto(self, offset: int, buffer: memoryview) -> None:
        if self._fd < 0:
            raise ValueError(f"{self.name}: is closed")
        done = 0
        while done < len(buffer):
            got = pread_into(self._fd, buffer[done:], offset + done)
            if got == 0:
                raise CorruptFileError(
                    f"{self.name}: ends at byte {offset + done}, {len(buffer) - done} bytes too early; "
                    "it was cut while it was being read"
                )
            done += got

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pread_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Read what the system gives at once into the buffer; returns the number of bytes, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    data = os.pread(fd, len(buffer), offset)  # macOS before 11 has no preadv
    buffer[: len(data)] = data
    return len(data)
