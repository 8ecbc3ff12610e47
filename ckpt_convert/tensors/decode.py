"""Decodes the stored bytes of each dtype to numpy arrays: the raw codes, and the values they encode.

float32 holds the values of every dtype of at most 32 bits exactly, except I32 and U32; float64 holds those and F64 and
C128. Neither holds I64 and U64, so callers that need them exact use the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from ckpt_convert.dtypes import DTYPES, DType

Array = np.ndarray[Any, Any]


CHUNK = 1 << 17
"""Values decoded per numpy call: few enough for the cache, enough to make the call overhead small."""


class Scratch:
    """Reusable buffers by number, allocated on first use: allocating a new one each time is slower."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, str], Array] = {}

    def take(self, number: int, dtype: str, count: int) -> Array:
        """``count`` elements of the dtype, valid until the same (number, dtype) is taken again."""
        buffer = self._buffers.get((number, dtype))
        if buffer is None or len(buffer) < count:
            buffer = self._buffers[number, dtype] = np.empty(count, dtype)
        return buffer if len(buffer) == count else buffer[:count]


@dataclass(frozen=True, slots=True)
class Codec:
    """How the elements of a dtype are encoded in bytes.

    unit_dtype: numpy dtype of the stored unit, of ``nbytes`` bytes.
    value_dtype: numpy dtype that holds every value exactly (except I64 and U64).
    values_per_unit: 2 for 4-bit dtypes, else 1.
    values_per_element: 2 for complex dtypes, else 1.
    kind: "float" if the sign is the highest bit and the codes of one sign ascend with the magnitude.
    """

    dtype: str
    kind: Literal["float", "exponent", "int"]
    unit_dtype: str
    value_dtype: str
    values_per_unit: int = 1
    values_per_element: int = 1

    @property
    def nbytes(self) -> int:
        return np.dtype(self.unit_dtype).itemsize

    @property
    def is_long(self) -> bool:
        """Whether float64 cannot hold every value."""
        return self.kind == "int" and self.nbytes == 8


def _codec(dtype: DType) -> Codec:
    kind: Literal["float", "exponent", "int"] = "float" if dtype.kind == "complex" else dtype.kind
    parts = 2 if dtype.kind == "complex" else 1
    size = max(dtype.bits // 8 // parts, 1)
    code = dtype.numpy if kind == "int" and dtype.name != "BOOL" else np.dtype(f"<u{size}").str
    is_wide = size == 8 or (kind == "int" and size == 4)
    return Codec(dtype.name, kind, code, "<f8" if is_wide else "<f4", max(8 // dtype.bits, 1), parts)


_CODECS = {dtype.name: _codec(dtype) for dtype in DTYPES.values() if dtype.bits != 6}


def codec_of(dtype: str) -> Codec | None:
    """The codec of a dtype; None for F6, whose packing nothing specifies, and for unknown dtypes."""
    return _CODECS.get(dtype)


def unpack_codes(codec: Codec, raw: Array) -> Array:
    """The codes in ``raw`` (uint8), one for each value."""
    if codec.values_per_unit == 1:
        return raw.view(codec.unit_dtype)
    # The first of two values is in the low bits, as in torch's float4_e2m1fn_x2; both end with the sign on top.
    out = np.empty(2 * len(raw), np.uint8)
    np.left_shift(raw, 4, out=out[0::2])
    np.bitwise_and(raw, 0xF0, out=out[1::2])
    return out


def is_native(codec: Codec) -> bool:
    """Whether numpy has the dtype, so that the bytes need no decoding."""
    return codec.dtype in ("F64", "F32", "C128", "C64")


def decode_values(codec: Codec, raw: Array, scratch: Array) -> Array:
    """The values in ``raw`` (uint8) as ``codec.value_dtype``: ``scratch``, cut to length, or a view of ``raw``."""
    count = len(raw) // codec.nbytes * codec.values_per_unit
    out = scratch[:count]
    if is_native(codec):
        return raw.view(codec.value_dtype)
    if codec.kind == "int":
        np.copyto(out, raw.view(codec.unit_dtype), casting="unsafe")
    elif codec.dtype == "BF16":
        from ml_dtypes import bfloat16  # in one pass, where a copy and a shift take twice as long

        np.copyto(out, raw.view(bfloat16))
    elif codec.dtype == "F16":
        np.take(_singles("F16"), raw.view("<u2"), out=out, mode="clip")
    elif codec.values_per_unit == 2:
        np.take(_pairs(codec.dtype), raw, out=out.view("<u8"), mode="clip")
    else:  # two bytes at a time, which takes half the time
        even = count & ~1
        np.take(_pairs(codec.dtype), raw[:even].view("<u2"), out=out[:even].view("<u8"), mode="clip")
        np.take(_singles(codec.dtype), raw[even:], out=out[even:], mode="clip")
    return out


@cache
def _singles(dtype: str) -> Array:
    """The value of every code, as float32."""
    out: Array
    if dtype == "F16":
        return np.arange(1 << 16, dtype="<u2").view("<f2").astype("<f4")
    if dtype == "F8_E8M0":
        out = np.ldexp(np.float64(1), np.arange(255) - 127)
        return np.append(out, np.nan).astype("<f4")
    known = DTYPES[dtype]
    bits, mantissa = known.bits, known.mantissa
    bias = (1 << (known.exponent - 1)) - (known.special != "zero")
    code = np.arange(1 << bits)
    magnitude = code & ((1 << (bits - 1)) - 1)
    exponent, fraction = magnitude >> mantissa, magnitude & ((1 << mantissa) - 1)
    fraction = fraction + ((exponent > 0) << mantissa)
    out = np.ldexp(fraction.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa).astype("<f4")
    out = np.where(code >> (bits - 1), -out, out)
    if known.special == "ieee":
        full = ((1 << known.exponent) - 1) << mantissa
        out[magnitude == full] *= np.inf
        out[magnitude > full] = np.nan
    elif known.special == "last":
        out[magnitude == (1 << (bits - 1)) - 1] = np.nan
    elif known.special == "zero":
        out[1 << (bits - 1)] = np.nan
    return out


@cache
def _pairs(dtype: str) -> Array:
    """For every pair of codes, the first in the low bits: both values as float32, packed in 64 bits."""
    single = _singles(dtype)
    pairs = np.empty((len(single), len(single), 2), "<f4")
    pairs[..., 0], pairs[..., 1] = single[None, :], single[:, None]
    out: Array = pairs.reshape(-1).view("<u8")
    return out
