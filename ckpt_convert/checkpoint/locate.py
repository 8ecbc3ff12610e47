"""Where the checkpoint is that a source means: a path, a folder of a web server, or a repository of the Hub.

A repository may hold a model in several formats.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from pathlib import PurePosixPath

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
from ckpt_convert.storage.hub import HubId
from ckpt_convert.storage.names import is_web_url
from ckpt_convert.storage.place import Location, Place, checked_place


def locate_checkpoint(
    source: Location, revision: str | None = None, *, format: str | None = None, cache: bool = False
) -> Place:
    """The place of a source: a path, a URL, or a Hub id (``org/name``, ``hf://org/name[@revision][/folder]``).

    ``format`` selects one of several in a repository, hf by default. A repository is read from the Hub's cache, else
    by ranges from the Hub, or with ``cache`` downloaded into the cache. Raises CheckpointNotFoundError if the source is
    nothing of these.
    """
    text = str(source) if isinstance(source, str | Place) else ""  # a place may be a page of the Hub, with options
    named = hub.parse_hub_id(text, revision) if isinstance(source, str) or is_web_url(text) else None
    if named is not None and (text.startswith(hub.PREFIX) or is_web_url(text)):
        return _in_repository(named, str(named), format, cache)
    place = checked_place(source)
    if not place.is_local:
        from ckpt_convert.checkpoint.web import locate_on_web  # imported here, since local files do not need it

        place = locate_on_web(place)
    place = place.with_listing()
    if place.is_present():
        return place
    if named is not None:
        return _in_repository(named, f"{text}: no such path; {named}", format, cache)
    if place.link() is not None:
        raise CheckpointNotFoundError(f"{source}: is a link that leads nowhere")
    what_else = ", and no Hub id (org/name) either" if place.is_local else "; look at the bucket and at the name"
    raise CheckpointNotFoundError(f"{source}: no such file or directory{what_else}")


def locate_file(given: Location, what: str) -> Place:
    """The place of one file that a caller gives for ``what``: a path, a URL, or ``hf://org/name/config.json``."""
    text = given if isinstance(given, str) else ""
    return locate_checkpoint(text) if text.startswith(hub.PREFIX) or is_web_url(text) else checked_place(given, what)


def _in_repository(named: HubId, label: str, format: str | None, cache: bool) -> Place:
    """A repository in the Hub's cache, or on the Hub; ``label`` is its name in errors."""
    cached = hub.cached_snapshot(named.repo, named.revision)
    cached = _within(cached, named, format) if cached is not None else None
    # The cache may hold a snapshot with only the tokenizer, or with everything but that.
    whole = cached if cached is not None and _is_complete(cached, format) else None
    if whole is not None and (whole.is_regular_file() or has_tokenizer(_names(whole))):
        return whole
    if whole is None and not cache:
        return _by_ranges(named, label, format)
    try:
        snapshot = hub.download_snapshot(named, label, lambda names: unwanted_patterns(names, format))
        return _within(snapshot, named, format)
    except CheckpointNotFoundError:
        if whole is None:
            raise
        return whole  # its weights are complete; other missing files are reported where they are needed


def _by_ranges(named: HubId, label: str, format: str | None) -> Place:
    """The repository on the Hub itself, with those files that a download would have."""
    from ckpt_convert.storage.remote.hub import open_repository

    if hub.is_offline():
        raise CheckpointNotFoundError(
            f"{label}: is not in the Hub's cache, or not wholly, and HF_HUB_OFFLINE keeps the Hub from being asked; "
            f"unset it, or download the repository where there is a connection: hf download {named.repo}"
        )
    store = open_repository(label, named.repo, named.revision)
    unwanted = [] if named.path else unwanted_patterns(store.files, format)
    files = {name: file for name, file in store.files.items() if not any(fnmatch(name, one) for one in unwanted)}
    root = Place(replace(store, files=files), PurePosixPath(".")).listed()
    found = _within(root, named, format)
    if not found.is_present():
        raise CheckpointNotFoundError(f"{found}: is not there; look at the files on the repository's page")
    return found


def _within(snapshot: Place, named: HubId, format: str | None) -> Place:
    """The folder of a snapshot with the weights: Meta's are in ``original/`` beside Hugging Face's."""
    if named.path:
        return snapshot / named.path
    original = snapshot / "original"
    return original if format == "meta" and original.is_folder() and is_meta(_names(original)) else snapshot


def _is_complete(snapshot: Place, format: str | None) -> bool:
    """Whether a snapshot has the weights of the format: a single file, or all files of an index."""
    if not snapshot.is_folder():
        return snapshot.is_regular_file()
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
