"""Computing merged weights of files on read, in blocks of rows; each thread has its own buffers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from ckpt_convert.adapters.arithmetic import BLOCK_ROWS, Array, LastBlock, RowBlocks, Tiles, merge_blocks
from ckpt_convert.adapters.stored import MergedWeight
from ckpt_convert.checkpoint.mapping import LogicalTensor
from ckpt_convert.dtypes import DTYPES, nbytes
from ckpt_convert.tensors.casts import Caster
from ckpt_convert.tensors.decode import Codec, Scratch, codec_of, decode_values
from ckpt_convert.tensors.gather import StridedReader
from ckpt_convert.tensors.header import StoredTensor, WeightFile
from ckpt_convert.tensors.lazy import LazyTensor

Overflows = dict[tuple[str, int], int]
"""The finite values that became infinite, by key and first row of a block."""

_SCRATCH = 1 << 20
"""Bytes of a thread's buffer for rows that are stored in another order."""

_BASE, _MERGED, _A, _B, _MAGNITUDE, _CHECKED = range(6)
"""The numbers of a thread's buffers."""


class Buffers(threading.local):
    """One thread's buffers, for all weights of a merge; ``stored`` are the tensors that lazy tensors refer to."""

    def __init__(self, stored: Sequence[tuple[WeightFile, StoredTensor]]) -> None:
        self.caster = Caster()
        self.last = LastBlock()
        self._reader = StridedReader(stored, _SCRATCH)
        self._scratch = Scratch()
        self._right: tuple[MergedWeight, Tiles] | None = None

    def take(self, number: int, dtype: str, count: int) -> Array:
        """``count`` elements of the buffer with this number."""
        return self._scratch.take(number, dtype, count)

    def read_into(self, tensor: LazyTensor, dtype: str, out: Array) -> None:
        """Fill ``out`` with the bytes of a tensor."""
        self._reader.read_into(tensor, dtype, out)

    def raw(self, tensor: LazyTensor, dtype: str, number: int, room: int = 0) -> Array:
        """The bytes of a tensor, in a buffer with room for so many bytes at least, of which all are returned."""
        size = nbytes(dtype, tensor.shape)
        raw = self.take(number, "|u1", max(size, room))
        self.read_into(tensor, dtype, raw[:size])
        return raw

    def values(self, tensor: LazyTensor, dtype: str, number: int, wide: str, shape: tuple[int, ...]) -> Array:
        """The values of a tensor as ``wide`` (numpy's float32 or float64), followed by any others to fill ``shape``."""
        return self.decode(self.raw(tensor, dtype, number, nbytes(dtype, shape)), dtype, number, wide, shape)

    def decode(self, raw: Array, dtype: str, number: int, wide: str, shape: tuple[int, ...]) -> Array:
        """The values in ``raw`` as ``wide``: in the buffer with this number, or ``raw`` itself."""
        codec = _codec(dtype)
        found = decode_values(codec, raw, self.take(number, codec.value_dtype, prod(shape)))
        if codec.value_dtype != wide:
            found, narrow = self.take(number, wide, prod(shape)), found
            np.copyto(found, narrow, casting="unsafe")
        return found.reshape(shape)

    def right(self, weight: MergedWeight, wide: str) -> Tiles:
        """The values of A, which are kept while this thread reads the same weight."""
        if self._right is None or self._right[0] is not weight:
            shape = weight.a.tensor.shape
            self._right = weight, Tiles(self.values(weight.a.tensor, weight.a.dtype, _A, wide, shape))
        return self._right[1]


