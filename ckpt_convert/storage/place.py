"""Places: a name in a store, with the queries that a path has.

Everything above this package holds places instead of paths.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ckpt_convert.errors import UnsafeFileError, UsageError
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
from ckpt_convert.storage.names import check_name, is_web_url, local_path
from ckpt_convert.values import frozen

_KEPT = 1 << 25
"""Bytes of the largest file that a listing keeps, such as the manifest of a model with 100,000 tensors."""


@frozen(slots=True)
class Place:
    """A name in a store: a file, a folder, or nothing. A value: comparable, hashable and picklable.

    ``path`` is the full name. ``listing``, if present, answers queries about the names that it covers. ``str`` gives
    the name for messages: for a local file the path as the user gave it.
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
        """The place beside this one; beside the root of a store, which has no name, one in it."""
        return self._at(self.path.with_name(name) if self.path.name else self.path / name)

    def relative_name(self, folder: Place) -> str:
        """The name relative to a folder; raises ValueError if it is not below it."""
        return self.path.relative_to(folder.path).as_posix()

    def is_inside(self, folder: Place) -> bool:
        """Whether this is below a folder, by name alone."""
        return self.store == folder.store and folder.path in self.path.parents

    def _at(self, path: PurePosixPath) -> Place:
        return Place(self.store, path, self.listing)

    def absolute(self) -> Place:
        """The same place by its absolute name."""
        return self._at(PurePosixPath(self.store.absolute(str(self.path))))

    # What is there

    @property
    def _names(self) -> NameLookup:
        listed = self.listing is not None and self.listing.covers(str(self.path))
        return self.listing if listed and self.listing is not None else self.store

    def _contents(self, *, deep: bool = False) -> NameLookup:
        """What answers queries about the names below this one."""
        unknown = isinstance(self.listing, FolderListing) and (deep or self.listing.prefix != str(self.path))
        return self.store if unknown else self._names

    def kind(self) -> FileKind | None:
        """What the name refers to, None if nothing; raises UnreadableError."""
        return self._names.kind(str(self.path))

    def is_regular_file(self) -> bool:
        """Whether this is a regular file, or a link to one."""
        return self.kind() is FileKind.FILE

    def is_folder(self) -> bool:
        """Whether this is a folder, or a link to one."""
        return self.kind() is FileKind.FOLDER

    def is_present(self) -> bool:
        """Whether the name refers to anything; raises UnreadableError if the store cannot tell."""
        return self.kind() is not None or self._names.entry(str(self.path)) is not None

    def children(self) -> list[Place]:
        """The direct children, in no order; raises UnreadableError, also for what is not a folder."""
        return [self / name for name in self._contents().children(str(self.path))]

    def files(self) -> list[Place]:
        """The regular files among the direct children, in no order; raises as ``children`` does."""
        return self._of(FileKind.FILE)

    def folders(self) -> list[Place]:
        """The folders among the direct children, in no order; raises as ``children`` does."""
        return self._of(FileKind.FOLDER)

    def _of(self, wanted: FileKind) -> list[Place]:
        return [self / name for name, kind in self._contents().children(str(self.path)).items() if kind is wanted]

    def entries(self, *, deep: bool = True) -> dict[Place, Entry]:
        """Every file below with its entry; without ``deep`` only direct children. Raises UnreadableError."""
        found = self._contents(deep=deep).list(str(self.path), deep=deep)
        return {self._at(PurePosixPath(name)): entry for name, entry in found.items()}

    def walk(self, enters: Callable[[str], bool]) -> Iterator[tuple[Place, list[Place], list[Place]]]:
        """Walk the tree as ``os.walk``: (folder, subfolders, everything else in it), in order of names.

        Folders whose name ``enters`` rejects are left out; links to folders are listed but not entered.
        """
        kinds = self._contents().children(str(self.path))
        folders = [self / name for name in sorted(kinds) if kinds[name] is FileKind.FOLDER and enters(name)]
        yield self, folders, [self / name for name in sorted(kinds) if kinds[name] is not FileKind.FOLDER]
        for folder in folders:
            if folder.link() is None:
                yield from folder.walk(enters)

    def link(self) -> str | None:
        """The target of a link, as stored in it; None if this is not a link."""
        return self.store.link(str(self.path))

    def real(self) -> Place:
        """The same place with all links resolved."""
        return self._at(PurePosixPath(self.store.real(str(self.path))))

    def resolve_member(self, name: str, named_by: str) -> Place:
        """The file below this folder that the file ``named_by`` names, checked to be inside the folder.

        Raises UnsafeFileError for a name or a link that leaves the folder and for what is not a regular file,
        CheckpointNotFoundError if it is missing.
        """
        found = self / check_name(name, named_by)
        if found._names is self.store or not self.store.prefers_listing:  # a listing does not know the targets of links
            self.store.guard(str(self.path), name, named_by)
        else:
            require_regular_file(str(found), found.kind(), named_by)
        return found

    # What is in it

    @property
    def is_local(self) -> bool:
        """Whether this is a path of this machine, existing or not."""
        return self.store == LOCAL

    @property
    def local(self) -> Path:
        """The path, for libraries that accept only paths; raises UsageError if the store is not local."""
        return self.store.local(str(self.path))

    def identity(self) -> Entry:
        """The file's current entry; raises SourceChangedError if it is gone, UnreadableError."""
        found = self._names.entry(str(self.path))
        if found is None:
            raise source_changed(self, "it was removed")
        return found

    def open(self, called: str | None = None, *, expected: Entry | None = None) -> OpenFile:
        """Open the file for reading; ``called`` is its name in messages, ``expected`` its earlier entry.

        Raises UnsafeFileError if it is not a regular file, UnreadableError, SourceChangedError if it has changed.
        """
        if expected is None and self._names is not self.store:
            expected = self._names.entry(str(self.path))
        return self.store.open(str(self.path), expected, called)

    def read(self, max_bytes: int, *, expected: Entry | None = None) -> bytes:
        """Read a small file whole; raises as ``open`` does, and UnsafeFileError if it exceeds ``max_bytes``.

        A listing keeps what was read of a store, since several readers want the manifest and the config.
        """
        data = self.known_content if expected is None else None
        if data is None or len(data) > max_bytes:
            data = self._read(max_bytes, expected)
            if isinstance(self.listing, Listing) and expected is None and len(data) <= _KEPT:
                self.listing.contents[str(self.path)] = data
        return data

    @property
    def known_content(self) -> bytes | None:
        """The content, where the listing keeps it."""
        return self.listing.contents.get(str(self.path)) if isinstance(self.listing, Listing) else None

    def _read(self, max_bytes: int, expected: Entry | None) -> bytes:
        with self.open(expected=expected) as file:
            if file.size > max_bytes:
                raise UnsafeFileError(
                    f"{self}: has {file.size:,} bytes, where a file of its kind has {max_bytes:,} at most; "
                    "is this the right file?"
                )
            return read_range(file, 0, file.size)

    def read_member(self, name: str, named_by: str, most: int) -> bytes:
        """Read a small file below this folder that another file names; raises as ``resolve_member`` and ``read`` do."""
        return self.resolve_member(name, named_by).read(most)

    def mode(self) -> int:
        """The permissions of a copy: at most those of the original."""
        return self.store.mode(str(self.path))

    # Listed once

    def listed(self, *, neighbors: bool = True) -> Place:
        """The same place with a listing of everything below it, made in one request; unchanged for cheap stores.

        That of a file is of the folder that it is in, unless its ``neighbors`` are not looked for.
        """
        if not self.store.prefers_listing or self.listing is not None:
            return self
        name = str(self.path)
        found = self.store.list(name)
        if name in found and neighbors:
            return replace(self, listing=_folder_listing(self.parent))
        return replace(self, listing=Listing(name, found))

    def with_listing(self) -> Place:
        """The same place with a listing: of everything below it where ``listed`` makes one, else of direct children.

        Raises UnreadableError.
        """
        name = str(self.path)
        if self.store.prefers_listing or self.listing is not None or self.store.kind(name) is not FileKind.FOLDER:
            return self.listed()
        return replace(self, listing=_folder_listing(self))

    def without_listing(self) -> Place:
        """The same place without a listing, so that queries see the current state."""
        return replace(self, listing=None)


