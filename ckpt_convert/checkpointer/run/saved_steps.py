"""The saved checkpoints of an output directory: which are complete, and in which order they were written.

A directory is a checkpoint if it has a ``ckpt_convert/manifest.json`` that names this very directory, and no journal.
Copies under another name, unfinished directories, and other files in an output directory are ignored.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ckpt_convert.checkpoint.record import MANIFEST, TRAINING_STATE, read_manifest, replace_manifest
from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.containers.dcp import DCP_SUFFIX, is_dcp_index
from ckpt_convert.convert import ownership
from ckpt_convert.errors import (
    CheckpointNotFoundError,
    CkptConvertError,
    ConfigError,
    CorruptFileError,
    NewerVersionError,
    SourceChangedError,
    UnreadableError,
    UsageError,
    error_text,
)
from ckpt_convert.formats.base import is_number
from ckpt_convert.formats.names import RECORD_FOLDER
from ckpt_convert.storage import workspace
from ckpt_convert.storage.names import JOURNAL
from ckpt_convert.storage.place import Place

T = TypeVar("T")

log = logging.getLogger("ckpt_convert")

VERSION = 1
"""The version of the manifest's section about training."""

CONTENTS = ("full", "weights", "adapter")
EMITTED = "emitted"
"""Whether the weights are those of another model than the trained one, whose weights are in the training state."""

REMOVED = "removed"
"""The value in the manifest for a training state that was removed to save space."""

_amending = threading.Lock()


@dataclass(frozen=True)
class SavedStep:
    """A complete checkpoint; ``sequence`` counts the saves of a run, so the newest has the highest.

    ``contents`` is "full", "weights" or "adapter"; ``manifest`` is the whole content of its manifest.
    """

    place: Place
    progress: Progress
    metrics: Mapping[str, float]
    contents: str
    sequence: int
    has_training_state: bool
    saver: str
    manifest: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.place.local

    @property
    def step(self) -> int:
        return self.progress.step


