"""Reading the elements of a lazy tensor from files into a dense buffer, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ckpt_convert import dtypes
from ckpt_convert.storage.object_store import ObjectFile, ReadAhead
from ckpt_convert.tensors.header import StoredTensor
from ckpt_convert.tensors.lazy import SCRATCH, ZEROS, LazyTensor

CopyDims = tuple[tuple[int, int, int], ...]

StoredTensors = Sequence[tuple[Any, StoredTensor]]
"""Stored tensors by number, each with its file, of which only ``reader`` is used."""

_WASTE = 4
"""Read a range whole if it has at most this many times as many bytes as are wanted."""


@runtime_checkable
class GatheringReader(Protocol):
    """A reader that can copy strided elements by itself."""

    def gather(self, offset: int, dims: CopyDims, target: np.ndarray[Any, Any], item: int) -> bool:
        """Do the copy; False, without doing anything, leaves it to ``StridedReader``."""


View = Callable[[int, int], memoryview | None]
"""What readers of memory have as ``view``: the bytes at (offset, nbytes), without a copy.

None where they are not in the memory of the process.
"""


class StridedReader:
    """Reads lazy tensors whose sources are indices into ``stored``; not to be shared between threads."""

    def __init__(self, stored: StoredTensors, scratch: int | None = None) -> None:
        self._stored = stored
        self._scratch = np.empty(scratch or SCRATCH, np.uint8)
        self._ahead: dict[int, list[ReadAhead]] = {}

    def expect(self, tensor: LazyTensor, dtype: str) -> None:
        """Announce that all of a tensor is going to be read: from a store, in large requests."""
        self._ahead = {}
        bits = dtypes.DTYPES[dtype].bits
        for copy in tensor.copies():
            reader = None if copy.source == ZEROS else self._stored[copy.source][0].reader
            if not isinstance(reader, ObjectFile):
                continue
            span = 1 + sum((count - 1) * source for count, source, _ in copy.dims)
            if span <= _WASTE * prod(count for count, _, _ in copy.dims):
                start = self._stored[copy.source][1].offset + copy.source_offset * bits // 8
                ahead = ReadAhead(reader, start, start + -(-span * bits // 8))
                self._ahead.setdefault(id(reader), []).append(ahead)

    def view(self, tensor: LazyTensor, dtype: str) -> memoryview | None:
        """The bytes of a tensor in memory that are dense and row-major there; None for any other."""
        bits, there = dtypes.DTYPES[dtype].bits, tensor.contiguous_source
        if bits < 8 or there is None:
            return None
        file, stored = self._stored[there[0]]
        view: View | None = getattr(file.reader, "view", None)  # isinstance of a protocol takes long for each block
        return view(stored.offset + there[1] * bits // 8, tensor.size * bits // 8) if view else None

    def _read(self, reader: Any, offset: int, buffer: memoryview) -> None:
        for ahead in self._ahead.get(id(reader), ()):
            if ahead.covers(offset, len(buffer)):
                ahead.readinto(offset, buffer)
                return
        reader.readinto(offset, buffer)

    def read_into(self, tensor: LazyTensor, dtype: str, buffer: np.ndarray[Any, Any]) -> None:
        """Fill ``buffer`` (uint8, exactly the tensor's size in bytes) with the tensor, dense and row-major."""
        bits = dtypes.DTYPES[dtype].bits
        if bits < 8:
            self._packed(tensor, bits, buffer)
            return
        item = bits // 8
        copies = tensor.copies()
        if any(copy.source == ZEROS for copy in copies):
            buffer[:] = 0
        for copy in copies:
            if copy.source == ZEROS:
                continue
            file, stored = self._stored[copy.source]
            self._copy(
                file.reader,
                stored.offset + copy.source_offset * item,
                buffer[copy.target_offset * item :],
                copy.dims,
                item,
            )

    def read(self, tensor: LazyTensor, dtype: str) -> bytes:
        """The whole tensor as bytes."""
        buffer = np.empty(tensor.size * dtypes.DTYPES[dtype].bits // 8, np.uint8)
        self.read_into(tensor, dtype, buffer)
        return buffer.tobytes()

    def _packed(self, tensor: LazyTensor, bits: int, buffer: np.ndarray[Any, Any]) -> None:
        """Copy elements smaller than a byte in whole bytes; they are never unpacked."""
        for copy in tensor.copies():
            (count, *_), *rest = copy.dims or ((1, 1, 1),)
            if rest or copy.source_offset * bits % 8 or copy.target_offset * bits % 8:
                raise ValueError("elements smaller than a byte cannot be reordered")
            file, stored = self._stored[copy.source]
            start = copy.target_offset * bits // 8
            view = buffer.data[start : start + count * bits // 8]
            self._read(file.reader, stored.offset + copy.source_offset * bits // 8, view)

    def _copy(self, reader: Any, offset: int, target: np.ndarray[Any, Any], dims: CopyDims, item: int) -> None:
        """Read elements at ``offset`` into the start of ``target``, with the strides of ``dims``."""
        if _is_dense(dims):
            nbytes = (dims[0][0] if dims else 1) * item
            self._read(reader, offset, target.data[:nbytes])
            return
        if isinstance(reader, GatheringReader) and reader.gather(offset, dims, target, item):
            return
        span = 1 + sum((count - 1) * source for count, source, _ in dims)
        wanted = prod(count for count, _, _ in dims)
        if span * item <= len(self._scratch) and (span <= _WASTE * wanted or span * item <= 1 << 16):
            cover = self._scratch[: span * item]
            self._read(reader, offset, cover.data)
            shape = [count for count, _, _ in dims]
            element = np.dtype(f"V{item}") if item not in (1, 2, 4, 8) else np.dtype(f"u{item}")
            length = 1 + sum((count - 1) * step for count, _, step in dims)
            np.copyto(
                np.lib.stride_tricks.as_strided(
                    target[: length * item].view(element), shape, [step * item for _, _, step in dims]
                ),
                np.lib.stride_tricks.as_strided(
                    cover.view(element), shape, [source * item for _, source, _ in dims], writeable=False
                ),
            )
            return
        widest = max(range(len(dims)), key=lambda axis: dims[axis][1])
        count, source, step = dims[widest]
        rest = (*dims[:widest], *dims[widest + 1 :])
        # Half of the dimension at a time, until the elements left are close enough together.
        parts = (
            ((0, count // 2), (count // 2, count - count // 2))
            if count > 2 and not _far(dims, widest)
            else ((index, 1) for index in range(count))
        )
        for start, size in parts:
            inner = (*dims[:widest], (size, source, step), *dims[widest + 1 :]) if size > 1 else rest
            self._copy(reader, offset + start * source * item, target[start * step * item :], inner, item)


def _is_dense(dims: CopyDims) -> bool:
    return not dims or (len(dims) == 1 and dims[0][1:] == (1, 1))


def _far(dims: CopyDims, widest: int) -> bool:
    """Whether the elements at one index of the widest dimension are far from those at the next."""
    rest = [dim for axis, dim in enumerate(dims) if axis != widest]
    span = 1 + sum((count - 1) * source for count, source, _ in rest)
    return dims[widest][1] > _WASTE * span
