"""The saved checkpoints of an output directory: which are complete, and in which order they were written.

``ckpt_convert/manifest.json`` in the directory of a step is what makes it a checkpoint: it is there, names the
directory that it lies in, and no journal lies beside it. Copies under another name, unfinished directories, and
whatever else people keep in an output directory are never taken for one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt_convert.checkpoint import record
from ckpt_convert.checkpoint.record import MANIFEST, MERGED, TRAINING_STATE, read_manifest, replace_manifest
from ckpt_convert.checkpointer.run.names import DELETED, PARTIAL, REPLACED
from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.containers.dcp import dcp
from ckpt_convert.convert import ownership
from ckpt_convert.errors import (
    CheckpointNotFoundError,
    CkptConvertError,
    ConfigError,
    CorruptFileError,
    LockedError,
    NewerVersionError,
    UsageError,
)
from ckpt_convert.storage.lock import Lock
from ckpt_convert.storage.names import JOURNAL, partial_of
from ckpt_convert.storage.pointer import SUFFIX, check_pointer, point, pointed, target_of
from ckpt_convert.storage.reader import reading
from ckpt_convert.storage.staging import remove
from ckpt_convert.storage.system import sync_directory

__all__ = [
    "Saved",
    "amend",
    "check_pointer",
    "finish_removal",
    "finish_thinning",
    "leftovers",
    "point",
    "pointed",
    "read",
    "removal_name",
    "scan",
    "tidy",
]

log = logging.getLogger("ckpt_convert")

VERSION = 1
"""The version of the manifest's part about training."""

CONTENTS = ("full", "weights", "adapter")
REMOVED = "removed"
"""What the manifest says of a training state that was removed to save space."""

_amending = threading.Lock()


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint; ``sequence`` counts the saves of a run, so the newest has the highest.

    ``contents`` is "full", "weights" or "adapter"; ``manifest`` is everything that its manifest says.
    """

    path: Path
    progress: Progress
    metrics: Mapping[str, float]
    contents: str
    sequence: int
    has_training_state: bool
    saver: str
    manifest: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def step(self) -> int:
        return self.progress.step


def _section(directory: Path, name: str | None) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The manifest and its part about training, where they say that this was completed under ``name`` (None: any).

    Raises ConfigError when the manifest cannot be read, CorruptFileError when it was edited or damaged.
    """
    with reading(directory / MANIFEST, "looked at"):
        if os.path.lexists(directory / JOURNAL) or not (directory / MANIFEST).is_file():
            return None
    manifest = read_manifest(directory)
    training = manifest.get("training")
    if not isinstance(training, dict) or name not in (None, training.get("directory")):
        return None
    return manifest, training


def _is_complete(directory: Path, name: str) -> bool:
    with contextlib.suppress(ConfigError, CorruptFileError):
        return _section(directory, name) is not None
    return False


def is_damaged(directory: Path) -> bool:
    """Whether this was a checkpoint of some saver, by its record, but its manifest is gone or cannot be read."""
    if directory.is_symlink() or not (directory / MANIFEST).parent.is_dir() or os.path.lexists(directory / JOURNAL):
        return False
    try:
        found = _section(directory, directory.name)
        if found is not None:
            _saved(directory, *found)
    except (ConfigError, CorruptFileError):
        return True
    return not (directory / MANIFEST).is_file()


def read(path: Path, saver: str = "default", *, renamed: bool = False) -> Saved | None:
    """The checkpoint in a directory; None if there is no complete one, or if another saver wrote it.

    ``renamed`` takes one that was copied or moved to another name, too. Damage is warned of. Raises NewerVersionError
    for one that a newer version wrote.
    """
    try:
        found = _section(path, None if renamed else path.name)
    except NewerVersionError:
        raise
    except (ConfigError, CorruptFileError) as error:
        log.warning("%s is no complete checkpoint: %s", path, error)
        return None
    if found is None or found[1].get("saver") != saver:
        return None
    version = found[1].get("version")
    if isinstance(version, int) and version > VERSION:
        raise NewerVersionError(
            f"{path / MANIFEST}: expected version {VERSION} of its part about training, found {version}; "
            "it was written by a newer ckpt-convert: update, or use another output directory"
        )
    try:
        return _saved(path, *found)
    except CorruptFileError as error:
        log.warning("%s is no complete checkpoint: %s", path, error)
        return None


