"""Files of a saved step other than weights, against its manifest: training state, adapter, extra files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_convert.analysis.check.accept import accept_command, is_acceptable
from ckpt_convert.analysis.check.spans import Share
from ckpt_convert.checkpoint import record
from ckpt_convert.checkpoint.findings import Finding, failed_check
from ckpt_convert.checkpoint.record import MANIFEST, TRAINING_STATE
from ckpt_convert.errors import CheckpointNotFoundError, CkptConvertError
from ckpt_convert.storage.checksums import digest_file
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.reader import DEFAULT_WORKERS
from ckpt_convert.tensors.pool import map_threaded

_WAY_OUT = "copy the checkpoint again, or use another step"


def check_saved_step(directory: Place, values: bool, share: Share) -> list[Finding] | None:
    """Missing and changed files of a saved step, without ``values`` by size only; None if it is no saved step.

    Of a ``share``, the values of its own files are read.
    """
    training = record.read_training(directory)
    if training is None:
        return None
    state = training.get(TRAINING_STATE)
    listed = {
        **(training.get("files") or {}),
        **(training.get("extra_files") or {}),
        **{f"{TRAINING_STATE}/{name}": entry for name, entry in _entries(state)},
    }
    own = share.of((_size(entry), name) for name, entry in listed.items()) if values else ()
    return [
        *compare_files(directory, {name: listed[name] for name in own}, True),
        *compare_files(directory, {name: one for name, one in listed.items() if name not in own}, False),
    ]


def compare_files(directory: Place, listed: Mapping[str, Mapping[str, Any]], values: bool) -> list[Finding]:
    """Compare files with their recorded size and checksum (xxh3_64); a few are read at a time."""
    found = map_threaded(lambda name: _compare(directory, name, listed[name], values), listed, DEFAULT_WORKERS)
    return [finding for finding in found if finding is not None]


def _compare(directory: Place, name: str, entry: Mapping[str, Any], values: bool) -> Finding | None:
    def finding(text: str, expected: object = None, found: object = None, way: str = _WAY_OUT) -> Finding:
        said = [None if value is None else str(value) for value in (expected, found)]
        return Finding("error", "training", f"{name}: {text}; {way}", name, None, *said)

    changed = (
        f"put it back, or accept it as it is: {accept_command(directory, name)}" if is_acceptable(name) else _WAY_OUT
    )
    try:
        path = directory.resolve_member(name, MANIFEST)
        size = path.identity().size
        if size != entry.get("size"):
            text = f"was edited or damaged: should have {entry.get('size')} bytes, but has {size}"
            return finding(text, entry.get("size"), size, changed)
        if values and (checksum := digest_file(path)) != entry.get("checksum"):
            text = f"was edited or damaged: should have the checksum {entry.get('checksum')}, but has {checksum}"
            return finding(text, entry.get("checksum"), checksum, changed)
    except CheckpointNotFoundError:
        return finding(f"is missing: {MANIFEST} says that it was written")
    except CkptConvertError as error:
        return failed_check("training", error, str(error).replace(f"{directory}/", ""), name)
    return None


def _size(entry: Mapping[str, Any]) -> int:
    size = entry.get("size")
    return size if isinstance(size, int) else 0


def _entries(state: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(state, Mapping):
        yield from (state.get("files") or {}).items()
