"""Reading lazy tensors block by block, in bounded memory, cast where asked for; comparing two of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from ckpt_convert import dtypes
from ckpt_convert.tensors.gather import Gatherer, Stored
from ckpt_convert.tensors.lazy import LazyTensor, together
from ckpt_convert.tensors.progress import Meter

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

BLOCK = 1 << 20
"""Bytes of the buffer of a block."""


class Read(NamedTuple):
    """A lazy tensor and the dtype of its elements."""

    tensor: LazyTensor
    dtype: str


class Mover:
    """One worker's buffers: reads a lazy tensor block by block, in the dtype of the output.

    ``overflowed`` counts the finite values that casts have made infinite so far.
    """

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self.overflowed = 0
        self._gatherer = Gatherer(stored)
        self._buffer = np.empty(BLOCK, np.uint8)

    def read(self, block: LazyTensor, source: str, target: str) -> memoryview:
        """The bytes of a block of at most ``most(source, target)`` elements, good until the next call."""
        view = self._buffer[: block.size * dtypes.DTYPES[source].bits // 8]
        self._gatherer.into(block, source, view)
        if source == target:
            return view.data
        made, overflowed = cast(view, source, target)
        self.overflowed += overflowed
        return made.data

    def blocks(self, tensor: LazyTensor, source: str, target: str) -> Iterator[tuple[int, memoryview]]:
        """(byte offset, bytes) of the tensor, in order; the bytes are only good until the next block."""
        bits = dtypes.DTYPES[target].bits
        for offset, block in tensor.blocks(most(source, target)):
            yield offset * bits // 8, self.read(block, source, target)


def most(source: str, target: str) -> int:
    """How many elements fit a worker's buffer, in both dtypes; they fill whole bytes."""
    return BLOCK // max(dtypes.DTYPES[source].bits, dtypes.DTYPES[target].bits) * 8


def difference(left: Mover, right: Mover, one: Read, other: Read, meter: Meter | None = None) -> int | None:
    """The first byte in which two tensors of one shape differ, the first cast to the other's dtype; None if none."""
    bits = dtypes.DTYPES[other.dtype].bits
    for offset, (mine, theirs) in together((one.tensor, other.tensor), most(one.dtype, other.dtype)):
        # As numpy arrays, which compare some twenty times faster than memoryviews.
        expected = np.frombuffer(left.read(mine, one.dtype, other.dtype), np.uint8)
        found = np.frombuffer(right.read(theirs, other.dtype, other.dtype), np.uint8)
        if not np.array_equal(expected, found):
            return offset * bits // 8 + int(np.not_equal(expected, found).argmax())
        if meter is not None:
            meter.add(len(found))
    return None


def cast(data: np.ndarray[Any, Any], source: str, target: str) -> tuple[np.ndarray[Any, Any], int]:
    """The elements in another floating-point dtype, rounded to nearest even, as torch does it.

    Also how many of them are finite, but too large for it, so that they have become infinite.
    """
    import torch

    elements = torch.from_numpy(data).view(getattr(torch, dtypes.DTYPES[source].torch))
    made = elements.to(getattr(torch, dtypes.DTYPES[target].torch))
    return made.view(torch.uint8).numpy(), overflowed(elements, made)


def overflowed(elements: torch.Tensor, made: torch.Tensor) -> int:
    """How many elements are finite and have become infinite in what was made of them."""
    import torch

    if torch.finfo(made.dtype).max >= torch.finfo(elements.dtype).max:
        return 0
    infinite = torch.isinf(made)
    if not infinite.any():
        return 0
    wide = elements if elements.dtype.itemsize > 1 else elements.float()  # torch asks no such thing of single bytes
    return int((infinite & torch.isfinite(wide)).sum())