Location = str | os.PathLike[str] | Place
"""How a caller gives a place: a path, the URL of a store, or a place in any store."""

StorageOptions = Mapping[str, Any]
"""Options of stores, such as an endpoint or credentials: by name, or by the URL of a bucket for it alone."""


def checked_place(given: Location, what: str = "") -> Place:
    """The place that a caller gives for ``what``: the URL of a store, or a path with ``~`` expanded.

    Raises UsageError for a URL of no store, and for a name that is too long for any file system.
    """
    if isinstance(given, Place):
        return given
    return _in_store(os.fspath(given)) or as_place(local_path(given, what))


def _in_store(url: str, options: StorageOptions | None = None) -> Place | None:
    """The place in a store that a URL denotes; None if it is no URL of a store."""
    if "://" not in url:
        return None
    from ckpt_convert.storage.remote.urls import address_of

    address = address_of(url, options)
    return Place(*address) if address is not None else None


def output_place(given: Location, what: str) -> Place:
    """As ``checked_place``, for what is written; raises UsageError for a web server, too."""
    place = checked_place(given, what)
    if isinstance(given, str) and is_web_url(given):
        raise UsageError(f"{what} {place}: nothing can be written to a web server; write to a directory or a bucket")
    return place


def with_options(options: StorageOptions | None, *given: Any) -> list[Any]:
    """What a caller gives, each as the place in a store with these ``storage_options`` where it is a URL.

    Raises UsageError if there are options and nothing is in a store.
    """
    places = [(_in_store(one, options) if options and isinstance(one, str) else None) or one for one in given]
    if options and not any(isinstance(place, Place) for place in places):
        raise UsageError("`storage_options={…}`: nothing here is the URL of a store", "storage_options")
    return places


