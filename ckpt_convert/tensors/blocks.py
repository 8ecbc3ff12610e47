"""Reading lazy tensors block by block in bounded memory, with a cast on request; comparing two of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ckpt_convert import dtypes
from ckpt_convert.tensors.casts import Caster
from ckpt_convert.tensors.gather import StoredTensors, StridedReader
from ckpt_convert.tensors.lazy import BLOCK, LazyTensor, aligned_blocks
from ckpt_convert.tensors.progress import ProgressCounter

T = TypeVar("T")


class TypedTensor(NamedTuple):
    """A lazy tensor and the dtype of its elements."""

    tensor: LazyTensor
    dtype: str


class BlockReader:
    """Reads lazy tensors block by block in the dtype of the output, with one worker's buffers.

    ``overflowed`` counts the finite values that casts have made infinite so far.
    """

    def __init__(self, stored: StoredTensors) -> None:
        self.stored = stored
        self.overflowed = 0
        self._gatherer = StridedReader(stored)
        self._caster = Caster()
        self._buffer = np.empty(BLOCK, np.uint8)

    def read(self, block: LazyTensor, source: str, target: str) -> memoryview:
        """The bytes of a block of at most ``most(source, target)`` elements, good until the next call.

        Of a tensor in memory they may be the tensor's own.
        """
        if source == target and (there := self._gatherer.view(block, source)) is not None:
            return there
        view = self._buffer[: block.size * dtypes.DTYPES[source].bits // 8]
        self._gatherer.read_into(block, source, view)
        if source == target:
            return view.data
        made, overflowed = self._caster.cast(view, source, target)
        self.overflowed += overflowed
        return made.data

    def expect(self, tensor: LazyTensor, dtype: str) -> None:
        """Announce that the blocks of a tensor are going to be read."""
        self._gatherer.expect(tensor, dtype)

    def blocks(self, tensor: LazyTensor, source: str, target: str) -> Iterator[tuple[int, memoryview]]:
        """(byte offset, bytes) of the tensor, in order; the bytes are valid until the next block."""
        bits = dtypes.DTYPES[target].bits
        self.expect(tensor, source)
        for offset, block in tensor.blocks(block_elements(source, target)):
            yield offset * bits // 8, self.read(block, source, target)


def block_elements(source: str, target: str) -> int:
    """How many elements fit a block's buffer in both dtypes; they fill whole bytes."""
    return BLOCK // max(dtypes.DTYPES[source].bits, dtypes.DTYPES[target].bits) * 8


def same_bytes(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Whether two arrays (uint8) of equal length hold the same bytes: eight at a time, which takes half as long."""
    whole = len(one) & ~7
    return np.array_equal(one[:whole].view("<u8"), other[:whole].view("<u8")) and np.array_equal(
        one[whole:], other[whole:]
    )


def first_difference(
    left_reader: BlockReader,
    right_reader: BlockReader,
    left: TypedTensor,
    right: TypedTensor,
    counter: ProgressCounter | None = None,
) -> int | None:
    """The first byte at which two tensors of one shape differ, ``left`` cast to ``right``'s dtype; None if equal."""
    bits = dtypes.DTYPES[right.dtype].bits
    left_reader.expect(left.tensor, left.dtype)
    right_reader.expect(right.tensor, right.dtype)
    for offset, (mine, theirs) in aligned_blocks((left.tensor, right.tensor), block_elements(left.dtype, right.dtype)):
        expected = np.frombuffer(left_reader.read(mine, left.dtype, right.dtype), np.uint8)
        found = np.frombuffer(right_reader.read(theirs, right.dtype, right.dtype), np.uint8)
        if not same_bytes(expected, found):
            return offset * bits // 8 + int(np.not_equal(expected, found).argmax())
        if counter is not None:
            counter.add(len(found))
    return None
