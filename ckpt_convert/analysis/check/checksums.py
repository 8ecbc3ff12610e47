"""Checksums that come with a checkpoint: those of our record, and Meta's checklist.chk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckpt_convert import containers
from ckpt_convert.analysis.check.accept import accept_command
from ckpt_convert.analysis.check.lenient_open import LenientCheckpoint, without_directory
from ckpt_convert.analysis.check.spans import Span, hashed_span
from ckpt_convert.checkpoint import checklist
from ckpt_convert.checkpoint.checklist import CHECKLIST
from ckpt_convert.checkpoint.findings import Finding, Severity, failed_check
from ckpt_convert.checkpoint.manifest_layout import described_headers
from ckpt_convert.checkpoint.record import MANIFEST, Record
from ckpt_convert.containers.dcp import dcp
from ckpt_convert.errors import CkptConvertError, UnsafeFileError
from ckpt_convert.formats.base import TEXT_LIMIT
from ckpt_convert.formats.names import RECORD_FOLDER, is_weights
from ckpt_convert.storage.base import OpenFile, RangeReader, read_range
from ckpt_convert.storage.checksums import CRC64, XXH3, digest, digest_file
from ckpt_convert.tensors.header import Header, WeightFile

_CHANGED = (
    "edited or damaged: copy or convert it again; if the change was meant, move the folder ckpt_convert elsewhere, "
    "which says what should be there"
)
_BLOCK = 1 << 20
_FOR_PEOPLE = (".md", ".rst", "LICENSE", "NOTICE", "USE_POLICY", ".gitattributes")
"""Endings of files for human readers, which no program needs to run the model: editing them is a warning only."""


def check_manifest(opened: LenientCheckpoint) -> tuple[list[Finding], list[Span]]:
    """The weight files against the manifest: sizes at once, checksums of pieces as spans to read."""
    record = opened.checkpoint.record
    findings: list[Finding] = []
    spans: list[Span] = []
    if record is None:
        return findings, spans
    kind = record.weights_checksum
    if kind is None or not isinstance(record.manifest.get("files"), Mapping):
        text = f"{MANIFEST} has no checksums of files that can be read; it is damaged, so copy or convert it again"
        return [Finding("error", "record", text, MANIFEST)], spans
    files: dict[str, WeightFile | None] = {file.name: file for file in opened.checkpoint.files}
    weights = frozenset(files)
    described = {file.name: header for file, header in described_headers(record.manifest).items()}
    for name in record.manifest["files"]:
        if name.startswith(f"{RECORD_FOLDER}/"):
            try:
                path = record.directory.resolve_member(name, MANIFEST)
                reader, header = containers.parse_header(path.open())
                files[name] = WeightFile(name, 0, path, reader, header)
            except OSError:
                continue  # missing, which is reported below
            except CkptConvertError as error:
                findings.append(failed_check("record", error, without_directory(str(error), record.directory), name))
                files[name] = None
    for name, entry in record.manifest["files"].items():
        file = files.get(name)
        if not _is_sound(entry, kind):
            text = f"{MANIFEST} says of {name!r} what it never says of a file; it is damaged, so convert again"
            findings.append(Finding("error", "record", text, MANIFEST))
        elif file is None:
            if name not in opened.unreadable_files and name not in files:
                text = f"{name} is missing: {MANIFEST} says that it was written; copy or convert it again"
                findings.append(Finding("error", "checksum", text, name))
        elif (size := file.place.identity().size) != entry["size"]:
            text = f"{name} has {size} bytes, but was written with {entry['size']} ({MANIFEST}); {_CHANGED}"
            findings.append(Finding("error", "checksum", text, name, None, str(entry["size"]), str(size)))
        elif file.name not in opened.damaged_files:
            found, readable = _whole(file, entry) if "header" in entry else _located(file, entry["pieces"])
            findings += found or _misdescribed(file, described.get(name))
            spans += readable
    for name in sorted(weights - record.manifest["files"].keys()):
        text = f"{name} was not there when {MANIFEST} was written; nothing says what should be in it"
        findings.append(Finding("warning", "checksum", text, name))
    return findings, spans


def _misdescribed(file: WeightFile, described: Header | None) -> list[Finding]:
    """Where the manifest's description of a file is not what the file's own header says."""
    if described is None or (set(described.tensors), described.metadata) == (
        set(file.header.tensors),
        file.header.metadata,
    ):
        return []
    text = f"{file.name}: {MANIFEST} describes other tensors than its header does; {_CHANGED}"
    return [Finding("error", "record", text, file.name)]


def _is_sound(entry: Any, kind: str) -> bool:
    sound = (
        isinstance(entry, Mapping)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("header"), str) is (kind != XXH3)
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
    if not sound or kind == XXH3:
        return sound
    ends = [0, *(offset + nbytes for _, offset, nbytes, _ in entry["pieces"])]
    starts = [*(offset for _, offset, _, _ in entry["pieces"]), entry["size"]]
    return all(end <= start for end, start in zip(ends, starts, strict=True))


def _whole(file: WeightFile, entry: Mapping[str, Any]) -> tuple[list[Finding], list[Span]]:
    """Every byte of a file: pieces as spans to read, the few bytes between them (headers, padding) at once."""
    pieces = [(str(key), int(offset), int(nbytes), str(checksum)) for key, offset, nbytes, checksum in entry["pieces"]]
    reader = dcp.whole_file(file.reader, file.place) if file.header.kind == dcp.KIND else file.reader
    try:
        found, expected = digest(_between(reader, pieces), CRC64.name), str(entry["header"])
    except (CkptConvertError, OSError) as error:
        text = f"{file.name}: its header cannot be read: {error}; the disk may be faulty"
        return [failed_check("checksum", error, text, file.name)], []
    findings = []
    if found != expected:
        text = (
            f"{file.name}: the bytes that belong to no tensor (header, padding) were changed: checksum "
            f"{found}, expected {expected}; {_CHANGED}"
        )
        findings.append(Finding("error", "checksum", text, file.name, None, expected, found))
    return findings, [_piece(file, reader, piece, CRC64.name) for piece in pieces]


def _between(reader: RangeReader, pieces: Sequence[tuple[str, int, int, str]]) -> Iterator[bytes]:
    """The bytes of a file outside of its pieces, in order."""
    start = 0
    for _, offset, nbytes, _ in (*pieces, ("", reader.size, 0, "")):
        for at in range(start, offset, _BLOCK):
            yield read_range(reader, at, min(_BLOCK, offset - at))
        start = offset + nbytes


def _located(file: Any, listed: list[Any]) -> tuple[list[Finding], list[Span]]:
    """Pieces of schema 1, which has no checksum of headers: each has to be within its tensor's bytes by the header."""
    header, reader = file.header, file.reader
    if header.kind == dcp.KIND:
        header, reader = dcp.resolve_offsets(file) or header, file.place.open()
    tensors = {tensor.key: tensor for tensor in header.tensors}
    findings, spans = [], []
    for key, offset, nbytes, checksum in listed:
        tensor = tensors.get(key)
        if tensor is None or not tensor.offset <= offset <= offset + nbytes <= tensor.offset + tensor.nbytes:
            place = f"bytes {offset} to {offset + nbytes}"
            text = f"{file.name}: {key} is not at the offset that {MANIFEST} says ({place}); {_CHANGED}"
            findings.append(Finding("error", "checksum", text, file.name, key))
        else:
            spans.append(_piece(file, reader, (key, offset, nbytes, checksum), XXH3))
    return findings, spans


