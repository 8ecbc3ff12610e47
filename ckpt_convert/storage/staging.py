"""Writing a directory that appears under its name complete or not at all.

Everything is written into ``.NAME.partial`` beside the destination, flushed to disk, compared with the record of what
was written, and renamed. The partial directory is locked while it is written, so that a second writer of the same
destination is refused; a journal in it marks it as ours.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TextIO

from ckpt_convert import log
from ckpt_convert.errors import (
    CkptConvertError,
    NotEnoughSpaceError,
    OutputExistsError,
    UnreadableError,
    UnwritableError,
    VerificationError,
)
from ckpt_convert.storage.folder import Folder, is_regular_file, lstat, remove_all, remove_entry
from ckpt_convert.storage.lock import Lock
from ckpt_convert.storage.names import JOURNAL, partial_path, replaced_path
from ckpt_convert.storage.place import Place, as_place
from ckpt_convert.storage.rules import Rules, refuse_existing
from ckpt_convert.storage.system import Advice, exchange, sync_directory, writing
from ckpt_convert.wording import indented_list


def refuse_replacing(destination: Path, rules: Rules, *, overwrite: bool) -> None:
    """``refuse_existing`` for the current content of a destination."""
    with writing(destination, "looked at"):
        refuse_existing(as_place(destination), os.listdir(destination), rules, overwrite=overwrite)


class Journal:
    """A text file with one line for each finished piece."""

    def __init__(self, file: TextIO, path: Path, advice: Advice) -> None:
        self._file = file
        self._path = path
        self._advice = advice

    def note(self, line: str) -> None:
        with writing(self._path, "written", self._advice):
            self._file.write(f"{line}\n")

    def note_file(self, name: str, line: str) -> None:
        """Nothing: files are recorded piece by piece."""

    def close(self) -> None:
        with writing(self._path, "closed", self._advice):
            self._file.close()


class Staging:
    """The locked partial directory of a destination; a context manager that keeps its files on early exit.

    ``resume`` keeps the files of an earlier attempt, which are removed otherwise. ``mode`` limits the permissions of
    the output. Raises OutputExistsError if something else is in the way, LockedError, and as ``writing`` does.
    """

    def __init__(
        self,
        destination: Path,
        rules: Rules | None = None,
        *,
        overwrite: bool = False,
        resume: bool = False,
        mode: int = 0o777,
        advice: Advice | None = None,
    ) -> None:
        # If the destination is a link to a directory, the directory is replaced and the link is kept.
        self.destination = destination.resolve() if destination.is_dir() else destination.absolute()
        self.rules = rules or Rules()
        self.overwrite = overwrite
        self.path = partial_path(self.destination)
        self._aside = replaced_path(self.destination)
        self._old: Lock | None = None
        what = f"finished files are kept in {self.path.name}"
        self.advice = advice or Advice(
            f"{what}, free some space and run again with `resume=True`",
            f"{what}; when that is fixed, run again with `resume=True`",
        )
        with self._writing(self.destination.parent, "made"):
            self.destination.parent.mkdir(parents=True, exist_ok=True)
        self._lock, made = self._acquire(mode)
        self.folder = Folder(self._lock.fd, self.path, mode, self.rules.rank, self.advice)
        self._found: set[str] = set()
        try:
            self._put_back()
            if self.destination.exists():
                refuse_replacing(self.destination, self.rules, overwrite=overwrite)
            with self._writing(self.path, "emptied"):
                self.resumed = self._start(resume)
        except BaseException:
            if made:
                self.discard()
            self.release()
            raise

    def _start(self, resume: bool) -> bool:
        """Mark the directory as ours, and empty it unless an attempt is resumed; returns whether one is."""
        there = os.listdir(self._lock.fd)
        resumed = resume and bool(there) and (there != [JOURNAL] or bool(_journal(self._lock.fd)))
        # The journal is written first and removed last, so that whatever is left here is recognized as ours.
        if not resumed or JOURNAL not in there:
            _mark(self._lock.fd, "")
        if not resumed:
            remove_all(self._lock.fd, self.rules.rank, but=JOURNAL)
        self._found = {name for name, _ in self.folder.contents()}
        return resumed

    def _put_back(self) -> None:
        """Restore, or remove, the old output that a killed run had moved aside."""
        aside = self._aside
        if not aside.is_dir() or aside.is_symlink():
            return
        begun = os.path.lexists(aside / JOURNAL)  # its removal had begun, so its replacement was complete
        ours = self.rules.is_ours(as_place(aside))
        with self._writing(aside, "put back"):
            if begun or (ours and os.path.lexists(self.destination) and not self.rules.foreign(as_place(aside))):
                with Folder.at(aside) as old:
                    remove_staged(old.fd, aside, self.rules.rank)
            elif not os.path.lexists(self.destination) and (ours or self.rules.is_ours(self.place)):
                os.rename(aside, self.destination)

    def _acquire(self, mode: int) -> tuple[Lock, bool]:
        """Lock the partial directory; also returns whether it was created for that."""
        made = False
        while True:
            with self._writing(self.path, "made"), contextlib.suppress(FileExistsError):
                os.mkdir(self.path, 0o777 & mode)
                made = True
            held = (
                f"{self.destination}: another process is writing it (it holds {self.path.name}); "
                "wait for it, or choose another destination"
            )
            with self._writing(self.path, "opened"):
                try:
                    lock = Lock.directory(self.path, held)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    if error.errno not in _NO_DIRECTORY:
                        raise
                    raise self._in_the_way("is no directory") from error
            # The previous holder may have renamed or removed the directory before we got the lock.
            if not lock.is_at(self.path):
                lock.close()
                continue
            there = os.listdir(lock.fd)
            if there and JOURNAL not in there and not self._is_left():
                lock.close()
                raise self._in_the_way(f"holds {', '.join(sorted(there)[:3])}, and no mark that we made it")
            return lock, made

    def _is_left(self) -> bool:
        """Whether a partial directory without a journal was left by an earlier run: its output, or what it replaced.

        A run that is killed after exchanging old and new, before the old one is marked, leaves a checkpoint here beside
        an output of ours. As for the output itself, `overwrite=True` allows to remove it.
        """
        if self.rules.is_ours(self.place):
            return True
        return self.overwrite and self.rules.is_ours(as_place(self.destination)) and not self.rules.foreign(self.place)

    def _in_the_way(self, what: str) -> OutputExistsError:
        return OutputExistsError(
            f"{self.path}: is in the way of writing {self.destination}: it {what}; move it elsewhere, or choose "
            "another name"
        )

    def _writing(self, path: Path, operation: str) -> contextlib.AbstractContextManager[None]:
        return writing(path, operation, self.advice)

    # Writing

    @property
    def place(self) -> Place:
        """The partial directory, from which the output can be read."""
        return as_place(self.path)

    def expect(self, names: Iterable[str]) -> None:
        """Nothing: everything in the partial directory belongs to this writer."""

    def allocated(self) -> int:
        """Bytes that the partial directory already takes on disk."""
        with self._writing(self.path, "looked at"):
            return sum(found.st_blocks * 512 for _, found in self.folder.contents())

    def journal(self) -> list[str]:
        """The lines of an earlier attempt's journal; empty for a first attempt."""
        with self._writing(self.path / JOURNAL, "read"):
            return _journal(self._lock.fd).splitlines() if self.resumed else []

    def begin(self, first: str, keep: Iterable[str] = ()) -> Journal:
        """Open the journal for appending; of an earlier attempt only the files ``keep`` are kept.

        If none is, the journal is rewritten with the line ``first``.
        """
        kept = [*keep]
        with self._writing(self.path / JOURNAL, "written"):
            if kept:
                self.folder.keep_only(kept, JOURNAL)
            else:
                _mark(self._lock.fd, f"{first}\n")
                remove_all(self._lock.fd, self.rules.rank, but=JOURNAL)
            fd = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | _SAFELY, dir_fd=self._lock.fd)
            file = os.fdopen(fd, "a", encoding="utf-8", buffering=1)
        return Journal(file, self.path / JOURNAL, self.advice)

    # The end

    def complete(self) -> None:
        """Write the files that come last; the output can then be read back, but is not published yet."""
        self.folder.complete()

    def is_resumable_after(self, error: BaseException) -> bool:
        """Whether the partial directory is worth keeping after this error, since resuming may succeed."""
        may_pass = isinstance(error, NotEnoughSpaceError | UnwritableError | UnreadableError)
        return may_pass and self._holds_work()

    def _holds_work(self) -> bool:
        with contextlib.suppress(OSError):
            return self._lock.is_at(self.path) and os.listdir(self._lock.fd) not in ([], [JOURNAL])
        return False

    def commit(self) -> None:
        """Flush and check everything, then rename the directory, replacing an old output.

        Raises VerificationError if something else changed the files, OutputExistsError if something else took the name,
        UnwritableError. Failing to remove the old output is only a warning.
        """
        self.complete()
        with self._writing(self.path, "flushed to disk"):
            self._refuse_changes()
            journal = _journal(self._lock.fd)
            try:
                os.unlink(JOURNAL, dir_fd=self._lock.fd)
                self.folder.sync()
                self._publish()
            except BaseException:
                if not self._lock.is_at(self.destination):
                    _mark(self._lock.fd, journal)
                raise
        left = f"; what it replaced is kept in {self._old_place}" if self._old_place is not None else ""
        with writing(
            self.destination.parent,
            "flushed to disk",
            f"{self.destination} is complete, but may be gone after a failure of the power{left}",
        ):
            sync_directory(self.destination.parent)
        self._remove_old()
        self.release()

    def _refuse_changes(self) -> None:
        changes = self.folder.changes([JOURNAL])
        if not self._lock.is_at(self.path):
            changes.append("the directory itself was moved, removed or replaced")
        if changes:
            raise VerificationError(
                f"{self.path}: something else wrote there meanwhile, so that nothing was published:"
                f"{indented_list(changes)}\nsee to it that nothing else does, and run it again"
            )

    def _publish(self) -> None:
        """Rename the directory; an old output is kept open, and moved out of the way."""
        if not self.destination.exists() or not os.listdir(self.destination):
            with self._writing(self.destination, "given its name"):
                os.rename(self.path, self.destination)
        elif not self.overwrite:
            raise OutputExistsError(f"{self.destination}: appeared while it was being written; it was left alone")
        else:
            refuse_replacing(self.destination, self.rules, overwrite=True)
            # The lock keeps another writer from taking the old output for its partial directory during the removal.
            held = f"{self.destination}: another process has it; wait for it, and run again"
            with self._writing(self.destination, "replaced"):
                self._old = Lock.directory(self.destination, held)
                self._replace(self._old)
        self._refuse_exchanged()

    def _replace(self, old: Lock) -> None:
        """Exchange old and new, atomically if the system supports it."""
        try:
            if exchange(self.path, self.destination):
                return
            if os.path.lexists(self._aside):
                raise OutputExistsError(
                    f"{self._aside}: is in the way of replacing {self.destination}; move it elsewhere, and run again"
                )
            os.rename(self.destination, self._aside)
            os.rename(self.path, self.destination)
        except BaseException:
            # An interruption does not tell what was done before it, so look at the disk.
            if old.is_at(self._aside) and not os.path.lexists(self.destination):
                os.rename(self._aside, self.destination)
            raise

    @property
    def _old_place(self) -> Path | None:
        """Where the replaced output is now; None if there is none (any more)."""
        if self._old is None or not self._old.held:
            return None
        return next((place for place in (self.path, self._aside) if self._old.is_at(place)), None)

    def _refuse_exchanged(self) -> None:
        if not self._lock.is_at(self.destination):
            raise VerificationError(
                f"{self.destination}: is not what was written into {self.path}, which something else put another "
                "directory in the place of; look at it before it is used, and run it again"
            )

    def _remove_old(self) -> None:
        """Remove the replaced output; a failure is a warning, as the new output is complete."""
        place, old = self._old_place, self._old
        if place is None or old is None:
            return
        try:
            remove_staged(old.fd, place, self.rules.rank)
        except OSError as error:
            log.warning(
                "%s is complete, but what it replaced is still in %s (%s): remove that",
                self.destination,
                place,
                error.strerror,
            )

    def discard(self) -> None:
        """Remove the partial directory, except foreign files in it."""
        with contextlib.suppress(OSError):
            if self._lock.held and self._lock.is_at(self.path):
                self._remove_ours()
                os.rmdir(self.path)
        self.release()

    def _remove_ours(self) -> None:
        # The journal is removed last; files that make loaders accept the directory as a model first.
        contents = sorted(self.folder.contents(), key=lambda found: (found[0] == JOURNAL, -self.rules.rank(found[0])))
        for name, there in contents:
            with contextlib.suppress(OSError):
                if stat.S_ISDIR(there.st_mode):
                    os.rmdir(name, dir_fd=self._lock.fd)  # fails if foreign files are in it
                elif name == JOURNAL or name in self._found or self.folder.is_written(name, there):
                    os.unlink(name, dir_fd=self._lock.fd)

    def release(self) -> None:
        """Give up the lock, leaving the partial directory as it is."""
        self._lock.close()
        if self._old is not None:
            self._old.close()

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, CkptConvertError) and (left := self._left()):
            error.add_note(left)
        self.release()

    def _left(self) -> str | None:
        """A note on what an interruption left on disk."""
        if not self._lock.held:
            return None
        old = self._old_place
        if self._lock.is_at(self.destination):
            if old is None or self._old is None:
                return f"{self.destination} is complete"
            with contextlib.suppress(OSError):
                _mark(self._old.fd, "")  # so that the next run removes it
            return f"{self.destination} is complete; what it replaced is still in {old}: remove that"
        if not os.path.lexists(self.destination) and old is not None:
            return f"{old} holds what was there before: rename it to {self.destination}, or let the next run do so"
        if self._holds_work():
            return f"{self.path} holds what is done; `resume=True` continues it, a run without it starts over"
        return None


_SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
"""Flags to open a journal without following links or blocking."""

_NO_DIRECTORY = (errno.ENOTDIR, errno.ELOOP)
"""Errors when the name to be opened as a directory is something else, or a link."""


def remove_staged(fd: int, path: Path, rank: Callable[[str], int]) -> None:
    """Remove an open directory; an interrupted removal is recognized as ours and does not look like a model.

    Raises OSError.
    """
    _mark(fd, "")
    sync_directory(fd)
    remove_all(fd, rank, but=JOURNAL)
    os.unlink(JOURNAL, dir_fd=fd)
    os.rmdir(path)


def _journal(fd: int) -> str:
    """The journal in an open directory; empty if there is none, or if it is a link or has other hard links."""
    found = lstat(JOURNAL, fd)
    if found is None or not is_regular_file(found):
        return ""
    with os.fdopen(os.open(JOURNAL, os.O_RDONLY | _SAFELY, dir_fd=fd), encoding="utf-8", errors="replace") as file:
        return file.read()


def _mark(fd: int, text: str) -> None:
    """Write a journal into an open directory, replacing anything of its name."""
    found = lstat(JOURNAL, fd)
    if found is not None and not is_regular_file(found):
        remove_entry(JOURNAL, found, fd)
        found = None
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if found is not None else os.O_EXCL) | _SAFELY
    with os.fdopen(os.open(JOURNAL, flags, 0o666, dir_fd=fd), "w", encoding="utf-8") as file:
        file.write(text)
