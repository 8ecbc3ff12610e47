"""FP8 with a scale for each block: value = code * scale, in float32.

A block has any size, up to a whole channel or tensor; blocks at the edges of a matrix are smaller. Scales have
different names (weight_scale_inv, weight_scale), but codes are always multiplied by them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from ckpt_convert.checkpoint.quantized.detect import Quantized
from ckpt_convert.checkpoint.quantized.row_reader import SCRATCH, STRIPS, contiguous
from ckpt_convert.dtypes import DTYPES
from ckpt_convert.storage.base import read_range
from ckpt_convert.tensors import decode
from ckpt_convert.tensors.header import FileTensor

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Fp8:
    """The values of one tensor, flattened to ``rows``; ``height`` is the number of rows of each of its matrices."""

    codes: FileTensor
    scales: FileTensor
    rows: int
    columns: int
    height: int
    block: tuple[int, int]
    codec: decode.Codec = field(repr=False)
    fits_bfloat16: bool = False

    def read(self, first: int, last: int, start: int, stop: int) -> Array:
        """Rows ``first`` to ``last`` of columns ``start`` to ``stop``, in a reused buffer."""
        count, width = last - first, stop - start
        box = (first, last, start, stop)
        raw = STRIPS.read(self.codes.file.reader, self.codes.tensor.offset, self.columns, box)
        raw = contiguous(raw, 2)
        numbers = decode.decode_values(self.codec, raw, SCRATCH.take(0, "<f4", count * width)).reshape(count, width)
        self._scale(numbers, first, start)
        return numbers

    def _scale(self, numbers: Array, first: int, start: int) -> None:
        """Multiply each value by the scale of its block."""
        down, across = self.block
        grid = -(-self.height // down), -(-self.columns // across)
        planes = prod(self.scales.tensor.shape) // prod(grid)  # 1 where all matrices share their scales
        rows = np.arange(first, first + len(numbers))
        places = rows % self.height // down
        if planes > 1:
            places += rows // self.height * grid[0]
        low, high = start // across, -(-(start + numbers.shape[1]) // across)
        scales = self._scales(int(places[0]), int(places[-1]) + 1, low, high, grid[1])[places - places[0]]
        if high - low == 1:
            np.multiply(numbers, scales, out=numbers)
            return
        head = -start % across  # columns of a partial first block
        whole = (numbers.shape[1] - head) // across
        end = head + whole * across
        at = 1 if head else 0
        if head:
            numbers[:, :head] *= scales[:, :1]
        blocks = numbers[:, head:end]
        parts = np.lib.stride_tricks.as_strided(
            blocks, [len(numbers), whole, across], [numbers.strides[0], across * numbers.itemsize, numbers.itemsize]
        )
        np.multiply(parts, scales[:, at : at + whole, None], out=parts)
        if end < numbers.shape[1]:
            numbers[:, end:] *= scales[:, -1:]

    def _scales(self, first: int, last: int, start: int, stop: int, width: int) -> Array:
        """Rows and columns of the scales, as float32."""
        tensor, file = self.scales.tensor, self.scales.file
        item = DTYPES[tensor.dtype].bits // 8
        data = np.frombuffer(
            read_range(file.reader, tensor.offset + first * width * item, (last - first) * width * item), np.uint8
        )
        return scale_values(data, tensor.dtype).reshape(last - first, width)[:, start:stop]


def scale_values(data: Array, dtype: str) -> Array:
    """Scales as float32; every NaN with the default payload, which rounding keeps a NaN."""
    if dtype == "U8":
        return np.ldexp(np.float32(1), data.astype(np.int32) - 127)
    codec = decode.codec_of(dtype)
    if codec is None:
        raise ValueError(f"{dtype} is no dtype of scales")
    numbers = decode.decode_values(codec, data, np.empty(len(data), "<f4"))
    return np.where(np.isnan(numbers), np.float32(np.nan), numbers)


def fp8_values(quantized: Quantized) -> Fp8:
    """The values of a detected tensor, with the shape of its blocks."""
    tensor = quantized.codes.tensor
    codec = decode.codec_of(tensor.dtype)
    if quantized.block is None or codec is None:
        raise ValueError(f"{quantized.key} has no blocks that are known")
    shape = tensor.shape if len(tensor.shape) > 1 else (1, prod(tensor.shape))
    return Fp8(quantized.codes, quantized.scale, prod(shape[:-1]), shape[-1], shape[-2], quantized.block, codec)