def _section(directory: Place, name: str | None) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The manifest and its training section, if the checkpoint was completed under ``name`` (None: any name).

    Raises ConfigError if the manifest cannot be read, CorruptFileError if it was edited or damaged.
    """
    if (directory / JOURNAL).is_present() or not (directory / MANIFEST).is_regular_file():
        return None
    manifest = read_manifest(directory)
    training = manifest.get("training")
    if not isinstance(training, dict) or name not in (None, training.get("directory")):
        return None
    return manifest, training


def _look(directory: Place, look: Callable[[Place], T]) -> T:
    """What ``look`` finds in a directory; it looks again where a file is gone or another one since that was listed.

    Another thread may be removing the step, or giving it a metric.
    """
    try:
        return look(directory.listed())
    except (SourceChangedError, UnreadableError) as error:
        if isinstance(error, UnreadableError) and not isinstance(error.__cause__, FileNotFoundError):
            raise  # a failing disk or store, which was tried again already
        return look(directory.without_listing().listed())


def _is_complete(directory: Place, name: str) -> bool:
    with contextlib.suppress(ConfigError, CorruptFileError):
        return _look(directory, lambda listed: _section(listed, name)) is not None
    return False


RULES = replace(ownership.STEP_RULES, is_complete=_is_complete)
"""For the directories of steps, which are complete only under the name in their manifest."""


def is_damaged(directory: Place) -> bool:
    """Whether this was a checkpoint, by its record folder, whose manifest is missing or cannot be read."""
    return _look(directory, _is_damaged)


def _is_damaged(directory: Place) -> bool:
    if (
        directory.link() is not None
        or not (directory / RECORD_FOLDER).is_folder()
        or (directory / JOURNAL).is_present()
    ):
        return False
    try:
        found = _section(directory, directory.name)
        if found is not None:
            _saved(directory, *found)
    except (ConfigError, CorruptFileError):
        return True
    return not (directory / MANIFEST).is_regular_file()


def read_step(directory: Place, saver: str = "default", *, renamed: bool = False) -> SavedStep | None:
    """The checkpoint in a directory; None if there is no complete one, or if another saver wrote it.

    ``renamed`` also accepts one that was copied or moved to another name. Damage is a warning. Raises NewerVersionError
    for a checkpoint of a newer version.
    """
    return _look(directory, lambda listed: _read_step(listed, saver, renamed))


def _read_step(directory: Place, saver: str, renamed: bool) -> SavedStep | None:
    try:
        found = _section(directory, None if renamed else directory.name)
    except NewerVersionError:
        raise
    except (ConfigError, CorruptFileError) as error:
        log.warning("%s is no complete checkpoint: %s", directory, error)
        return None
    if found is None or found[1].get("saver") != saver:
        return None
    version = found[1].get("version")
    if isinstance(version, int) and version > VERSION:
        raise NewerVersionError(
            f"{directory / MANIFEST}: expected version {VERSION} of its part about training, found {version}; "
            "it was written by a newer ckpt-convert: update, or use another output directory"
        )
    try:
        return _saved(directory, *found)
    except CorruptFileError as error:
        log.warning("%s is no complete checkpoint: %s", directory, error)
        return None


def scan_steps(output_dir: Place, saver: str = "default") -> list[SavedStep]:
    """The complete checkpoints of a saver, oldest first; links, files and hidden directories are skipped.

    Raises NewerVersionError for a checkpoint of a newer version.
    """
    found = (read_step(place, saver) for place in list_directories(output_dir) if not place.name.startswith("."))
    return sorted((saved for saved in found if saved is not None), key=lambda saved: saved.sequence)


def scan_places(places: Sequence[Place]) -> list[SavedStep]:
    """The complete checkpoints of several directories, oldest first; of one that is in several the first has it."""
    found: dict[tuple[str, int], SavedStep] = {}
    for place in places:
        for saved in scan_steps(place):
            found.setdefault((saved.place.name, saved.sequence), saved)
    return sorted(found.values(), key=lambda saved: saved.sequence)


def list_directories(output_dir: Place) -> list[Place]:
    """The directories in an output directory, without links, in order of their names."""
    here = output_dir.without_listing().listed()
    return sorted(place for place in here.folders() if place.link() is None) if here.is_folder() else []


def amend_step(saved: SavedStep, **changes: Any) -> SavedStep:
    """Replace entries of the manifest's training section, all or none; returns the updated checkpoint.

    Other entries keep the values that they have on disk now. Raises CheckpointNotFoundError if the checkpoint was
    removed, UsageError for a metric that is not a finite number.
    """
    for name, value in changes.get("metrics", {}).items():
        if not is_number(value) or not math.isfinite(value):
            raise UsageError(f"{saved.place}: the metric {name!r} is {value!r}; expected a finite number")
    # A metric from the training thread and a removal from the writer thread must not undo each other.
    with _amending:
        directory = saved.place.listed()
        found = _section(directory, directory.name)
        if found is None:
            raise CheckpointNotFoundError(f"{saved.place}: is no complete checkpoint any more; save another one")
        manifest, training = found
        training.update(changes)
        amended = _saved(directory, manifest, training)
        replace_manifest(directory, manifest)
    return amended


def _saved(directory: Place, manifest: Mapping[str, Any], training: Mapping[str, Any]) -> SavedStep:
    named_by = str(directory / MANIFEST)
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
        raise CorruptFileError(f"{named_by}: is damaged: {'; '.join(problems)}")
    return SavedStep(
        directory.without_listing(),
        Progress.from_dict(progress, named_by),
        {str(name): float(value) for name, value in (metrics or {}).items()},
        str(training["contents"]),
        int(training["sequence"]),
        isinstance(state, Mapping),
        str(training.get("saver")),
        manifest,
    )


def clean_up(output_dir: Place, but: Collection[str] = ()) -> None:
    """Remove what interrupted writers left, and training states whose removal was interrupted.

    Steps of the names ``but`` that are half-written are left, for a writer that goes on with them.
    """
    workspace.workspace_of(output_dir).tidy(output_dir, RULES, but)
    for directory in list_directories(output_dir):
        finish_state_removal(directory)


def finish_state_removal(directory: Place) -> None:
    """Remove the training state of a checkpoint whose manifest says that it is removed; a failure is a warning.

    Other files in its folder are kept.
    """
    state = directory / TRAINING_STATE
    if directory.link() is not None or not state.is_folder() or state.link() is not None:
        return
    with contextlib.suppress(ConfigError, CorruptFileError):
        found = _section(directory, directory.name)
        if found is None or found[1].get(TRAINING_STATE) != REMOVED:
            return
        try:
            names = [place.name for place in sorted(state.children())]
            index = [name for name in names if is_dcp_index(name)]
            workspace.workspace_of(state).remove(
                state, [*index, *(name for name in names if name.endswith(DCP_SUFFIX))]
            )
        except (OSError, CkptConvertError) as error:
            log.warning("%s cannot be removed: %s", state, error_text(error))
