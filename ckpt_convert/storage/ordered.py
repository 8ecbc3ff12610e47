"""Files and folders as written by ``in_order``: each file under its final name, some of them last."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType

from ckpt_convert.errors import NotEnoughSpaceError, OutputExistsError, UnwritableError, VerificationError
from ckpt_convert.storage.base import Entry, OpenFile, Version, Writer
from ckpt_convert.storage.checksums import digest
from ckpt_convert.storage.journaled import JournaledDirectory
from ckpt_convert.storage.listing import Listing
from ckpt_convert.storage.names import JOURNAL
from ckpt_convert.storage.object_store import ObjectFile, ObjectStore
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.system import Advice
from ckpt_convert.wording import indented_list

PART = 8 << 20
"""Bytes per request of a file that is appended to."""


@dataclass
class _Ledger:
    """Shared by a folder and its subfolders: files written, files held back, names announced, and files whose upload
    was attempted without an answer.
    """

    written: dict[str, Entry] = field(default_factory=dict)
    kept: dict[str, bytes] = field(default_factory=dict)
    expected: set[str] = field(default_factory=set)
    attempted: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class OrderedFolder:
    """A directory of such a store being written, or the folder ``inside`` it; ``advice`` ends messages of errors."""

    directory: JournaledDirectory
    advice: Advice
    inside: str = ""
    ledger: _Ledger = field(default_factory=_Ledger)

    def subfolder(self, name: str) -> OrderedFolder:
        return replace(self, inside=self._full(name))

    def with_mode(self, mode: int) -> OrderedFolder:
        """The same folder: such a store has no permissions of single files."""
        return self

    def past_cache(self) -> OrderedFolder:
        """The same folder: nothing is cached."""
        return self

    @property
    def sends_parts(self) -> bool:
        """Yes: a part of a file is uploaded when all of its bytes are written."""
        return True

    @property
    def nbytes(self) -> int:
        return sum(entry.size for entry in self.ledger.written.values())

    @property
    def place(self) -> Place:
        """Where the files written so far can be read."""
        return self.directory.place / self.inside if self.inside else self.directory.place

    def comes_last(self, name: str) -> bool:
        """Whether a file of this name is held back until all others are written."""
        return self.directory.rules.rank(self._full(name)) > 0

    def file(self, name: str, size: int | None) -> OrderedFile:
        full = self._full(name)
        with self.advised():
            self._announce(full)
            return OrderedFile(self, full, self.directory.store.create(self.directory.full_name(full), size))

    def write(self, name: str, data: bytes) -> None:
        if self.comes_last(name):
            with self.ledger.lock:
                self.ledger.kept[self._full(name)] = data
        else:
            self._write(self._full(name), data)

    def kept_back(self, name: str) -> bytes | None:
        return self.ledger.kept.get(self._full(name))

    def write_kept(self) -> None:
        """Write the files held back, in the order of their ranks."""
        rank = self.directory.rules.rank
        for name in sorted(self.ledger.kept, key=lambda name: (rank(name), name)):
            self._write(name, self.ledger.kept[name])

    def refuse_changes(self, there: Mapping[str, Entry]) -> None:
        """Raise VerificationError if the directory's content is not what was written."""
        written = self.ledger.written
        changes = [f"{name} is gone" for name in written if name not in there]
        for name, entry in there.items():
            if name in written and entry.etag != written[name].etag:
                changes.append(f"{name} was changed or replaced")
            elif name not in written and name != JOURNAL:
                changes.append(f"{name} was put there")
        if changes:
            raise self._changed(changes)

    def _changed(self, changes: list[str]) -> VerificationError:
        return VerificationError(
            f"{self.directory.place}: something else wrote there meanwhile, so that nothing was published:"
            f"{indented_list(changes)}\nsee to it that nothing else does, and run it again"
        )

    def is_written(self, name: str, entry: Entry) -> bool:
        """Whether this is the very file that was written under this name, or may be, if the answer was lost."""
        known = self.ledger.written.get(name)
        return name in self.ledger.attempted if known is None else known.etag == entry.etag

    def finish(self, full: str, give: Callable[[], Entry]) -> None:
        """Publish a file under its name, and record it."""
        with self.ledger.lock:
            self.ledger.attempted.add(full)
        try:
            with self.advised():
                made = give()
        except OutputExistsError:
            with self.ledger.lock:
                self.ledger.attempted.discard(full)
            raise self._changed([f"{full} was put there"]) from None
        with self.ledger.lock:
            self.ledger.written[full] = made

    def note_whole(self, full: str, line: str) -> None:
        self.note_written({full: self.ledger.written[full]}, line)

    def note_written(self, written: Mapping[str, Entry], line: str = "") -> None:
        """Record files that are complete, whichever process wrote them, in the journal, too."""
        with self.advised(), self.ledger.lock:
            self.ledger.written.update(written)
            self.directory.journal.whole.update({name: (entry.etag, line) for name, entry in written.items()})
            self.directory.write_journal()

    @contextlib.contextmanager
    def advised(self) -> Iterator[None]:
        """Append the advice to a store's errors."""
        try:
            yield
        except NotEnoughSpaceError as error:
            raise NotEnoughSpaceError(f"{error}; {self.advice.full}") from error
        except UnwritableError as error:
            raise UnwritableError(f"{error}; {self.advice.failed}") from error

    def _write(self, full: str, data: bytes) -> None:
        with self.advised():
            self._announce(full)
        self.finish(full, lambda: self.directory.store.put(self.directory.full_name(full), data, create_only=True))

    def _announce(self, full: str) -> None:
        if full not in self.directory.journal.names:
            self.directory.announce({full, *self.ledger.expected}, removing=False)

    def _full(self, name: str) -> str:
        return f"{self.inside}/{name}" if self.inside else name


