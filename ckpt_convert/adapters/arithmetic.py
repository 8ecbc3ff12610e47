"""The arithmetic of merged weights, with numpy alone: W + scale · B · A and DoRA's norm, in blocks of rows.

Saves of a training model and merges of files share it, so both write the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from math import frexp
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

Ranges = Sequence[tuple[int, int]]
"""(start, stop) of indices on one axis."""

BLOCK_ROWS = 32
"""Rows that are computed together. The rounding of a matrix product or a sum may depend on the shape, so everything is
computed in blocks of this many rows that start at multiples of it, whichever rows are requested."""

# A background thread must not wait for the cores that training uses. BLAS starts its own threads for large operations,
# which wait for each other: with all cores busy, that took a hundred times as long.
_PRODUCT = 1 << 18
"""Multiplications of one call of BLAS at most: too few for it to start threads."""

_TILE = 256
"""Columns of a tile at most: with more, its rows no longer fit the processor's first cache."""

_READ = 1 << 19
"""About as many bytes of rows are computed at once."""


class Tiles:
    """The values of A, [rank, in], in tiles of columns, each of which is contiguous.

    BLAS multiplies such a tile in half the time that it takes for columns of a wide matrix, whose rows are in each
    other's place in the processor's cache.
    """

    def __init__(self, right: Array) -> None:
        rank, self.columns = right.shape
        self.width = min(_TILE, max(1, _PRODUCT // (BLOCK_ROWS * rank)))
        cut = self.columns - self.columns % self.width
        self.whole = np.ascontiguousarray(right[:, :cut].reshape(rank, -1, self.width).transpose(1, 0, 2))
        self.rest = np.ascontiguousarray(right[:, cut:])

    def multiply(self, left: Array, out: Array, wanted: Ranges | None = None) -> None:
        """Fill ``out`` [rows, in] with left · A; with ``wanted`` at least these columns of it."""
        count, cut = len(self.whole), len(self.whole) * self.width
        blocks = left.reshape(-1, 1, BLOCK_ROWS, left.shape[1])
        made = out.reshape(len(blocks), BLOCK_ROWS, self.columns)
        tiles = made[:, :, :cut].reshape(len(blocks), BLOCK_ROWS, count, self.width).transpose(0, 2, 1, 3)
        parts = [slice(0, count)] if wanted is None else self._tiles_of(wanted)
        for part in parts:
            np.matmul(blocks, self.whole[None, part], out=tiles[:, part])
        if wanted is None or any(stop > cut for _, stop in wanted):
            np.matmul(blocks[:, 0], self.rest, out=made[:, :, cut:])

    def _tiles_of(self, columns: Ranges) -> list[slice]:
        """Each whole tile that has one of these columns."""
        found = {tile for start, stop in columns for tile in range(start // self.width, -(-stop // self.width))}
        return [slice(tile, tile + 1) for tile in sorted(found) if tile < len(self.whole)]


def merge_blocks(
    base: Array,
    left: Array,
    right: Tiles,
    scale: float,
    magnitude: Array | None = None,
    *,
    columns: Ranges | None = None,
    out: Array,
) -> None:
    """Fill ``out`` with merged rows: base + scale · left · right; with DoRA each times its magnitude / its length.

    ``base`` and ``out`` are [rows, in], ``left`` [rows, rank], ``right`` of [rank, in], ``magnitude`` [rows], all of
    one dtype, and of whole blocks of rows; the last block of ``base`` may be shorter, and what ``out`` has beyond it is
    of no use. With ``columns``, ``base`` and ``out`` have these, one range after another, and not all of them; not with
    DoRA. The bits of an element do not depend on the others that are asked for. Infinity and NaN come without a
    warning, as torch has it.
    """
    with np.errstate(all="ignore"):
        factor = out.dtype.type(scale)
        # With a power of two, scaling B gives the same bits, but for numbers at the ends of the dtype's range.
        is_exact = abs(frexp(factor)[0]) == 0.5
        if is_exact:
            left = left * factor
        if columns is None:
            right.multiply(left, out)
        else:
            product = np.empty((len(left), right.columns), out.dtype)
            right.multiply(left, product, columns)
            np.concatenate([product[:, start:stop] for start, stop in columns], axis=1, out=out)
        if not is_exact:
            out *= factor
        out[: len(base)] += base
        if magnitude is not None:
            _rescale(out, magnitude)


def _rescale(rows: Array, magnitude: Array) -> None:
    """Give each row its magnitude as its length, in float64: in float32, the length alone is off by some ulps."""
    length = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1))
    np.multiply(rows, (magnitude / length)[:, None], out=rows, casting="unsafe")


class LastBlock(threading.local):
    """The last block of rows of which a thread read a part, since its next read is often within it.

    Matrices that are read one after another share one, so that memory does not grow with their number.
    """

    def __init__(self) -> None:
        self._block: tuple[RowBlocks, int] | None = None
        self._data = np.empty(0, np.uint8)

    def rows(self, blocks: RowBlocks, start: int, stop: int) -> Array:
        """The bytes of a block of a matrix, good until the next call."""
        size = (stop - start) * blocks.row_bytes
        if self._block != (blocks, start):
            self._block = None
            if len(self._data) < size:
                self._data = np.empty(size, np.uint8)
            blocks.compute(start, stop, self._data[:size])
            self._block = blocks, start
        return self._data[:size]


class RowBlocks:
    """The bytes of a matrix whose rows are computed in blocks, on demand, dense and row-major.

    ``compute(start, stop, out)`` fills ``out`` with the bytes of these rows: of one block of ``step`` rows or several,
    the last one of the matrix may be shorter.
    """

    def __init__(
        self, rows: int, row_bytes: int, compute: Callable[[int, int, Array], None], last: LastBlock | None = None
    ) -> None:
        self.step = max(1, _READ // (BLOCK_ROWS * row_bytes)) * BLOCK_ROWS
        self.row_bytes, self.compute = row_bytes, compute
        self._rows, self._last = rows, last or LastBlock()

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (writable, one byte an item) from byte ``offset`` on."""
        left = np.frombuffer(buffer, np.uint8)
        while len(left):
            index, within = divmod(offset, self.step * self.row_bytes)
            start = index * self.step
            stop = start if within else self._end_of_whole(start, len(left))
            if start < stop:
                part = left[: (stop - start) * self.row_bytes]
                self.compute(start, stop, part)
            else:
                block = self._last.rows(self, start, min(start + self.step, self._rows))[within:]
                part = left[: len(block)]
                np.copyto(part, block[: len(part)])
            offset += len(part)
            left = left[len(part) :]

    def _end_of_whole(self, start: int, nbytes: int) -> int:
        """The end of the whole blocks that this many bytes from the row ``start`` on are."""
        stop = start + nbytes // self.row_bytes
        return stop if stop == self._rows else stop - stop % self.step
