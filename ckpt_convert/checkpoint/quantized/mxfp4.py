"""MXFP4: two 4-bit floats in a byte, the low half first, and for each group of 32 a power of two (bias 127) as scale.

The packed tensor is [..., rows, groups, 16]; the values are read as [..., rows, groups * 32]. transformers has the last
two axes swapped, which the strides of the computed tensor say. Every value fits bfloat16 exactly, unless it overflows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np

from ckpt_convert.checkpoint.quantized.detect import Quantized
from ckpt_convert.checkpoint.quantized.row_reader import SCRATCH, STRIPS, contiguous
from ckpt_convert.tensors import decode
from ckpt_convert.tensors.header import FileTensor

Array = np.ndarray[Any, Any]

GROUP = 32
_BYTES = 16


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """The values of one tensor."""

    codes: FileTensor
    scales: FileTensor
    rows: int
    columns: int
    fits_bfloat16: bool = True

    def read(self, first: int, last: int, start: int, stop: int) -> Array:
        """Rows ``first`` to ``last`` of columns ``start`` to ``stop``, in a reused buffer."""
        low, high = start // GROUP, -(-stop // GROUP)
        count, groups = last - first, self.columns // GROUP
        packed = contiguous(_box(self.codes, groups * _BYTES, (first, last, low * _BYTES, high * _BYTES)), 2)
        # Codes may still be in the buffer that the next read fills, so scales are read after the codes are decoded.
        out = SCRATCH.take(0, "<f4", count * (high - low) * GROUP)
        codec = decode.codec_of("F4")
        assert codec is not None
        numbers = decode.decode_values(codec, packed, out).reshape(-1, GROUP)
        scales = contiguous(_box(self.scales, groups, (first, last, low, high)), 2)
        np.multiply(numbers, _powers()[scales][:, None], out=numbers)
        return numbers.reshape(count, -1)[:, start - low * GROUP : stop - low * GROUP]


def _box(stored: FileTensor, pitch: int, box: tuple[int, int, int, int]) -> Array:
    return STRIPS.read(stored.file.reader, stored.tensor.offset, pitch, box)


@cache
def _powers() -> Array:
    """The scale of every exponent; the last one is infinite, as in transformers and torch."""
    with np.errstate(over="ignore"):
        return np.ldexp(np.float32(1), np.arange(256) - 127)


def mxfp4_values(quantized: Quantized) -> Mxfp4:
    """The values of a detected tensor."""
    *rows, groups, _ = quantized.codes.tensor.shape
    return Mxfp4(quantized.codes, quantized.scale, prod(rows), groups * GROUP)
