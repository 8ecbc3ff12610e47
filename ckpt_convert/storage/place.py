"""A place: a name in a store, and what can be asked of it.

It is what everything above this package holds instead of a path.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from ckpt_convert.errors import UnsafeFileError
from ckpt_convert.storage.base import (
    Entry,
    FileKind,
    NameLookup,
    OpenFile,
    Store,
    read_range,
    require_regular_file,
    source_changed,
)
from ckpt_convert.storage.listing import FolderListing, Listing
from ckpt_convert.storage.local import LOCAL
from ckpt_convert.storage.names import check_name, local_path


@dataclass(frozen=True, slots=True)
class Place:
    """A name in a store: a file, a folder, or nothing. A value, to be compared, hashed and pickled.

    ``path`` is the whole name. ``listing`` is what a part of the store held when it was listed; what is asked of names
    in it is answered from there. As text it is what messages call it: of a local file, its path as it was given.
    """

    store: Store
    path: PurePosixPath
    listing: Listing | FolderListing | None = field(default=None, compare=False, repr=False)

    # The name

    def __truediv__(self, name: str | PurePosixPath) -> Place:
        return self._at(self.path / name)

    def __str__(self) -> str:
        return self.store.label(str(self.path))

    def __lt__(self, other: Place) -> bool:
        return self.path < other.path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def suffix(self) -> str:
        return self.path.suffix

    @property
    def parent(self) -> Place:
        return self._at(self.path.parent)

    def with_name(self, name: str) -> Place:
        return self._at(self.path.with_name(name))

    def relative_name(self, folder: Place) -> str:
        """The name from a folder on; raises ValueError for what does not lie below it."""
        return self.path.relative_to(folder.path).as_posix()

    def is_inside(self, folder: Place) -> bool:
        """Whether the name says that this lies in a folder, or in one of its own."""
        return self.store == folder.store and folder.path in self.path.parents

    def _at(self, path: PurePosixPath) -> Place:
        return Place(self.store, path, self.listing)

    def absolute(self) -> Place:
        """The same place by a name that does not depend on where this process is."""
        return self._at(PurePosixPath(self.store.absolute(str(self.path))))

    # What is there

    @property
    def _names(self) -> NameLookup:
        listed = self.listing is not None and self.listing.covers(str(self.path))
        return self.listing if listed and self.listing is not None else self.store

    def _contents(self, *, deep: bool = False) -> NameLookup:
        """Who is asked for what is below."""
        unknown = isinstance(self.listing, FolderListing) and (deep or self.listing.prefix != str(self.path))
        return self.store if unknown else self._names

    def kind(self) -> FileKind | None:
        """What the name leads to, None for nothing; raises UnreadableError where that cannot be told."""
        return self._names.kind(str(self.path))

    def is_regular_file(self) -> bool:
        """Whether a regular file is there, be it by a link."""
        return self.kind() is FileKind.FILE

    def is_folder(self) -> bool:
        """Whether there is something below this name."""
        return self.kind() is FileKind.FOLDER

    def is_present(self) -> bool:
        """Whether anything is there; what the store fails to say is no answer, but raises UnreadableError."""
        return self.kind() is not None or self._names.entry(str(self.path)) is not None

    def children(self) -> list[Place]:
        """What lies right below, in no order; raises UnreadableError, also for what is no folder."""
        return [self / name for name in self._contents().children(str(self.path))]

    def files(self) -> list[Place]:
        """The regular files right below, in no order; raises as ``children`` does."""
        return self._of(FileKind.FILE)

    def folders(self) -> list[Place]:
        """The folders right below, in no order; raises as ``children`` does."""
        return self._of(FileKind.FOLDER)

    def _of(self, wanted: FileKind) -> list[Place]:
        return [self / name for name, kind in self._contents().children(str(self.path)).items() if kind is wanted]

    def entries(self, *, deep: bool = True) -> dict[Place, Entry]:
        """Every file below and what it is; without ``deep`` those right below. Raises UnreadableError."""
        found = self._contents(deep=deep).list(str(self.path), deep=deep)
        return {self._at(PurePosixPath(name)): entry for name, entry in found.items()}

    def walk(self, enters: Callable[[str], bool]) -> Iterator[tuple[Place, list[Place], list[Place]]]:
        """Each folder from this one on, with the folders and with all else right below it, in order of their names.

        Folders whose name ``enters`` does not accept are left out; links to folders are listed, and not entered.
        """
        kinds = self._contents().children(str(self.path))
        folders = [self / name for name in sorted(kinds) if kinds[name] is FileKind.FOLDER and enters(name)]
        yield self, folders, [self / name for name in sorted(kinds) if kinds[name] is not FileKind.FOLDER]
        for folder in folders:
            if folder.link() is None:
                yield from folder.walk(enters)

    def link(self) -> str | None:
        """Where a link leads, as it says so itself; None for what is none."""
        return self.store.link(str(self.path))

    def real(self) -> Place:
        """The same place by its one name, whatever links lead to it."""
        return self._at(PurePosixPath(self.store.real(str(self.path))))

    def resolve_member(self, name: str, said_by: str) -> Place:
        """A file below this folder whose name another file (``said_by``) says: it stays in the folder.

        Raises UnsafeFileError for a name or a link that leaves it and for what is no regular file,
        CheckpointNotFoundError where nothing is there.
        """
        found = self / check_name(name, said_by)
        if found._names is self.store or not self.store.prefers_listing:  # a listing says nothing of where links lead
            self.store.guard(str(self.path), name, said_by)
        else:
            require_regular_file(str(found), found.kind(), said_by)
        return found

    # What is in it

    @property
    def is_local(self) -> bool:
        """Whether it is a path of this machine, be there something or not."""
        return self.store == LOCAL

    @property
    def local(self) -> Path:
        """The path, for libraries that know nothing else; raises UsageError where the store is no local one."""
        return self.store.local(str(self.path))

    def identity(self) -> Entry:
        """The file as it is; raises SourceChangedError where it is not there any more, UnreadableError."""
        found = self._names.entry(str(self.path))
        if found is None:
            raise source_changed(self, "it was removed")
        return found

    def open(self, called: str | None = None, *, expected: Entry | None = None) -> OpenFile:
        """Open the file for reading; ``called`` is its name in messages, ``expected`` what it was before.

        Raises UnsafeFileError for what is no regular file, UnreadableError, and SourceChangedError for another file.
        """
        if expected is None and self._names is not self.store:
            expected = self._names.entry(str(self.path))
        return self.store.open(str(self.path), expected, called)

    def read(self, max_bytes: int, *, expected: Entry | None = None) -> bytes:
        """A small file, whole; raises what ``open`` does, and UnsafeFileError for a file of more than ``max_bytes``."""
        with self.open(expected=expected) as file:
            if file.size > max_bytes:
                raise UnsafeFileError(
                    f"{self}: has {file.size:,} bytes, where a file of its kind has {max_bytes:,} at most; "
                    "is this the right file?"
                )
            return read_range(file, 0, file.size)

    def read_member(self, name: str, said_by: str, most: int) -> bytes:
        """A small file below this folder whose name another file says; raises what ``inside`` and ``read`` do."""
        return self.resolve_member(name, said_by).read(most)

    def mode(self) -> int:
        """The permissions that a copy may have: nobody may do with it what they could not do with the original."""
        return self.store.mode(str(self.path))

    # Listed once

    def listed(self) -> Place:
        """The same place with all that is below it listed, in one request; as it is where asking costs nothing."""
        if not self.store.prefers_listing or self.listing is not None:
            return self
        name = str(self.path)
        return replace(self, listing=Listing(name, self.store.list(name)))

    def with_listing(self) -> Place:
        """The same place with what is there noted, once: all below it as ``listed``, or what lies right below.

        Raises UnreadableError.
        """
        name = str(self.path)
        if self.store.prefers_listing or self.listing is not None or self.store.kind(name) is not FileKind.FOLDER:
            return self.listed()
        return replace(self, listing=FolderListing(name, self.store.children(name), self.store.list(name, deep=False)))

    def without_listing(self) -> Place:
        """The same place without what was listed, so that it is asked for as it is now."""
        return replace(self, listing=None)


Location = str | os.PathLike[str] | Place
"""How somebody gives a place: a path, or a place in any store."""


def checked_place(given: Location, what: str = "") -> Place:
    """The place that somebody gives for ``what``, with ``~`` as the home directory of a local one.

    Raises UsageError for the address of a store or a web server, and for a name that no file system takes.
    """
    return given if isinstance(given, Place) else as_place(local_path(os.fspath(given), what))


def as_place(path: Location) -> Place:
    """A local path, or a place, as it is."""
    return path if isinstance(path, Place) else Place(LOCAL, PurePosixPath(path))


def list_identities(folder: Place, *inner: str) -> dict[Place, Entry]:
    """Every file right below a folder as it is now, and every file below some folders in it; links are followed."""
    found = folder.entries(deep=False)
    for name in inner:
        found |= (folder / name).entries() if (folder / name).is_present() else {}
    return found


def check_unchanged(files: Mapping[Place, Entry]) -> list[str]:
    """Hold files against what they were: those that are the same, in size and time, but lie in another place.

    Raises SourceChangedError for one that was changed, replaced or removed.
    """
    moved = []
    for place, before, now in _now(files):
        if now is None:
            raise source_changed(place, "it was removed")
        what = before.change(now)
        if what is not None:
            raise source_changed(place, what)
        if now != before:
            moved.append(f"{place}: was replaced by a copy of the same size and time while it was read")
    return moved


def _now(files: Mapping[Place, Entry]) -> Iterator[tuple[Place, Entry, Entry | None]]:
    """Each file as it was and as it is, what was listed listed again, once."""
    again: dict[int, Listing] = {}
    for place, before in files.items():
        known = place.listing
        if not isinstance(known, Listing) or not known.covers(str(place.path)):
            yield place, before, place.store.entry(str(place.path))
            continue
        if id(known) not in again:
            again[id(known)] = Listing(known.prefix, place.store.list(known.prefix))
        yield place, before, again[id(known)].entry(str(place.path))


class FilePool:
    """Files that are opened when they are read, and kept open, though only so many: there may be thousands of them.

    Each is what it was when it was first identified, or reading it raises SourceChangedError.
    """

    def __init__(self, max_open: int = 64) -> None:
        self._most = max_open
        self._idle: list[tuple[Place, OpenFile]] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[FilePool], tuple[int]]:
        """Another process opens its own."""
        return FilePool, (self._most,)

    @contextmanager
    def open(self, place: Place, expected: Entry) -> Iterator[OpenFile]:
        """One of the open files of this place, or a new one; nobody else has it meanwhile."""
        with self._lock:
            index = next((index for index, (known, _) in enumerate(self._idle) if known == place), None)
            file = self._idle.pop(index)[1] if index is not None else None
        file = file or place.open(expected=expected)
        try:
            yield file
        finally:
            with self._lock:
                self._idle.append((place, file))
                spare = self._idle.pop(0)[1] if len(self._idle) > self._most else None
            if spare is not None:
                spare.close()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for _, file in idle:
            file.close()
