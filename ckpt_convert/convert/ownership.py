"""Which files of a directory belong to a checkpoint, and so may be replaced or removed; all others are the user's.

A file belongs to a checkpoint if the manifest lists it, or if it has the name of a typical file: weights (of ambiguous
names the magic bytes are checked), index, config, tokenizer, model card, license, the model's own code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from ckpt_convert.checkpoint import record
from ckpt_convert.errors import InputError
from ckpt_convert.formats.names import (
    RECORD_FOLDER,
    is_any_index,
    is_certainly_weights,
    is_known_auxiliary,
    makes_loadable,
    may_be_weights,
)
from ckpt_convert.storage.base import read_range
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.rules import Rules

_HUB = ".cache/huggingface"
"""Metadata of huggingface_hub's downloads and uploads."""

_FOLDERS = (RECORD_FOLDER, record.TRAINING_STATE, record.MERGED, "original", "onnx", "metal", ".cache")
"""Subfolders of checkpoints, for which the same rules hold; all other folders are foreign."""

_DEEP = (_HUB, f"{RECORD_FOLDER}/")
"""Prefixes of folders that may have subfolders of any name."""

_ZIP, _PICKLE, _GGUF = b"PK\x03\x04", b"\x80", b"GGUF"

_RECORD = re.compile(
    r"manifest\.json|\.manifest\.json\.partial|config\.json"
    r"|layouts/\w+/(layout\.json|index\.json|\d+\.bytes|carried\.safetensors|params\.json|checklist\.chk)"
)
"""The names of files in the record's folder, without those in ``side/``."""


def foreign_files(directory: Place) -> list[str]:
    """The foreign files of a directory, which replacing it by a checkpoint would lose; folders end in a slash.

    Without weights, index and record everything is foreign. Raises UnreadableError.
    """
    directory = directory.listed()
    listed = record.listed_files(directory)
    found = list(_others(directory, listed, lambda name, place: name in listed or _is_known(name, place)))
    there = sorted(directory.children())
    if found or listed or any(_is_weights(place) or is_any_index(place.name) for place in there):
        return found
    return [place.name for place in there]


def unlisted_files(directory: Place) -> list[str]:
    """The files of a directory that its manifest does not list; without a manifest its ``foreign_files``.

    Raises UnreadableError.
    """
    directory = directory.listed()
    listed = record.listed_files(directory)
    if not listed:
        return foreign_files(directory)
    return list(_others(directory, listed, lambda name, path: name in listed or name.startswith(f"{_HUB}/")))


def publish_order(name: str) -> int:
    """The order in which files are published: the manifest last, before it the files that loaders look for."""
    if name.endswith(record.MANIFEST):
        return 2
    *folders, last = PurePosixPath(name).parts
    if RECORD_FOLDER in folders:
        return 0
    return int(makes_loadable(last))


_MARKS = (f"{record.MERGED}/{record.MANIFEST}", record.MANIFEST)

RULES = Rules(foreign_files, record.is_recorded, publish_order, record.listed_files, _MARKS)
"""The rules for the output of a conversion."""

STEP_RULES = replace(RULES, foreign=unlisted_files)
"""The rules for saved steps, whose manifests list all of their files: any other file is a user's."""


def _others(
    directory: Place, listed: frozenset[str], belongs: Callable[[str, Place], bool], inside: str = ""
) -> Iterator[str]:
    here = directory / inside if inside else directory
    folders = {place.name for place in here.folders() if place.link() is None}
    for place in sorted(here.children()):
        name = inside + place.name
        if place.name not in folders:
            if not belongs(name, place):
                yield name
        elif place.name in _FOLDERS or name.startswith(_DEEP) or any(one.startswith(f"{name}/") for one in listed):
            yield from _others(directory, listed, belongs, f"{name}/")
        elif _holds_files(place):
            yield f"{name}/"


def _holds_files(folder: Place) -> bool:
    """Whether a folder contains any file, at any depth."""
    folders = [place for place in folder.folders() if place.link() is None]
    return len(folders) < len(folder.children()) or any(map(_holds_files, folders))


def _is_known(name: str, place: Place) -> bool:
    folder, _, inner = name.partition("/")
    if name.startswith(f"{_HUB}/"):
        return True
    if folder == ".cache":
        return False
    if folder == RECORD_FOLDER:
        if inner.startswith("side/"):
            return _is_known(inner.removeprefix("side/"), place)
        return _RECORD.fullmatch(inner) is not None
    last = PurePosixPath(name).name
    return _is_weights(place) or is_any_index(last) or is_known_auxiliary(last)


def _is_weights(place: Place) -> bool:
    """Whether a file, or a link to one, has the name of weights, or an ambiguous name and their magic bytes."""
    regular = place.is_regular_file()
    if not regular and place.link() is None:
        return False
    if is_certainly_weights(place.name):
        return True
    if not regular or not may_be_weights(place.name):
        return False
    try:
        with place.open() as file:
            start = read_range(file, 0, min(file.size, 9))
    except InputError:
        return False
    return not start or start.startswith((_ZIP, _PICKLE, _GGUF)) or start[8:] == b"{"
