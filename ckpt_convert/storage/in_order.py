"""Publishing in a store without rename: files get their final names, those that complete the directory last.

A journal is written first and removed last. While it exists, the directory counts as incomplete, and the journal lists
the writer's files, which distinguishes the remains of an attempt from foreign files. Files are created only where their
name is free, or replaced only if their etag is the expected one. Removal writes the journal, then removes the files
that make the directory complete, the rest, and at last the journal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import PurePosixPath
from types import TracebackType

from ckpt_convert import log
from ckpt_convert.errors import (
    CkptConvertError,
    CorruptFileError,
    NotEnoughSpaceError,
    OutputExistsError,
    UnreadableError,
    UnwritableError,
    UsageError,
)
from ckpt_convert.storage import pointer
from ckpt_convert.storage.base import FileKind
from ckpt_convert.storage.journaled import JournalContent, JournaledDirectory
from ckpt_convert.storage.names import JOURNAL
from ckpt_convert.storage.ordered import OrderedFolder, OrderedJournal, OverlayStore
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.rules import Rules, refuse_existing
from ckpt_convert.storage.store_lock import StoreLock, lock_place, stale
from ckpt_convert.storage.system import Advice

_KEPT = Advice(
    "finished files are kept, free some space and run again with `resume=True`",
    "finished files are kept; when that is fixed, run again with `resume=True`",
)


class OrderedStage:
    """A locked destination in such a store; a context manager that keeps finished files on early exit.

    ``resume`` keeps the weight files that an earlier attempt finished. Raises OutputExistsError if something else is in
    the way, LockedError, and UnwritableError.
    """

    def __init__(
        self,
        destination: Place,
        rules: Rules,
        *,
        overwrite: bool = False,
        resume: bool = False,
        advice: Advice | None = None,
        alone: bool = False,
    ) -> None:
        """``alone`` means that a lock of the caller already excludes other writers."""
        self.destination = destination.without_listing()
        self.resumed = False
        self.advice = advice or _KEPT
        self._directory = JournaledDirectory(destination, rules)
        held = f"{destination}: another process is writing it; wait for it, or choose another destination"
        self._lock = None if alone else StoreLock(lock_place(destination), held)
        self.folder = OrderedFolder(self._directory, self.advice)
        try:
            with self.folder.advised():
                self._begin(overwrite, resume)
        except BaseException:
            self.release()
            raise

    def _begin(self, overwrite: bool, resume: bool) -> None:
        there = self._directory.list()
        if not there:
            return
        if JOURNAL not in there:
            _refuse_existing(self.destination, there, self._directory.rules, overwrite=overwrite)
            self._directory.announce({*there}, removing=True)
        else:
            self._directory.adopt(there)
            names = self._directory.journal.names
            if others := sorted(there.keys() - names - {JOURNAL}):
                raise OutputExistsError(
                    f"{self.destination}: holds {', '.join(others[:8])} beside what an interrupted writer left; move "
                    "that elsewhere, or choose another name"
                )
        whole = self._directory.journal.whole
        kept = {name for name, (etag, _) in whole.items() if name in there and there[name].etag == etag}
        kept = kept if resume and not self._directory.journal.removing else set()
        self._directory.remove(there.keys() - kept - {JOURNAL})
        self._directory.journal = JournalContent(
            self._directory.journal.first, kept, {name: whole[name] for name in kept}
        )
        self.folder.ledger.written.update({name: there[name] for name in kept})
        self.resumed = bool(kept)

    # What is written

    @property
    def place(self) -> Place:
        """Where the output can be read back, including the files that are held back."""
        return replace(self.destination, store=OverlayStore(self._directory, self.folder.ledger.kept))

    def expect(self, names: Iterable[str]) -> None:
        """Announce names that will be written, together with the first of them."""
        self.folder.ledger.expected.update(names)

    def announce(self, names: Iterable[str]) -> None:
        """Announce names now, which other processes may write then (``folder_for``)."""
        with self.folder.advised():
            self._directory.announce({*names}, removing=False)

    @property
    def whole(self) -> set[str]:
        """The files of an earlier attempt that the journal has as complete, and that are still there."""
        return {*self._directory.journal.whole}

    @property
    def first(self) -> str:
        """The first line of the journal of an earlier attempt; empty for none."""
        return self._directory.journal.first if self.resumed else ""

    def allocated(self) -> int:
        """Bytes written by an earlier attempt."""
        return self.folder.nbytes

    def journal(self) -> list[str]:
        """The journal lines of an earlier attempt for files that still exist; empty for a first attempt."""
        journal = self._directory.journal
        return [journal.first, *(line for _, line in journal.whole.values())] if self.resumed else []

    def begin(self, first: str, keep: Collection[str] = ()) -> OrderedJournal:
        """Open the journal with the line ``first``; of an earlier attempt only the files ``keep`` are kept."""
        gone = self.folder.ledger.written.keys() - {*keep}
        with self.folder.advised():
            self._directory.remove(gone)
        for name in gone:
            self.folder.ledger.written.pop(name)
            self._directory.journal.whole.pop(name)
        self._directory.journal.first = first
        return OrderedJournal(None if self._lock is None else self.folder)

    # The end

    def complete(self) -> None:
        """Nothing: the files that come last are held back until ``commit``, and ``place`` includes them."""

    def is_resumable_after(self, error: BaseException) -> bool:
        """Whether the finished files are worth keeping after this error, since resuming may succeed."""
        may_pass = isinstance(error, NotEnoughSpaceError | UnwritableError | UnreadableError)
        return may_pass and bool(self.folder.ledger.written)

    def commit(self) -> None:
        """Check that all files are as written, then write those that complete the directory.

        Raises VerificationError if something else changed the files, LockedError if another process has taken the
        lock over, UnwritableError.
        """
        if self._lock is not None:
            self._lock.refuse_lost()
        with self.folder.advised():
            self.folder.refuse_changes(self._directory.list())
            self.folder.write_kept()
            self._directory.remove_journal()
        self.release()

    def discard(self) -> None:
        """Remove what was written, except files that something else changed or created; the rest is no checkpoint."""
        try:
            self._directory.abort_uploads()  # one whose start was not answered is known to no writer
            there = self._directory.list()
            ours = {name for name in there if self.folder.is_written(name, there[name])}
            if ours and JOURNAL not in there:  # removing the journal was the last step
                self._directory.announce(ours, removing=True)
            self._directory.remove(ours)
            if JOURNAL in there or ours:
                self._directory.remove_journal()
        except CkptConvertError as error:
            log.warning("%s could not be removed, and is no checkpoint: %s", self.destination, error)
        self.release()

    def release(self) -> None:
        """Release the lock; files are left as they are."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> OrderedStage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, CkptConvertError) and self.folder.ledger.written:
            error.add_note(
                f"{self.destination} keeps the finished files; `resume=True` continues, a run without it starts over"
            )
        self.release()


