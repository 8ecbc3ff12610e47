"""Protocols for publishing: directories that appear atomically, locks, pointers.

There are two strategies. On a file system, a directory is written under a temporary name and renamed (``by_rename``).
In a store without rename, files are written in order under their final names, those that complete it last
(``in_order``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self

from ckpt_convert.storage.local import LocalStore
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.rules import Rules
from ckpt_convert.storage.system import Advice


class StagedFile(Protocol):
    """A file being written; a context manager. One that is closed without ``sync`` is not part of the output."""

    @property
    def name(self) -> str:
        """Its name relative to the staged directory."""

    @property
    def is_past_cache(self) -> bool:
        """Whether large writes of whole pages, from memory that begins with one, go past the page cache."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write at any offset, from any thread; every byte once."""

    def append(self, data: memoryview) -> None:
        """Write at the end, for a file that is written sequentially."""

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Read what an earlier attempt wrote; the number of bytes, 0 if none of it is kept."""

    def sync(self) -> None:
        """Make the complete file durable."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Folder(Protocol):
    """A directory being written, or a subfolder of it."""

    @property
    def nbytes(self) -> int:
        """Total bytes of the files written."""

    @property
    def place(self) -> Place:
        """Where the written files can be read before they are published."""

    @property
    def sends_parts(self) -> bool:
        """Whether bytes are kept in memory until all around them are written, so that none should come late."""

    def subfolder(self, name: str) -> Folder:
        """A subfolder, written as if it were a directory of its own."""

    def with_mode(self, mode: int) -> Folder:
        """The same folder, for files with at most these permissions."""

    def past_cache(self) -> Folder:
        """The same folder, for files that nobody reads soon: large writes go past the page cache, where that works."""

    def file(self, name: str, size: int | None) -> StagedFile:
        """Create a file to be written; ``size`` is None for one that is appended to."""

    def write(self, name: str, data: bytes) -> None:
        """Write a small file: now, or after all others if ``comes_last``."""

    def comes_last(self, name: str) -> bool:
        """Whether a file of this name is held back until all others are written."""

    def kept_back(self, name: str) -> bytes | None:
        """The content of a file that is still held back."""


class Journal(Protocol):
    """Records finished work, for a later attempt that resumes this one."""

    def note(self, line: str) -> None:
        """Record that a part of a file is written."""

    def note_file(self, name: str, line: str) -> None:
        """Record that a file is complete and durable."""

    def close(self) -> None: ...


class Stage(Protocol):
    """A directory being written that ``commit`` publishes; a context manager, which keeps the files on early exit."""

    @property
    def destination(self) -> object:
        """The name of the output in messages."""

    @property
    def folder(self) -> Folder: ...

    @property
    def resumed(self) -> bool:
        """Whether files of an earlier attempt were found."""

    @property
    def place(self) -> Place:
        """Where the output can be read back after ``complete``."""

    def expect(self, names: Iterable[str]) -> None:
        """Announce the files that will be written, as far as they are known."""

    def allocated(self) -> int:
        """Bytes on disk of an earlier attempt."""

    def journal(self) -> list[str]:
        """The journal of an earlier attempt: its first line, then the others."""

    def begin(self, first: str, keep: Collection[str] = ()) -> Journal:
        """Open the journal; of an earlier attempt only the files ``keep`` are kept."""

    def complete(self) -> None:
        """Write the files that come last, so that the output can be read back; it is not published yet."""

    def is_resumable_after(self, error: BaseException) -> bool:
        """Whether the finished work is worth keeping after this error."""

    def commit(self) -> None:
        """Publish the directory if its files are what was written.

        Raises VerificationError if something else changed them, OutputExistsError, UnwritableError.
        """

    def discard(self) -> None:
        """Remove what was written, but nothing that something else put there."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class HeldLock(Protocol):
    """A lock that this process holds until it is closed."""

    def refuse_lost(self) -> None:
        """Raise LockedError if it was lost to another process, as a lease may be that was not renewed in time."""

    def close(self) -> None: ...


class Workspace(Protocol):
    """The operations that a store offers to writers.

    Failures are UnwritableError or, for operations that are a single system call, its OSError.
    """

    def check_destination(self, destination: Place, source: Place, rules: Rules, *, overwrite: bool) -> None:
        """Refuse a destination that exists or overlaps with the source; raises OutputExistsError."""

    def check_space(self, destination: Place, needed: int) -> None:
        """Raise NotEnoughSpaceError if fewer than ``needed`` bytes are free."""

    def stage(
        self,
        destination: Place,
        rules: Rules,
        *,
        overwrite: bool = False,
        resume: bool = False,
        mode: int = 0o777,
        advice: Advice | None = None,
        alone: bool = False,
    ) -> Stage:
        """Start to write a directory, or with ``resume`` continue an earlier attempt.

        ``mode`` limits its permissions; ``advice`` ends the messages of errors; ``alone`` means that a lock of the
        caller already excludes other writers. Raises OutputExistsError, LockedError, UnwritableError.
        """

    def join(self, staged: Place, advice: Advice) -> AbstractContextManager[Folder]:
        """The ``Stage.place`` of another process, to write into the files that it has made.

        ``advice`` ends the messages of errors. Raises UnwritableError, and UsageError where only one process can write
        a directory.
        """

    def make_folder(self, folder: Place) -> None:
        """Create a folder and its parents if they are missing."""

    def lock(self, place: Place, message: str) -> HeldLock:
        """Exclude other writers with a lock file; raises LockedError with ``message``."""

    def identity(self, folder: Place) -> str:
        """A string that identifies a folder."""

    def file_system(self, folder: Place) -> str | None:
        """The type of the file system that a folder is on, or will be; None if it is on none, or not known."""

    def replace_file(self, place: Place, data: bytes, etag: str | None = None) -> None:
        """Replace a small file atomically; raises OutputExistsError if its etag is no longer ``etag``."""

    def remove(self, folder: Place, names: Iterable[str]) -> None:
        """Remove files of a folder, in this order, then the folder if it is empty."""

    def withdraw(self, directory: Place, rules: Rules) -> None:
        """Remove the files that a directory's manifests list; a partial removal never looks complete."""

    def is_leftover(self, directory: Place) -> bool:
        """Whether an interrupted writer left this directory under its final name, for the next one to replace."""

    def tidy(self, parent: Place, rules: Rules, but: Collection[str] = ()) -> None:
        """Clean up after interrupted writers below a place, except directories ``but`` that are gone on with."""

    def check_pointer(self, parent: Place, name: str) -> None:
        """Raise OutputExistsError if something other than a pointer has this name."""

    def point(self, parent: Place, name: str, target: str) -> None:
        """Let the pointer ``name`` refer to the sibling directory ``target``; raises as ``check_pointer`` does."""


def workspace_of(place: Place) -> Workspace:
    """The workspace of a place's store."""
    # Imported here, since most commands only read.
    if isinstance(place.store, LocalStore):
        from ckpt_convert.storage import by_rename

        return by_rename
    from ckpt_convert.storage import in_order

    return in_order
