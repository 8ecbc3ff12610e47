"""Carrying out a plan: pieces of tensors are read, put in order, checksummed and written, by a few threads.

A piece is a fixed range of an output file: the next PIECE bytes of a tensor, wherever they come from and whoever writes
them. It is moved block by block through buffers that each worker keeps, so memory is the number of workers times the
buffers, whatever the size of the model. numpy, checksums, reading and writing all let other threads run meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ckpt_convert import dtypes
from ckpt_convert.checkpoint.mapping import Equality
from ckpt_convert.convert.layout import OutputFile, Placed
from ckpt_convert.convert.plan import Plan, fingerprint
from ckpt_convert.convert.ties import Equal
from ckpt_convert.errors import LossyConversionError, TiedWeightsError
from ckpt_convert.formats.names import RECORD_FOLDER
from ckpt_convert.storage.checksums import CRC32, CRC64
from ckpt_convert.storage.workspace import Folder, Journal, Stage, StagedFile
from ckpt_convert.tensors import blocks, decode
from ckpt_convert.tensors.blocks import Meter, Mover, ProgressCallback, Read, difference
from ckpt_convert.tensors.header import StoredTensor, WeightFile
from ckpt_convert.tensors.lazy import LazyTensor
from ckpt_convert.words import MORE, listing, some

PIECE = 64 << 20
"""Bytes of a piece, at most."""

WRITEBACK = 16 << 20

_NAMED = 8
"""How many tensors a message names."""

log = logging.getLogger("ckpt_convert")


@dataclass(frozen=True, slots=True)
class Piece:
    """The ``nbytes`` at ``offset`` of an output file, made from ``parts``, one after another."""

    file: int
    placed: Placed
    offset: int
    nbytes: int
    parts: tuple[LazyTensor, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """A finished piece: its CRC-64 and, where the container keeps one, its CRC-32.

    ``overflowed`` is how many of its values the cast has made infinite.
    """

    offset: int
    nbytes: int
    key: str
    checksum: int
    crc: int
    overflowed: int = 0


def comparing(stored: Sequence[tuple[WeightFile, StoredTensor]], meter: Meter | None = None) -> Equal:
    """Whether the tensors of a pair, of these files, hold the same bytes; stops at the first difference."""
    left, right = Mover(stored), Mover(stored)

    def equal(check: Equality) -> bool:
        return difference(left, right, Read(check.left, check.dtype), Read(check.right, check.dtype), meter) is None

    return equal


def run_checks(plan: Plan, progress: ProgressCallback | None = None) -> None:
    """Compare what has to be equal before anything is written; raises TiedWeightsError listing what is not."""
    if not plan.checks:
        return
    total = sum(check.left.size * dtypes.DTYPES[check.dtype].bits // 8 for check in plan.checks)
    meter = Meter("checking", total, progress)
    equal = comparing(plan.stored, meter)
    failed = [check.message for check in plan.checks if not equal(check)]
    if failed:
        raise TiedWeightsError(f"{plan.source.path}: tensors that have to be equal are not:{listing(failed)}")


def check_losses(plan: Plan) -> dict[str, int]:
    """How many values other than zero have no place in the output although they change what the model computes, by key.

    Raises LossyConversionError for any, unless that was accepted.
    """
    mover = Mover(plan.stored)
    counts = {check.key: _nonzero(mover, check.left, check.dtype) for check in plan.losses}
    lost = {key: count for key, count in counts.items() if count}
    if lost and not plan.request.allow_loss:
        raise LossyConversionError(
            f"{plan.source.path}: {loss_text(lost)} change what the model computes, and the {plan.target} format of "
            f"{plan.model.family.name} has no place for them; --allow-loss goes on without, and keeps them in the "
            f"record ({RECORD_FOLDER}/) for the way back",
            lost,
        )
    return lost


def loss_text(lost: Mapping[str, int]) -> str:
    """In a few words: which tensors lose values, and how many."""
    return f"{sum(lost.values()):,} values of {named(lost)}"


def named(counts: Mapping[str, int]) -> str:
    """Tensors with a count of values each, the first few of them."""
    return some([f"{key} ({count:,})" for key, count in counts.items()], _NAMED, MORE)


def _nonzero(mover: Mover, tensor: LazyTensor, dtype: str) -> int:
    codec = decode.codec(dtype)
    count = 0
    for _, data in mover.blocks(tensor, dtype, dtype):
        raw = np.frombuffer(data, np.uint8)
        if codec is not None:
            raw = decode.values(codec, raw, np.empty(len(raw) * 8 // dtypes.DTYPES[dtype].bits, codec.wide))
        count += int(np.count_nonzero(raw))
    return count


def settled(plan: Plan) -> tuple[OutputFile, ...]:
    """The files of a plan, with tensors as they were earlier wherever nothing has changed since.

    Decided when the plan is carried out: the tensors may be those of a model in memory, which other plans are not made
    for at every save.
    """
    equal = comparing(plan.stored)

    def chosen(placed: Placed) -> Placed:
        earlier = placed.earlier
        same = earlier is not None and equal(earlier.unchanged)
        return replace(placed, tensor=earlier.tensor) if earlier is not None and same else placed

    return tuple(
        replace(file, tensors=tuple(map(chosen, file.tensors))) if any(t.earlier for t in file.tensors) else file
        for file in plan.files
    )


def pieces(files: tuple[OutputFile, ...]) -> Iterator[Piece]:
    """Every piece, in the order in which the source is read best.

    Files are written one after another, each in offset order; only where the files are ranks they are written side by
    side, since every source row goes into all of them.
    """
    order: list[tuple[int, Placed]] = []
    ranks = {file.rank for file in files}
    if len(ranks) > 1:
        longest = max(len(file.tensors) for file in files)
        for at in range(longest):
            order += [(number, file.tensors[at]) for number, file in enumerate(files) if at < len(file.tensors)]
    else:
        order = [(number, placed) for number, file in enumerate(files) for placed in file.tensors]
    for number, placed in order:
        bits = dtypes.DTYPES[placed.dtype].bits
        step = PIECE // bits * 8  # elements, which fill whole bytes
        for start in range(0, placed.tensor.size, step):
            stop = min(start + step, placed.tensor.size)
            offset, nbytes = placed.offset + start * bits // 8, (stop - start) * bits // 8
            yield Piece(number, placed, offset, nbytes, tuple(placed.tensor.between(start, stop)))


class _File:
    """An output file while it is written: what of it is done, and what is left."""

    def __init__(self, output: OutputFile, folder: Folder, left: int) -> None:
        self.output = output
        self.left = left
        self.done: list[Done] = []
        self._has_crc = bool(output.layout.header.checksummed)
        self._header = 0
        self._folder = folder
        self._staged: StagedFile | None = None
        self._lock = threading.Lock()
        self._described: dict[str, Any] | None = None

    @property
    def staged(self) -> StagedFile:
        """The file itself, opened when its first piece is due, so that only a few files are open at a time."""
        with self._lock:
            if self._staged is None:
                self._staged = self._folder.file(self.output.name, self.output.size)
            return self._staged

    def sums(self, data: memoryview, checksum: int, crc: int) -> tuple[int, int]:
        """Both checksums of a piece, with more bytes of it."""
        return CRC64.of(data, checksum), CRC32.of(data, crc) if self._has_crc else 0

    def finish(self) -> None:
        """Every piece is written: add what belongs to none, the CRC-32s of the members in it, and let the file be."""
        places = deque(sorted(_crcs(self)))
        for offset, data in self.output.layout.literals:
            whole: bytes | bytearray = data
            while places and places[0][0] < offset + len(data):
                place, crc = places.popleft()
                at = place - offset
                whole = bytearray(whole) if isinstance(whole, bytes) else whole
                whole[at : at + 4] = crc.to_bytes(4, "little")
            self.staged.write(offset, memoryview(whole))
            self._header = CRC64.of(whole, self._header)
        self.staged.sync()
        self.close()

    def described(self) -> dict[str, Any]:
        """What the manifest says of the file; its header are all bytes that are in no piece, one after another."""
        if self._described is not None:
            return self._described
        done = sorted(self.done, key=lambda piece: piece.offset)
        return {
            "size": self.output.size,
            "header": CRC64.hex(self._header),
            "pieces": [[piece.key, piece.offset, piece.nbytes, CRC64.hex(piece.checksum)] for piece in done],
        }

    def take_over(self, described: dict[str, Any]) -> int:
        """Take the file as an earlier attempt finished it; returns the bytes of its pieces."""
        self.left, self._described = 0, described
        return sum(int(nbytes) for _, _, nbytes, _ in described["pieces"])

    def close(self) -> None:
        if self._staged is not None:
            self._staged.close()


class Execution:
    """Writes the files of a plan into a staging directory, or a folder of it."""

    _journal: Journal

    def __init__(
        self, plan: Plan, stage: Stage, folder: Folder, workers: int, progress: ProgressCallback | None
    ) -> None:
        self._plan = plan
        self._stage = stage
        self._folder = folder
        self._workers = workers
        self._lock = threading.Lock()
        self._queue: deque[Piece] = deque(pieces(settled(plan)))
        self._meter = Meter("converting", plan.tensor_bytes, progress)
        self._stop = threading.Event()
        self._files: list[_File] = []
        self._overflowed: dict[tuple[str, tuple[LazyTensor, ...]], int] = {}
        self.resumed = 0

    @property
    def overflows(self) -> dict[str, int]:
        """How many finite values of each tensor have become infinite, by its key in the output."""
        counts: dict[str, int] = {}
        for (key, _), count in sorted(self._overflowed.items(), key=lambda item: item[0][0]):
            counts[key] = counts.get(key, 0) + count
        return counts

    def run(self) -> dict[str, dict[str, Any]]:
        """Write everything; returns what the manifest says of each file.

        Raises whatever a worker raised first; the others stop at their next block.
        """
        earlier, whole = self._open_journal()
        self._queue = deque(piece for piece in self._queue if piece.file not in whole)
        counts = [0] * len(self._plan.files)
        for piece in self._queue:
            counts[piece.file] += 1
        with contextlib.ExitStack() as stack:
            stack.callback(self._journal.close)
            for output, count in zip(self._plan.files, counts, strict=True):
                self._files.append(_File(output, self._folder, count))
                stack.callback(self._files[-1].close)
            for number, file in enumerate(self._files):
                if number in whole:
                    self._take_over(file, whole[number])
                elif not file.left:
                    self._finish(number, file)
            self._run_workers(earlier)
        return {file.output.name: file.described() for file in self._files}

    def _run_workers(self, earlier: dict[tuple[int, int], int]) -> None:
        with ThreadPoolExecutor(self._workers, "convert") as pool:
            futures = [pool.submit(self._work, earlier) for _ in range(self._workers)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
            for future in futures:
                future.result()

    def _work(self, earlier: dict[tuple[int, int], int]) -> None:
        mover = Mover(self._plan.stored)
        while not self._stop.is_set():
            with self._lock:
                if not self._queue:
                    return
                piece = self._queue.popleft()
            file = self._files[piece.file]
            done = self._verified(file, piece, earlier.get((piece.file, piece.offset)))
            resumed = done is not None
            if done is None:
                done = self._move(mover, file, piece)
                if done is None:
                    return
                self._note(piece, done)
            with self._lock:
                if done.overflowed:  # by what was read: ranks may hold copies of it
                    self._overflowed[piece.placed.key, piece.parts] = done.overflowed
                file.done.append(done)
                file.left -= 1
                self.resumed += piece.nbytes if resumed else 0
                complete = not file.left
            if complete:
                self._finish(piece.file, file)

    def _finish(self, number: int, file: _File) -> None:
        file.finish()
        self._journal.whole(file.staged.name, json.dumps([number, file.described()]))

    def _take_over(self, file: _File, described: dict[str, Any]) -> None:
        nbytes = file.take_over(described)
        self.resumed += nbytes
        self._meter.add(nbytes)

    def _move(self, mover: Mover, file: _File, piece: Piece) -> Done | None:
        checksum = crc = done = flushed = 0
        placed, before = piece.placed, mover.overflowed
        for part in piece.parts:
            for _, data in mover.blocks(part, placed.source_dtype, placed.dtype):
                if self._stop.is_set():
                    return None
                checksum, crc = file.sums(data, checksum, crc)
                file.staged.write(piece.offset + done, data)
                self._meter.add(len(data))
                done += len(data)
                if done - flushed >= WRITEBACK or done == piece.nbytes:
                    file.staged.start_writeback(piece.offset + flushed, done - flushed)
                    flushed = done
        return Done(piece.offset, piece.nbytes, placed.key, checksum, crc, mover.overflowed - before)

    def _verified(self, file: _File, piece: Piece, expected: int | None) -> Done | None:
        """A piece that an earlier attempt wrote, if its bytes are really there."""
        if expected is None:
            return None
        checksum = crc = 0
        buffer = np.empty(min(blocks.BLOCK, piece.nbytes), np.uint8)
        for start in range(0, piece.nbytes, blocks.BLOCK):
            view = buffer.data[: min(blocks.BLOCK, piece.nbytes - start)]
            file.staged.readinto(piece.offset + start, view)
            checksum, crc = file.sums(view, checksum, crc)
        if checksum != expected:
            return None
        self._meter.add(piece.nbytes)
        return Done(piece.offset, piece.nbytes, piece.placed.key, checksum, crc)

    def _open_journal(self) -> tuple[dict[tuple[int, int], int], dict[int, dict[str, Any]]]:
        """Start or continue the journal; returns what an earlier attempt at this same plan has finished.

        That is the checksum of pieces, by file and offset, or what is said of whole files.
        """
        mine = fingerprint(self._plan)
        earlier: dict[tuple[int, int], int] = {}
        whole: dict[int, dict[str, Any]] = {}
        if self._stage.resumed:
            lines = self._stage.journal()
            if lines and lines[0] == mine:
                earlier = dict(entry for line in lines[1:] if (entry := _finished_piece(line)) is not None)
                whole = dict(found for line in lines[1:] if (found := _finished_file(line)) is not None)
            else:
                log.warning("the partial output is of another source or other options; it is written anew")
        names = [file.name for file in self._plan.files]
        self._journal = self._stage.begin(mine, names if earlier or whole else ())
        return earlier, whole

    def _note(self, piece: Piece, done: Done) -> None:
        if done.overflowed:
            return  # an attempt that continues this one has to count these, too
        with self._lock:
            self._journal.note(json.dumps([piece.file, piece.offset, CRC64.hex(done.checksum)]))


def _finished_piece(line: str) -> tuple[tuple[int, int], int] | None:
    with contextlib.suppress(ValueError, TypeError):
        number, offset, checksum = json.loads(line)
        return (int(number), int(offset)), int(checksum, 16)
    return None  # the last line of an attempt that was killed may be cut


def _finished_file(line: str) -> tuple[int, dict[str, Any]] | None:
    with contextlib.suppress(ValueError, TypeError):
        number, described = json.loads(line)
        return int(number), dict(described)
    return None


def _crcs(file: _File) -> Iterator[tuple[int, int]]:
    """(place, CRC-32) for every checksum that the container keeps of tensor bytes."""
    header = file.output.layout.header
    runs = sorted((done.offset, done.nbytes, done.crc) for done in file.done if done.nbytes)
    runs += [(offset, len(data), CRC32.of(data, 0)) for offset, data in file.output.layout.literals]
    runs.sort()
    at = 0
    for member in sorted(header.checksummed, key=lambda member: member.offset):
        while at < len(runs) and runs[at][0] + runs[at][1] <= member.offset:
            at += 1
        crc, position, end = 0, member.offset, member.offset + member.nbytes
        index = at
        while position < end:
            offset, nbytes, value = runs[index]
            if offset < position or offset + nbytes > end:  # a literal that also reaches outside of the member
                value, nbytes = _part_crc(file, offset, position, min(offset + nbytes, end))
            crc = CRC32.combine(crc, value, nbytes)
            position += nbytes
            index += 1
        for place in member.places:
            yield place, crc


def _part_crc(file: _File, literal: int, start: int, end: int) -> tuple[int, int]:
    data = next(data for offset, data in file.output.layout.literals if offset == literal)
    return CRC32.of(data[start - literal : end - literal], 0), end - start
