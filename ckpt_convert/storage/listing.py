"""Listings: part of a store, listed once and then queried without further requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from functools import cached_property
from pathlib import PurePosixPath

from ckpt_convert.errors import UnreadableError
from ckpt_convert.storage.base import Entry, FileKind
from ckpt_convert.values import frozen

ROOT = "."
"""The name of a store's root folder, as ``PurePosixPath`` spells it."""


def name_prefix(folder: str) -> str:
    """The common prefix of all names below a folder."""
    return "" if folder == ROOT else f"{folder.rstrip('/')}/"


@frozen(eq=False)
class Listing:
    """Every file of the name ``prefix`` or below it with its entry; answers the queries of ``NameLookup``.

    ``contents`` are small files that were read, under the entries of the listing.
    """

    prefix: str
    entries: Mapping[str, Entry]
    contents: dict[str, bytes] = field(default_factory=dict, repr=False)

    def __reduce__(self) -> tuple[type[Listing], tuple[str, Mapping[str, Entry]]]:
        """Another process reads the files itself."""
        return Listing, (self.prefix, self.entries)

    def covers(self, name: str) -> bool:
        """Whether everything below this name is in the listing."""
        return name == self.prefix or name.startswith(name_prefix(self.prefix))

    def kind(self, name: str) -> FileKind | None:
        if name in self.entries:
            return FileKind.FILE
        return FileKind.FOLDER if name in self._tree else None

    def entry(self, name: str) -> Entry | None:
        return self.entries.get(name)

    def list(self, prefix: str, *, deep: bool = True) -> dict[str, Entry]:
        if not deep:
            start = name_prefix(prefix)
            return {
                name: entry
                for name, entry in entries_under(prefix, self.entries).items()
                if "/" not in name[len(start) :]
            }
        return entries_under(prefix, self.entries)

    def children(self, folder: str) -> Mapping[str, FileKind | None]:
        if folder not in self._tree:
            raise UnreadableError(f"{folder}: cannot be listed: it is no folder, or not there (any more)")
        return self._tree[folder]

    @cached_property
    def _tree(self) -> dict[str, dict[str, FileKind | None]]:
        """The direct children of each folder, by their last part."""
        tree: dict[str, dict[str, FileKind | None]] = {}
        for name in self.entries:
            child, kind = PurePosixPath(name), FileKind.FILE
            for parent in child.parents:
                known = str(parent) in tree
                tree.setdefault(str(parent), {})[child.name] = kind
                if known:
                    break
                child, kind = parent, FileKind.FOLDER
        return tree


@frozen(eq=False)
class FolderListing:
    """The direct children of the folder ``prefix``: kinds by last part, and entries of its files by name.

    Answers queries about these names and about names below a child that is not a folder; it does not know the content
    of subfolders.
    """

    prefix: str
    kinds: Mapping[str, FileKind | None]
    entries: Mapping[str, Entry]

    def covers(self, name: str) -> bool:
        """Whether it is known what this name refers to."""
        start = name_prefix(self.prefix)
        first, _, rest = name[len(start) :].partition("/")
        return name == self.prefix or (
            name.startswith(start) and (not rest or self.kinds.get(first) is not FileKind.FOLDER)
        )

    def kind(self, name: str) -> FileKind | None:
        return FileKind.FOLDER if name == self.prefix else self.kinds.get(name[len(name_prefix(self.prefix)) :])

    def entry(self, name: str) -> Entry | None:
        return self.entries.get(name)

    def list(self, prefix: str, *, deep: bool = True) -> dict[str, Entry]:
        """The files of the folder itself, not deep."""
        return dict(self.entries)

    def children(self, folder: str) -> Mapping[str, FileKind | None]:
        """The children of the folder itself."""
        return self.kinds


def entries_under(prefix: str, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries that have this name or are below it."""
    start = name_prefix(prefix)
    return {name: entry for name, entry in entries.items() if name == prefix or name.startswith(start)}
