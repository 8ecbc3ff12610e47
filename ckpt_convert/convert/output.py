"""Writing the output of a plan into a staging directory: weights, auxiliary files and record."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_convert.checkpoint import checklist
from ckpt_convert.checkpoint.checklist import CHECKLIST
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.convert.auxiliary_files import AuxiliaryFile
from ckpt_convert.convert.execute import FinishedPiece, byte_comparer, execute, list_counts, loss_text, settle_originals
from ckpt_convert.convert.partition import split_into_pieces
from ckpt_convert.convert.plan import Checklist, Plan
from ckpt_convert.convert.publish import StagedOutput
from ckpt_convert.convert.sources import NumberedTensors, Sources
from ckpt_convert.errors import CorruptFileError, LossyConversionError
from ckpt_convert.formats.base import TEXT_LIMIT
from ckpt_convert.formats.names import CONSOLIDATED, RECORD_FOLDER
from ckpt_convert.storage import checksums
from ckpt_convert.storage.base import read_blocks, read_range
from ckpt_convert.storage.checksums import digest
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.reader import reading
from ckpt_convert.storage.workspace import Folder, Stage
from ckpt_convert.tensors.lazy import LazyTensor
from ckpt_convert.tensors.pool import map_threaded
from ckpt_convert.tensors.progress import ProgressCallback, ProgressCounter


@dataclass(frozen=True)
class WriteResult:
    """The result of ``write_output``: the manifest, not yet written, and the bytes that an earlier attempt had written.

    ``overflows`` counts by key the finite values that became infinite; ``notices`` are those of files that were
    generated while writing (tokenizers).
    """

    manifest: dict[str, Any]
    resumed: int
    overflows: dict[str, int]
    notices: tuple[str, ...] = ()


def write_output(
    plan: Plan,
    sources: Sources,
    stage: Stage,
    workers: int,
    progress: ProgressCallback | None,
    folder: Folder | None = None,
    *,
    phase: str = "converting",
) -> WriteResult:
    """Write weights and auxiliary files, flushed to disk, into the staging directory or a ``folder`` of it.

    The caller writes the manifest. Raises LossyConversionError where a cast has made finite values infinite, unless
    ``allow_overflow`` accepts that.
    """
    into = folder or stage.folder
    made = settle_originals(plan, byte_comparer(NumberedTensors(plan, sources)))
    counter = ProgressCounter(phase, made.tensor_bytes, progress)
    with StagedOutput(made, stage, into) as staged:
        left = staged.begin(split_into_pieces(made.files))
        if staged.resumed:
            counter.add(staged.resumed)
        done = execute(made, left, sources, staged, workers=workers, counter=counter)
        return finish_output(made, done, staged, into, workers, progress)


def finish_output(
    plan: Plan,
    done: Sequence[FinishedPiece],
    staged: StagedOutput,
    folder: Folder,
    workers: int,
    progress: ProgressCallback | None,
) -> WriteResult:
    """Write the auxiliary files after the weights, whose pieces (of all writers) are ``done`` and added to ``staged``.

    Raises LossyConversionError where a cast has made finite values infinite, unless ``allow_overflow`` accepts that.
    """
    overflows = _overflows(plan, done)
    refuse_overflows(plan, overflows)
    side, kept = _write_auxiliary_files(plan, folder, workers, progress)
    together = {id(one.generated): one.generated for one in plan.auxiliary_files if one.generated is not None}
    notices = [text for files in together.values() for text in files.notices]
    return WriteResult(plan.manifest(staged.described(), side, kept), staged.resumed, overflows, tuple(notices))


def refuse_overflows(plan: Plan, overflows: Mapping[str, int]) -> None:
    """Raise LossyConversionError for finite values that have become infinite, unless ``allow_overflow`` accepts them.

    Without a cast it was a change of the source's tensors.
    """
    if not overflows or plan.request.allow_overflow:
        return
    advice = "choose one with a wider range (`dtype='bfloat16'` has about float32's), or accept it with "
    how = f"in {plan.request.dtype}; keep the dtype, {advice}" if plan.request.dtype else "once merged; accept it with "
    raise LossyConversionError(
        f"{plan.source.place}: {overflow_text(overflows)} {how}`allow_overflow=True`", dict(overflows)
    )


def _overflows(plan: Plan, done: Sequence[FinishedPiece]) -> dict[str, int]:
    """Count by output key the finite values that became infinite; replicas on several ranks count once."""
    found: dict[tuple[str, tuple[LazyTensor, ...]], int] = {}
    for one in done:
        if one.overflowed:
            placed = plan.files[one.piece.file].tensors[one.piece.tensor]
            found[placed.key, tuple(placed.tensor.flat_range(one.piece.start, one.piece.stop))] = one.overflowed
    counts: dict[str, int] = {}
    for (key, _), count in sorted(found.items(), key=lambda item: item[0][0]):
        counts[key] = counts.get(key, 0) + count
    return counts


def overflow_text(overflows: Mapping[str, int]) -> str:
    """The tensors with values that became infinite, and how many, for messages."""
    count = sum(overflows.values())
    values = f"{count:,} finite values become" if count != 1 else "1 finite value becomes"
    return f"{values} infinite, of {list_counts(overflows)},"


def accepted_losses(plan: Plan, lost: Mapping[str, int], overflows: Mapping[str, int]) -> list[str]:
    """What the output has lost as its user accepted."""
    said = [f"{loss_text(lost)} are kept in the record alone, as accepted"] if lost else []
    how = f"in {plan.request.dtype}" if plan.request.dtype else "once merged"
    return said + ([f"{overflow_text(overflows)} {how}, as accepted"] if overflows else [])


def _write_auxiliary_files(
    plan: Plan, folder: Folder, workers: int, progress: ProgressCallback | None
) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Write the auxiliary files; returns their entries in the manifest, and the checksums of the record's files."""
    written = []
    kept = {}
    for side in plan.auxiliary_files:
        checksum = write_auxiliary_file(side, folder)
        if checksum is None:
            continue
        if side.name.startswith(f"{RECORD_FOLDER}/"):
            kept[side.name] = checksum
        else:
            written.append({"name": side.name, "origin": side.origin, "checksum": checksum})
    if plan.checklist.listed:
        _check_source(plan.checklist, workers, progress)
    if plan.checklist.template is not None:
        data = _checklist(plan.checklist.template, folder)
        folder.write(CHECKLIST, data)
        written.append({"name": CHECKLIST, "origin": "generated", "checksum": digest(data)})
    return written, kept


