"""The exchange of slices before they are written: ranges of files whose parts several ranks have get one owner each.

Ranks send what they have to the owners in rounds, in each of which an owner puts together at most as much as a piece
has: so a rank needs memory for what it sends, what arrives, and what it puts together. They talk over connections of
their own (gloo), never over the training's groups, so all of it may be done by a thread behind the training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from ckpt_convert.checkpointer.distributed import heartbeat
from ckpt_convert.checkpointer.distributed import ranks as talk
from ckpt_convert.checkpointer.distributed.heartbeat import Vigil
from ckpt_convert.checkpointer.distributed.ranks import Ranks
from ckpt_convert.convert import partition
from ckpt_convert.convert.boxes import Bytes, boxes_of, fill_message, message_size, place_message
from ckpt_convert.convert.execute import FinishedPiece, PieceOutput
from ckpt_convert.convert.partition import Piece
from ckpt_convert.convert.plan import Plan
from ckpt_convert.convert.sharing import Owns
from ckpt_convert.convert.sources import NumberedTensors, Sources
from ckpt_convert.errors import CkptConvertError
from ckpt_convert.storage.checksums import CRC32, CRC64
from ckpt_convert.tensors.blocks import BlockReader
from ckpt_convert.tensors.pool import CallThread
from ckpt_convert.tensors.progress import ProgressCounter
from ckpt_convert.tensors.runs import RunWriter

Writers = Literal["auto", "direct", "exchange"]


class BrokenExchangeError(CkptConvertError):
    """A connection was lost: what ended it, or what failed there, is for another rank to say."""


class Exchange:
    """Connections to the other ranks, which are made with the first exchange, and again after a save that failed.

    gloo waits for a rank that is stopped as long as for one that is slow. So a thread waits for gloo, and is left to
    itself where the first rank finds that another one is not heard of any more, or the others that the first one is.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._group: Any = None
        self._thread: CallThread | None = None
        self._saves = 0
        self._memory: dict[str, Bytes] = {}

    @contextlib.contextmanager
    def one_save(self) -> Iterator[None]:
        """A save, which all ranks begin together; where it fails, all close their connections."""
        self._saves += 1
        try:
            yield
        except BaseException:
            self.close()
            raise
        finally:
            self._memory.clear()

    def memory(self, name: str, nbytes: int) -> Bytes:
        """Memory under a name, the same in all rounds of a save; what was in it may be overwritten."""
        if len(self._memory.get(name, ())) < nbytes:
            self._memory[name] = np.empty(nbytes, np.uint8)
        return self._memory[name][:nbytes] if nbytes else np.empty(0, np.uint8)

    def close(self) -> None:
        """Close the connections, so that no rank waits for this one."""
        self._group = self._thread = None

    def swap(self, sizes: Sequence[int], fill: Callable[[int, Bytes], None], take: Callable[[Bytes], None]) -> None:
        """Send each rank a message of its size, and take those that arrive, this rank's own among them.

        ``fill`` is called with a rank and the memory of its message. Raises BrokenExchangeError where a rank has ended.
        """
        own, count = self.ranks.rank, self.ranks.count
        arriving = self._sizes([0 if rank == own else size for rank, size in enumerate(sizes)])
        parts = np.split(self.memory("arriving", sum(arriving)), np.cumsum(arriving)[:-1])
        waiting = [self._begin("recv", part, rank) for rank, part in enumerate(parts) if len(part)]
        try:
            message = self.memory("sent", max(sizes))
            for rank in (*range(own + 1, count), *range(own)):  # not all of them to one rank at once
                if sizes[rank]:
                    fill(rank, message[: sizes[rank]])
                    self._end(self._begin("send", message[: sizes[rank]], rank))
            if sizes[own]:
                fill(own, message[: sizes[own]])
                take(message[: sizes[own]])
            while waiting:
                self._end(waiting.pop())
        finally:
            waiting.clear()  # what is under way keeps the connections open
        for part in parts:
            if len(part):
                take(part)

    def _sizes(self, sending: Sequence[int]) -> list[int]:
        """The sizes of the messages that every rank sends this one, given those that it sends."""
        out = torch.tensor(sending, dtype=torch.int64)
        found = torch.empty_like(out)
        self._wait(lambda: self._connected().alltoall_base(found, out, [], []).wait())
        return [int(size) for size in found.tolist()]

    def _begin(self, what: Literal["send", "recv"], data: Bytes, rank: int) -> Any:
        with _broken_off():
            return getattr(self._connected(), what)([torch.from_numpy(data)], rank, 0)

    def _end(self, work: Any) -> None:
        try:
            self._wait(work.wait)
        finally:
            del work  # the error's traceback would keep it

    def _wait(self, act: Callable[[], object]) -> None:
        """Let the thread do something that waits for other ranks, as long as they are heard of."""
        self._thread = self._thread or CallThread("ckpt-convert-exchange")
        future = self._thread.start(partial(_with, self._group, act))
        vigil = Vigil(self.ranks.name, 0, self.ranks.line.gone)
        try:
            while True:
                try:
                    with _broken_off():
                        return future.result(heartbeat.BEAT)
                except TimeoutError:
                    self._refuse_silence(vigil)
        finally:
            del act, future  # what is under way keeps the connections open

    def _refuse_silence(self, vigil: Vigil) -> None:
        """Raise BrokenExchangeError where a rank is not heard of any more.

        The first rank looks at all others and tells them, so that their questions to the store are as many as they are.
        """
        ranks, broken = self.ranks, f"exchange/{self._saves}/broken"
        watched = range(1, ranks.count) if ranks.is_first else [0]
        vigil.look({rank: ranks.beat_of(rank) for rank in watched})
        if ranks.is_first and vigil.silent:
            ranks.propose(broken, b"1")
        if vigil.silent or ranks.proposed(broken):
            raise BrokenExchangeError("a rank was not heard of any more while the ranks exchanged slices")

    def _connected(self) -> Any:
        if self._group is None:
            # A store that waits would keep the training from using it: the connections get their own.
            prefix = f"{self.ranks.root}/exchange/{self._saves}"
            store = dist.distributed_c10d.PrefixStore(prefix, talk.store_of_group().clone())
            limit = timedelta(seconds=talk.DEADLINE)
            self._group = dist.ProcessGroupGloo(store, self.ranks.rank, self.ranks.count, limit)
        return self._group


