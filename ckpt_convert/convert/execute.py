"""Carrying out a plan: pieces of tensors are read, put in order, checksummed and written, by a few threads.

A piece is a contiguous run of one output tensor, at most PIECE bytes. It is moved block by block through buffers that
each worker keeps, so memory is the number of workers times the buffers, whatever the size of the model. numpy,
hashing, reading and writing all let other threads run meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash

from ckpt_convert import dtypes
from ckpt_convert.convert import blocks, decode
from ckpt_convert.convert.blocks import Meter, Mover, ProgressCallback, Read, difference
from ckpt_convert.convert.containers.crc import crc32_combine
from ckpt_convert.convert.formats.base import RECORD_FOLDER
from ckpt_convert.convert.layout import OutputFile, Placed
from ckpt_convert.convert.mapping import Equality
from ckpt_convert.convert.plan import Plan, fingerprint
from ckpt_convert.errors import LossyConversionError, TiedWeightsError, listing
from ckpt_convert.models.lazy import LazyTensor
from ckpt_convert.storage.folder import Folder, StagedFile
from ckpt_convert.storage.staging import Journal, Staging

PIECE = 64 << 20
WRITEBACK = 16 << 20

_NAMED = 8
"""How many tensors a message names."""

log = logging.getLogger("ckpt_convert")


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of ``nbytes`` at ``offset`` of an output file, made from ``tensor``."""

    file: int
    placed: Placed
    offset: int
    nbytes: int
    tensor: LazyTensor


@dataclass(frozen=True, slots=True)
class Done:
    """A finished piece: its checksum and, where the container keeps one, its CRC-32.

    ``overflowed`` is how many of its values the cast has made infinite.
    """

    offset: int
    nbytes: int
    key: str
    checksum: str
    crc: int
    overflowed: int = 0


def equal(left: Mover, right: Mover, check: Equality, meter: Meter | None = None) -> bool:
    """Whether both tensors of a check hold the same bytes; stops at the first difference."""
    return difference(left, right, Read(check.left, check.dtype), Read(check.right, check.dtype), meter) is None