class OrderedFile:
    """A file that appears under its name in ``sync``; closing it earlier leaves nothing."""

    def __init__(self, folder: OrderedFolder, name: str, writer: Writer) -> None:
        self.name = name
        self._folder = folder
        self._writer: Writer | None = writer
        self._end = 0
        self._part = bytearray()

    @property
    def is_past_cache(self) -> bool:
        return False

    def write(self, offset: int, data: memoryview) -> None:
        assert self._writer is not None
        with self._folder.advised():
            self._writer.write(offset, data)

    def append(self, data: memoryview) -> None:
        self._part += data
        if len(self._part) >= PART:
            self._write_part()

    def _write_part(self) -> None:
        part, self._part = self._part, bytearray()
        self.write(self._end, memoryview(part))
        self._end += len(part)

    def readinto(self, offset: int, buffer: memoryview) -> int:
        return 0  # a finished file is recognized by its etag; of an unfinished one nothing is kept

    def sync(self) -> None:
        if self._part:
            self._write_part()
        writer, self._writer = self._writer, None
        assert writer is not None
        try:
            self._folder.finish(self.name, lambda: writer.complete(create_only=True))
        except BaseException:
            writer.abort()
            raise

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.abort()

    def __enter__(self) -> OrderedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class OrderedJournal:
    """Records complete files; what is written of others is lost with the attempt."""

    def __init__(self, folder: OrderedFolder | None) -> None:
        """``folder`` is None if no attempt is ever resumed."""
        self._folder = folder

    def note(self, line: str) -> None:
        """Nothing: a piece does not outlive an attempt."""

    def note_file(self, name: str, line: str) -> None:
        if self._folder is not None:
            self._folder.note_whole(name, line)

    def close(self) -> None:
        """Nothing is held."""


class OverlayStore(ObjectStore):
    """A directory as it will be, including the files that are held back."""

    def __init__(self, directory: JournaledDirectory, kept: Mapping[str, bytes]) -> None:
        self._store = directory.store
        self._kept = {directory.full_name(name): data for name, data in kept.items()}

    def list(self, prefix: str, *, deep: bool = True) -> dict[str, Entry]:
        found = self._store.list(prefix)
        return Listing(prefix, {**found, **{name: _entry_of(data) for name, data in self._kept.items()}}).list(
            prefix, deep=deep
        )

    def entry(self, name: str) -> Entry | None:
        return _entry_of(self._kept[name]) if name in self._kept else self._store.entry(name)

    def open(self, name: str, expected: Entry | None = None, called: str | None = None) -> OpenFile:
        data = self._kept.get(name)
        if data is None:
            return self._store.open(name, expected, called)
        return ObjectFile(called or self.label(name), _entry_of(data), lambda offset, nbytes: data[offset:][:nbytes])

    def label(self, name: str) -> str:
        return self._store.label(name)

    def put(self, name: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> Entry:
        return self._store.put(name, data, create_only=create_only, if_match=if_match)

    def create(self, name: str, size: int | None) -> Writer:
        return self._store.create(name, size)

    def delete(self, names: Iterable[str]) -> None:
        self._store.delete(names)


def _entry_of(data: bytes) -> Version:
    return Version(len(data), digest(data))