def check_destination(destination: Place, source: Place, rules: Rules, *, overwrite: bool) -> None:
    """``Workspace.check_destination``."""
    if source.store == destination.store:
        _refuse_overlap(destination, source)
    if not destination.name:
        raise OutputExistsError(
            f"{destination}: is a whole bucket; give a name inside it, such as {destination / 'model'}"
        )
    there = destination.without_listing().listed()
    if there.kind() is FileKind.FILE:
        raise OutputExistsError(f"{destination}: is a file, but the output is a directory; choose another name")
    if there.is_folder() and not is_leftover(there):
        _refuse_existing(there, [place.name for place in there.children()], rules, overwrite=overwrite)


def _refuse_overlap(destination: Place, source: Place) -> None:
    target, origin = destination.path, source.path
    if target.is_relative_to(origin) or (source.is_regular_file() and target == origin.parent):
        raise OutputExistsError(
            f"{destination}: is inside the source {source}; the source is never written, choose another place"
        )
    if origin.is_relative_to(target):
        raise OutputExistsError(
            f"{destination}: contains the source {source}, which writing it would replace; choose another place"
        )


def _refuse_existing(destination: Place, there: Iterable[str], rules: Rules, *, overwrite: bool) -> None:
    refuse_existing(destination, {PurePosixPath(name).parts[0] for name in there}, rules, overwrite=overwrite)


def check_space(destination: Place, needed: int) -> None:
    """Nothing: such a store does not report free space."""


def stage(
    destination: Place,
    rules: Rules,
    *,
    overwrite: bool = False,
    resume: bool = False,
    mode: int = 0o777,
    advice: Advice | None = None,
    alone: bool = False,
) -> OrderedStage:
    """``Workspace.stage``; an old output is removed first, as such a store cannot exchange directories."""
    return OrderedStage(destination, rules, overwrite=overwrite, resume=resume, advice=advice, alone=alone)


def join(staged: Place, advice: Advice) -> AbstractContextManager[OrderedFolder]:
    """``Workspace.join``: a file of such a store is written by one process."""
    raise UsageError(
        f"{staged}: several processes cannot write one file in this store; choose an output_dir on a file system that "
        "all of them see"
    )