class MergedMatrix:
    """The bytes of a merged weight in the dtype of its base, dense and row-major; see ``quantized.Computed``."""

    def __init__(self, weight: MergedWeight, buffers: Buffers, overflows: Overflows) -> None:
        self._weight, self._buffers, self._overflows = weight, buffers, overflows
        rows, self._columns = weight.base.tensor.shape
        self._row_bytes = nbytes(weight.base.dtype, (self._columns,))
        self._wide = "F64" if weight.base.dtype == "F64" else "F32"
        self._blocks = RowBlocks(rows, self._row_bytes, self._rows, buffers.last)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes from ``offset`` on."""
        self._blocks.readinto(offset, buffer)

    def gather(self, first: int, dims: tuple[tuple[int, int, int], ...], target: Any) -> bool:
        """Nothing: strided elements are read in one run that covers them."""
        return False

    def _rows(self, start: int, stop: int, out: Array) -> None:
        """Read rows of the base into ``out``, and merge the adapter into them there, block by block."""
        weight, step = self._weight, self._blocks.step
        count = -(-(stop - start) // BLOCK_ROWS) * BLOCK_ROWS
        left = self._values(weight.b, _B, start, stop, (count, weight.a.tensor.shape[0]))
        norms = self._values(weight.magnitude, _MAGNITUDE, start, stop, (count,)) if weight.magnitude else None
        self._buffers.read_into(weight.base.tensor.narrow(0, start, stop - start), weight.base.dtype, out)
        for first in range(0, stop - start, step):
            block = slice(first, first + step)
            data = out[first * self._row_bytes : (first + step) * self._row_bytes]
            self._merge(start + first, data, left[block], None if norms is None else norms[block])

    def _merge(self, first: int, data: Array, left: Array, norms: Array | None) -> None:
        """Merge the adapter into the bytes of a block of rows, and count the finite values that became infinite."""
        weight, buffers, wide = self._weight, self._buffers, DTYPES[self._wide].numpy
        shape = len(data) // self._row_bytes, self._columns
        base = buffers.decode(data, weight.base.dtype, _BASE, wide, shape)
        merged = buffers.take(_MERGED, wide, len(left) * self._columns).reshape(len(left), self._columns)
        merge_blocks(base, left, buffers.right(weight, wide), weight.scale, norms, out=merged)
        made = merged[: len(base)]
        if weight.base.dtype == self._wide:
            with np.errstate(all="ignore"):
                is_finite = np.isfinite(made.sum())
            if not is_finite:
                self._count(first, made, base)
            data[...] = made.reshape(-1).view(np.uint8)
        elif buffers.caster.cast_into(data, made.reshape(-1).view(np.uint8), self._wide, weight.base.dtype):
            self._count(first, buffers.decode(data, weight.base.dtype, _CHECKED, wide, shape), base)

    def _count(self, first: int, made: Array, base: Array) -> None:
        if count := int(np.count_nonzero(np.isinf(made) & np.isfinite(base))):
            self._overflows[self._weight.base.key, first] = count

    def _values(self, tensor: LogicalTensor, number: int, first: int, last: int, shape: tuple[int, ...]) -> Array:
        rows = tensor.tensor.narrow(0, first, last - first)
        return self._buffers.values(rows, tensor.dtype, number, DTYPES[self._wide].numpy, shape)


class CastTensor:
    """The bytes of a tensor in another dtype, dense and row-major; see ``quantized.Computed``."""

    def __init__(self, tensor: LogicalTensor, dtype: str, buffers: Buffers, overflows: Overflows) -> None:
        shape = tensor.tensor.shape or (1,)
        self._tensor, self._dtype, self._buffers, self._overflows = tensor, dtype, buffers, overflows
        self._lazy = tensor.tensor.reshape(shape)
        self._blocks = RowBlocks(shape[0], nbytes(dtype, shape[1:]), self._rows, buffers.last)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes from ``offset`` on."""
        self._blocks.readinto(offset, buffer)

    def gather(self, first: int, dims: tuple[tuple[int, int, int], ...], target: Any) -> bool:
        """Nothing: strided elements are read in one run that covers them."""
        return False

    def _rows(self, start: int, stop: int, out: Array) -> None:
        step, row = self._blocks.step, len(out) // (stop - start)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            data = out[(first - start) * row : (last - start) * row]
            lazy = self._lazy.narrow(0, first, last - first)
            if self._tensor.dtype == self._dtype:
                self._buffers.read_into(lazy, self._dtype, data)
                continue
            raw = self._buffers.raw(lazy, self._tensor.dtype, _BASE)
            made, overflowed = self._buffers.caster.cast(raw, self._tensor.dtype, self._dtype)
            np.copyto(data, made)
            if overflowed:
                self._overflows[self._tensor.key, first] = overflowed


def _codec(dtype: str) -> Codec:
    found = codec_of(dtype)
    if found is None:
        raise ValueError(f"{dtype} has no values")
    return found
