"""Removing directories that we wrote, and cleaning up after interrupted writers.

A directory is renamed before its files are removed, so that it never looks complete; foreign files in it are kept,
under the original name.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ckpt_convert import log
from ckpt_convert.errors import CkptConvertError, CorruptFileError, LockedError
from ckpt_convert.storage.lock import Lock
from ckpt_convert.storage.names import DELETED, JOURNAL, PARTIAL, REPLACED, partial_path
from ckpt_convert.storage.place import as_place
from ckpt_convert.storage.pointer import SUFFIX, read_pointer
from ckpt_convert.storage.reader import reading
from ckpt_convert.storage.rules import Rules
from ckpt_convert.storage.staging import remove_staged
from ckpt_convert.storage.system import sync_directory


def withdraw(path: Path, rules: Rules) -> None:
    """Remove the files that a directory's manifests list; it is renamed first. Raises as ``finish_removal`` does."""
    hidden = removal_name(path)
    if hidden.is_dir():  # left by an earlier attempt
        finish_removal(hidden, path, rules)
    os.rename(path, hidden)
    sync_directory(hidden.parent)
    finish_removal(hidden, path, rules)


def removal_name(path: Path) -> Path:
    """The name of a directory while it is removed: no loader accepts it, and ``tidy`` recognizes it."""
    return partial_path(path.with_name(f"{path.name}{DELETED}"))


def finish_removal(hidden: Path, original: Path, rules: Rules) -> None:
    """Remove the files of a renamed directory; if foreign files are left, it gets its original name back.

    Removes the files that its manifests list, and the manifests last, so that an interrupted removal can be continued.
    Raises OSError, UnreadableError, and CorruptFileError if the manifest is damaged.
    """
    journal = hidden / JOURNAL
    journal.touch()
    sync_directory(hidden)
    listed = rules.listed_files(as_place(hidden))
    mark = rules.manifests[-1]
    if not listed and os.path.lexists(hidden / mark):
        raise CorruptFileError(f"{hidden / mark}: is damaged, so nothing says which files are to be removed")
    _remove_files(hidden, listed.difference(rules.manifests), rules)
    for name in rules.manifests:
        if name in listed:
            (hidden / name).unlink(missing_ok=True)
    _remove_files(hidden, frozenset(), rules)  # empty folders
    kept = sorted(entry.name for entry in hidden.iterdir() if entry != journal)
    if not kept:
        journal.unlink()
        hidden.rmdir()
        return
    what = f"the checkpoint in {original} was removed, and {', '.join(kept[:8])}, which it did not write,"
    if os.path.lexists(original):  # it was saved again since
        log.warning("%s is kept in %s", what, hidden)
        return
    os.rename(hidden, original)
    (original / JOURNAL).unlink()
    sync_directory(original.parent)
    log.warning("%s is kept there", what)


def _remove_files(directory: Path, names: frozenset[str], rules: Rules) -> None:
    """Remove these files without following links, then empty folders."""
    for folder, _, _ in os.walk(directory, topdown=False):
        here = Path(folder)
        for entry in sorted(here.iterdir(), key=lambda entry: rules.rank(entry.name), reverse=True):
            if entry.relative_to(directory).as_posix() in names and (entry.is_symlink() or not entry.is_dir()):
                entry.unlink()
        if here != directory and not any(here.iterdir()):
            here.rmdir()


def leftovers(parent: Path) -> list[Path]:
    """Paths that an interrupted writer may have left: ``.X.partial``, ``.X.replaced``, unfinished pointers."""
    with reading(parent, "listed"):
        if not parent.is_dir():
            return []
        with os.scandir(parent) as entries:
            found = [e.name for e in entries if _is_leftover(e.name, e.is_dir(follow_symlinks=False))]
    return [parent / name for name in sorted(found)]


def _is_leftover(name: str, is_directory: bool) -> bool:
    endings = (PARTIAL, REPLACED) if is_directory else (SUFFIX,)
    return name.startswith(".") and any(name.endswith(end) and len(name) > len(end) + 1 for end in endings)


def tidy(parent: Path, rules: Rules) -> None:
    """Clean up after interrupted writers, and restore an output that one of them had moved aside.

    Removes unfinished directories that are unlocked and either empty or ours by their journal or manifest, unfinished
    pointers, and manifests that were to replace others. Logs a line for each, and a warning for what cannot be removed.
    Touches nothing else.
    """
    for path in leftovers(parent):
        try:
            if path.name.endswith(PARTIAL):
                _tidy_partial(path, rules)
            elif path.name.endswith(REPLACED):
                _tidy_replaced(path, rules)
            elif read_pointer(as_place(path)) is not None or not os.lstat(path).st_size:
                path.unlink()
                log.info("half-written pointer %s removed", path)
        except (OSError, CkptConvertError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            log.warning("%s is left over and cannot be removed: %s", path, said)
    half_written = partial_path(Path(rules.manifests[-1]))
    for path in parent.glob(f"*/{half_written}"):
        directory = path.parents[len(half_written.parts) - 1]
        if not directory.is_symlink() and rules.is_complete(as_place(directory), directory.name):
            _remove_half_written(path)


def _remove_half_written(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        log.warning("%s is left over and cannot be removed: %s", path, error.strerror)


def _tidy_partial(path: Path, rules: Rules) -> None:
    name = path.name[1 : -len(PARTIAL)]
    removed = name.removesuffix(DELETED)
    with contextlib.suppress(LockedError), Lock.directory(path, "it is being written") as lock:
        if (
            not os.path.lexists(path / JOURNAL)
            and any(path.iterdir())
            and not rules.is_complete(as_place(path), removed)
        ):
            return
        if removed != name:
            finish_removal(path, path.with_name(removed), rules)
        else:
            remove_staged(lock.fd, path, rules.rank)
            log.warning("half-written %s removed", path)


def _tidy_replaced(path: Path, rules: Rules) -> None:
    original = path.with_name(path.name[1 : -len(REPLACED)])
    ours = rules.is_complete(as_place(path), original.name)
    if rules.is_complete(as_place(original), original.name) and (os.path.lexists(path / JOURNAL) or ours):
        finish_removal(path, original, rules)
        log.warning("%s removed: %s, which replaced it, is complete", path, original.name)
    elif not os.path.lexists(original) and ours:
        os.rename(path, original)
        sync_directory(path.parent)
        log.warning("%s put back: what was to replace it was not completed", original)
