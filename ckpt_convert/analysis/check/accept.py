"""Accepting edited auxiliary files: the manifest gets their current checksums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ckpt_convert.checkpoint.record import ACCEPTED, MANIFEST, read_manifest, replace_manifest
from ckpt_convert.containers.dcp import DCP_INDEX, DCP_SUFFIX
from ckpt_convert.errors import CheckpointNotFoundError, CkptConvertError, option_error
from ckpt_convert.formats.names import WEIGHT_SUFFIXES
from ckpt_convert.storage.checksums import digest_file
from ckpt_convert.storage.place import Place
from ckpt_convert.wording import python_literal


@dataclass(frozen=True, slots=True)
class Accepted:
    """A file whose checksum was renewed, from ``expected`` to what was ``found``."""

    file: str
    expected: str
    found: str


def accept_command(directory: Place, name: str) -> str:
    """The call that accepts a file, for messages."""
    return f"`verify_checkpoint({python_literal(directory)}, accept={python_literal(name)})`"


def accept_files(directory: Place, names: Sequence[str]) -> list[Accepted]:
    """Renew the checksums of these files in the directory's manifest, all or none; returns those that had changed.

    A conversion from the directory treats an accepted file like any that a user edited.
    Raises CheckpointNotFoundError where there is no manifest or no such file, UsageError for a name that it does not
    list as an auxiliary file, and what ``record.read_manifest`` raises.
    """
    if not (directory / MANIFEST).is_regular_file():
        raise CheckpointNotFoundError(
            f"{directory}: has no {MANIFEST}, so nothing says what its files should be, and there is nothing to accept"
        )
    manifest = read_manifest(directory)
    listed = _listed(manifest)
    refused = [name for name in names if name not in listed]
    if refused:
        raise option_error("accept", refused[0], f"{_why(refused[0], listed)} (nothing was changed)")
    out = []
    for name in dict.fromkeys(names):
        path = directory.resolve_member(name, MANIFEST)
        expected, found = str(listed[name].get("checksum")), _digest(path)
        if found == expected:
            continue
        listed[name]["checksum"] = found
        if "size" in listed[name]:
            listed[name]["size"] = path.identity().size
        out.append(Accepted(name, expected, found))
    if out:
        manifest[ACCEPTED] = sorted({*manifest.get(ACCEPTED, ()), *(one.file for one in out)})
        try:
            replace_manifest(directory, manifest)
        except OSError as error:
            raise CkptConvertError(
                f"{directory / MANIFEST}: cannot be written: {error.strerror}; nothing was changed"
            ) from error
    return out


def _listed(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The manifest's entries of files that may be accepted: auxiliary files, and those of a saved step."""
    entries = {entry["name"]: entry for entry in manifest.get("side_files", ())}
    training = manifest.get("training")
    if isinstance(training, dict):
        entries |= {**(training.get("files") or {}), **(training.get("extra_files") or {})}
    return {name: entry for name, entry in entries.items() if is_acceptable(name)}


def is_acceptable(name: str) -> bool:
    """Whether a file may be edited on purpose: it holds no weights and is not the index of files that do."""
    return not name.endswith((*WEIGHT_SUFFIXES, DCP_SUFFIX)) and PurePosixPath(name).name != DCP_INDEX


def _why(name: str, listed: Mapping[str, Any]) -> str:
    if not is_acceptable(name):
        return "only auxiliary files can be accepted; for changed weights there is no record of the right values"
    return f"is none of the auxiliary files that {MANIFEST} lists: {', '.join(sorted(listed)) or 'none'}"


def _digest(path: Place) -> str:
    try:
        return digest_file(path)
    except OSError as error:
        raise CkptConvertError(f"{path}: cannot be read: {error.strerror}; nothing was changed") from error