def as_place(path: Location) -> Place:
    """A path as a place of the local store; a place unchanged."""
    return path if isinstance(path, Place) else Place(LOCAL, PurePosixPath(path))


def _folder_listing(folder: Place) -> FolderListing:
    name = str(folder.path)
    return FolderListing(name, folder.store.children(name), folder.store.list(name, deep=False))


def list_identities(folder: Place, *inner: str) -> dict[Place, Entry]:
    """The current entries of a folder's direct files and of all files below some folders in it; links are followed."""
    found = folder.entries(deep=False)
    for name in inner:
        found |= (folder / name).entries() if (folder / name).is_present() else {}
    return found


def check_unchanged(files: Mapping[Place, Entry]) -> list[str]:
    """Compare files with their earlier entries; returns a notice for each that was replaced by an identical copy.

    Raises SourceChangedError for a file that was changed, replaced or removed.
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
    """Each file with its earlier and its current entry; a listing is made again once."""
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
    """Opens files on demand and keeps a limited number open, for there may be thousands.

    A file that has changed since it was first identified raises SourceChangedError when it is read.
    """

    def __init__(self, max_open: int = 64) -> None:
        self._most = max_open
        self._idle: list[tuple[Place, OpenFile]] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[FilePool], tuple[int]]:
        """Another process gets an empty pool."""
        return FilePool, (self._most,)

    @contextmanager
    def open(self, place: Place, expected: Entry) -> Iterator[OpenFile]:
        """Borrow an open file of this place, opened if none is idle; no other thread uses it meanwhile.

        Of a store, all threads share one, which has what any of them has read with the neighbors of what it wanted.
        """
        with self._lock:
            index = next((index for index, (known, _) in enumerate(self._idle) if known == place), None)
            file = self._idle.pop(index)[1] if index is not None else None
            shared = place.store.prefers_listing
            if shared:
                file = file or place.open(expected=expected)
                self._keep(place, file)
        file = file or place.open(expected=expected)
        try:
            yield file
        finally:
            if not shared:
                with self._lock:
                    spare = self._keep(place, file)
                if spare is not None:
                    spare.close()

    def _keep(self, place: Place, file: OpenFile) -> OpenFile | None:
        """Make a file the last one; returns the one that is too many."""
        self._idle.append((place, file))
        return self._idle.pop(0)[1] if len(self._idle) > self._most else None

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for _, file in idle:
            file.close()
