"""Which part of a repository is the checkpoint that is wanted: one may hold a model in several formats."""

from __future__ import annotations

from ckpt_convert.errors import CheckpointNotFoundError, InputError
from ckpt_convert.formats.base import load_json
from ckpt_convert.formats.names import (
    TRANSFORMERS_NAMES,
    has_tokenizer,
    is_index,
    is_meta,
    is_weights,
    unwanted_patterns,
)
from ckpt_convert.storage import hub
from ckpt_convert.storage.place import Location, Place


def locate_checkpoint(source: Location, revision: str | None = None, *, format: str | None = None) -> Place:
    """The place of a source: a path first, then a Hub id (``org/name``, ``hf://org/name``), cached or downloaded.

    ``format`` is what is wanted of a repository that holds several: hf if not said. Raises CheckpointNotFoundError when
    it is neither, or cannot be had.
    """
    there = hub.find_existing(source)
    if there is not None:
        return there
    repo = hub.repo_id(source)
    cached = hub.cached_snapshot(repo, revision)
    cached = _within(cached, format) if cached is not None else None
    # The cache also holds snapshots of which only the tokenizer was loaded, or all but that.
    whole = cached if cached is not None and _is_complete(cached, format) else None
    if whole is not None and has_tokenizer(_names(whole)):
        return whole
    try:
        return _within(hub.download_snapshot(repo, revision, lambda names: unwanted_patterns(names, format)), format)
    except CheckpointNotFoundError:
        if whole is None:
            raise
        return whole  # its weights are all there; what lacks is said where it is needed


def _within(snapshot: Place, format: str | None) -> Place:
    """Where in a snapshot the weights lie: Meta's own are in ``original/`` beside Hugging Face's."""
    original = snapshot / "original"
    return original if format == "meta" and original.is_folder() and is_meta(_names(original)) else snapshot


def _is_complete(snapshot: Place, format: str | None) -> bool:
    """Whether a snapshot has the weights that are wanted: a single file, or all that an index names."""
    names = _names(snapshot)
    if format == "meta":
        return is_meta(names)
    if any((snapshot / name).is_regular_file() for name in TRANSFORMERS_NAMES):
        return True
    indexes = [name for name in names if is_index(name)]
    for index in indexes:
        try:
            files = set(load_json(snapshot / index)["weight_map"].values())
        except (InputError, KeyError, AttributeError, TypeError):
            continue
        if all((snapshot / str(file)).is_regular_file() for file in files):
            return True
    return not indexes and any(map(is_weights, names))


def _names(snapshot: Place) -> list[str]:
    return [entry.name for entry in snapshot.children()]
