"""Checksums that came along with a checkpoint: our own record's, and Meta's checklist.chk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ckpt_convert.convert import checklist, containers
from ckpt_convert.convert.check.spans import Span, hashed
from ckpt_convert.convert.check.tolerant import Opened, relative
from ckpt_convert.convert.checklist import CHECKLIST
from ckpt_convert.convert.containers import dcp
from ckpt_convert.convert.findings import Finding
from ckpt_convert.convert.formats.base import RECORD_FOLDER
from ckpt_convert.convert.opening import WeightFile
from ckpt_convert.convert.record import MANIFEST, Record, digest_file
from ckpt_convert.errors import CkptConvertError
from ckpt_convert.storage.names import WEIGHT_SUFFIXES, resolve
from ckpt_convert.storage.reader import LocalFile

_CHANGED = (
    "a bit flipped, or the file was changed since: convert again, or remove the folder ckpt_convert if that was meant"
)


def pieces(opened: Opened) -> tuple[list[Finding], list[Span]]:
    """What the manifest says of the weight files: sizes now, and the checksums of pieces as spans to be read."""
    record = opened.checkpoint.record
    findings: list[Finding] = []
    spans: list[Span] = []
    if record is None:
        return findings, spans
    if record.manifest.get("checksum") != "xxh3_64" or not isinstance(record.manifest.get("files"), Mapping):
        text = f"{MANIFEST} has no checksums of files that can be read; it is damaged, so convert again"
        return [Finding("error", "record", text, MANIFEST)], spans
    files: dict[str, WeightFile | None] = {file.name: file for file in opened.checkpoint.files}
    weights = frozenset(files)
    for name in record.manifest["files"]:
        if name.startswith(f"{RECORD_FOLDER}/"):
            try:
                path = resolve(record.directory, name, MANIFEST)
                reader, header = containers.parse(LocalFile(path))
                files[name] = WeightFile(name, 0, path, reader, header)
            except OSError:
                continue  # it is not there, which is said below
            except CkptConvertError as error:
                findings.append(Finding("error", "record", relative(str(error), record.directory), name))
                files[name] = None
    for name, entry in record.manifest["files"].items():
        file = files.get(name)
        if not _is_sound(entry):
            text = f"{MANIFEST} says of {name!r} what it never says of a file; it is damaged, so convert again"
            findings.append(Finding("error", "record", text, MANIFEST))
        elif file is None:
            if name not in opened.lost and name not in files:
                text = f"{name} is missing: {MANIFEST} says that it was written; copy or convert it again"
                findings.append(Finding("error", "checksum", text, name))
        elif (size := file.path.stat().st_size) != entry["size"]:
            text = f"{name} has {size} bytes, but was written with {entry['size']} ({MANIFEST}); {_CHANGED}"
            findings.append(Finding("error", "checksum", text, name, None, str(entry["size"]), str(size)))
        elif file.name not in opened.damaged:
            found, readable = _pieces(file, entry["pieces"])
            findings += found
            spans += readable
    for name in sorted(weights - record.manifest["files"].keys()):
        text = f"{name} was not there when {MANIFEST} was written; nothing says what should be in it"
        findings.append(Finding("warning", "checksum", text, name))
    return findings, spans


def _is_sound(entry: Any) -> bool:
    return (
        isinstance(entry, Mapping)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("pieces"), list)
        and all(
            isinstance(piece, list)
            and len(piece) == 4
            and isinstance(piece[0], str)
            and isinstance(piece[3], str)
            and all(type(number) is int and number >= 0 for number in piece[1:3])
            for piece in entry["pieces"]
        )
    )


def _pieces(file: Any, listed: list[Any]) -> tuple[list[Finding], list[Span]]:
    header, reader = file.header, file.reader
    if header.kind == dcp.KIND:
        header, reader = dcp.located(file) or header, LocalFile(file.path)
    tensors = {tensor.key: tensor for tensor in header.tensors}
    findings, spans = [], []
    for key, offset, nbytes, checksum in listed:
        tensor = tensors.get(key)
        if tensor is None or not tensor.offset <= offset <= offset + nbytes <= tensor.offset + tensor.nbytes:
            place = f"bytes {offset} to {offset + nbytes}"
            text = f"{file.name}: {key} does not lie where {MANIFEST} says ({place}); {_CHANGED}"
            findings.append(Finding("error", "checksum", text, file.name, key))
            continue

        def done(found: str, key: str = key, offset: int = offset, checksum: str = checksum) -> Iterator[Finding]:
            if found != checksum:
                text = (
                    f"{key} in {file.name} is not as it was written: checksum {found}, expected {checksum} "
                    f"(bytes from {offset} on); {_CHANGED}"
                )
                yield Finding("error", "checksum", text, file.name, key, checksum, found)

        spans.append(hashed(reader, file.name, offset, offset + nbytes, "xxh3_64", done))
    return findings, spans


def side_files(record: Record | None) -> Iterator[Finding]:
    """Files beside the weights, and of the record, that are not as they were written."""
    if record is None:
        return
    for name, entry in record.side_files.items():
        for text in _changed(record, name, str(entry["checksum"])):
            yield Finding("warning", "checksum", f"{text}; put it back if nobody meant to change it", name)
    for name, checksum in record.checksums.items():
        for text in _changed(record, name, str(checksum)):
            yield Finding("error", "record", f"{text}; the record is damaged, so convert again", name)


def _changed(record: Record, name: str, checksum: str) -> Iterator[str]:
    try:
        found = digest_file(resolve(record.directory, name, MANIFEST))
    except CkptConvertError as error:
        yield relative(str(error), record.directory)
        return
    except OSError as error:
        yield f"{name}: cannot be read: {error.strerror}"
        return
    if found != checksum:
        yield f"{name} is not as it was written: checksum {found}, expected {checksum} ({MANIFEST})"


def listed(opened: Opened) -> tuple[list[Finding], list[Span]]:
    """Meta's checklist.chk: files that are missing, and the hashes of the others as spans to be read."""
    checkpoint = opened.checkpoint
    path = checkpoint.root / CHECKLIST
    if not checkpoint.path.is_dir() or not path.is_file():
        return [], []
    try:
        entries = checklist.parse(path.read_text(encoding="utf-8", errors="replace"))
        kind = checklist.algorithm(entries)
    except (CkptConvertError, OSError) as error:
        return [Finding("error", "checklist", str(error), CHECKLIST)], []
    findings, spans = [], []
    # Files that are open already are read once for all checks; but legacy ones are open as what torch made of them.
    opened_files = {file.name: file.reader for file in checkpoint.files if isinstance(file.reader, LocalFile)}
    for name, expected in entries.items():
        weights = name.endswith(WEIGHT_SUFFIXES)
        try:
            reader = opened_files.get(name) or LocalFile(resolve(checkpoint.root, name, CHECKLIST), name)
        except (CkptConvertError, OSError):
            if name not in opened.lost:
                text = f"{name} is missing, or cannot be read, but {CHECKLIST} lists it; download it again"
                findings.append(Finding("error" if weights else "warning", "checklist", text, name))
            continue
        spans.append(hashed(reader, name, 0, reader.size, kind, _wrong(name, kind, expected)))
    return findings, spans


def _wrong(name: str, kind: str, expected: str) -> Any:
    def done(found: str) -> Iterable[Finding]:
        if found == expected:
            return []
        text = f"{name} has the {kind} {found}, but {CHECKLIST} says {expected}; download it again"
        return [Finding("error", "checklist", text, name, None, expected, found)]

    return done
