"""Casts between floating-point dtypes: to the nearest, ties to even, as torch's ``Tensor.to`` rounds, with numpy alone.

The bits are those of torch 2.13 for every value. Which NaN torch makes of a NaN depends on the processor, and on the
length of the tensor; here it is the one that long tensors get on x86 with AVX2 or AVX-512. From float64 to 16 bits
torch rounds twice, through float32, and so does this.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from ckpt_convert.dtypes import DTYPES
from ckpt_convert.tensors import decode
from ckpt_convert.tensors.decode import Array, Scratch

_PIECE = 1 << 17
"""Elements that are cast together: few enough for the cache, enough to make numpy's calls cheap."""

_TIES = 16
"""About as many values of a piece lie half-way between two codes, if what is rounded is like any other."""

_MAGNITUDE = 0x7FFFFFFF
_INFINITE = 0x7F800000
"""Codes of float32: all bits but the sign, and infinity."""

_OVERFLOW = {"BF16": 0x7F7F8000, "F16": 0x477FF000}
"""The least magnitude of a float32 that is rounded to infinity, by the dtype that it is rounded to."""


class Caster:
    """One worker's buffers for casts."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    def cast(self, data: Array, source: str, target: str) -> tuple[Array, int]:
        """The elements of ``data`` (bytes) in another dtype, as bytes that are good until the next call.

        Also how many of them are finite, but too large for it, so that they have become infinite. The source is one of
        dtypes.CAST_FROM, the target one of dtypes.CASTABLE.
        """
        given = data.view(_code(source))
        made = self._scratch.take(0, _code(target), len(given))
        overflowed = 0
        with np.errstate(all="ignore"):  # as torch, which says nothing of what becomes infinite, or is NaN
            for start in range(0, len(given), _PIECE):
                part = slice(start, start + _PIECE)
                if self._cast(given[part], made[part], source, target):
                    overflowed += _infinities(made[part], target) - _infinities(given[part], source)
        return made.view(np.uint8), overflowed

    def cast_into(self, out: Array, data: Array, source: str, target: str) -> bool:
        """``cast`` into ``out`` (bytes); returns whether any element may be infinite or NaN, before or after.

        What ``data`` holds is of no use afterwards.
        """
        given, made = data.view(_code(source)), out.view(_code(target))
        found = False
        with np.errstate(all="ignore"):
            for start in range(0, len(given), _PIECE):
                part = slice(start, start + _PIECE)
                found |= self._cast(given[part], made[part], source, target, keep=False)
        return found

    def _cast(self, given: Array, made: Array, source: str, target: str, *, keep: bool = True) -> bool:
        """Cast codes into ``made``; returns whether any may have become infinite. ``given`` may be lost, or is kept."""
        if (source, target) == ("BF16", "F32"):
            np.copyto(made, given)
            np.left_shift(made, 16, out=made)
            return False
        if DTYPES[source].bits <= 16:
            table, has_infinite = _table(source, target)
            np.take(table, given, out=made, mode="clip")
            return has_infinite
        if DTYPES[target].bits > 16:
            np.copyto(made.view(_wide(target)), given.view(_wide(source)), casting="unsafe")
            return target == "F32"
        single = given
        if source == "F64":
            single = self._scratch.take(1, "<u4", len(given))
            np.copyto(single.view("<f4"), given.view("<f8"), casting="unsafe")
        return self.narrow(single, made, target, 0xFFFF, keep=keep)

    def narrow(self, single: Array, made: Array, target: str, nan: int, *, keep: bool = True) -> bool:
        """Round codes of float32 to 16 bits; ``nan`` is what every NaN becomes in bfloat16."""
        is_large = _has_large(single, _OVERFLOW[target])
        if target == "BF16":
            sums = self._scratch.take(2, "<u4", len(single)) if keep or is_large else single
            self._round_to_bfloat16(single, made, sums)
        else:
            first, power = (self._scratch.take(number, "<u4", len(single)) for number in (2, 3))
            np.bitwise_and(single, _MAGNITUDE, out=first)
            _round_to_float16(single, first, power)
            np.copyto(made, first, casting="unsafe")
        if is_large:
            _repair(single, made, target, nan)
        return is_large

    def _round_to_bfloat16(self, single: Array, made: Array, sums: Array) -> None:
        """The upper halves of codes, rounded; ``sums`` may be ``single``.

        Adding half a unit rounds what is half-way between two codes up, to an odd one as well. Those are rare, and a
        lower half of 0 afterwards tells them, so looking for them takes less than adding more to odd codes only.
        """
        low = self._scratch.take(1, "<u2", len(single))
        np.add(single, 0x8000, out=sums)
        np.copyto(low, sums, casting="unsafe")
        np.right_shift(sums, 16, out=sums)
        np.copyto(made, sums, casting="unsafe")
        start = 0
        for _ in range(_TIES):
            if start == len(low):
                return
            start += int(low[start:].argmin())
            if low[start]:
                return
            made[start] &= 0xFFFE
            start += 1
        np.bitwise_and(made[start:], 0xFFFE, out=made[start:], where=low[start:] == 0)


def _has_large(single: Array, limit: int) -> bool:
    """Whether any magnitude is ``limit`` or more; NaN is. Of codes with a sign the negative ones are the largest."""
    return bool(single.view("<i4").max() >= limit or single.max() >= limit | 0x80000000)


def round_to_bfloat16(single: Array, out: Array) -> None:
    """The codes of bfloat16, in the low bits of ``out``, that codes of float32 are rounded to; none of them a NaN."""
    np.right_shift(single, 16, out=out)
    np.bitwise_and(out, 1, out=out)
    np.add(out, 0x7FFF, out=out)
    np.add(out, single, out=out)
    np.right_shift(out, 16, out=out)


def _round_to_float16(single: Array, out: Array, power: Array) -> None:
    """The same for float16; ``out`` comes with the magnitudes. Those too large for float16 give anything.

    A magnitude with exponent e is a multiple of 2^(e - 23), and has to become one of 2^(e - 10), or of 2^-24 where it
    is subnormal. Adding 2^(e + 13) lets the processor do that, and what was added is then subtracted from the code.
    """
    np.bitwise_and(out, _INFINITE, out=power)
    np.maximum(power, _smallest()[: len(power)], out=power)
    np.add(power, 13 << 23, out=power)
    np.add(out.view("<f4"), power.view("<f4"), out=out.view("<f4"))
    np.subtract(out, power, out=out)
    np.right_shift(power, 13, out=power)  # the exponent where float16 has it
    np.add(out, power, out=out)
    np.subtract(out, 126 << 10, out=out)
    np.right_shift(single, 16, out=power)
    np.bitwise_and(power, 0x8000, out=power)
    np.bitwise_or(out, power, out=out)


@cache
def _smallest() -> Array:
    """float16's least normal number, as float32: an array, with which numpy's maximum is three times as fast."""
    return np.full(_PIECE, 113 << 23, "<u4")


def _repair(single: Array, made: Array, target: str, nan: int) -> None:
    """Put in what is too large, infinite or NaN, which rounding does not get right."""
    sign, magnitude = single >> 16 & 0x8000, single & _MAGNITUDE
    infinite = 0x7F80 if target == "BF16" else 0x7C00
    np.copyto(made, sign | infinite, casting="unsafe", where=magnitude >= _OVERFLOW[target])
    nans = nan if target == "BF16" else sign | 0x7E00 | magnitude >> 13 & 0x3FF
    np.copyto(made, nans, casting="unsafe", where=magnitude > _INFINITE)


@cache
def _table(source: str, target: str) -> tuple[Array, bool]:
    """The code that each code of a dtype of at most 16 bits becomes, and whether a finite one becomes infinite."""
    codes = np.arange(1 << DTYPES[source].bits, dtype=_code(source))
    single = _singles(source, codes)
    if target == "F32":
        return single, False
    made = np.empty(len(codes), _code(target))
    caster = Caster()
    with np.errstate(all="ignore"):
        for start in range(0, len(codes), _PIECE):
            part = slice(start, start + _PIECE)
            if target == "F64":
                np.copyto(made[part].view("<f8"), single[part].view("<f4"))
            else:
                caster.narrow(single[part], made[part], target, 0x7FC0)
    return made, _infinities(made, target) > _infinities(codes, source)


def _singles(source: str, codes: Array) -> Array:
    """The codes of float32 with the values of these codes."""
    known, codec = DTYPES[source], decode.codec_of(source)
    if codec is None or source == "BF16":
        return codes.astype("<u4") << 16
    values = decode.decode_values(codec, codes.view(np.uint8), np.empty(len(codes), "<f4"))
    single = values.view("<u4").copy()
    if known.special in ("ieee", "last"):
        sign = codes.astype("<u4") >> (known.bits - 1) << 31
        nans = sign | 0x7FC00000 | codes.astype("<u4") << (23 - known.mantissa) & 0x7FFFFF
    else:
        nans = np.full(len(codes), 0x7F800001, "<u4")
    np.copyto(single, nans, where=np.isnan(values))
    return single


def _infinities(codes: Array, dtype: str) -> int:
    """How many of the codes are infinite."""
    known = DTYPES[dtype]
    if known.special != "ieee":
        return 0
    infinite = ((1 << known.exponent) - 1) << known.mantissa
    return int(np.count_nonzero(codes & ((1 << (known.bits - 1)) - 1) == infinite))


@cache
def _code(dtype: str) -> str:
    """numpy's name of the unsigned integers that hold the codes of a dtype."""
    return np.dtype(f"<u{DTYPES[dtype].bits // 8}").str


def _wide(dtype: str) -> str:
    """numpy's name of F32 and F64."""
    return DTYPES[dtype].numpy