def run_checks(plan: Plan, progress: ProgressCallback | None = None) -> None:
    """Compare what has to be equal before anything is written; raises TiedWeightsError listing what is not."""
    if not plan.checks:
        return
    total = sum(check.left.size * dtypes.DTYPES[check.dtype].bits // 8 for check in plan.checks)
    meter = Meter("checking", total, progress)
    left, right = Mover(plan.stored), Mover(plan.stored)
    failed = [check.message for check in plan.checks if not equal(left, right, check, meter)]
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
    shown = [f"{key} ({count:,})" for key, count in counts.items()]
    return ", ".join(shown[:_NAMED]) + (f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else "")


def _nonzero(mover: Mover, tensor: LazyTensor, dtype: str) -> int:
    codec = decode.codec(dtype)
    count = 0
    for _, data in mover.blocks(tensor, dtype, dtype):
        raw = np.frombuffer(data, np.uint8)
        if codec is not None:
            raw = decode.values(codec, raw, np.empty(len(raw) * 8 // dtypes.DTYPES[dtype].bits, codec.wide))
        count += int(np.count_nonzero(raw))
    return count


def is_tied(plan: Plan) -> bool:
    """What the bytes say where no file says whether the weights are tied."""
    if plan.undecided is None:
        return bool(plan.dims["tied"])
    return equal(Mover(plan.stored), Mover(plan.stored), plan.undecided)


def settled(plan: Plan) -> tuple[OutputFile, ...]:
    """The files of a plan, with tensors as they were earlier wherever nothing has changed since.

    Decided when the plan is carried out: the tensors may be those of a model in memory, which other plans are not made
    for at every save.
    """
    movers = Mover(plan.stored), Mover(plan.stored)

    def chosen(placed: Placed) -> Placed:
        earlier = placed.earlier
        same = earlier is not None and equal(*movers, earlier.unchanged)
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
        for offset, block in placed.tensor.blocks(PIECE * 8 // bits):
            start = placed.offset + offset * bits // 8
            yield Piece(number, placed, start, block.size * bits // 8, block)


class _File:
    """An output file while it is written: what of it is done, and what is left."""

    def __init__(self, output: OutputFile, folder: Folder, left: int) -> None:
        self.output = output
        self.left = left
        self.done: list[Done] = []
        self.has_crc = bool(output.layout.header.checksummed)
        self._folder = folder
        self._staged: StagedFile | None = None
        self._lock = threading.Lock()

    @property
    def staged(self) -> StagedFile:
        """The file itself, opened when its first piece is due, so that only a few files are open at a time."""
        with self._lock:
            if self._staged is None:
                self._staged = self._folder.file(self.output.name, self.output.size)
                for offset, data in self.output.layout.literals:
                    self._staged.write(offset, memoryview(data))
            return self._staged

    def close(self) -> None:
        if self._staged is not None:
            self._staged.close()


class Execution:
    """Writes the files of a plan into a staging directory, or a folder of it."""

    _journal: Journal

    def __init__(
        self, plan: Plan, staging: Staging, folder: Folder, workers: int, progress: ProgressCallback | None
    ) -> None:
        self._plan = plan
        self._staging = staging
        self._folder = folder
        self._workers = workers
        self._lock = threading.Lock()
        self._queue: deque[Piece] = deque(pieces(settled(plan)))
        self._meter = Meter("converting", plan.tensor_bytes, progress)
        self._stop = threading.Event()
        self._files: list[_File] = []
        self._overflowed: dict[tuple[str, LazyTensor], int] = {}
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
        counts = [0] * len(self._plan.files)
        for piece in self._queue:
            counts[piece.file] += 1
        earlier = self._open_journal()
        with contextlib.ExitStack() as stack:
            stack.callback(self._journal.close)
            for output, count in zip(self._plan.files, counts, strict=True):
                self._files.append(_File(output, self._folder, count))
                stack.callback(self._files[-1].close)
            for file in self._files:
                if not file.left:
                    self._finish(file)
            self._run_workers(earlier)
        return {file.output.name: _described(file) for file in self._files}

    def _run_workers(self, earlier: dict[tuple[int, int], str]) -> None:
        with ThreadPoolExecutor(self._workers, "convert") as pool:
            futures = [pool.submit(self._work, earlier) for _ in range(self._workers)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
            for future in futures:
                future.result()

    def _work(self, earlier: dict[tuple[int, int], str]) -> None:
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
                    self._overflowed[piece.placed.key, piece.tensor] = done.overflowed
                file.done.append(done)
                file.left -= 1
                self.resumed += piece.nbytes if resumed else 0
                complete = not file.left
            if complete:
                self._finish(file)

    def _move(self, mover: Mover, file: _File, piece: Piece) -> Done | None:
        digest = xxhash.xxh3_64()
        crc = 0
        flushed = 0
        before = mover.overflowed
        for offset, data in mover.blocks(piece.tensor, piece.placed.source_dtype, piece.placed.dtype):
            if self._stop.is_set():
                return None
            digest.update(data)
            if file.has_crc:
                crc = zlib.crc32(data, crc)
            file.staged.write(piece.offset + offset, data)
            self._meter.add(len(data))
            if offset + len(data) - flushed >= WRITEBACK or offset + len(data) == piece.nbytes:
                file.staged.start_writeback(piece.offset + flushed, offset + len(data) - flushed)
                flushed = offset + len(data)
        overflowed = mover.overflowed - before
        return Done(piece.offset, piece.nbytes, piece.placed.key, digest.hexdigest(), crc, overflowed)

    def _verified(self, file: _File, piece: Piece, checksum: str | None) -> Done | None:
        """A piece that an earlier attempt wrote, if its bytes are really there."""
        if checksum is None:
            return None
        digest = xxhash.xxh3_64()
        crc = 0
        buffer = np.empty(min(blocks.BLOCK, piece.nbytes), np.uint8)
        for start in range(0, piece.nbytes, blocks.BLOCK):
            view = buffer.data[: min(blocks.BLOCK, piece.nbytes - start)]
            file.staged.readinto(piece.offset + start, view)
            digest.update(view)
            if file.has_crc:
                crc = zlib.crc32(view, crc)
        if digest.hexdigest() != checksum:
            return None
        self._meter.add(piece.nbytes)
        return Done(piece.offset, piece.nbytes, piece.placed.key, checksum, crc)

    def _finish(self, file: _File) -> None:
        """Everything of a file is written: put the CRCs in and flush it to disk."""
        for offset, crc in _crcs(file):
            file.staged.write(offset, memoryview(crc.to_bytes(4, "little")))
        file.staged.sync()
        file.close()

    def _open_journal(self) -> dict[tuple[int, int], str]:
        """Start or continue the journal of finished pieces; returns those of an earlier attempt at this same plan."""
        mine = fingerprint(self._plan)
        earlier: dict[tuple[int, int], str] = {}
        if self._staging.resumed:
            lines = self._staging.journal()
            if lines and lines[0] == mine:
                earlier = dict(entry for line in lines[1:] if (entry := _journal_entry(line))[1])
            else:
                log.warning("the partial output is of another source or other options; it is written anew")
        self._journal = self._staging.begin(mine, (file.name for file in self._plan.files) if earlier else ())
        return earlier

    def _note(self, piece: Piece, done: Done) -> None:
        if done.overflowed:
            return  # an attempt that continues this one has to count these, too
        with self._lock:
            self._journal.note(json.dumps([piece.file, piece.offset, done.checksum]))


def _journal_entry(line: str) -> tuple[tuple[int, int], str]:
    with contextlib.suppress(ValueError, TypeError):
        number, offset, checksum = json.loads(line)
        return (int(number), int(offset)), str(checksum)
    return (-1, -1), ""  # the last line of an attempt that was killed may be cut


def _crcs(file: _File) -> Iterator[tuple[int, int]]:
    """(place, CRC-32) for every checksum that the container keeps of tensor bytes."""
    header = file.output.layout.header
    runs = sorted((done.offset, done.nbytes, done.crc) for done in file.done if done.nbytes)
    runs += [(offset, len(data), zlib.crc32(data)) for offset, data in file.output.layout.literals]
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
            crc = crc32_combine(crc, value, nbytes)
            position += nbytes
            index += 1
        for place in member.places:
            yield place, crc


def _part_crc(file: _File, literal: int, start: int, end: int) -> tuple[int, int]:
    data = next(data for offset, data in file.output.layout.literals if offset == literal)
    return zlib.crc32(data[start - literal : end - literal]), end - start


def _described(file: _File) -> dict[str, Any]:
    done = sorted(file.done, key=lambda done: done.offset)
    return {
        "size": file.output.size,
        "pieces": [[piece.key, piece.offset, piece.nbytes, piece.checksum] for piece in done],
    }
