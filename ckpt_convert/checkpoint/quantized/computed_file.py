"""Files in which some tensors are computed on read: a reader whose bytes are dequantized values.

This module computes nothing itself, so that listing tensors or checking headers does not import numpy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ckpt_convert.dtypes import DTYPES
from ckpt_convert.errors import CorruptFileError
from ckpt_convert.storage.base import Closable, RangeReader
from ckpt_convert.tensors.header import StoredTensor

Dims = tuple[tuple[int, int, int], ...]


class Computed(Protocol):
    """A tensor that is computed on read: its bytes, dense and row-major."""

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes from ``offset`` on."""

    def gather(self, first: int, dims: Dims, target: Any) -> bool:
        """Copy elements from ``first`` on into ``target``; ``dims`` are (count, source stride, target stride).

        Returns False, with nothing copied, where the caller has to read the elements one run at a time.
        """


Make = Callable[[], Computed]


@dataclass(frozen=True, slots=True)
class _Run:
    """A range of the file: copied from ``origin``, or computed by ``make`` in elements of ``item`` bytes."""

    start: int
    end: int
    origin: int
    make: Make | None = None
    item: int = 1


class ComputedFile:
    """A file with computed tensors; ``tensors`` are all of its tensors with their offsets, in the given order.

    Each comes with the function that computes it, None for a tensor that is copied. It is called on the first read.
    """

    def __init__(self, reader: RangeReader, tensors: Sequence[tuple[StoredTensor, Make | None]]) -> None:
        """``tensors`` that are copied are in offset order."""
        self.reader = reader
        self.name = reader.name
        self._runs: list[_Run] = []
        self._made: dict[int, Computed] = {}
        out = []
        end = 0
        for tensor, make in tensors:
            if make is not None:
                self._runs.append(_Run(end, end + tensor.nbytes, 0, make, DTYPES[tensor.dtype].bits // 8))
                out.append(tensor._replace(offset=end))
                end += tensor.nbytes
                continue
            last = self._runs[-1] if self._runs and self._runs[-1].make is None else None
            low, high = tensor.offset, tensor.offset + _extent(tensor)
            if last is None:
                last = _Run(end, end + high - low, low)
                self._runs.append(last)
            else:  # adjacent tensors stay in one run: they may share bytes
                size = max(last.end - last.start, high - last.origin)
                last = self._runs[-1] = _Run(last.start, last.start + size, last.origin)
            out.append(tensor._replace(offset=last.start + low - last.origin))
            end = last.end
        self.tensors = tuple(out)
        self.size = end
        self._starts = [run.start for run in self._runs]

    def readinto(self, offset: int, buffer: memoryview) -> None:
        if not len(buffer):
            return
        run = self._run(offset, len(buffer))
        if run.make is None:
            self.reader.readinto(run.origin + offset - run.start, buffer)
        else:
            self._computed(run, run.make).readinto(offset - run.start, buffer)

    def gather(self, offset: int, dims: Dims, target: Any, item: int) -> bool:
        """``Computed.gather`` of a computed tensor; False for any other."""
        run = self._run(offset, 1)
        if run.make is None or run.item != item:
            return False
        return self._computed(run, run.make).gather((offset - run.start) // item, dims, target)

    def is_computed(self, tensor: StoredTensor) -> bool:
        """Whether one of ``tensors`` is computed."""
        return tensor.nbytes > 0 and self._run(tensor.offset, 1).make is not None

    def close(self) -> None:
        if isinstance(self.reader, Closable):
            self.reader.close()

    def _computed(self, run: _Run, make: Make) -> Computed:
        found = self._made.get(run.start)
        return found if found is not None else self._made.setdefault(run.start, make())

    def _run(self, offset: int, nbytes: int) -> _Run:
        run = self._runs[max(bisect_right(self._starts, offset) - 1, 0)] if self._runs else None
        if run is None or offset < run.start or offset + nbytes > run.end:
            raise CorruptFileError(f"{self.name}: bytes {offset} to {offset + nbytes} are not those of one tensor")
        return run


def _extent(tensor: StoredTensor) -> int:
    """The number of bytes that a tensor spans from its first element to its last."""
    if tensor.strides is None or not tensor.nbytes:
        return tensor.nbytes
    spanned = 1 + sum((count - 1) * step for count, step in zip(tensor.shape, tensor.strides, strict=True))
    return spanned * DTYPES[tensor.dtype].bits // 8
