"""Sums over blocks of a tensor that fit the cache, in float64 and in reused buffers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ckpt_convert.tensors.decode import CHUNK, Array, Codec

Data = bytes | bytearray | memoryview | np.ndarray[Any, Any]

LARGEST = float(np.finfo(np.float64).max)

_RUN = 1 << 13
"""Values of one dot product: for more than 10,000 BLAS starts its own threads, which would compete with the workers."""

_SQUARABLE = (1e-140, 1e140)
"""Magnitudes whose squares neither overflow nor underflow in float64."""

_CANCELLED = 1e-3
"""The remaining share of a sum of squares, after subtracting the mean, at which too many digits are lost."""

_SHORT = 1 << 8
_ONES = np.ones(_SHORT, np.float32)
_SINGLE = (1e-12, 1e15)
"""Magnitudes whose squares, and their sum over a block, fit float32."""


def cache_blocks(codec: Codec, data: Data) -> Iterator[tuple[int, Array]]:
    """(index of the first element, bytes) of each cache-sized part of a block."""
    raw = as_bytes(data)
    step = CHUNK // codec.values_per_unit * codec.nbytes
    for start in range(0, len(raw), step):
        yield start // codec.nbytes * codec.values_per_unit // codec.values_per_element, raw[start : start + step]


def as_bytes(data: Data) -> Array:
    return data.reshape(-1).view(np.uint8) if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)


def total(numbers: Array) -> float:
    """The sum; for float32 to six digits of the sum of the magnitudes."""
    if numbers.dtype == np.float32:
        # As matrix products, which BLAS sums three times as fast; short ones, so that rounding errors stay small.
        whole = len(numbers) - len(numbers) % _SHORT
        runs = np.matmul(numbers[:whole].reshape(-1, _SHORT), _ONES)
        found = float(np.add.reduce(runs, dtype=np.float64) + np.add.reduce(numbers[whole:], dtype=np.float64))
    else:
        found = float(np.add.reduce(numbers))
    return found if math.isfinite(found) else float(np.add.reduce(numbers, dtype=np.float64))


def squares(numbers: Array) -> float:
    """The sum of the squares; to five digits for float32."""
    whole = len(numbers) - len(numbers) % _RUN
    runs, rest = numbers[:whole], numbers[whole:]
    found = np.matmul(runs.reshape(-1, 1, _RUN), runs.reshape(-1, _RUN, 1))
    return float(np.add.reduce(found, None)) + float(np.dot(rest, rest))


def norm(numbers: Array) -> float:
    """The Euclidean norm of finite values (to five digits for float32), even if their squares are out of range."""
    found = squares(numbers)
    low, high = (1e-30, 1e38) if numbers.dtype == np.float32 else (_SQUARABLE[0] ** 2, _SQUARABLE[1] ** 2)
    if low * len(numbers) < found < high:
        return math.sqrt(found)
    numbers = numbers.astype(np.float64)
    largest = float(np.abs(numbers).max(initial=0.0))
    if largest in (0, math.inf) or math.isnan(largest):
        return largest
    _, exponent = math.frexp(largest)
    return _scaled(math.sqrt(squares(np.ldexp(numbers, -exponent))), exponent)


def single_moments(numbers: Array, low: float, high: float) -> tuple[float, float, float] | None:
    """``moments`` of float32 values, to six digits; None if that takes float64."""
    if not _SINGLE[0] < max(-low, high) < _SINGLE[1]:
        return None
    count, sum1, sum2 = len(numbers), total(numbers), squares(numbers)
    spread = sum2 - sum1 * sum1 / count
    return (0.0, sum1 / count, math.sqrt(spread / count)) if spread > sum2 / 2 else None


def moments(numbers: Array, low: float, high: float) -> tuple[float, float, float]:
    """The mean as two terms c + m, and the deviation, of finite float64 values between ``low`` and ``high``.

    c keeps what m would lose by rounding if the mean is far larger than the deviation. Overwrites the values.
    """
    largest, exponent = max(-low, high), 0
    if not _SQUARABLE[0] < largest < _SQUARABLE[1]:
        if low == high:
            return 0.0, low, 0.0
        _, exponent = math.frexp(largest)
        np.ldexp(numbers, -exponent, out=numbers)
    elif low == high:
        return low, 0.0, 0.0
    count = len(numbers)
    sum1, sum2 = total(numbers), squares(numbers)
    middle, mean, spread = 0.0, sum1 / count, sum2 - sum1 * sum1 / count
    if spread <= _CANCELLED * sum2:
        middle = mean
        np.subtract(numbers, middle, out=numbers)
        rest = total(numbers)
        mean, spread = rest / count, squares(numbers) - rest * rest / count
    return _scaled(middle, exponent), _scaled(mean, exponent), _scaled(math.sqrt(max(spread, 0.0) / count), exponent)


def _scaled(number: float, exponent: int) -> float:
    try:
        return math.ldexp(number, exponent)
    except OverflowError:
        return math.copysign(math.inf, number)