def scan(output_dir: Path, saver: str = "default") -> list[Saved]:
    """The complete checkpoints of a saver, oldest first; links, files and hidden directories are passed over.

    Raises NewerVersionError for one that a newer version wrote.
    """
    with reading(output_dir, "listed"):
        if not output_dir.is_dir():
            return []
        with os.scandir(output_dir) as entries:
            names = [e.name for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
    found = (read(output_dir / name, saver) for name in sorted(names))
    return sorted((saved for saved in found if saved is not None), key=lambda saved: saved.sequence)


def amend(saved: Saved, **changes: Any) -> Saved:
    """Replace entries of the manifest's part about training, all or none; returns the checkpoint as it is now.

    What else the manifest says now stays, whatever ``saved`` knew of it. Raises CheckpointNotFoundError when the
    checkpoint is gone, UsageError for a metric that is no finite number.
    """
    for name, value in changes.get("metrics", {}).items():
        if not _is_number(value) or not math.isfinite(value):
            raise UsageError(f"{saved.path}: the metric {name!r} is {value!r}; expected a finite number")
    # A metric from the training thread and a removal from the one that writes must not undo each other.
    with _amending:
        found = _section(saved.path, saved.path.name)
        if found is None:
            raise CheckpointNotFoundError(f"{saved.path}: is no complete checkpoint any more; save another one")
        manifest, training = found
        training.update(changes)
        amended = _saved(saved.path, manifest, training)
        replace_manifest(saved.path, manifest)
    return amended


def _saved(path: Path, manifest: Mapping[str, Any], training: Mapping[str, Any]) -> Saved:
    place = str(path / MANIFEST)
    progress, metrics, sequence = (training.get(name) for name in ("progress", "metrics", "sequence"))
    state = training.get(TRAINING_STATE)
    problems = [
        f"{name!r} is {training.get(name)!r}"
        for name, good in (
            ("progress", isinstance(progress, Mapping)),
            ("metrics", isinstance(metrics, Mapping) and all(_is_number(value) for value in metrics.values())),
            ("contents", training.get("contents") in CONTENTS),
            ("sequence", _is_number(sequence) and isinstance(sequence, int)),
            (TRAINING_STATE, state in (None, REMOVED) or isinstance(state, Mapping)),
        )
        if not good
    ]
    if problems or not isinstance(progress, Mapping):
        raise CorruptFileError(f"{place}: is damaged: {'; '.join(problems)}")
    return Saved(
        path,
        Progress.from_dict(progress, place),
        {str(name): float(value) for name, value in (metrics or {}).items()},
        str(training["contents"]),
        int(training["sequence"]),
        isinstance(state, Mapping),
        str(training.get("saver")),
        manifest,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def removal_name(path: Path) -> Path:
    """Where a checkpoint goes to be removed: a name under which nobody takes it for one, and ``tidy`` knows it."""
    return partial_of(path.with_name(f"{path.name}{DELETED}"))


def finish_removal(hidden: Path, original: Path) -> None:
    """Remove the files of a checkpoint that has lost its name, and give that back to what somebody put beside them.

    The files are those that the manifests list, which go last, so that what an attempt leaves is listed still. Raises
    OSError, UnreadableError, and CorruptFileError where the manifest is damaged.
    """
    journal = hidden / JOURNAL
    journal.touch()
    sync_directory(hidden)
    listed = record.listed(hidden)
    if not listed and os.path.lexists(hidden / MANIFEST):
        raise CorruptFileError(f"{hidden / MANIFEST}: is damaged, so nothing says which files are to be removed")
    manifests = (f"{MERGED}/{MANIFEST}", MANIFEST)
    _remove_files(hidden, listed.difference(manifests))
    for name in manifests:
        if name in listed:
            (hidden / name).unlink(missing_ok=True)
    _remove_files(hidden, frozenset())  # folders that are empty now
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


def _remove_files(directory: Path, names: frozenset[str]) -> None:
    """Remove these files, without following links on the way, and the folders that are empty then."""
    for folder, _, _ in os.walk(directory, topdown=False):
        here = Path(folder)
        for entry in sorted(here.iterdir(), key=lambda entry: ownership.rank(entry.name), reverse=True):
            if entry.relative_to(directory).as_posix() in names and (entry.is_symlink() or not entry.is_dir()):
                entry.unlink()
        if here != directory and not any(here.iterdir()):
            here.rmdir()


def leftovers(output_dir: Path) -> list[Path]:
    """What looks like an interrupted writer's: ``.X.partial``, ``.X.replaced``, half-made pointers."""
    with reading(output_dir, "listed"):
        if not output_dir.is_dir():
            return []
        with os.scandir(output_dir) as entries:
            found = [e.name for e in entries if _is_leftover(e.name, e.is_dir(follow_symlinks=False))]
    return [output_dir / name for name in sorted(found)]


def _is_leftover(name: str, is_directory: bool) -> bool:
    endings = (PARTIAL, REPLACED) if is_directory else (SUFFIX,)
    return name.startswith(".") and any(name.endswith(end) and len(name) > len(end) + 1 for end in endings)


def tidy(output_dir: Path) -> None:
    """Clear away what interrupted writers left, and put back what one of them had moved aside.

    Removes unfinished directories that are known to be a writer's, by their journal or their manifest, or empty, and
    that nobody is writing; what is left of training states that were being removed; half-made pointers. Logs a line
    for each, and a warning for what cannot be removed. Touches nothing else.
    """
    for path in leftovers(output_dir):
        try:
            if path.name.endswith(PARTIAL):
                _tidy_partial(path)
            elif path.name.endswith(REPLACED):
                _tidy_replaced(path)
            elif target_of(path) is not None or not os.lstat(path).st_size:
                path.unlink()
                log.info("half-written pointer %s removed", path)
        except (OSError, CkptConvertError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            log.warning("%s is left over and cannot be removed: %s", path, said)
    for state in output_dir.glob(f"*/{TRAINING_STATE}"):
        finish_thinning(state.parent)
    for amended in output_dir.glob(f"*/{partial_of(Path(MANIFEST))}"):
        _finish_amending(amended)


def finish_thinning(directory: Path) -> None:
    """Remove the training state of a checkpoint whose manifest says that it is removed; failing is warned of.

    What else was put beside its files is left.
    """
    state = directory / TRAINING_STATE
    if directory.is_symlink() or state.is_symlink() or not state.is_dir():
        return
    with contextlib.suppress(ConfigError, CorruptFileError):
        found = _section(directory, directory.name)
        if found is None or found[1].get(TRAINING_STATE) != REMOVED:
            return
        try:
            for entry in state.iterdir():
                if dcp.is_metadata(entry.name) or entry.name.endswith(dcp.SUFFIX):
                    entry.unlink()
            if not any(state.iterdir()):
                state.rmdir()
        except OSError as error:
            log.warning("%s cannot be removed: %s", state, error.strerror)


def _finish_amending(amended: Path) -> None:
    """Remove the manifest that was to replace another when it was interrupted; failing is warned of."""
    directory = amended.parent.parent
    if directory.is_symlink() or not _is_complete(directory, directory.name):
        return
    try:
        amended.unlink()
    except OSError as error:
        log.warning("%s is left over and cannot be removed: %s", amended, error.strerror)


def _tidy_partial(path: Path) -> None:
    name = path.name[1 : -len(PARTIAL)]
    removed = name.removesuffix(DELETED)
    with contextlib.suppress(LockedError), Lock.directory(path, "it is being written") as lock:
        if not os.path.lexists(path / JOURNAL) and any(path.iterdir()) and not _is_complete(path, removed):
            return
        if removed != name:
            finish_removal(path, path.with_name(removed))
        else:
            remove(lock.fd, path, ownership.rank)
            log.warning("half-written %s removed", path)


def _tidy_replaced(path: Path) -> None:
    original = path.with_name(path.name[1 : -len(REPLACED)])
    ours = _is_complete(path, original.name)
    if _is_complete(original, original.name) and (os.path.lexists(path / JOURNAL) or ours):
        finish_removal(path, original)
        log.warning("%s removed: %s, which replaced it, is complete", path, original.name)
    elif not os.path.lexists(original) and ours:
        os.rename(path, original)
        sync_directory(path.parent)
        log.warning("%s put back: what was to replace it was not completed", original)
