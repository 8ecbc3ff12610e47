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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt_convert.checkpoint.record import MANIFEST, TRAINING_STATE, read_manifest, replace_manifest
from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.containers.dcp import DCP_SUFFIX, dcp
from ckpt_convert.convert import ownership
from ckpt_convert.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptFileError,
    NewerVersionError,
    UsageError,
)
from ckpt_convert.formats.base import is_number
from ckpt_convert.storage import removal
from ckpt_convert.storage.names import JOURNAL
from ckpt_convert.storage.place import at
from ckpt_convert.storage.reader import reading

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
    manifest = read_manifest(at(directory))
    training = manifest.get("training")
    if not isinstance(training, dict) or name not in (None, training.get("directory")):
        return None
    return manifest, training


def _is_complete(directory: Path, name: str) -> bool:
    with contextlib.suppress(ConfigError, CorruptFileError):
        return _section(directory, name) is not None
    return False


RULES = replace(ownership.STEP_RULES, is_complete=lambda place, name: _is_complete(place.local, name))
"""For the directories of steps, which are complete under the name that their manifest says."""


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
        if not is_number(value) or not math.isfinite(value):
            raise UsageError(f"{saved.path}: the metric {name!r} is {value!r}; expected a finite number")
    # A metric from the training thread and a removal from the one that writes must not undo each other.
    with _amending:
        found = _section(saved.path, saved.path.name)
        if found is None:
            raise CheckpointNotFoundError(f"{saved.path}: is no complete checkpoint any more; save another one")
        manifest, training = found
        training.update(changes)
        amended = _saved(saved.path, manifest, training)
        replace_manifest(at(saved.path), manifest)
    return amended


def _saved(path: Path, manifest: Mapping[str, Any], training: Mapping[str, Any]) -> Saved:
    place = str(path / MANIFEST)
    progress, metrics, sequence = (training.get(name) for name in ("progress", "metrics", "sequence"))
    state = training.get(TRAINING_STATE)
    problems = [
        f"{name!r} is {training.get(name)!r}"
        for name, good in (
            ("progress", isinstance(progress, Mapping)),
            ("metrics", isinstance(metrics, Mapping) and all(is_number(value) for value in metrics.values())),
            ("contents", training.get("contents") in CONTENTS),
            ("sequence", is_number(sequence) and isinstance(sequence, int)),
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


def tidy(output_dir: Path) -> None:
    """Clear away what interrupted writers left (``removal.tidy``), also of training states that were being removed."""
    removal.tidy(output_dir, RULES)
    for state in output_dir.glob(f"*/{TRAINING_STATE}"):
        finish_thinning(state.parent)


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
                if dcp.is_metadata(entry.name) or entry.name.endswith(DCP_SUFFIX):
                    entry.unlink()
            if not any(state.iterdir()):
                state.rmdir()
        except OSError as error:
            log.warning("%s cannot be removed: %s", state, error.strerror)
