"""The arithmetic of merged weights, with numpy alone: W + scale · B · A and DoRA's norm, in blocks of rows.

Saves of a training model and merges of files share it, so both write the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
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
_TILE = 1 << 18

_READ = 1 << 18
"""About as many bytes of rows are computed at once."""


def merge_blocks(
    base: Array,
    left: Array,
    right: Array,
    scale: float,
    magnitude: Array | None = None,
    *,
    columns: Ranges | None = None,
    out: Array,
) -> None:
    """Fill ``out`` with merged rows: base + scale · left · right; with DoRA each times its magnitude / its length.

    ``base`` and ``out`` are [rows, in], ``left`` [rows, rank], ``right`` [rank, in], ``magnitude`` [rows], all of one
    dtype, and of whole blocks of rows. With ``columns``, ``base`` and ``out`` have these, one range after another, and
    not all of them; not with DoRA. The bits of an element do not depend on the others that are asked for. Infinity and
    NaN come without a warning, as torch has it.
    """
    with np.errstate(all="ignore"):
        _columns(left, right, columns, out)
        out *= out.dtype.type(scale)
        out += base
        if magnitude is not None:
            _rescale(out, magnitude)


def _rescale(rows: Array, magnitude: Array) -> None:
    """Give each row its magnitude as its length, in float64: in float32, the length alone is off by some ulps."""
    length = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1))
    np.multiply(rows, (magnitude / length)[:, None], out=rows, casting="unsafe")


def _columns(left: Array, right: Array, columns: Ranges | None, out: Array) -> None:
    """Left · right, or these columns of it."""
    if columns is None:
        _product(left, right, [(0, right.shape[1])], out)
    else:
        product = np.empty((len(left), right.shape[1]), out.dtype)
        _product(left, right, columns, product)
        np.concatenate([product[:, start:stop] for start, stop in columns], axis=1, out=out)


def _product(left: Array, right: Array, wanted: Ranges, out: Array) -> None:
    """Left · right, in tiles that are too small for BLAS to start threads; those that have a wanted column."""
    blocks, made = (one.reshape(-1, BLOCK_ROWS, one.shape[1]) for one in (left, out))
    step = max(1, _TILE // blocks[0].size)
    for first in range(0, right.shape[1], step):
        if any(start < first + step and first < stop for start, stop in wanted):
            np.matmul(blocks, right[:, first : first + step], out=made[:, :, first : first + step])


class RowBlocks:
    """The bytes of a matrix whose rows are computed in blocks, on demand, dense and row-major.

    ``compute(start, stop)`` gives the bytes of these rows. Each thread keeps its last block, since the next read is
    often within it.
    """

    def __init__(self, rows: int, row_bytes: int, compute: Callable[[int, int], memoryview]) -> None:
        self._rows = rows
        self._row_bytes = row_bytes
        self._step = max(1, _READ // (BLOCK_ROWS * row_bytes)) * BLOCK_ROWS
        self._compute = compute
        self._last = threading.local()

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (writable, one byte an item) from byte ``offset`` on."""
        done = 0
        while done < len(buffer):
            index, within = divmod(offset + done, self._step * self._row_bytes)
            part = self._block(index)[within : within + len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)

    def _block(self, index: int) -> memoryview:
        kept: tuple[int, memoryview] | None = getattr(self._last, "block", None)
        if kept is None or kept[0] != index:
            kept = index, self._compute(index * self._step, min((index + 1) * self._step, self._rows))
            self._last.block = kept
        return kept[1]