def folder_for(destination: Place, rules: Rules, names: Collection[str], advice: Advice) -> OrderedFolder:
    """The folder of a stage of another process, to write whole files into it that the stage has announced."""
    directory = JournaledDirectory(destination, rules)
    directory.journal.names.update(names)
    return OrderedFolder(directory, advice)


def make_folder(folder: Place) -> None:
    """Nothing: a folder is only a prefix of names."""


def lock(place: Place, message: str) -> StoreLock:
    """``Workspace.lock``."""
    return StoreLock(place, message)


def file_system(folder: Place) -> None:
    """``Workspace.file_system``: a store is none."""


def identity(folder: Place) -> str:
    """``Workspace.identity``."""
    return str(folder)


def is_leftover(directory: Place) -> bool:
    """``Workspace.is_leftover``."""
    return (directory / JOURNAL).is_regular_file()


def replace_file(place: Place, data: bytes, etag: str | None = None) -> None:
    """``Workspace.replace_file``."""
    place.store.put(str(place.path), data, if_match=etag)


def remove(folder: Place, names: Iterable[str]) -> None:
    """``Workspace.remove``; one request for each, as a request for several removes them in no order."""
    for name in names:
        folder.store.delete([str((folder / name).path)])


def check_pointer(parent: Place, name: str) -> None:
    """``Workspace.check_pointer``."""
    place = (parent / name).without_listing().listed(neighbors=False)
    if place.is_present() and pointer.read_pointer(place) is None:
        raise pointer.in_the_way(place)


def point(parent: Place, name: str, target: str) -> None:
    """``Workspace.point``: a small file, created, or replaced if it has not changed since."""
    check_pointer(parent, name)
    place = (parent / name).without_listing()
    found = place.store.entry(str(place.path))
    etag = None if found is None else found.etag
    place.store.put(str(place.path), pointer.pointer_text(target), create_only=found is None, if_match=etag)


def withdraw(place: Place, rules: Rules) -> None:
    """Remove the files that a directory's manifests list, first those that complete it. Raises UnwritableError.

    Foreign files are kept, with a warning. Raises CorruptFileError if the manifest is damaged.
    """
    directory = JournaledDirectory(place, rules)
    there = directory.list()
    if JOURNAL in there:
        directory.adopt(there)
        listed = frozenset(directory.journal.names)
    else:
        listed = rules.listed_files(directory.seen)
        if not listed and (mark := rules.manifests[-1]) in there:
            raise CorruptFileError(f"{place / mark}: is damaged, so nothing says which files are to be removed")
    directory.announce(listed & there.keys(), removing=True)
    _finish(directory, there.keys() - {JOURNAL})


def _finish(directory: JournaledDirectory, there: Collection[str]) -> None:
    names = directory.journal.names
    directory.remove(name for name in there if name in names)
    directory.remove_journal()
    if kept := sorted(name for name in there if name not in names):
        log.warning(
            "the checkpoint in %s was removed, and %s, which it did not write, is kept there",
            directory.place,
            ", ".join(kept[:8]),
        )


def tidy(parent: Place, rules: Rules, but: Collection[str] = ()) -> None:
    """Clean up after interrupted writers below a place; a directory that only lacked the last step is completed.

    Directories with a lock are left, with a warning, and half-written ones whose names are in ``but``. Logs a line for
    each, and a warning for what cannot be removed.
    """
    listed = parent.without_listing().listed()
    if not listed.is_folder():
        return
    for place in sorted(listed.folders()):
        if not (place / JOURNAL).is_regular_file():
            continue
        try:
            _tidy(place, rules, is_kept=place.name in but)
        except CkptConvertError as error:
            log.warning("%s is left over and cannot be removed: %s", place, error)


def _tidy(place: Place, rules: Rules, *, is_kept: bool) -> None:
    if (lock := lock_place(place)).is_present():
        log.warning("%s is being written, or was when its writer ended; %s", place, stale(lock))
        return
    directory = JournaledDirectory(place, rules)
    there = directory.list()
    directory.adopt(there)
    if is_kept and not directory.journal.removing and rules.manifests[-1] not in there:
        return
    if rules.manifests[-1] in there and not directory.journal.removing:
        directory.remove_journal()
        log.info("%s is complete: its writer was interrupted after the last file", place)
        return
    _finish(directory, there.keys() - {JOURNAL})
    log.warning("half-written %s removed", place)
