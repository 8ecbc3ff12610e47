"""Dequantizing on read: rows and columns of a matrix, as the bytes of a dtype.

Only the requested values are computed, row by row in blocks that fit the processor's cache; nothing is kept.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

from ckpt_convert.dtypes import DTYPES
from ckpt_convert.storage.base import RangeReader
from ckpt_convert.tensors.casts import round_to_bfloat16
from ckpt_convert.tensors.decode import CHUNK, Scratch

Array = np.ndarray[Any, Any]
Dims = tuple[tuple[int, int, int], ...]

_WASTE = 4
"""Read a span of rows as one when it has at most this many times the bytes that are needed."""


class _OfThread(Scratch, threading.local):
    """Scratch buffers of one thread."""


SCRATCH = _OfThread()


class Strips(threading.local):
    """Reads a range of columns of some rows, with a cache for each thread.

    Where a matrix is read transposed, each block is a few columns of all rows. More columns than the block needs are
    then read at once and kept for the next blocks.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...], tuple[RangeReader, int, Array]] = {}

    def read(self, reader: RangeReader, offset: int, pitch: int, box: tuple[int, int, int, int]) -> Array:
        """Bytes ``start`` to ``stop`` of rows ``first`` to ``last``, of ``pitch`` bytes each from ``offset`` on.

        The array is valid until the next call, and may be a view of a larger one.
        """
        first, last, start, stop = box
        count, width = last - first, stop - start
        at = offset + first * pitch
        if width == pitch or count == 1:
            raw = SCRATCH.take(0, "|u1", count * width)
            reader.readinto(at + start, raw.data)
            return raw.reshape(count, width)
        if count < _TALL * width:
            return _rows(reader, at + start, pitch, SCRATCH.take(0, "|u1", count * width).reshape(count, width))
        key = (id(reader), offset, first, last)
        owner, begin, strip = self._kept.get(key, (None, 0, _NOTHING))
        if owner is not reader or start < begin or stop > begin + strip.shape[1]:
            self._kept.pop(key, None)
            if len(self._kept) >= _STRIPS:
                self._kept.clear()
            begin, strip = start, np.empty((count, max(width, min(pitch - start, _STRIP // count))), np.uint8)
            _rows(reader, at + start, pitch, strip)
            self._kept[key] = reader, begin, strip
        return strip[:, start - begin : stop - begin]


_TALL = 4
"""A strip is cached when the box has at least this many times as many rows as bytes in a row."""

_STRIP, _STRIPS = 2 << 20, 8
"""Approximate bytes of a strip, and how many are cached: a block needs two to eight."""

_NOTHING = np.empty((0, 0), np.uint8)


def _rows(reader: RangeReader, at: int, pitch: int, out: Array) -> Array:
    """Fill ``out`` with the bytes of each row from ``at`` on; rows that are close are read as one span."""
    count, width = out.shape
    if pitch <= _WASTE * width:
        step = max(1, _STRIP // pitch)
        for row in range(0, count, step):
            part = out[row : row + step]
            cover = SCRATCH.take(1, "|u1", (len(part) - 1) * pitch + width)
            reader.readinto(at + row * pitch, cover.data)
            part[...] = np.lib.stride_tricks.as_strided(cover, part.shape, [pitch, 1])
    else:
        for row in range(count):
            reader.readinto(at + row * pitch, out[row].data)
    return out


STRIPS = Strips()


def contiguous(box: Array, number: int) -> Array:
    """The bytes of a box as one dimension: a view, or a copy in the scratch buffer of this number."""
    if box.flags.c_contiguous:
        return box.reshape(-1)
    out = SCRATCH.take(number, "|u1", box.size)
    out.reshape(box.shape)[...] = box
    return out


class ValueMatrix(Protocol):
    """A matrix whose values are computed: all axes but the last are its rows.

    ``fits_bfloat16`` is whether every value is exact in bfloat16, so that nothing has to be rounded.
    """

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...

    @property
    def fits_bfloat16(self) -> bool: ...

    def read(self, first: int, last: int, start: int, stop: int) -> Array:
        """Rows ``first`` to ``last`` of columns ``start`` to ``stop``, as float32 in new or reused memory."""


@dataclass(frozen=True, slots=True)
class MatrixBytes:
    """A matrix as the bytes of a dtype (BF16 or F32), dense and row-major."""

    matrix: ValueMatrix
    dtype: str

    @property
    def item(self) -> int:
        return DTYPES[self.dtype].bits // 8

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes from ``offset`` on."""
        item = self.item
        first, last = offset // item, -(-(offset + len(buffer)) // item)
        target = np.frombuffer(buffer, np.uint8)
        if first * item != offset or (last - first) * item != len(buffer):  # starts or ends within an element
            whole = np.empty((last - first) * item, np.uint8)
            self._fill(first, whole)
            target[:] = whole[offset - first * item :][: len(buffer)]
        else:
            self._fill(first, target)

    def _fill(self, first: int, target: Array) -> None:
        columns, out = self.matrix.columns, target.view(f"<u{self.item}")
        done, end = 0, len(out)
        while done < end:
            row, column = divmod(first + done, columns)
            if column or end - done < columns or columns > CHUNK:
                count, stop = 1, min(columns, column + min(end - done, CHUNK))
            else:
                count, stop = min((end - done) // columns, max(1, CHUNK // columns)), columns
            codes = self._codes(row, row + count, column, stop)
            out[done : done + codes.size].reshape(codes.shape)[...] = codes
            done += codes.size

    def gather(self, first: int, dims: Dims, target: Array) -> bool:
        """Copy elements from ``first`` on into ``target``; ``dims`` are (count, source stride, target stride).

        Returns False, with nothing copied, where the elements are not a box of rows and columns.
        """
        columns = self.matrix.columns
        row, column = divmod(first, columns)
        down: list[tuple[int, int, int]] = []
        across: list[tuple[int, int, int]] = []
        for count, step, there in dims:
            if step == 1 and column == 0 and count > columns and count % columns == 0:
                down.append((count // columns, 1, columns * there))  # whole consecutive rows
                across.append((columns, 1, there))
            elif step % columns == 0 and (step or not count):
                down.append((count, step // columns, there))
            else:
                across.append((count, step, there))
        if column + sum((count - 1) * step for count, step, _ in across) >= columns:
            return False
        if len(across) > 1 or any(step < 0 for _, step, _ in dims):
            return False
        self._box(row, column, tuple(down), across[0] if across else (1, 1, 1), target.view(f"<u{self.item}"))
        return True

    def _box(self, row: int, column: int, down: Dims, across: tuple[int, int, int], out: Array) -> None:
        count, step, there = across
        stop = column + (count - 1) * step + 1
        rows = prod(size for size, _, _ in down)
        span = 1 + sum((size - 1) * move for size, move, _ in down)
        if rows > 1 and (span > _WASTE * rows or span * (stop - column) > CHUNK):
            widest = max(range(len(down)), key=lambda axis: down[axis][1] * (down[axis][0] > 1))
            size, move, jump = down[widest]
            for start, part in ((0, size // 2), (size // 2, size - size // 2)):
                inner = (*down[:widest], (part, move, jump), *down[widest + 1 :])
                self._box(row + start * move, column, inner, across, out[start * jump :])
            return
        codes = self._codes(row, row + span, column, stop)
        shape = [*(size for size, _, _ in down), count]
        moves = [*(move * codes.strides[0] for _, move, _ in down), step * codes.strides[1]]
        jumps = [*(jump * self.item for _, _, jump in down), there * self.item]
        chosen = np.lib.stride_tricks.as_strided(codes, shape, moves)
        np.lib.stride_tricks.as_strided(out, shape, jumps)[...] = chosen

    def _codes(self, first: int, last: int, start: int, stop: int) -> Array:
        """Values as unsigned integers whose low bits are the encoding in the dtype."""
        numbers = self.matrix.read(first, last, start, stop)
        if self.dtype == "F32":
            return numbers.view("<u4")
        return numbers.view("<u2")[:, 1::2] if self.matrix.fits_bfloat16 else bfloat16(numbers)


def bfloat16(numbers: Array) -> Array:
    """The bfloat16 encoding of float32 values, rounded to nearest even, in a reused buffer.

    A NaN has to have the default payload, or rounding could carry into its sign.
    """
    out = SCRATCH.take(9, "<u4", numbers.size).reshape(numbers.shape)
    round_to_bfloat16(numbers.view("<u4"), out)
    return out
