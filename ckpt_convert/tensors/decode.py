"""What the stored bytes of each dtype mean: codes, and the numbers that they stand for, as numpy arrays.

The values of every dtype of 32 bits or fewer but I32 and U32 fit float32 exactly, those of F64, C128, I32 and U32
fit float64. I64 and U64 fit neither, so whoever wants them exact takes the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from ckpt_convert.dtypes import DTYPES, DType

Array = np.ndarray[Any, Any]


PIECE = 1 << 17
"""Numbers that are worked on together: few enough for the cache, enough to make numpy's calls cheap."""


class Scratch:
    """Buffers by number, made when they are first needed: making new ones each time costs more."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, str], Array] = {}

    def take(self, number: int, dtype: str, count: int) -> Array:
        """``count`` elements of the dtype, good until the same are taken again."""
        buffer = self._buffers.get((number, dtype))
        if buffer is None or len(buffer) < count:
            buffer = self._buffers[number, dtype] = np.empty(count, dtype)
        return buffer if len(buffer) == count else buffer[:count]


@dataclass(frozen=True, slots=True)
class Codec:
    """How the elements of a dtype lie in bytes.

    ``code`` is a numpy dtype of the stored unit and ``wide`` one that holds every value exactly (but for I64 and U64);
    ``each`` says how many numbers lie in a unit of ``nbytes`` bytes, ``parts`` how many numbers make an element: two
    for complex ones. ``kind`` is "float" where the sign is the highest bit and codes of one sign count upwards.
    """

    dtype: str
    kind: Literal["float", "exponent", "int"]
    code: str
    wide: str
    each: int = 1
    parts: int = 1

    @property
    def nbytes(self) -> int:
        return np.dtype(self.code).itemsize

    @property
    def is_long(self) -> bool:
        """Whether float64 does not hold every value."""
        return self.kind == "int" and self.nbytes == 8


def _codec(dtype: DType) -> Codec:
    kind: Literal["float", "exponent", "int"] = "float" if dtype.kind == "complex" else dtype.kind
    parts = 2 if dtype.kind == "complex" else 1
    size = max(dtype.bits // 8 // parts, 1)
    code = dtype.numpy if kind == "int" and dtype.name != "BOOL" else np.dtype(f"<u{size}").str
    is_wide = size == 8 or (kind == "int" and size == 4)
    return Codec(dtype.name, kind, code, "<f8" if is_wide else "<f4", max(8 // dtype.bits, 1), parts)


_CODECS = {dtype.name: _codec(dtype) for dtype in DTYPES.values() if dtype.bits != 6}


def codec(dtype: str) -> Codec | None:
    """How to read the dtype, or None: F6, of which nobody says how it is packed, and what no table knows."""
    return _CODECS.get(dtype)


def codes(codec: Codec, raw: Array) -> Array:
    """The codes of these bytes (uint8), one for each number."""
    if codec.each == 1:
        return raw.view(codec.code)
    # The first of two numbers lies in the low bits, as in torch's float4_e2m1fn_x2; both end with the sign on top.
    out = np.empty(2 * len(raw), np.uint8)
    np.left_shift(raw, 4, out=out[0::2])
    np.bitwise_and(raw, 0xF0, out=out[1::2])
    return out


def is_plain(codec: Codec) -> bool:
    """Whether the bytes are the numbers, as numpy has them."""
    return codec.dtype in ("F64", "F32", "C128", "C64")


def values(codec: Codec, raw: Array, scratch: Array) -> Array:
    """The numbers of these bytes (uint8) as ``codec.wide``: ``scratch``, cut to length, or the bytes themselves."""
    count = len(raw) // codec.nbytes * codec.each
    out = scratch[:count]
    if is_plain(codec):
        return raw.view(codec.wide)
    if codec.kind == "int":
        np.copyto(out, raw.view(codec.code), casting="unsafe")
    elif codec.dtype == "BF16":
        bits = out.view("<u4")
        np.copyto(bits, raw.view("<u2"))
        np.left_shift(bits, 16, out=bits)
    elif codec.dtype == "F16":
        np.take(_singles("F16"), raw.view("<u2"), out=out, mode="clip")
    elif codec.each == 2:
        np.take(_pairs(codec.dtype), raw, out=out.view("<u8"), mode="clip")
    else:  # two bytes at a time, which takes half as long
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
    """Two float32 for every code of twice the size, the low bits first, in 64 bits."""
    single = _singles(dtype)
    pairs = np.empty((len(single), len(single), 2), "<f4")
    pairs[..., 0], pairs[..., 1] = single[None, :], single[:, None]
    out: Array = pairs.reshape(-1).view("<u8")
    return out
