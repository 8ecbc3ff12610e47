"""Finds the files of a checkpoint on a web server: HTTP has no listing, so they are asked for by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import PurePosixPath

from ckpt_convert.checkpoint import record
from ckpt_convert.containers.dcp import dcp, is_dcp_index
from ckpt_convert.errors import CheckpointNotFoundError, InputError
from ckpt_convert.formats.hf import weights_from_index
from ckpt_convert.formats.names import RANK, WELL_KNOWN_NAMES, is_any_index, is_index, may_be_weights
from ckpt_convert.storage.base import Entry
from ckpt_convert.storage.listing import Listing
from ckpt_convert.storage.object_store import AT_ONCE
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.remote.web import WebStore
from ckpt_convert.tensors.pool import map_threaded


def locate_on_web(place: Place) -> Place:
    """The same place with a listing: what is known to be there.

    A folder has the files that its manifest lists; without a manifest, those of well-known names and those that an
    index names. Raises CheckpointNotFoundError if there are none, UnreadableError.
    """
    store, path = place.store, place.path
    if not isinstance(store, WebStore) or place.listing is not None:
        return place
    if is_any_index(path.name):
        return _folder(store, path.parent, path.name)
    if not may_be_weights(path.name) and path.suffix != ".json":
        return _folder(store, path)
    with store.open(str(path)) as file:  # raises if it is not there
        return _known(store, path, {str(path): file.identity})


def _folder(store: WebStore, path: PurePosixPath, *names: str) -> Place:
    """A folder with what is found in it; ``names`` are asked for, too."""
    found = _ask(store, path, [record.MANIFEST])
    listed = record.listed_files(_known(store, path, found)) if found else frozenset()
    more: Iterable[str] = [*names, *(listed or WELL_KNOWN_NAMES)]
    while answers := _ask(store, path, more):
        found |= answers
        more = [name for name in _named_by(_known(store, path, found)) if str(path / name) not in found]
    place = _known(store, path, found)
    if not found:
        raise CheckpointNotFoundError(
            f"{place}: none of the files that checkpoints begin with is there, or is given to you (config.json, "
            "params.json, an index, ckpt_convert/manifest.json, …), and a web server does not list what there is: give "
            "the URL of a folder of a checkpoint, or of a weight file"
        )
    return place


def _known(store: WebStore, path: PurePosixPath, files: Mapping[str, Entry]) -> Place:
    """A place with these files, by full name, as its listing."""
    return Place(store.with_names(files), path, Listing(str(path), files))


def _ask(store: WebStore, path: PurePosixPath, names: Iterable[str]) -> dict[str, Entry]:
    """Those of the names that are there, by full name."""
    full = sorted({str(path / name) for name in names})
    answers = map_threaded(store.entry, full, min(AT_ONCE, max(1, len(full))))
    return {name: entry for name, entry in zip(full, answers, strict=True) if entry is not None}


def _named_by(place: Place) -> Iterator[str]:
    """The names that the files of a folder imply: those in indexes, and further ranks."""
    names = [file.name for file in place.files()] if place.is_folder() else []
    for name in names:
        with suppress(InputError):  # reported by what reads the file
            if is_dcp_index(name):
                yield from dcp.files_in_metadata(place / name)
            elif is_index(name):
                yield from (weight.name for weight in weights_from_index(place, name).weights)
    ranks = [match for name in names if (match := RANK.fullmatch(name))]
    if ranks:
        last = max(int(match[1]) for match in ranks)
        suffix = ranks[-1][2]
        yield from (f"consolidated.{number:02d}.{suffix}" for number in range(last + 1, last + 9))
