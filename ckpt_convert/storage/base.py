"""The protocols of a store: files by name, read in ranges and written whole.

Code above this package knows nothing else about where its files are. The local file system is one store, memory
another (``local``, ``memory``). A name is a string with "/" between folders; how it is interpreted is up to the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from ckpt_convert.errors import CheckpointNotFoundError, CorruptFileError, SourceChangedError, UnsafeFileError
from ckpt_convert.values import frozen


class FileKind(Enum):
    """What a name refers to. A folder is a prefix of other names; a store may have no empty folders."""

    FILE = "a regular file"
    FOLDER = "a folder"
    OTHER = "a pipe, a device, a socket"


class Entry(Protocol):
    """A file as a store lists it: its size, and an etag that differs once the file has changed."""

    @property
    def size(self) -> int: ...

    @property
    def etag(self) -> str: ...

    def change(self, now: Entry, /) -> str | None:
        """A description of what has changed in the content since; None if nothing has."""


@frozen(slots=True)
class Version:
    """An entry of a store that knows only size and etag, and perhaps when the file was written.

    ``modified`` is that time by the store's clock, in seconds; a copy of the same content may have another one.
    """

    size: int
    etag: str
    modified: float | None = field(default=None, compare=False)

    def change(self, now: Entry, /) -> str | None:
        if now.size != self.size:
            return f"it had {self.size:,} bytes and has {now.size:,} now"
        return f"it was rewritten (its etag was {self.etag}, and is {now.etag})" if now.etag != self.etag else None


class RangeReader(Protocol):
    """A file of known size that can be read at any offset, from several threads at once."""

    @property
    def name(self) -> str:
        """The file's name in messages."""

    @property
    def size(self) -> int:
        """Size of the file in bytes."""

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (writable, of bytes) with the file's bytes from ``offset`` on.

        Raises CorruptFileError if the file ends before the buffer is full.
        """


@runtime_checkable
class Closable(Protocol):
    """A reader that keeps a file open until it is closed."""

    def close(self) -> None: ...


@runtime_checkable
class JoinsRanges(Protocol):
    """A file of a store, of which small ranges are read together with their neighbors."""

    def join(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Note ranges, as (start, stop), that are going to be read."""


@runtime_checkable
class OpenFile(RangeReader, Protocol):
    """A file of a store, open for reading; a context manager.

    If the file stops matching ``identity`` while it is open, reading raises SourceChangedError.
    """

    @property
    def identity(self) -> Entry: ...

    def read_many(self, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """``readinto`` for several offsets and buffers; adjacent ranges may be read in one request."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Writer(Protocol):
    """A file being written, at any offset and from several threads; every byte must be written once.

    The file appears under its name when ``complete`` returns, not before; ``abort`` leaves nothing behind.
    """

    def write(self, offset: int, data: memoryview) -> None: ...

    def complete(self, *, create_only: bool = False) -> Entry:
        """Publish the file under its name; raises OutputExistsError if ``create_only`` and the name is taken."""

    def abort(self) -> None: ...


class NameLookup(Protocol):
    """Queries about the names in a store; a listing answers them without further requests."""

    def kind(self, name: str) -> FileKind | None:
        """What a name refers to, None if nothing; links are followed. Raises UnreadableError."""

    def entry(self, name: str) -> Entry | None:
        """The current entry of a file, None if there is none; links are followed. Raises UnreadableError."""

    def list(self, prefix: str, *, deep: bool = True) -> dict[str, Entry]:
        """Every file of this name or below it; without ``deep`` only direct children. Raises UnreadableError."""

    def children(self, folder: str) -> Mapping[str, FileKind | None]:
        """The direct children of a folder by their last part; None for a dangling link.

        Raises UnreadableError, also for what is not a folder.
        """


class Store(NameLookup, Protocol):
    """A place that holds files. A value: equal for the same place, hashable and picklable."""

    @property
    def prefers_listing(self) -> bool:
        """Whether listing everything below a name costs less than two queries."""

    def open(self, name: str, expected: Entry | None = None, called: str | None = None) -> OpenFile:
        """Open a file for reading.

        ``expected`` is its entry when it was first seen, ``called`` its name in messages. Raises UnsafeFileError if it
        is not a regular file, UnreadableError if it cannot be opened, SourceChangedError if it is not as expected.
        """

    def put(self, name: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> Entry:
        """Write a small file atomically and durably.

        Raises OutputExistsError if ``create_only`` and the name is taken, or if the file's etag is no longer
        ``if_match``; UnwritableError.
        """

    def create(self, name: str, size: int | None) -> Writer:
        """Create a file of ``size`` bytes to be written in ranges; None if the size is not known yet.

        Raises UnwritableError.
        """

    def delete(self, names: Iterable[str]) -> None:
        """Remove files; a missing one is no error. Raises UnwritableError."""

    def abort_uploads(self, names: Iterable[str], prefix: str) -> None:
        """Remove what writers of these files that were killed have left, where the store keeps such things.

        The names all begin with ``prefix``. Raises UnwritableError.
        """

    def label(self, name: str) -> str:
        """The name of a file in messages."""

    def local(self, name: str) -> Path:
        """The path of a file, for libraries that accept only paths; raises UsageError if it has none."""

    def real(self, name: str) -> str:
        """The name with all links resolved."""

    def absolute(self, name: str) -> str:
        """The absolute name."""

    def link(self, name: str) -> str | None:
        """The target of a link, as stored in it; None if the name is not a link."""

    def guard(self, folder: str, name: str, named_by: str) -> None:
        """Check that a file below ``folder``, named by the file ``named_by``, is a regular file inside it.

        Raises UnsafeFileError for a link that leaves the folder and for what is not a regular file,
        CheckpointNotFoundError if it is missing.
        """

    def mode(self, name: str) -> int:
        """The permissions that a copy of a file may have."""


def source_changed(path: object, what: str) -> SourceChangedError:
    return SourceChangedError(
        f"{path}: the source changed while it was read: {what}; nothing was published: restore it, or run again once "
        "nothing changes it any more"
    )


def read_range(reader: RangeReader, offset: int, nbytes: int) -> bytes:
    """Read exactly ``nbytes`` bytes from ``offset`` on.

    Raises CorruptFileError, before anything is allocated, if the range is not within the file.
    """
    if offset < 0 or nbytes < 0 or offset + nbytes > reader.size:
        raise CorruptFileError(
            f"{reader.name}: bytes {offset} to {offset + nbytes} are needed, but the file has {reader.size}; "
            "it is truncated or its header is wrong, so download or copy it again"
        )
    buffer = bytearray(nbytes)
    reader.readinto(offset, memoryview(buffer))
    return bytes(buffer)


def read_blocks(reader: RangeReader, size: int = 1 << 20) -> Iterator[memoryview]:
    """Read a whole file, ``size`` bytes at a time; each block is valid until the next one."""
    buffer = memoryview(bytearray(min(size, reader.size)))
    for offset in range(0, reader.size, size):
        block = buffer[: min(size, reader.size - offset)]
        reader.readinto(offset, block)
        yield block


def require_regular_file(label: str, kind: FileKind | None, named_by: str) -> None:
    """Raise if a file that ``named_by`` names is missing or not a regular file."""
    if kind is None:
        raise CheckpointNotFoundError(f"{label}: is not there, though {named_by} needs it; download or copy it again")
    if kind is not FileKind.FILE:
        raise UnsafeFileError(f"{label}: is not a regular file; move it elsewhere, and put the file itself there")
