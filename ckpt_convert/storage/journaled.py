"""A directory of a store without rename, with a journal that marks it as unfinished and lists what may be removed."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckpt_convert import log
from ckpt_convert.errors import CkptConvertError, CorruptFileError, UnwritableError
from ckpt_convert.storage.base import Entry, Store
from ckpt_convert.storage.names import JOURNAL
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.rules import Rules

_LONGEST = 1 << 28
"""Size limit of a journal in bytes; it describes every complete weight file."""


@dataclass
class JournalContent:
    """The content of a journal.

    first: identifies the plan.
    names: the files that belong to the writer.
    whole: the etag and the noted line of each complete file.
    removing: whether the directory is being removed.
    """

    first: str = ""
    names: set[str] = field(default_factory=set)
    whole: dict[str, tuple[str, str]] = field(default_factory=dict)
    removing: bool = False

    def render(self) -> bytes:
        content = {"first": self.first, "names": sorted(self.names), "whole": self.whole, "removing": self.removing}
        return json.dumps(content, separators=(",", ":")).encode()

    @classmethod
    def read(cls, place: Place) -> JournalContent:
        """Raises CorruptFileError for a journal that is not ours: it cannot say what may be removed."""
        try:
            said = json.loads(place.read(_LONGEST))
            whole = {str(name): (str(etag), str(line)) for name, (etag, line) in said["whole"].items()}
            return cls(str(said["first"]), {str(name) for name in said["names"]}, whole, bool(said["removing"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptFileError(
                f"{place}: is no journal of an interrupted writer; look at what is in the directory"
            ) from error


class JournaledDirectory:
    """A directory of a store and its journal, as this process last wrote it."""

    def __init__(self, place: Place, rules: Rules) -> None:
        self.place = self.seen = place.without_listing()
        self.store: Store = place.store
        self.rules = rules
        self.journal = JournalContent()
        self._etag: str | None = None
        self._lock = threading.RLock()

    def full_name(self, name: str) -> str:
        return str(self.place.path / name)

    def list(self) -> dict[str, Entry]:
        """The files in the directory by their relative names."""
        self.seen = self.place.listed()
        if not (self.seen / JOURNAL).is_regular_file():
            self._etag = None
        return {place.relative_name(self.place): entry for place, entry in self.seen.entries().items()}

    def adopt(self, there: Mapping[str, Entry]) -> None:
        """Take over the existing journal, and abort the uploads that its writer has left open."""
        self.journal = JournalContent.read(self.seen / JOURNAL)
        self._etag = there[JOURNAL].etag
        self.abort_uploads()

    def abort_uploads(self) -> None:
        """Abort the uploads that are open for names in the journal; warns if they may still be there."""
        try:
            self.store.abort_uploads([self.full_name(name) for name in self.journal.names], f"{self.place.path}/")
        except CkptConvertError as error:
            log.warning("%s; uploads that were left open may still be charged", error)

    def announce(self, names: Collection[str], **changes: Any) -> None:
        """Record that these names belong to this writer, before any of the files exists."""
        with self._lock:
            if names <= self.journal.names and not changes:  # type: ignore[operator]
                return
            self.journal = replace(self.journal, names=self.journal.names | {*names}, **changes)
            self.write_journal()

    def write_journal(self) -> None:
        with self._lock:
            new = self._etag is None
            made = self.store.put(
                self.full_name(JOURNAL), self.journal.render(), create_only=new, if_match=None if new else self._etag
            )
            self._etag = made.etag

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, starting with those that make loaders accept the directory as a model."""
        ranks: dict[int, list[str]] = {}
        for name in sorted(names):
            ranks.setdefault(self.rules.rank(name), []).append(self.full_name(name))
        for _, group in sorted(ranks.items(), reverse=True):
            self.store.delete(group)

    def remove_journal(self) -> None:
        try:
            self.store.delete([self.full_name(JOURNAL)])
        except UnwritableError:
            if self.store.entry(self.full_name(JOURNAL)) is not None:  # else only the answer was lost
                raise
        self._etag = None
        self.journal = JournalContent()
