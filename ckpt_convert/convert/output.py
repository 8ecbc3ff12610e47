"""Writing everything that a plan says into a staging directory: weights, the files beside them, and the record."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ckpt_convert.convert import checklist, record, sidefiles
from ckpt_convert.convert.blocks import Meter, ProgressCallback
from ckpt_convert.convert.checklist import CHECKLIST
from ckpt_convert.convert.checkpoint import Checkpoint
from ckpt_convert.convert.execute import Execution, named
from ckpt_convert.convert.formats.base import RECORD_FOLDER, TEXT_LIMIT
from ckpt_convert.convert.plan import Plan
from ckpt_convert.convert.sidefiles import SideFile
from ckpt_convert.errors import CorruptFileError, LossyConversionError
from ckpt_convert.storage.reader import LocalFile, identify, read, read_file
from ckpt_convert.storage.staging import Staging

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Written:
    """What ``write`` wrote: the manifest, which is still to be written, and how many bytes were there already.

    ``overflows`` has how many finite values of each tensor have become infinite.
    """

    manifest: dict[str, Any]
    resumed: int
    overflows: dict[str, int]


def write(made: Plan, staging: Staging, workers: int, progress: ProgressCallback | None) -> Written:
    """Write the weights and everything beside them, flushed to disk; the manifest is the caller's to write last.

    Raises LossyConversionError where a cast has made finite values infinite and nobody accepted that.
    """
    execution = Execution(made, staging, workers, progress)
    pieces = execution.run()
    overflows = execution.overflows
    if overflows and not made.request.allow_overflow:
        raise LossyConversionError(
            f"{made.source.path}: {overflow_text(overflows)} in {made.request.dtype}; keep the dtype, choose one with "
            f"a wider range (--dtype bfloat16 has about float32's), or accept it with --allow-overflow",
            overflows,
        )
    side, kept = _write_side_files(made, staging, workers, progress)
    return Written(made.manifest(pieces, side, kept), execution.resumed, overflows)


def overflow_text(overflows: Mapping[str, int]) -> str:
    """In a few words: which tensors have values that are too large, and how many."""
    count = sum(overflows.values())
    values = f"{count:,} finite values become" if count != 1 else "1 finite value becomes"
    return f"{values} infinite, of {named(overflows)},"


def _write_side_files(
    made: Plan, staging: Staging, workers: int, progress: ProgressCallback | None
) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Write everything beside the weights; returns the manifest's entries of it, and the checksums of the record."""
    written = []
    kept = {}
    for side in made.side:
        digest = write_side_file(side, staging)
        if digest is None:
            continue
        if side.name.startswith(f"{RECORD_FOLDER}/"):
            kept[side.name] = digest
        else:
            written.append({"name": side.name, "origin": side.origin, "checksum": digest})
    listed = sidefiles.checklist_of(made.source) if made.live is None else {}
    if listed:
        _check_source(made.source, listed, workers, progress)
    template = sidefiles.checklist_for(made.source, made.target)
    if template is not None:
        data = _checklist(template, staging)
        staging.write(CHECKLIST, data)
        written.append({"name": CHECKLIST, "origin": "generated", "checksum": record.digest(data)})
    return written, kept


def write_side_file(side: SideFile, staging: Staging) -> str | None:
    """Write one file; returns its checksum, None where there was nothing to write."""
    if side.path is None:
        data = side.make() if side.make else None
        if data is None:
            return None
        staging.write(side.name, data)
        return record.digest(data)
    digest = xxhash.xxh3_64()
    with LocalFile(side.path, expected=side.identity) as file, staging.file(side.name, 0) as out:
        for offset in range(0, file.size, _BLOCK):
            block = read(file, offset, min(_BLOCK, file.size - offset))
            digest.update(block)
            out.write(offset, memoryview(block))
        out.sync()
    return digest.hexdigest()


def _check_source(source: Checkpoint, listed: dict[str, str], workers: int, progress: ProgressCallback | None) -> None:
    """Compare the source's files with its checklist.chk; raises CorruptFileError naming those that differ."""
    meter = Meter("checking", sum(identify(source.root / name).size for name in listed), progress)

    def findings(name: str) -> list[checklist.Finding]:
        return checklist.check(source.root, {name: listed[name]}, advance=meter.add)

    with ThreadPoolExecutor(workers) as pool:
        wrong = [finding for found in pool.map(findings, listed) for finding in found]
    if wrong:
        listing = "; ".join(f"{finding.file}: expected {finding.expected}, found {finding.found}" for finding in wrong)
        raise CorruptFileError(
            f"{source.root / CHECKLIST}: the files are not those it lists: {listing}; "
            "download them again, or remove the checklist if they were changed on purpose"
        )


def _checklist(template: Path, staging: Staging) -> bytes:
    """The checklist of the files that were written, in the order and with the hash of the one that came along."""
    listed = checklist.parse(read_file(template, TEXT_LIMIT).decode(errors="replace"))
    names = [name for name in listed if (staging.path / name).is_file()]
    names += [path.name for path in sorted(staging.path.glob("consolidated.*")) if path.name not in listed]
    return checklist.render(checklist.hash_files(staging.path, names, checklist.algorithm(listed)))