def _piece(file: WeightFile, reader: RangeReader, piece: tuple[str, int, int, str], kind: str) -> Span:
    key, offset, nbytes, checksum = piece

    def done(found: str) -> Iterator[Finding]:
        if found != checksum:
            text = (
                f"{key} in {file.name} was changed: checksum {found}, expected {checksum} "
                f"(bytes from {offset} on); {_CHANGED}"
            )
            yield Finding("error", "checksum", text, file.name, key, checksum, found)

    return hashed_span(reader, file.name, offset, offset + nbytes, kind, done)


def check_auxiliary_files(record: Record | None) -> Iterator[Finding]:
    """Auxiliary files, and files of the record, whose checksum differs."""
    if record is None:
        return
    for name in record.auxiliary_files:
        yield from _changed(record, name)
    for name in record.checksums:
        for one in _changed(record, name):
            yield replace(one, severity="error", check="record", text=f"{one.text}; copy or convert it again")


def _changed(record: Record, name: str) -> Iterator[Finding]:
    beside = name in record.auxiliary_files
    expected = record.auxiliary_files[name]["checksum"] if beside else record.checksums[name]
    try:
        found = digest_file(record.directory.resolve_member(name, MANIFEST))
    except CkptConvertError as error:
        severity: Severity = "error" if isinstance(error, UnsafeFileError) else "warning"
        yield failed_check("checksum", error, without_directory(str(error), record.directory), name, severity=severity)
        return
    except OSError as error:
        yield failed_check("checksum", error, f"{name}: cannot be read: {error.strerror}", name, severity="warning")
        return
    if found != expected:
        text = f"{name} was edited or damaged: checksum {found}, expected {expected} ({MANIFEST})"
        if beside:
            text += f"; put it back, or accept it as it is: {accept_command(record.directory, name)}"
        yield Finding("warning" if name.endswith(_FOR_PEOPLE) else "error", "checksum", text, name)


def check_checklist(opened: LenientCheckpoint) -> tuple[list[Finding], list[Span]]:
    """Meta's checklist.chk: missing files as findings, the hashes of the others as spans to read."""
    checkpoint = opened.checkpoint
    path = checkpoint.root / CHECKLIST
    if not checkpoint.place.is_folder() or not path.is_regular_file():
        return [], []
    try:
        entries = checklist.parse_checklist(path.read(TEXT_LIMIT).decode(errors="replace"))
        kind = checklist.hash_algorithm(entries)
    except (CkptConvertError, OSError) as error:
        return [failed_check("checklist", error, str(error), CHECKLIST)], []
    findings, spans = [], []
    # Files that are open already are read once for all checks.
    opened_files = {file.name: file.reader for file in checkpoint.files if isinstance(file.reader, OpenFile)}
    for name, expected in entries.items():
        weights = is_weights(name)
        try:
            reader = opened_files.get(name) or checkpoint.root.resolve_member(name, CHECKLIST).open(name)
        except (CkptConvertError, OSError) as error:
            if name not in opened.unreadable_files:
                text = f"{name} is missing, or cannot be read, but {CHECKLIST} lists it; download it again"
                findings.append(
                    failed_check("checklist", error, text, name, severity="error" if weights else "warning")
                )
            continue
        spans.append(hashed_span(reader, name, 0, reader.size, kind, _wrong(name, kind, expected)))
    return findings, spans


def _wrong(name: str, kind: str, expected: str) -> Any:
    def done(found: str) -> Iterable[Finding]:
        if found == expected:
            return []
        text = f"{name} has the {kind} {found}, but {CHECKLIST} says {expected}; download it again"
        return [Finding("error", "checklist", text, name, None, expected, found)]

    return done
