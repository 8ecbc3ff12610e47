"""Executing a plan: a few threads read, reorder, checksum and write pieces of tensors.

A piece is a fixed range of an output file: the next PIECE bytes of a tensor, independent of the source and of the
writer. It is moved block by block through the buffers of a worker, so memory is the number of workers times the
buffers, independent of the model's size. numpy, checksums, reading and writing all release the GIL.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from ckpt_convert import dtypes
from ckpt_convert.checkpoint.mapping import Equality
from ckpt_convert.convert.layout import PlacedTensor
from ckpt_convert.convert.partition import Piece
from ckpt_convert.convert.plan import Plan
from ckpt_convert.convert.sources import NumberedTensors, Sources
from ckpt_convert.convert.ties import EqualBytes
from ckpt_convert.errors import LossyConversionError, TiedWeightsError
from ckpt_convert.formats.names import RECORD_FOLDER
from ckpt_convert.storage.checksums import CRC32, CRC64
from ckpt_convert.storage.workspace import StagedFile
from ckpt_convert.tensors import decode
from ckpt_convert.tensors.blocks import BlockReader, TypedTensor, first_difference
from ckpt_convert.tensors.gather import StoredTensors
from ckpt_convert.tensors.lazy import BLOCK, LazyTensor
from ckpt_convert.tensors.pool import run_threaded
from ckpt_convert.tensors.progress import ProgressCallback, ProgressCounter
from ckpt_convert.tensors.runs import RunWriter
from ckpt_convert.wording import MORE, first_few, indented_list

_NAMED = 8
"""The number of tensors that a message names."""


class FinishedPiece(NamedTuple):
    """A finished piece: its CRC-64 and, where the container keeps one, its CRC-32.

    ``overflowed`` is the number of values that the cast made infinite; ``resumed`` is set where an earlier attempt
    wrote the piece.
    """

    piece: Piece
    checksum: int
    crc: int
    overflowed: int = 0
    resumed: bool = False


class PieceOutput(Protocol):
    """The destination of pieces: the staged files of a plan, by number."""

    def file(self, number: int) -> StagedFile:
        """A file, open for writing at any offset."""

    def earlier_checksum(self, piece: Piece) -> int | None:
        """The checksum of the piece according to an earlier attempt, None if it has not written it."""

    def add(self, done: FinishedPiece) -> None:
        """Register a finished piece."""


def byte_comparer(stored: StoredTensors, counter: ProgressCounter | None = None) -> EqualBytes:
    """A function that compares the bytes of a pair of tensors, up to the first difference."""
    left, right = BlockReader(stored), BlockReader(stored)

    def equal(check: Equality) -> bool:
        return (
            first_difference(
                left, right, TypedTensor(check.left, check.dtype), TypedTensor(check.right, check.dtype), counter
            )
            is None
        )

    return equal


def run_checks(plan: Plan, sources: Sources, progress: ProgressCallback | None = None) -> None:
    """Compare the pairs that must be equal before anything is written; raises TiedWeightsError listing the others."""
    if not plan.checks:
        return
    total = sum(check.left.size * dtypes.DTYPES[check.dtype].bits // 8 for check in plan.checks)
    counter = ProgressCounter("checking", total, progress)
    equal = byte_comparer(NumberedTensors(plan, sources), counter)
    failed = [check.message for check in plan.checks if not equal(check)]
    if failed:
        raise TiedWeightsError(f"{plan.source.place}: tensors that have to be equal are not:{indented_list(failed)}")


def check_losses(plan: Plan, sources: Sources) -> dict[str, int]:
    """Count, by key, the nonzero values that the target cannot hold although they change what the model computes.

    Raises LossyConversionError for any, unless ``allow_loss`` accepts them.
    """
    mover = BlockReader(NumberedTensors(plan, sources))
    counts = {check.key: count_nonzero(mover, check.left, check.dtype) for check in plan.losses}
    lost = {key: count for key, count in counts.items() if count}
    if lost and not plan.request.allow_loss:
        raise LossyConversionError(
            f"{plan.source.place}: {loss_text(lost)} change what the model computes, and the {plan.target} format of "
            f"{plan.family} has no place for them; `allow_loss=True` continues without them, and keeps them in the "
            f"record ({RECORD_FOLDER}/) for a conversion back",
            lost,
        )
    return lost


def loss_text(lost: Mapping[str, int]) -> str:
    """The tensors that lose values, and how many, for messages."""
    return f"{sum(lost.values()):,} values of {list_counts(lost)}"


def list_counts(counts: Mapping[str, int]) -> str:
    """The first few tensors with their counts, for messages."""
    return first_few([f"{key} ({count:,})" for key, count in counts.items()], _NAMED, MORE)


def count_nonzero(mover: BlockReader, tensor: LazyTensor, dtype: str) -> int:
    """How many elements of a tensor are not zero."""
    codec = decode.codec_of(dtype)
    count = 0
    for _, data in mover.blocks(tensor, dtype, dtype):
        raw = np.frombuffer(data, np.uint8)
        if codec is not None:
            raw = decode.decode_values(
                codec, raw, np.empty(len(raw) * 8 // dtypes.DTYPES[dtype].bits, codec.value_dtype)
            )
        count += int(np.count_nonzero(raw))
    return count


def settle_originals(plan: Plan, equal: EqualBytes) -> Plan:
    """The plan with the original tensors wherever their values are unchanged, as ``equal`` says of each in turn.

    This is decided on execution, since the same plan may write a model in memory at every save.
    """
    files = list(plan.files)
    for number, file in enumerate(files):
        if any(placed.original for placed in file.tensors):
            files[number] = replace(file, tensors=tuple([_chosen(placed, equal) for placed in file.tensors]))
    return replace(plan, files=tuple(files))


def _chosen(placed: PlacedTensor, equal: EqualBytes) -> PlacedTensor:
    if placed.original is None:
        return placed
    same = equal(placed.original.unchanged)
    return replace(placed, tensor=placed.original.tensor if same else placed.tensor, original=None)


def execute(
    plan: Plan,
    pieces: Iterable[Piece],
    sources: Sources,
    output: PieceOutput,
    *,
    workers: int,
    counter: ProgressCounter | None = None,
) -> list[FinishedPiece]:
    """Write these pieces of a plan's files; other processes may write the rest.

    Raises the first error of a worker; the others stop at their next block.
    """
    queue, stored = list(pieces), NumberedTensors(plan, sources)
    counter = counter or ProgressCounter("converting", sum(piece.nbytes for piece in queue), None)
    execution = _Execution(plan, output, counter)
    run_threaded(queue, workers, counter, lambda: partial(execution.write, BlockReader(stored), RunWriter()))
    return execution.done


class _Execution:
    """The shared state of the threads that write pieces."""

    def __init__(self, plan: Plan, output: PieceOutput, counter: ProgressCounter) -> None:
        self.done: list[FinishedPiece] = []
        self._plan = plan
        self._output = output
        self._meter = counter

    def write(self, mover: BlockReader, writer: RunWriter, piece: Piece) -> None:
        file = self._output.file(piece.file)
        done = self._verified(file, piece) or self._moved(mover, writer, file, piece)
        self.done.append(done)
        self._output.add(done)

    def _sums(self, piece: Piece, data: memoryview, checksum: int, crc: int) -> tuple[int, int]:
        """Both checksums of a piece, updated with more of its bytes."""
        has_crc = self._plan.files[piece.file].layout.header.checksummed
        return CRC64.of(data, checksum), CRC32.of(data, crc) if has_crc else 0

    def _moved(self, mover: BlockReader, writer: RunWriter, file: StagedFile, piece: Piece) -> FinishedPiece:
        checksum = crc = 0
        placed, before = self._plan.files[piece.file].tensors[piece.tensor], mover.overflowed
        writer.begin(file, piece.offset)
        for part in placed.tensor.flat_range(piece.start, piece.stop):
            for _, data in mover.blocks(part, placed.source_dtype, placed.dtype):
                checksum, crc = self._sums(piece, data, checksum, crc)
                writer.write(data)
                self._meter.add(len(data))
        writer.end()
        return FinishedPiece(piece, checksum, crc, mover.overflowed - before)

    def _verified(self, file: StagedFile, piece: Piece) -> FinishedPiece | None:
        """A piece that an earlier attempt wrote, if its bytes have the checksum."""
        expected = self._output.earlier_checksum(piece)
        if expected is None:
            return None
        checksum = crc = 0
        buffer = np.empty(min(BLOCK, piece.nbytes), np.uint8)
        for start in range(0, piece.nbytes, BLOCK):
            view = buffer.data[: min(BLOCK, piece.nbytes - start)]
            file.readinto(piece.offset + start, view)
            checksum, crc = self._sums(piece, view, checksum, crc)
        if checksum != expected:
            return None
        self._meter.add(piece.nbytes)
        return FinishedPiece(piece, checksum, crc, resumed=True)
