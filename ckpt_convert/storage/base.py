"""What a store is: a place where files lie under names, read in ranges and written whole.

Nothing above this package knows more of where its files lie. A local directory is one store, memory another
(``local``, ``memory``); a name is text, its folders parted by "/", and what it means is the store's affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self, runtime_checkable

from ckpt_convert.errors import CheckpointNotFoundError, CorruptFileError, SourceChangedError, UnsafeFileError


class FileKind(Enum):
    """What lies under a name. A folder is a name that others begin with; a store may have none that are empty."""

    FILE = "a regular file"
    FOLDER = "a folder"
    OTHER = "a pipe, a device, a socket"


class Entry(Protocol):
    """A file as a store lists it: its size, and a mark that is another one once the file has changed."""

    @property
    def size(self) -> int: ...

    @property
    def etag(self) -> str: ...

    def change(self, now: Entry, /) -> str | None:
        """What has changed since in the content, in words; None where it is what it was."""


class Version(NamedTuple):
    """An entry of a store that says no more than the size and a mark."""

    size: int
    etag: str

    def change(self, now: Entry, /) -> str | None:
        if now.size != self.size:
            return f"it had {self.size:,} bytes and has {now.size:,} now"
        return f"it was written anew (its etag was {self.etag}, and is {now.etag})" if now.etag != self.etag else None


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
class Closable(Protocol):
    """A reader that holds a file open until it is closed."""

    def close(self) -> None: ...


@runtime_checkable
class OpenFile(RangeReader, Protocol):
    """A file of a store that is open for reading; a context manager.

    ``identity`` is what it is; it stays that while it is open, or reading raises SourceChangedError.
    """

    @property
    def identity(self) -> Entry: ...

    def read_many(self, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """``readinto`` for several offsets and buffers; those that lie close may be read in one request."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class OnDisk(Protocol):
    """A reader of a file of this machine, which libraries that take nothing else can be given by its path."""

    path: Path
    name: str
    size: int


class Writer(Protocol):
    """A file that is being written, at any place and from several threads; every byte comes once.

    It has its name once ``complete`` returns, and not before; ``abort`` leaves nothing of it.
    """

    def write(self, offset: int, data: memoryview) -> None: ...

    def complete(self, *, create_only: bool = False) -> Entry:
        """Give the file its name; raises OutputExistsError with ``create_only`` where that is taken."""

    def abort(self) -> None: ...


class NameLookup(Protocol):
    """What is asked of the names in a store; a listing of it answers the same without asking it again."""

    def kind(self, name: str) -> FileKind | None:
        """What a name leads to, None for nothing. Raises UnreadableError where that cannot be told."""

    def entry(self, name: str) -> Entry | None:
        """The file that a name leads to as it is now, None where there is none. Raises UnreadableError."""

    def list(self, prefix: str, *, deep: bool = True) -> dict[str, Entry]:
        """Every file of this name or below it; without ``deep`` only those right below. Raises UnreadableError."""

    def children(self, folder: str) -> Mapping[str, FileKind | None]:
        """What lies right below a folder, by its last part; None for a link that leads nowhere.

        Raises UnreadableError, also for what is no folder.
        """


class Store(NameLookup, Protocol):
    """A place where files lie. A value: equal for the same place, hashable and picklable."""

    @property
    def prefers_listing(self) -> bool:
        """Whether one listing of all that is below a name costs less than asking twice."""

    def open(self, name: str, expected: Entry | None = None, called: str | None = None) -> OpenFile:
        """Open a file for reading. ``expected`` is what it was when it was first looked at, ``called`` its name in
        messages.

        Raises UnsafeFileError for what is no regular file, UnreadableError for what the store does not give, and
        SourceChangedError for another file than was expected.
        """

    def put(self, name: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> Entry:
        """Write a small file, whole or not at all, and durably.

        Raises OutputExistsError with ``create_only`` where the name is taken, or, with the etag ``if_match``, where
        the file is another one by now; UnwritableError.
        """

    def create(self, name: str, size: int | None) -> Writer:
        """A file of ``size`` bytes to be written in ranges, of as many as are written for None.

        Raises UnwritableError.
        """

    def delete(self, names: Iterable[str]) -> None:
        """Remove files; one that is not there is no error. Raises UnwritableError."""

    def label(self, name: str) -> str:
        """How messages call a file."""

    def local(self, name: str) -> Path:
        """The path of a file for libraries that know nothing else; raises UsageError where it has none."""

    def real(self, name: str) -> str:
        """The one name that a file has, whatever links lead to it."""

    def absolute(self, name: str) -> str:
        """The name as it is said from anywhere."""

    def link(self, name: str) -> str | None:
        """Where a name leads that is a link, as it says so itself; None for what is none."""

    def guard(self, folder: str, name: str, said_by: str) -> None:
        """See that a file whose name (below ``folder``) another file says lies there, and is a regular one.

        Raises UnsafeFileError for a link that leaves the folder and for what is no regular file,
        CheckpointNotFoundError where nothing is there.
        """

    def mode(self, name: str) -> int:
        """The permissions that a copy of a file may have."""


def source_changed(path: object, what: str) -> SourceChangedError:
    return SourceChangedError(
        f"{path}: the source changed while it was read: {what}; nothing was published: put it back as it was, or run "
        "again once nobody changes it any more"
    )


def read_range(reader: RangeReader, offset: int, nbytes: int) -> bytes:
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


def read_blocks(reader: RangeReader, size: int = 1 << 20) -> Iterator[memoryview]:
    """All of a file, ``size`` bytes at a time; each is good until the next one."""
    buffer = memoryview(bytearray(min(size, reader.size)))
    for offset in range(0, reader.size, size):
        block = buffer[: min(size, reader.size - offset)]
        reader.readinto(offset, block)
        yield block


def require_regular_file(label: str, kind: FileKind | None, said_by: str) -> None:
    """Raise for a file that another one names where it is not there, or no file."""
    if kind is None:
        raise CheckpointNotFoundError(f"{label}: is not there, though {said_by} needs it; download or copy it again")
    if kind is not FileKind.FILE:
        raise UnsafeFileError(f"{label}: is no regular file; move it elsewhere, and put the file itself there")
