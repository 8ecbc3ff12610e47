"""The difference between two tensors, accumulated over blocks of their bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ckpt_convert.analysis.stats.blocked_sums import LARGEST, Data, as_bytes, cache_blocks, norm, total
from ckpt_convert.tensors import decode
from ckpt_convert.tensors.blocks import same_bytes
from ckpt_convert.tensors.decode import Array, Codec, Scratch

_FEW = 16
"""One in so many pairs of codes may have different signs before all are put in the order of their values."""


@dataclass(frozen=True, slots=True)
class Delta:
    """The difference between two tensors of one shape; ``at`` and ``first`` are flat indices, row-major.

    ``differing`` counts the elements whose bits differ after an exact upcast to a common type, so -0.0 and 0.0 differ
    (by 0), and so do two NaNs with different payloads. ``nan_mismatch`` counts those of them where one side is NaN or
    infinite and the other is not the same. All other fields are over the pairs of finite elements: ``relative_norm``
    is ‖a-b‖ / ‖a‖, None if ‖a‖ is 0 (or beyond float64); ``max_ulp`` is the largest distance in steps from one value
    of the dtype to the next, None unless both have the same floating-point dtype. ``at`` is the element of the largest
    |Δ| (None if that is 0), ``first`` the first that differs. Complex elements are compared part by part.
    If both dtypes fit float32, means and norms are accurate to five digits, and ``max_abs`` is exact at ``at``.

    If the dtype cannot be decoded, ``count`` and ``differing`` count bytes and the rest is None (``nan_mismatch``: 0).
    """

    count: int = 0
    differing: int = 0
    max_abs: float | None = None
    mean_abs: float | None = None
    relative_norm: float | None = None
    max_ulp: int | None = None
    nan_mismatch: int = 0
    at: int | None = None
    first: int | None = None


class Comparison:
    """Accumulates the difference between two tensors of one shape, block by block; not to be shared between threads.

    Raises ValueError for two dtypes that are not ``comparable``.
    """

    def __init__(self, dtype_a: str, dtype_b: str) -> None:
        if not comparable(dtype_a, dtype_b):
            raise ValueError(f"elements of {dtype_a} and {dtype_b} cannot be compared")
        self._a, self._b = decode.codec_of(dtype_a), decode.codec_of(dtype_b)
        self._is_same = dtype_a == dtype_b
        self._has_ulp = self._is_same and self._a is not None and self._a.kind != "int"
        self._scratch = Scratch()
        self._count = self._differing = self._nan_mismatch = self._finite = self._ulp = 0
        self._max = self._sum = self._norm = self._reference = 0.0
        self._was_equal = True
        self._at: int | None = None
        self._first: int | None = None

    def add(self, a: Data, b: Data, first_element: int) -> None:
        """Add the same elements of both tensors, which begin at this flat index."""
        if self._a is None or self._b is None:
            one, other = as_bytes(a), as_bytes(b)
            self._count += len(one)
            self._differing += int(np.count_nonzero(one != other))
            return
        with np.errstate(all="ignore"):
            for (at, one), (_, other) in zip(cache_blocks(self._a, a), cache_blocks(self._b, b), strict=True):
                self._piece(self._a, self._b, one, other, first_element + at)

    def result(self) -> Delta:
        if self._a is None:
            return Delta(self._count, self._differing)
        mean = self._sum / self._finite if self._finite else 0.0
        is_known = self._reference > 0 and (max(self._reference, self._norm) < math.inf or self._norm == 0)
        relative = self._norm / self._reference if is_known else None
        return Delta(
            count=self._count,
            differing=self._differing,
            max_abs=self._max,
            mean_abs=min(mean, self._max),
            relative_norm=relative,
            max_ulp=self._ulp if self._has_ulp else None,
            nan_mismatch=self._nan_mismatch,
            at=self._at,
            first=self._first,
        )

    def _piece(self, a: Codec, b: Codec, one: Array, other: Array, first: int) -> None:
        numbers = len(one) // a.nbytes * a.values_per_unit
        self._count += numbers // a.values_per_element
        # If the last block differed, this one most likely does too.
        self._was_equal = self._was_equal and self._is_same and same_bytes(one, other)
        if self._was_equal:
            self._equal(a, one, numbers)
            return
        left, right, changed = self._read(a, b, one, other)
        count = int(np.count_nonzero(changed))
        self._was_equal = not count
        if not count:
            self._equal(a, one, numbers)
            return
        self._differ(changed, count, a, first)
        ulps = _ulps(a, one, other, self._scratch) if self._has_ulp else None
        # In float32 if both fit it: the rounding is below the digits that are shown.
        # In place of the right side (but never of a file's own bytes): fewer buffers stay in the cache. What needs the
        # right side again, which is rare, decodes it again.
        kept = self._scratch.take(2, left.dtype.str, numbers) if decode.is_native(b) else right
        delta = np.subtract(left, right, out=kept)
        np.abs(delta, out=delta)
        if a.is_long and b.is_long:
            delta = _distance(one.view(a.unit_dtype), other.view(b.unit_dtype))
        largest = float(np.maximum.reduce(delta))
        if not math.isfinite(largest):
            left, right, _ = self._read(a, b, one, other)
            finite = np.isfinite(left) & np.isfinite(right)
            apart = ~finite & (left != right) & ~(np.isnan(left) & np.isnan(right))
            self._nan_mismatch += int(np.count_nonzero(_by_element(apart, a)))
            numbers = int(np.count_nonzero(finite))
            left, right = (np.where(finite, side, 0.0).astype("<f8") for side in (left, right))
            ulps = None if ulps is None else np.where(finite, ulps, 0)
            # The difference of two finite values may overflow.
            delta = np.minimum(np.abs(left - right), LARGEST)
            largest = float(delta.max())
        if ulps is not None:
            self._ulp = max(self._ulp, int(ulps.max()))
        self._finite += numbers
        self._sum = min(self._sum + total(delta), LARGEST)
        self._norm = math.hypot(self._norm, norm(delta))
        self._reference = math.hypot(self._reference, norm(left))
        if largest > self._max:
            at = int(delta.argmax())
            if delta.dtype == np.float32:
                left, right, _ = self._read(a, b, one, other)
                largest = abs(float(left[at]) - float(right[at]))
            self._max = largest
            self._at = first + at // a.values_per_element

    def _read(self, a: Codec, b: Codec, one: Array, other: Array) -> tuple[Array, Array, Array]:
        """The values of both sides in a common type, and which of them differ."""
        wide = "<f8" if "<f8" in (a.value_dtype, b.value_dtype) else "<f4"
        left, right = self._values(a, one, wide, 0), self._values(b, other, wide, 1)
        if self._is_same:
            codes, others = decode.unpack_codes(a, one), decode.unpack_codes(b, other)
            return left, right, np.not_equal(codes, others, out=self._scratch.take(6, "?", len(codes)))
        if a.is_long or b.is_long:
            return left, right, _changed_long(a, b, one, other, left, right)
        unit = wide.replace("f", "u")
        return left, right, left.view(unit) != right.view(unit)

    def _values(self, codec: Codec, raw: Array, wide: str, number: int) -> Array:
        numbers = len(raw) // codec.nbytes * codec.values_per_unit
        values = decode.decode_values(codec, raw, self._scratch.take(number, codec.value_dtype, numbers))
        return values if codec.value_dtype == wide else values.astype(wide)

    def _equal(self, a: Codec, raw: Array, numbers: int) -> None:
        """Count equal values, and add them to the norm that the difference is relative to."""
        values = decode.decode_values(a, raw, self._scratch.take(0, a.value_dtype, numbers))
        found = norm(values)
        if not math.isfinite(found):
            values = values[np.isfinite(values)]
            found = norm(values)
        self._finite += len(values)
        self._reference = math.hypot(self._reference, found)

    def _differ(self, changed: Array, count: int, a: Codec, first: int) -> None:
        elements = _by_element(changed, a)
        self._differing += count if a.values_per_element == 1 else int(np.count_nonzero(elements))
        if self._first is None:
            self._first = first + int(elements.argmax())


def comparable(dtype_a: str, dtype_b: str) -> bool:
    """Whether the elements of two dtypes can be compared; complex ones only with complex ones."""
    a, b = decode.codec_of(dtype_a), decode.codec_of(dtype_b)
    return dtype_a == dtype_b or (a is not None and b is not None and a.values_per_element == b.values_per_element)


def _by_element(numbers: Array, codec: Codec) -> Array:
    """For each element, whether any of its parts is set."""
    return (
        numbers
        if codec.values_per_element == 1
        else np.logical_or.reduce(numbers.reshape(-1, codec.values_per_element), axis=1)
    )


def _ulps(codec: Codec, one: Array, other: Array, scratch: Scratch) -> Array:
    """The distance of each pair in steps between values of the dtype; both zeros are one value."""
    a, b = decode.unpack_codes(codec, one), decode.unpack_codes(codec, other)
    opposite = _opposite(a, b, scratch) if codec.kind == "float" else None
    if opposite is not None and len(opposite) > len(a) // _FEW:
        a, b, opposite = _ordered(a, scratch, 3), _ordered(b, scratch, 4), None
    # Into reused memory: allocating costs more than the operations.
    found, rest = (scratch.take(number, a.dtype.str, len(a)) for number in (5, 6))
    np.maximum(a, b, out=found)
    np.minimum(a, b, out=rest)
    np.subtract(found, rest, out=found)
    found = found.view(codec.unit_dtype)
    if opposite is not None:
        magnitude = np.array((1 << 8 * a.itemsize - 1) - 1, a.dtype)
        found[opposite] = (a[opposite] & magnitude) + (b[opposite] & magnitude)
    return found >> 4 if codec.values_per_unit == 2 else found


def _opposite(a: Array, b: Array, scratch: Scratch) -> Array | None:
    """Where two codes have different signs; None if they nowhere have. The others differ by as much as their codes."""
    signs = np.bitwise_xor(a, b, out=scratch.take(5, a.dtype.str, len(a)))
    sign = 1 << 8 * a.itemsize - 1
    return np.flatnonzero(signs >= np.array(sign, a.dtype)) if int(np.maximum.reduce(signs)) >= sign else None


def _ordered(codes: Array, scratch: Scratch, number: int) -> Array:
    """Sign-magnitude codes as signed integers in the order of their values; -0.0 becomes 0."""
    bits, signed = 8 * codes.itemsize - 1, codes.dtype.str.replace("u", "i")
    values = codes.view(signed)
    sign, out = scratch.take(5, signed, len(codes)), scratch.take(number, signed, len(codes))
    np.right_shift(values, bits, out=sign)  # -1 if the sign bit is set, else 0
    np.bitwise_and(sign, (1 << bits) - 1, out=out)
    np.bitwise_xor(values, out, out=out)
    return np.subtract(out, sign, out=out)


def _distance(a: Array, b: Array) -> Array:
    """|a-b| of 64-bit integers, signed or not; rounded once, except for a negative value against an unsigned type."""
    low, high = a.view("<u8"), b.view("<u8")
    is_less = (a < 0) & (b >= 0) | ((a < 0) == (b < 0)) & (low < high)
    found: Array = np.where(is_less, high - low, low - high).astype("<f8")
    if a.dtype != b.dtype:
        found = np.where((a < 0) | (b < 0), np.abs(a.astype("<f8") - b.astype("<f8")), found)
    return found


def _changed_long(a: Codec, b: Codec, one: Array, other: Array, left: Array, right: Array) -> Array:
    """Which values differ if float64 cannot represent one side exactly."""
    found: Array
    if a.kind == b.kind == "int":
        x, y = one.view(a.unit_dtype), other.view(b.unit_dtype)
        found = ((x < 0) != (y < 0)) | (_extended(x) != _extended(y))
        return found
    # The integer as a float has to equal the float, and the float as an integer has to equal the integer.
    codec, numbers, floats = (a, one.view(a.unit_dtype), right) if a.is_long else (b, other.view(b.unit_dtype), left)
    low, high = (-(2.0**63), 2.0**63) if codec.unit_dtype == "<i8" else (0.0, 2.0**64)
    inside = (floats >= low) & (floats < high)
    back = np.where(inside, floats, 0.0).astype(codec.unit_dtype)
    found = (left.view("<u8") != right.view("<u8")) | ~inside | (back != numbers)
    return found


def _extended(numbers: Array) -> Array:
    found: Array = numbers.astype("<i8" if numbers.dtype.kind == "i" else "<u8").view("<u8")
    return found
