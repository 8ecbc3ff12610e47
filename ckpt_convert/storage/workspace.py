"""What it takes to write where others may read: directories that appear whole or not at all, locks, pointers.

There are two strategies. A file system renames a directory that was written under another name (``by_rename``); a store
without rename gets the files in order under their own names, and what completes them last (``in_order``).
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
    """A file that is being written; a context manager. One that is closed without ``sync`` is no part of the output."""

    @property
    def name(self) -> str:
        """In the whole directory."""

    def write(self, offset: int, data: memoryview) -> None:
        """From any thread, at any place; every byte once."""

    def append(self, data: memoryview) -> None:
        """Write at the end, for a file that is written from front to back."""

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Read what an earlier attempt wrote."""

    def start_writeback(self, offset: int, nbytes: int) -> None:
        """These bytes will not change any more."""

    def sync(self) -> None:
        """All is written: let it be there for good."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Folder(Protocol):
    """A directory that is being written, or a folder of it, by the names of its files."""

    @property
    def nbytes(self) -> int:
        """Bytes of the files that were written."""

    @property
    def place(self) -> Place:
        """Where what was written can be read, before it is published."""

    def subfolder(self, name: str) -> Folder:
        """A folder of this one, that is written as if it were a directory of its own."""

    def with_mode(self, mode: int) -> Folder:
        """The same, for files that have these permissions at most."""

    def file(self, name: str, size: int | None) -> StagedFile:
        """A file to be written; ``size`` is None for one that is appended to."""

    def write(self, name: str, data: bytes) -> None:
        """Write a small file: at once, or where its name says that it comes last, when all others are there."""

    def comes_last(self, name: str) -> bool:
        """Whether a file of this name is kept back until then."""

    def kept_back(self, name: str) -> bytes | None:
        """The content of a file that is kept back still."""


class Journal(Protocol):
    """What is noted of what is done, for an attempt that continues this one."""

    def note(self, line: str) -> None:
        """A part of a file is written."""

    def note_file(self, name: str, line: str) -> None:
        """A file is written, and there for good."""

    def close(self) -> None: ...


class Stage(Protocol):
    """A directory that is being written and appears in ``commit``; a context manager, which leaves it as it is."""

    @property
    def destination(self) -> object:
        """How messages call what is written."""

    @property
    def folder(self) -> Folder: ...

    @property
    def resumed(self) -> bool:
        """Whether there is something of an earlier attempt."""

    @property
    def place(self) -> Place:
        """Where the output can be read again after ``complete``."""

    def expect(self, names: Iterable[str]) -> None:
        """What files are wanted, as far as that is known before any is written."""

    def allocated(self) -> int:
        """Bytes that are taken by an earlier attempt."""

    def journal(self) -> list[str]:
        """What an earlier attempt noted: the line that it began with, and the others."""

    def begin(self, first: str, keep: Collection[str] = ()) -> Journal:
        """Open the journal; of an earlier attempt only the files ``keep`` stay."""

    def complete(self) -> None:
        """Everything was written: let it be read again, under no name yet."""

    def is_resumable_after(self, error: BaseException) -> bool:
        """Whether what is done is worth keeping after this error."""

    def commit(self) -> None:
        """Publish the directory, if it is what was written.

        Raises VerificationError for what somebody else has changed, OutputExistsError, UnwritableError.
        """

    def discard(self) -> None:
        """Remove what was written, but for what somebody else has put there."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class HeldLock(Protocol):
    """A lock that this process holds until it is closed."""

    def close(self) -> None: ...


class Workspace(Protocol):
    """What a store offers to those who write: the same acts, in the way that it has for them.

    What fails is an UnwritableError or, of acts that are one call of the system, its OSError.
    """

    def check_destination(self, destination: Place, source: Place, rules: Rules, *, overwrite: bool) -> None:
        """Refuse a destination that is there already, or where writing would touch the source.

        Raises OutputExistsError.
        """

    def check_space(self, destination: Place, needed: int) -> None:
        """Refuse to start what cannot end; raises NotEnoughSpaceError."""

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
        """Begin to write a directory, or continue (``resume``) what an earlier attempt left of it.

        ``mode`` are the permissions that it may have at most; ``advice`` is how errors go on; ``alone`` says that a
        lock above keeps others away. Raises OutputExistsError, LockedError, UnwritableError.
        """

    def join(self, staged: Place) -> AbstractContextManager[Folder]:
        """The ``Stage.place`` of another process, to write into the files that it has made.

        Raises UnwritableError, and UsageError where only one process can write a directory.
        """

    def make_folder(self, folder: Place) -> None:
        """See that a folder is there, and those above it."""

    def lock(self, place: Place, message: str) -> HeldLock:
        """Keep others away by a file; raises LockedError with ``message``."""

    def identity(self, folder: Place) -> str:
        """A text that is another one for every other folder."""

    def replace_file(self, place: Place, data: bytes, etag: str | None = None) -> None:
        """Write a small file in the place of another, all of it or not at all.

        Raises OutputExistsError where that is not the one with this etag any more.
        """

    def remove(self, folder: Place, names: Iterable[str]) -> None:
        """Remove files of a folder, in this order, and the folder where it is empty then."""

    def withdraw(self, directory: Place, rules: Rules) -> None:
        """Remove the files that a directory lists; at no time the rest is taken for complete."""

    def is_leftover(self, directory: Place) -> bool:
        """Whether an interrupted writer left this under the name of a directory, for the next one to replace."""

    def tidy(self, parent: Place, rules: Rules) -> None:
        """Clear away what interrupted writers left below a place."""

    def check_pointer(self, parent: Place, name: str) -> None:
        """Raise OutputExistsError where something else has the name of a pointer."""

    def point(self, parent: Place, name: str, target: str) -> None:
        """Let the pointer ``name`` lead to the directory ``target`` beside it; raises as ``check_pointer`` does."""


def workspace_of(place: Place) -> Workspace:
    """How it is written where this lies."""
    # Imported here, for most of what is run only reads.
    if isinstance(place.store, LocalStore):
        from ckpt_convert.storage import by_rename

        return by_rename
    from ckpt_convert.storage import in_order

    return in_order
