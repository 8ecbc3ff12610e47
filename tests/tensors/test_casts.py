"""Casts give torch's bits: every code of the narrow dtypes, and what lies at and beside every boundary of the wide."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from ckpt_convert.dtypes import CAST_FROM, CASTABLE, DTYPES
from ckpt_convert.tensors.casts import Caster

Array = np.ndarray[Any, Any]

PAIRS = [(source, target) for source in CAST_FROM for target in CASTABLE if source != target]
LOW_HALVES = (
    0,
    1,
    0xFFF,
    0x1000,
    0x1001,
    0x2FFF,
    0x3000,
    0x3001,
    0x5000,
    0x7000,
    0x7FFF,
    0x8000,
    0x8001,
    0xF000,
    0xFFFF,
)
"""The lower bits of float32 at which a 16-bit dtype's rounding changes: ties, and their neighbors."""


@cache
def codes(dtype: str) -> Array:
    """Every code of 8 or 16 bits; of float32 every upper half with each of LOW_HALVES, and random ones; of float64
    those, their neighbors, what is half-way between two float32 and its neighbors, and random ones."""
    bits, random = DTYPES[dtype].bits, np.random.default_rng(7)
    if bits <= 16:
        return np.arange(1 << bits, dtype=f"<u{bits // 8}")
    if bits == 32:
        upper = np.arange(1 << 16, dtype="<u4") << 16
        return np.concatenate([*(upper | low for low in LOW_HALVES), random.integers(0, 1 << 32, 1 << 20, "<u4")])
    with np.errstate(invalid="ignore"):
        single = codes("F32").view("<f4").astype("<f8").view("<u8")
    offsets = (0, 1, -1, 1 << 28, (1 << 28) - 1, (1 << 28) + 1)
    return np.concatenate(
        [*(single + np.uint64(by % (1 << 64)) for by in offsets), random.integers(0, 1 << 64, 1 << 20, "<u8")]
    )


def by_torch(given: Array, source: str, target: str) -> tuple[Array, int]:
    """What torch makes of the codes, and how many finite ones it makes infinite."""
    elements = torch.from_numpy(given.view(np.uint8)).view(getattr(torch, DTYPES[source].torch))
    made = elements.to(getattr(torch, DTYPES[target].torch))
    wide = elements if DTYPES[source].bits > 8 else elements.float()
    overflowed = int((torch.isinf(made) & torch.isfinite(wide)).sum())
    return made.view(torch.uint8).numpy().view(f"<u{made.dtype.itemsize}"), overflowed


def is_nan(made: Array, dtype: str) -> Array:
    tensor = torch.from_numpy(made.view(np.uint8)).view(getattr(torch, DTYPES[dtype].torch))
    return torch.isnan(tensor).numpy()


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda name: name)
def test_a_cast_has_the_bits_of_torch(source: str, target: str) -> None:
    """On a processor whose NaNs are others, a NaN has to become a NaN."""
    given = codes(source)
    made, overflowed = Caster().cast(given.view(np.uint8), source, target)
    expected, count = by_torch(given, source, target)
    found = made.view(expected.dtype)
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        nan = is_nan(expected, target)
        assert np.array_equal(nan, is_nan(found, target))
        found, expected = found[~nan], expected[~nan]
    assert np.array_equal(found, expected)
    assert overflowed == count


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda name: name)
def test_an_element_is_cast_the_same_whatever_lies_beside_it(source: str, target: str) -> None:
    """Unlike torch, which makes other NaNs of what is left over at the end of a tensor."""
    caster, item = Caster(), DTYPES[source].bits // 8
    given = np.resize(codes(source)[:: 1 if item < 4 else 97], (1 << 17) + 300)
    whole = caster.cast(given.view(np.uint8), source, target)[0].copy()
    width = DTYPES[target].bits // 8
    for start, stop in ((0, 1), (5, 12), (300, 300 + (1 << 17)), (1, 1 << 17)):
        part, _ = caster.cast(given[start:stop].view(np.uint8), source, target)
        assert np.array_equal(part, whole[start * width : stop * width])


def test_no_elements_are_cast_to_none() -> None:
    made, overflowed = Caster().cast(np.empty(0, np.uint8), "F32", "BF16")
    assert (len(made), overflowed) == (0, 0)
