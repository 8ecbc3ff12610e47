"""Computing merged weights of files on read, in blocks of rows; each thread has its own buffers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from ckpt_convert.adapters.arithmetic import BLOCK_ROWS, Array, RowBlocks, merge_blocks
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

_BASE, _MERGED, _B, _MAGNITUDE, _CHECKED = range(5)
"""The numbers of a thread's buffers."""


class Buffers(threading.local):
    """One thread's buffers, for all weights of a merge; ``stored`` are the tensors that lazy tensors refer to."""

    def __init__(self, stored: Sequence[tuple[WeightFile, StoredTensor]]) -> None:
        self.caster = Caster()
        self._reader = StridedReader(stored, _SCRATCH)
        self._scratch = Scratch()
        self._right: tuple[MergedWeight | None, Array] = None, np.empty(0)

    def take(self, number: int, dtype: str, count: int) -> Array:
        """``count`` elements of the buffer with this number."""
        return self._scratch.take(number, dtype, count)

    def raw(self, tensor: LazyTensor, dtype: str, number: int, room: int = 0) -> Array:
        """The bytes of a tensor, in a buffer with room for so many bytes at least, of which all are returned."""
        size = nbytes(dtype, tensor.shape)
        raw = self.take(number, "|u1", max(size, room))
        self._reader.read_into(tensor, dtype, raw[:size])
        return raw

    def values(self, tensor: LazyTensor, dtype: str, number: int, wide: str, shape: tuple[int, ...]) -> Array:
        """The values of a tensor as ``wide`` (numpy's float32 or float64), followed by any others to fill ``shape``."""
        codec = _codec(dtype)
        count = prod(shape)
        raw = self.raw(tensor, dtype, number, nbytes(dtype, shape))
        found = decode_values(codec, raw, self.take(number, codec.value_dtype, count))
        if codec.value_dtype != wide:
            found, narrow = self.take(number, wide, count), found
            np.copyto(found, narrow, casting="unsafe")
        return found.reshape(shape)

    def right(self, weight: MergedWeight, wide: str) -> Array:
        """The values of A, which are kept while this thread reads the same weight."""
        if self._right[0] is not weight:
            shape = weight.a.tensor.shape
            self._right = weight, self.values(weight.a.tensor, weight.a.dtype, _BASE, wide, shape).copy()
        return self._right[1]


class MergedMatrix:
    """The bytes of a merged weight in the dtype of its base, dense and row-major; see ``quantized.Computed``."""

    def __init__(self, weight: MergedWeight, buffers: Buffers, overflows: Overflows) -> None:
        self._weight, self._buffers, self._overflows = weight, buffers, overflows
        rows, self._columns = weight.base.tensor.shape
        self._row_bytes = nbytes(weight.base.dtype, (self._columns,))
        self._wide = "F64" if weight.base.dtype == "F64" else "F32"
        self._blocks = RowBlocks(rows, self._row_bytes, self._rows)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes from ``offset`` on."""
        self._blocks.readinto(offset, buffer)

    def gather(self, first: int, dims: tuple[tuple[int, int, int], ...], target: Any) -> bool:
        """Nothing: strided elements are read in one run that covers them."""
        return False

    def _rows(self, start: int, stop: int) -> memoryview:
        """The bytes of merged rows, from a multiple of BLOCK_ROWS on."""
        weight, room = self._weight, -(-(stop - start) // BLOCK_ROWS) * BLOCK_ROWS
        right = self._buffers.right(weight, DTYPES[self._wide].numpy)
        base = self._values(weight.base, _BASE, start, stop, (room, self._columns))
        left = self._values(weight.b, _B, start, stop, (room, len(right)))
        norms = self._values(weight.magnitude, _MAGNITUDE, start, stop, (room,)) if weight.magnitude else None
        merged = self._buffers.take(_MERGED, base.dtype.str, base.size).reshape(base.shape)
        merge_blocks(base, left, right, weight.scale, norms, out=merged)
        out = np.empty((stop - start) * self._row_bytes, np.uint8)
        if self._round(merged[: stop - start], out):
            self._count(start, out, base[: stop - start])
        return out.data

    def _round(self, rows: Array, out: Array) -> bool:
        """Write rows in the dtype of the base; returns whether any value may be infinite or NaN."""
        data, dtype = rows.reshape(-1).view(np.uint8), self._weight.base.dtype
        if dtype != self._wide:
            return self._buffers.caster.cast_into(out, data, self._wide, dtype)
        out[...] = data
        with np.errstate(all="ignore"):
            return not np.isfinite(rows.sum())

    def _count(self, first: int, data: Array, base: Array) -> None:
        """Count the values of a block that were finite and became infinite."""
        codec = _codec(self._weight.base.dtype)
        made = decode_values(codec, data, self._buffers.take(_CHECKED, codec.value_dtype, base.size))
        if count := int(np.count_nonzero(np.isinf(made.reshape(base.shape)) & np.isfinite(base))):
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
        self._blocks = RowBlocks(shape[0], nbytes(dtype, shape[1:]), self._rows)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes from ``offset`` on."""
        self._blocks.readinto(offset, buffer)

    def gather(self, first: int, dims: tuple[tuple[int, int, int], ...], target: Any) -> bool:
        """Nothing: strided elements are read in one run that covers them."""
        return False

    def _rows(self, start: int, stop: int) -> memoryview:
        raw = self._buffers.raw(self._lazy.narrow(0, start, stop - start), self._tensor.dtype, _BASE)
        if self._tensor.dtype == self._dtype:
            return raw.copy().data
        made, overflowed = self._buffers.caster.cast(raw, self._tensor.dtype, self._dtype)
        if overflowed:
            self._overflows[self._tensor.key, start] = overflowed
        return made.copy().data


def _codec(dtype: str) -> Codec:
    found = codec_of(dtype)
    if found is None:
        raise ValueError(f"{dtype} has no values")
    return found
