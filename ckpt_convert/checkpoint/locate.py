"""Locates the checkpoint in a Hub repository, which may hold a model in several formats."""

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
    """The place of a source: a path, else a Hub id (``org/name``, ``hf://org/name``), from the cache or downloaded.

    ``format`` selects one of several in a repository, hf by default. Raises CheckpointNotFoundError if the source is
    neither, or cannot be downloaded.
    """
    there = hub.find_existing(source)
    if there is not None:
        return there
    repo = hub.repo_id(source)
    cached = hub.cached_snapshot(repo, revision)
    cached = _within(cached, format) if cached is not None else None
    # The cache may hold a snapshot with only the tokenizer, or with everything but that.
    whole = cached if cached is not None and _is_complete(cached, format) else None
    if whole is not None and has_tokenizer(_names(whole)):
        return whole
    try:
        return _within(hub.download_snapshot(repo, revision, lambda names: unwanted_patterns(names, format)), format)
    except CheckpointNotFoundError:
        if whole is None:
            raise
        return whole  # its weights are complete; other missing files are reported where they are needed


def _within(snapshot: Place, format: str | None) -> Place:
    """The folder of a snapshot with the weights: Meta's are in ``original/`` beside Hugging Face's."""
    original = snapshot / "original"
    return original if format == "meta" and original.is_folder() and is_meta(_names(original)) else snapshot


def _is_complete(snapshot: Place, format: str | None) -> bool:
    """Whether a snapshot has the weights of the format: a single file, or all files of an index."""
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
