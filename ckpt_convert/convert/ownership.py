"""What of a directory is a checkpoint's, so that it may be replaced or removed; everything else is its owner's.

A file is a checkpoint's if the manifest lists it, or if its name is one that checkpoints have: weights (in doubt they
have to begin like some), index, config, tokenizer, model card, license, the model's own code.
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
"""What huggingface_hub notes of a download or an upload."""

_FOLDERS = (RECORD_FOLDER, record.TRAINING_STATE, record.MERGED, "original", "onnx", "metal", ".cache")
"""Folders of checkpoints, in which the same names count; others are foreign, whatever is in them."""

_DEEP = (_HUB, f"{RECORD_FOLDER}/")
"""Beginnings of the names of folders that have folders of any name."""

_ZIP, _PICKLE, _GGUF = b"PK\x03\x04", b"\x80", b"GGUF"

_RECORD = re.compile(
    r"manifest\.json|\.manifest\.json\.partial|config\.json"
    r"|layouts/\w+/(layout\.json|index\.json|\d+\.bytes|carried\.safetensors|params\.json|checklist\.chk)"
)
"""The files of the record, below its folder, but for those of ``side/``."""


def foreign_files(directory: Place) -> list[str]:
    """What is in a directory and would be lost if a checkpoint took its place; the name of a folder ends in a slash.

    Where there are no weights, no index and no record, nothing is a checkpoint's. Raises UnreadableError.
    """
    directory = directory.listed()
    listed = record.listed_files(directory)
    found = list(_others(directory, listed, lambda name, place: name in listed or _is_known(name, place)))
    there = sorted(directory.children())
    if found or listed or any(_is_weights(place) or is_any_index(place.name) for place in there):
        return found
    return [place.name for place in there]


def unlisted_files(directory: Place) -> list[str]:
    """What is in a directory and not in its manifest; what is ``foreign`` where there is none.

    Raises UnreadableError.
    """
    directory = directory.listed()
    listed = record.listed_files(directory)
    if not listed:
        return foreign_files(directory)
    return list(_others(directory, listed, lambda name, path: name in listed or name.startswith(f"{_HUB}/")))


def publish_order(name: str) -> int:
    """How late a file is written: the manifest last, before it what makes loaders take a directory for a model."""
    if name.endswith(record.MANIFEST):
        return 2
    *folders, last = PurePosixPath(name).parts
    if RECORD_FOLDER in folders:
        return 0
    return int(makes_loadable(last))


_MARKS = (f"{record.MERGED}/{record.MANIFEST}", record.MANIFEST)

RULES = Rules(foreign_files, record.is_recorded, publish_order, record.listed_files, _MARKS)
"""For the output of a conversion."""

STEP_RULES = replace(RULES, foreign=unlisted_files)
"""For saved steps: every file of theirs is listed, so whatever else is in one was put there by somebody."""


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
    """Whether there is anything but folders in a folder, however deep."""
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
    """Whether a file, or a link to one, is named like weights, or begins like some."""
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