def _with(group: Any, act: Callable[[], object]) -> None:
    """Do something that needs a group, which is kept until then: where it is the last to have it, it closes it."""
    act()


@contextlib.contextmanager
def _broken_off() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        said = str(error).split("] ", 1)[-1].partition(". ")[0]
        raise BrokenExchangeError(f"a connection was lost while the ranks exchanged slices ({said})") from None


def write_exchanged(
    exchange: Exchange,
    plan: Plan,
    sources: Sources,
    output: PieceOutput,
    owns: Owns,
    ranges: Sequence[Sequence[Piece]],
    counter: ProgressCounter,
) -> list[FinishedPiece]:
    """Write the pieces that this rank owns, of the ``ranges`` of each rank, while all others do the same.

    Returns them, and what this rank's casts made infinite in those of others, as pieces of no bytes.
    """
    assembly = _Assembly(exchange, plan, sources, output, owns, counter)
    rounds = [_rounds(pieces) for pieces in ranges]
    try:
        for number in range(max(map(len, rounds))):
            assembly.round([pieces[number] if number < len(pieces) else [] for pieces in rounds])
    except BaseException:
        exchange.close()  # at once: the others are waiting for this rank
        raise
    return assembly.done


def _rounds(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces in groups of at most PIECE bytes."""
    rounds: list[list[Piece]] = []
    left = 0
    for piece in pieces:
        if piece.nbytes > left:
            rounds.append([])
            left = partition.PIECE
        rounds[-1].append(piece)
        left -= piece.nbytes
    return rounds


class _Assembly:
    """Putting together, and writing, what this rank owns, round by round."""

    def __init__(
        self,
        exchange: Exchange,
        plan: Plan,
        sources: Sources,
        output: PieceOutput,
        owns: Owns,
        counter: ProgressCounter,
    ) -> None:
        self.done: list[FinishedPiece] = []
        self._exchange, self._plan, self._output, self._owns, self._counter = exchange, plan, output, owns, counter
        self._reader = BlockReader(NumberedTensors(plan, sources))
        self._writer = RunWriter()

    def round(self, pieces: Sequence[Sequence[Piece]]) -> None:
        """Exchange, and write, the pieces of each owner."""
        boxes = [boxes_of(self._plan.files, own, self._owns) for own in pieces]
        mine = pieces[self._exchange.ranks.rank]
        memory = self._exchange.memory("put together", sum(piece.nbytes for piece in mine))
        placed = 0

        def fill(rank: int, message: Bytes) -> None:
            for piece, overflowed in fill_message(boxes[rank], self._reader, message):
                if overflowed:
                    nothing = piece._replace(nbytes=0, stop=piece.start)
                    self.done.append(FinishedPiece(nothing, 0, 0, overflowed))

        def take(message: Bytes) -> None:
            nonlocal placed
            placed += place_message(message, memory)

        self._exchange.swap([message_size(own) for own in boxes], fill, take)
        if placed != len(memory):
            raise CkptConvertError(f"{placed:,} bytes arrived of a range of {len(memory):,}")
        self._write(mine, memory)

    def _write(self, pieces: Sequence[Piece], memory: Bytes) -> None:
        at = 0
        for piece in pieces:
            data = memory[at : at + piece.nbytes].data
            self._writer.begin(self._output.file(piece.file), piece.offset)
            self._writer.write(data)
            self._writer.end()
            has_crc = self._plan.files[piece.file].layout.header.checksummed
            self.done.append(FinishedPiece(piece, CRC64.of(data, 0), CRC32.of(data, 0) if has_crc else 0))
            self._counter.add(piece.nbytes)
            at += piece.nbytes
