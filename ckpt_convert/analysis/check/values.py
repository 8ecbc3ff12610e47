"""Reading every byte once, for all checks that need it: checksums, CRCs, hashes, and NaN or infinite values.

Checks ask for spans of files. Spans that overlap are read together, block by block, each block once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod

import numpy as np

from ckpt_convert.analysis.check import container, root_causes
from ckpt_convert.analysis.check.lenient_open import LenientCheckpoint
from ckpt_convert.analysis.check.spans import ExpectedEqual, Share, Span
from ckpt_convert.checkpoint.findings import Finding, failed_check
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.dtypes import DTYPES
from ckpt_convert.errors import CkptConvertError
from ckpt_convert.storage.checksums import CRC32
from ckpt_convert.storage.object_store import ObjectFile, ReadAhead
from ckpt_convert.tensors.blocks import BlockReader, TypedTensor, first_difference
from ckpt_convert.tensors.header import StoredTensor
from ckpt_convert.tensors.lazy import BLOCK
from ckpt_convert.tensors.pool import run_threaded
from ckpt_convert.tensors.progress import ProgressCallback, ProgressCounter

_EXPONENTS = {
    one.name: (f"<u{one.bits // 8}", ((1 << one.exponent) - 1) << one.mantissa, (1 << (one.bits - 1)) - 1)
    for one in DTYPES.values()
    if one.special == "ieee"
}
"""By dtype: the unsigned integer of its size, the mask of its exponent, and the mask of all bits but the sign."""


class _Finite:
    """Counts the elements of a tensor that are NaN or infinite."""

    def __init__(self, dtype: str) -> None:
        self._kind, self._exponent, self._magnitude = _EXPONENTS[dtype]
        self._item = np.dtype(self._kind).itemsize
        self._rest = b""
        self.nan = self.inf = 0
        self.is_zero = True

    def add(self, data: memoryview) -> None:
        if self._rest or len(data) % self._item:
            joined = self._rest + bytes(data)
            whole = len(joined) - len(joined) % self._item
            self._rest, data = joined[whole:], memoryview(joined[:whole])
        numbers = np.frombuffer(data, self._kind)
        if not len(numbers):
            return
        # The largest magnitude of each sign, by its bits: two passes over the block, and nothing is written.
        positive = int(np.maximum.reduce(numbers.view(self._kind.replace("u", "i"))))
        negative = int(np.maximum.reduce(numbers))
        if positive > 0 or negative > self._magnitude + 1:
            self.is_zero = False
        if max(positive, negative & self._magnitude) >= self._exponent:
            magnitudes = np.bitwise_and(numbers, np.array(self._magnitude, self._kind))
            odd = magnitudes[magnitudes >= self._exponent]
            infinite = int(np.count_nonzero(odd == self._exponent))
            self.inf += infinite
            self.nan += len(odd) - infinite


def read_spans(
    spans: Sequence[Span],
    expected: Sequence[ExpectedEqual],
    checkpoint: Identified,
    *,
    workers: int,
    progress: ProgressCallback | None,
    share: Share,
) -> tuple[list[Finding], int]:
    """Read all spans and pairs, or a share of them; returns the findings and the number of bytes read."""
    findings: list[Finding] = []
    everything: list[list[Span] | ExpectedEqual] = [*_runs(spans), *expected]
    items = share.of((_nbytes(item), item) for item in everything)
    total = sum(map(_nbytes, items))
    counter = ProgressCounter("checking", total, progress)

    def start() -> Callable[[list[Span] | ExpectedEqual], None]:
        buffer = memoryview(bytearray(BLOCK))
        readers: list[BlockReader] = []

        def work(item: list[Span] | ExpectedEqual) -> None:
            if isinstance(item, ExpectedEqual):
                readers.extend(() if readers else (BlockReader(checkpoint.stored), BlockReader(checkpoint.stored)))
                findings.extend(_compared(item, readers[0], readers[1], counter))
            else:
                findings.extend(_streamed(item, buffer, counter))

        return work

    run_threaded(items, workers, counter, start)
    return findings, counter.done


def finite_spans(opened: LenientCheckpoint) -> Iterator[Span]:
    """Spans that count NaN and infinity in every floating-point tensor; other tensors are only read."""
    for file, tensor in opened.view.stored:
        size = _extent(tensor)
        if size is None or tensor.offset + size > file.header.size:
            continue
        counter = _Finite(tensor.dtype) if tensor.dtype in _EXPONENTS else None

        def finish(
            key: str = tensor.key, name: str = file.name, count: int = prod(tensor.shape), it: _Finite | None = counter
        ) -> Iterator[Finding]:
            if it is not None and (it.nan or it.inf):
                said = " and ".join(f"{n:,} {what}" for n, what in ((it.nan, "NaN"), (it.inf, "infinite")) if n)
                text = f"{key} in {name} has {said} of {count:,} numbers; no model computes anything with these"
                yield Finding("warning", "values", text, name, key, "0", str(it.nan + it.inf))
            elif it is not None and it.is_zero and count > 1 and key.endswith("weight"):
                yield Finding(
                    "warning", "values", "", name, key, None, root_causes.ALL_ZEROS
                )  # merge_zero_tensors words it

        add = counter.add if counter is not None else _ignore
        yield Span(file.reader, file.name, tensor.offset, tensor.offset + size, add, finish)


def crc_spans(opened: LenientCheckpoint) -> Iterator[Span]:
    """Spans that compare each member of a torch zip file with its CRC-32 in the archive."""
    for file in opened.checkpoint.files:
        if file.header.kind != "torch":
            continue
        try:
            members = container.zip_members(file.reader)
        except CkptConvertError:
            continue  # reported when the file was opened
        for member in members:
            state = [0]

            def add(data: memoryview, state: list[int] = state) -> None:
                state[0] = CRC32.of(data, state[0])

            def finish(
                state: list[int] = state, name: str = file.name, member: str = member.name, crc: int = member.crc
            ) -> Iterator[Finding]:
                if state[0] != crc:
                    text = (
                        f"{name}: {member} has the CRC-32 {state[0]:08x}, but the zip archive says {crc:08x}; its "
                        "bytes were changed or damaged since it was written, so download or copy the file again"
                    )
                    yield Finding("error", "crc", text, name, None, f"{crc:08x}", f"{state[0]:08x}")

            yield Span(file.reader, file.name, member.offset, member.offset + member.size, add, finish)


def _compared(
    item: ExpectedEqual, left: BlockReader, right: BlockReader, counter: ProgressCounter
) -> Iterator[Finding]:
    one, other = (TypedTensor(side, item.equality.dtype) for side in (item.equality.left, item.equality.right))
    try:
        if first_difference(left, right, one, other, counter) is not None:
            yield item.differ
        elif item.equal is not None:
            yield item.equal
    except (CkptConvertError, OSError) as error:
        text = f"{item.differ.key}: cannot be read: {error}"
        yield failed_check("values", error, text, item.differ.file, item.differ.key)


def _streamed(run: list[Span], buffer: memoryview, counter: ProgressCounter) -> Iterator[Finding]:
    position, end, reader = run[0].start, _end(run), run[0].reader
    source = ReadAhead(reader, position, end) if isinstance(reader, ObjectFile) else reader
    waiting = list(reversed(run))
    active: list[Span] = []
    try:
        while position < end or waiting or active:
            size = min(len(buffer), end - position)
            source.readinto(position, buffer[:size])
            while waiting and waiting[-1].start <= position + size:
                active.append(waiting.pop())
            for span in active:
                low, high = max(span.start, position), min(span.end, position + size)
                if low < high:
                    span.add(buffer[low - position : high - position])
            position += size
            counter.add(size)
            for span in [span for span in active if span.end <= position]:
                active.remove(span)
                yield from span.finish()
    except (CkptConvertError, OSError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        text = f"{run[0].file}: cannot be read from byte {position} on: {said}; the disk may be faulty"
        yield failed_check("values", error, text, run[0].file)


def _runs(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Overlapping spans in groups."""
    run: list[Span] = []
    end = 0
    spans = list(spans)
    order: dict[int, int] = {}
    for span in spans:  # the same in every process
        order.setdefault(id(span.reader), len(order))
    for span in sorted(spans, key=lambda span: (span.file, order[id(span.reader)], span.start, -span.end)):
        if run and (span.reader is not run[0].reader or span.start >= end):
            yield run
            run = []
        end = max(end, span.end) if run else span.end
        run.append(span)
    if run:
        yield run


def _nbytes(item: list[Span] | ExpectedEqual) -> int:
    if isinstance(item, ExpectedEqual):
        return DTYPES[item.equality.dtype].bits * prod(item.equality.left.shape) // 8
    return _end(item) - item[0].start


def _end(run: Sequence[Span]) -> int:
    return max(span.end for span in run)


def _extent(tensor: StoredTensor) -> int | None:
    """The size of the tensor in bytes, None if its strides leave gaps."""
    if tensor.strides is not None:
        spanned = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
        if spanned != prod(tensor.shape):
            return None
    return tensor.nbytes


def _ignore(data: memoryview) -> None:
    """Reading it was the check."""
