"""Statistics of a tensor, accumulated over blocks of its bytes.

Totals are kept in float64, and the deviation is taken around the mean of each block, so that it is accurate even if the
mean is far larger (layer norms, biases, counters). For small dtypes the codes are counted, which is exact and fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ckpt_convert.analysis.stats.blocked_sums import LARGEST, Data, as_bytes, cache_blocks, moments, single_moments
from ckpt_convert.tensors import decode
from ckpt_convert.tensors.decode import Array, Codec, Scratch

_TOGETHER = 1 << 18
"""Codes of one np.bincount, whose cost and memory (8 bytes a bin) also grow with the number of possible codes."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Statistics of one tensor.

    ``count`` is the number of values: the elements; two for each complex one (its real and its imaginary part); 0 if
    the dtype cannot be decoded (F6, block-quantized ones). ``min``, ``max``, ``mean`` and ``std`` (of the population,
    as numpy's) are over the finite values, None if there are none. ``zeros`` counts zeros of either sign. 64-bit
    integers beyond 2**53 are rounded to the nearest float; mean and std of BF16 are accurate to six digits of the std.
    """

    count: int = 0
    nan: int = 0
    inf: int = 0
    zeros: int = 0
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None


class Summary:
    """Accumulates the statistics of a tensor, block by block; not to be shared between threads."""

    def __init__(self, dtype: str) -> None:
        self._codec = decode.codec_of(dtype)
        self._scratch = Scratch()
        self._tally: Array | None = None
        self._count = self._nan = self._inf = self._zeros = self._finite = 0
        self._min, self._max = math.inf, -math.inf
        self._base = self._mean = self._std = 0.0

    def add(self, data: Data) -> None:
        """Add the next block of the tensor's bytes, which holds whole elements."""
        codec = self._codec
        if codec is None:
            return
        if _is_counted(codec):
            self._count_codes(_tallied(codec, as_bytes(data)))
            return
        with np.errstate(all="ignore"):
            for _, raw in cache_blocks(codec, data):
                self._add_long(raw.view(codec.unit_dtype)) if codec.is_long else self._add(codec, raw)

    def merge(self, other: Summary) -> None:
        """Add everything that another summary has accumulated."""
        self._count, self._nan, self._inf = self._count + other._count, self._nan + other._nan, self._inf + other._inf
        self._zeros += other._zeros
        if other._tally is not None:
            self._count_codes(other._tally)
        if other._finite:
            self._join(other._finite, other._min, other._max, other._base, other._mean, other._std)

    def result(self) -> Stats:
        if self._codec is not None and self._tally is not None:
            return _of_tally(self._codec, self._tally)
        if not self._finite:
            return Stats(self._count, self._nan, self._inf, self._zeros)
        mean = min(max(float(self._base) + self._mean, self._min), self._max)
        # Adding 0.0 turns -0.0 into 0.0.
        bounds = self._min + 0.0, self._max + 0.0
        return Stats(self._count, self._nan, self._inf, self._zeros, *bounds, mean + 0.0, min(self._std, LARGEST))

    def _count_codes(self, tally: Array) -> None:
        self._tally = tally.copy() if self._tally is None else np.add(self._tally, tally, out=self._tally)

    def _add(self, codec: Codec, raw: Array) -> None:
        count = len(raw) // codec.nbytes * codec.values_per_unit
        values = decode.decode_values(codec, raw, self._scratch.take(0, codec.value_dtype, count))
        self._count += count
        low, high = float(np.minimum.reduce(values)), float(np.maximum.reduce(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            self._nan += int(np.count_nonzero(np.isnan(values)))
            self._inf += int(np.count_nonzero(np.isinf(values)))
            values = values[np.isfinite(values)]
            if not len(values):
                return
            low, high = float(values.min()), float(values.max())
        if low <= 0 <= high:
            is_zero = np.equal(values, 0, out=self._scratch.take(2, "?", len(values)))
            self._zeros += int(np.count_nonzero(is_zero))
        found = single_moments(values, low, high) if codec.dtype == "BF16" else None
        if found is None:
            wide = self._scratch.take(1, "<f8", len(values))
            np.copyto(wide, values)
            found = moments(wide, low, high)
        self._join(len(values), low, high, *found)

    def _add_long(self, codes: Array) -> None:
        """64-bit integers, as unsigned differences from the smallest of the block, which are exact."""
        low, high = int(codes.min()), int(codes.max())
        self._count += len(codes)
        self._zeros += len(codes) - int(np.count_nonzero(codes))
        wide = (codes.view("<u8") - np.uint64(low % (1 << 64))).astype("<f8")
        middle, mean, std = moments(wide, 0.0, float(high - low))
        self._join(len(codes), float(low), float(high), low, middle + mean, std)

    def _join(self, count: int, low: float, high: float, middle: float, mean: float, std: float) -> None:
        """Merge two groups by Chan's formula, with standard deviations, which do not overflow where variances would.

        The mean of the group is middle + mean; ours is kept relative to the middle of the first group, which may be an
        integer that no float represents.
        """
        if not self._finite:
            self._base = middle
        self._min, self._max = min(self._min, low), max(self._max, high)
        mine, both = self._finite, self._finite + count
        # Halves, because the means of two groups may be farther apart than the largest float.
        half = float(middle - self._base) / 2 + mean / 2 - self._mean / 2
        if mine:
            between = half * (2 * math.sqrt(mine / both) * math.sqrt(count / both))
            self._std = math.hypot(self._std * math.sqrt(mine / both), std * math.sqrt(count / both), between)
            self._mean += 2 * (half * (count / both))
        else:
            self._mean, self._std = mean, std
        self._finite = both


def _is_counted(codec: Codec) -> bool:
    """Whether counting codes is faster than adding values; for bfloat16, decoding is too cheap."""
    return codec.nbytes == 1 or codec.dtype == "F16"


def _tallied(codec: Codec, raw: Array) -> Array:
    """How often each code occurs; a byte that packs two values is one code."""
    if codec.nbytes == 2:
        return _counts(raw.view("<u2"), 1 << 16)
    if len(raw) < _TOGETHER:
        return _counts(raw, 256)
    whole = len(raw) & ~1
    pairs = _counts(raw[:whole].view("<u2"), 1 << 16).reshape(256, 256)  # two bytes at a time, which takes half as long
    found: Array = pairs.sum(0) + pairs.sum(1) + _counts(raw[whole:], 256)
    return found


def _counts(codes: Array, size: int) -> Array:
    counts = np.bincount(codes[:_TOGETHER], minlength=size)
    for start in range(_TOGETHER, len(codes), _TOGETHER):
        counts += np.bincount(codes[start : start + _TOGETHER], minlength=size)
    return counts


def _of_tally(codec: Codec, tally: Array) -> Stats:
    every = np.arange(len(tally), dtype=codec.unit_dtype.replace("i", "u")).view(np.uint8)
    with np.errstate(all="ignore"):  # the codes include signaling NaNs
        values = decode.decode_values(
            codec, every, np.empty(len(tally) * codec.values_per_unit, codec.value_dtype)
        ).astype(np.float64)
    counts = np.repeat(tally, codec.values_per_unit)
    is_there = (counts > 0) & np.isfinite(values)
    some, weights = values[is_there], counts[is_there]
    nan, inf = int(counts[np.isnan(values)].sum()), int(counts[np.isinf(values)].sum())
    total, zeros = int(counts.sum()), int(counts[values == 0].sum())
    if not len(some):
        return Stats(total, nan, inf, zeros)
    mean = float((some * weights).sum() / weights.sum())
    std = math.sqrt(float((weights * (some - mean) ** 2).sum() / weights.sum()))
    return Stats(total, nan, inf, zeros, float(some.min()) + 0.0, float(some.max()) + 0.0, mean + 0.0, std)