def write_auxiliary_file(side: AuxiliaryFile, folder: Folder) -> str | None:
    """Write one file; returns its checksum, None where there was nothing to write.

    A copy gets no permissions beyond those of the original.
    """
    if side.place is None:
        data = side.content
        if data is None:
            return None
        folder.write(side.name, data)
        return digest(data)
    with side.place.open(expected=side.identity) as file:
        folder = folder.with_mode(side.place.mode())
        if folder.comes_last(side.name):  # small, and written once everything else is
            data = read_range(file, 0, file.size)
            folder.write(side.name, data)
            return digest(data)
        total = checksums.new(checksums.XXH3)
        with folder.file(side.name, file.size) as out:
            offset = 0
            for block in read_blocks(file):
                total.update(block)
                out.write(offset, block)
                offset += len(block)
            out.sync()
    return total.hexdigest()


def output_permissions(source: Identified) -> int:
    """The maximum permissions of a conversion's output: those of the source's directory and weights."""
    with reading(source.place, "looked at"):
        mode = 0o777 if source.place.is_regular_file() else source.place.mode()
        for path in {file.place for file in source.files}:
            mode &= path.mode()
    return mode


def _check_source(list_: Checklist, workers: int, progress: ProgressCallback | None) -> None:
    """Verify the source's files against its checklist.chk; raises CorruptFileError naming those that differ."""
    root, listed = list_.root, list_.listed
    counter = ProgressCounter("checking", sum((root / name).identity().size for name in listed), progress)

    def findings(name: str) -> list[checklist.HashMismatch]:
        return checklist.check_hashes(root, {name: listed[name]}, advance=counter.add)

    wrong = [finding for found in map_threaded(findings, listed, workers) for finding in found]
    if wrong:
        listing = "; ".join(f"{finding.file}: expected {finding.expected}, found {finding.found}" for finding in wrong)
        raise CorruptFileError(
            f"{root / CHECKLIST}: files differ from their hashes: {listing}; "
            "download them again, or remove the checklist if they were changed on purpose"
        )


def _checklist(template: Place, folder: Folder) -> bytes:
    """The checklist of the files that were written, with the order and hash algorithm of the template."""
    listed = checklist.parse_checklist(template.read(TEXT_LIMIT).decode(errors="replace"))
    kind = checklist.hash_algorithm(listed)
    late = {name: data for name in listed if (data := folder.kept_back(name)) is not None}
    written = folder.place.listed()
    names = [name for name in listed if name in late or (written / name).is_regular_file()]
    weights = sorted(place.name for place in written.children() if place.name.startswith(f"{CONSOLIDATED}."))
    names += [name for name in weights if name not in listed]
    hashes = checklist.hash_files(written, (name for name in names if name not in late), kind)
    hashes |= {name: hashlib.new(kind, data).hexdigest() for name, data in late.items()}
    return checklist.render_checklist({name: hashes[name] for name in names})
