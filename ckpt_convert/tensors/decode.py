"""What the stored bytes of each dtype mean: codes, and the numbers that they stand for, as numpy arrays.

The values of every dtype of 32 bits or fewer but I32 and U32 fit float32 exactly, those of F64, C128, I32 and U32
fit float64. I64 and U64 fit neither, so whoever wants them exact takes the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]


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


_CODECS = {
    codec.dtype: codec
    for codec in (
        Codec("F64", "float", "<u8", "<f8"),
        Codec("F32", "float", "<u4", "<f4"),
        Codec("F16", "float", "<u2", "<f4"),
        Codec("BF16", "float", "<u2", "<f4"),
        Codec("F8_E4M3", "float", "|u1", "<f4"),
        Codec("F8_E4M3FNUZ", "float", "|u1", "<f4"),
        Codec("F8_E5M2", "float", "|u1", "<f4"),
        Codec("F8_E5M2FNUZ", "float", "|u1", "<f4"),
        Codec("F8_E8M0", "exponent", "|u1", "<f4"),
        Codec("F4", "float", "|u1", "<f4", each=2),
        Codec("C64", "float", "<u4", "<f4", parts=2),
        Codec("C128", "float", "<u8", "<f8", parts=2),
        Codec("I64", "int", "<i8", "<f8"),
        Codec("I32", "int", "<i4", "<f8"),
        Codec("I16", "int", "<i2", "<f4"),
        Codec("I8", "int", "|i1", "<f4"),
        Codec("U64", "int", "<u8", "<f8"),
        Codec("U32", "int", "<u4", "<f8"),
        Codec("U16", "int", "<u2", "<f4"),
        Codec("U8", "int", "|u1", "<f4"),
        Codec("BOOL", "int", "|u1", "<f4"),
    )
}

_SMALL = {
    # dtype: bits, bits of the mantissa, bias of the exponent
    "F8_E4M3": (8, 3, 7),
    "F8_E4M3FNUZ": (8, 3, 8),
    "F8_E5M2": (8, 2, 15),
    "F8_E5M2FNUZ": (8, 2, 16),
    "F4": (4, 1, 1),
}


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
    bits, mantissa, bias = _SMALL[dtype]
    code = np.arange(1 << bits)
    magnitude = code & ((1 << (bits - 1)) - 1)
    exponent, fraction = magnitude >> mantissa, magnitude & ((1 << mantissa) - 1)
    fraction = fraction + ((exponent > 0) << mantissa)
    out = np.ldexp(fraction.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa).astype("<f4")
    out = np.where(code >> (bits - 1), -out, out)
    if dtype == "F8_E4M3":
        out[[0x7F, 0xFF]] = np.nan
    elif dtype == "F8_E5M2":
        out[[0x7C, 0xFC]] = np.inf, -np.inf
        out[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    elif dtype.endswith("FNUZ"):
        out[0x80] = np.nan
    return out


@cache
def _pairs(dtype: str) -> Array:
    """Two float32 for every code of twice the size, the low bits first, in 64 bits."""
    single = _singles(dtype)
    pairs = np.empty((len(single), len(single), 2), "<f4")
    pairs[..., 0], pairs[..., 1] = single[None, :], single[:, None]
    out: Array = pairs.reshape(-1).view("<u8")
    return out
