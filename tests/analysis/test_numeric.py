"""Statistics and differences, against what torch and numpy make of the same bytes in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_convert.analysis.stats import blocked_sums
from ckpt_convert.analysis.stats.numeric import Comparison, Delta, comparable
from ckpt_convert.analysis.stats.summary import Stats, Summary
from ckpt_convert.dtypes import DTYPES
from tests.helpers import bits

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0")
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
SIZES = (1, 2, 3, 255, blocked_sums.CHUNK - 1, blocked_sums.CHUNK, blocked_sums.CHUNK + 1, 3 * blocked_sums.CHUNK + 5)
F4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def noise(nbytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def as_torch(dtype: str, data: bytes) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[: len(data)]
    return flat.view(getattr(torch, DTYPES[dtype].torch))


def doubles(dtype: str, data: bytes) -> np.ndarray[Any, Any]:
    """The numbers as torch reads them; a complex one is two."""
    tensor = as_torch(dtype, data)
    if dtype == "U64":
        return np.frombuffer(data, np.uint64).astype(np.float64)
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double().numpy().reshape(-1)


def summarised(dtype: str, data: bytes, block: int = 1 << 20) -> Stats:
    summary = Summary(dtype)
    for start in range(0, len(data), block):
        summary.add(data[start : start + block])
    return summary.result()


def compared(dtype_a: str, a: bytes, dtype_b: str, b: bytes, block: int | None = None) -> Delta:
    """Block by block, ``block`` elements each."""
    comparison = Comparison(dtype_a, dtype_b)
    sizes = [DTYPES[dtype].bits for dtype in (dtype_a, dtype_b)]
    count = len(a) * 8 // sizes[0]
    for at in range(0, count, block or max(count, 1)):
        end = min(count, at + (block or count))
        one, other = (data[at * size // 8 : end * size // 8] for data, size in zip((a, b), sizes, strict=True))
        comparison.add(one, other, at)
    return comparison.result()


def assert_stats(found: Stats, numbers: np.ndarray[Any, Any]) -> None:
    finite = numbers[np.isfinite(numbers)]
    assert found.count == len(numbers)
    assert found.nan == np.isnan(numbers).sum()
    assert found.inf == np.isinf(numbers).sum()
    assert found.zeros == (numbers == 0).sum()
    if not len(finite):
        assert (found.min, found.max, found.mean, found.std) == (None, None, None, None)
        return
    assert (found.min, found.max) == (finite.min(), finite.max())
    # Scaled, so that numpy's own sums and squares stay in range.
    scale = np.abs(finite).max() or 1.0
    mean, std = (finite / scale).mean() * scale, (finite / scale).std() * scale
    assert found.mean == pytest.approx(mean, rel=1e-9, abs=1e-12 * scale)
    assert found.std == pytest.approx(std, rel=1e-9, abs=1e-14 * scale)


# -- one tensor


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS[:-1], "C64", "C128"])
@pytest.mark.parametrize("size", SIZES)
def test_any_bits_of_any_dtype(dtype: str, size: int) -> None:
    data = noise(size * DTYPES[dtype].bits // 8)
    assert_stats(summarised(dtype, data), doubles(dtype, data))


@pytest.mark.parametrize("dtype", [dtype for dtype in FLOATS if DTYPES[dtype].bits <= 16])
def test_every_code_of_a_small_float(dtype: str) -> None:
    codes = np.arange(1 << DTYPES[dtype].bits, dtype=f"<u{DTYPES[dtype].bits // 8}").tobytes()
    assert_stats(summarised(dtype, codes), doubles(dtype, codes))
    for code in range(0, len(codes), DTYPES[dtype].bits // 8):
        one = codes[code : code + DTYPES[dtype].bits // 8]
        if DTYPES[dtype].bits == 8 or code % 254 == 0:
            assert_stats(summarised(dtype, one), doubles(dtype, one))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8", "F16"])
def test_blocks_so_large_that_codes_are_counted_in_pairs(dtype: str) -> None:
    data = noise(1_200_002)
    assert_stats(summarised(dtype, data, 1 << 21), doubles(dtype, data))
    odd = data[: 1_200_001 if DTYPES[dtype].bits == 8 else None]
    assert_stats(summarised(dtype, odd, 700_000), doubles(dtype, odd))


def test_two_numbers_of_four_bits_lie_in_a_byte_the_first_in_the_low_bits() -> None:
    data = bytes(range(256))
    numbers = np.array([F4[code] for byte in data for code in (byte & 15, byte >> 4)])
    assert_stats(summarised("F4", data), numbers)
    assert summarised("F4", b"\x72").max == 6.0
    delta = compared("F4", b"\x72", "F4", b"\x32")  # (1, 6) and (1, 1.5)
    assert (delta.count, delta.differing, delta.max_abs, delta.max_ulp, delta.at, delta.first) == (2, 1, 4.5, 4, 1, 1)


def test_booleans() -> None:
    stats = summarised("BOOL", bytes([0, 1, 1, 0, 1]))
    assert (stats.count, stats.zeros, stats.min, stats.max, stats.mean) == (5, 2, 0.0, 1.0, 0.6)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if not dtype.startswith("F6")])
def test_nothing_at_all(dtype: str) -> None:
    assert summarised(dtype, b"") == Stats()
    assert compared(dtype, b"", dtype, b"") == Delta(
        max_abs=0.0, mean_abs=0.0, max_ulp=0 if dtype in (*FLOATS, "F4", "C64", "C128") else None
    )


def test_only_nan_and_infinity() -> None:
    data = np.array([np.nan, np.inf, -np.inf], np.float32).tobytes()
    assert summarised("F32", data) == Stats(count=3, nan=1, inf=2)


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2", "Q4_K"])
def test_what_cannot_be_taken_apart_has_no_statistics(dtype: str) -> None:
    assert summarised(dtype, b"abc") == Stats()
    comparison = Comparison(dtype, dtype)
    comparison.add(b"abc", b"abd", 0)
    assert comparison.result() == Delta(count=3, differing=1)
    assert not comparable(dtype, "F32")
    with pytest.raises(ValueError, match=f"{dtype} and F32 cannot be compared"):
        Comparison(dtype, "F32")


@pytest.mark.parametrize("dtype", ["F64", "F32", "I64", "I32", "U64"])
def test_a_mean_far_larger_than_the_spread(dtype: str) -> None:
    """Sums of squares alone would leave no digit of it; the integers beyond 2**53 are not even floats."""
    count = 3 * blocked_sums.CHUNK + 7
    steps = np.random.default_rng(0).integers(0, 5, count)
    start = {"F64": 1e12, "F32": 8e6, "I32": 2_000_000_000}.get(dtype, 2**62 + 1)
    data = (np.array(start, DTYPES[dtype].numpy) + steps.astype(DTYPES[dtype].numpy)).tobytes()
    found = summarised(dtype, data)
    assert found.std == pytest.approx(steps.std(), rel=1e-9)
    assert found.mean == pytest.approx(float(start) + steps.mean(), rel=1e-15)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3"])
@pytest.mark.parametrize("value", [0.1, 1.0, -300.0])
def test_equal_numbers_have_no_spread(dtype: str, value: float) -> None:
    tensor = torch.full((100_001,), value).to(getattr(torch, DTYPES[dtype].torch))
    found = summarised(dtype, bits(tensor), 1 << 16)
    exact = float(tensor[0])
    assert (found.min, found.max, found.mean, found.std, found.zeros) == (exact, exact, exact, 0.0, 0)


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-160, 1e160, 1e300, 1.7e308])
def test_squares_out_of_range(scale: float) -> None:
    numbers = scale * np.random.default_rng(0).uniform(-1, 1, 50_000)
    found = summarised("F64", numbers.tobytes())
    assert found.std is not None
    precision = 1e-9 if scale > 1e-310 else 0.01  # subnormal numbers have few digits
    assert found.std / scale == pytest.approx((numbers / scale).std(), rel=precision)
    delta = compared("F64", numbers.tobytes(), "F64", (numbers / 2).tobytes())
    if scale < 1e305:  # the norm itself is in range
        assert delta.relative_norm == pytest.approx(0.5, rel=precision)
    assert math.isfinite(delta.max_abs or 0.0)


def test_blocks_of_any_size_and_merged_summaries_say_the_same() -> None:
    numbers = np.random.default_rng(0).normal(3, 2, 100_003).astype(np.float32)
    numbers[[5, 70_000]] = np.nan, np.inf
    data = numbers.tobytes()
    for block in (4, 4000, 4 * blocked_sums.CHUNK, 1 << 20):
        assert_stats(
            summarised("F32", data[:100_000] if block == 4 else data, block),
            numbers[: 25_000 if block == 4 else None].astype(np.float64),
        )
    halves = [Summary("F32"), Summary("F32"), Summary("F32")]
    halves[0].add(data[:40_000])
    halves[1].add(data[40_000:])
    halves[0].merge(halves[1])
    halves[2].merge(halves[0])
    halves[2].merge(Summary("F32"))
    assert_stats(halves[2].result(), numbers.astype(np.float64))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3", "I64", "U8"])
def test_merged_summaries_count_all_of_both(dtype: str) -> None:
    data = bytes(16) + noise(4000)
    one, other = Summary(dtype), Summary(dtype)
    one.add(data[:2000])
    other.add(data[2000:] + bytes(24))
    one.merge(other)
    assert_stats(one.result(), doubles(dtype, data + bytes(24)))


def test_blocks_as_far_apart_as_floats_can_be() -> None:
    largest = np.finfo(np.float64).max
    found = summarised("F64", np.array([-largest, largest, largest, -largest]).tobytes(), 8)
    assert (found.min, found.max) == (-largest, largest)
    assert found.mean == pytest.approx(0, abs=1e-9 * largest)
    assert found.std == pytest.approx(largest)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(width=32), max_size=60), st.integers(1, 30))
def test_any_floats_in_any_blocks(numbers: list[float], block: int) -> None:
    data = np.array(numbers, np.float32).tobytes()
    assert_stats(summarised("F32", data, 4 * block), np.array(numbers, np.float64))


# -- two tensors


def ordered(tensor: torch.Tensor) -> torch.Tensor:
    """The place of each value among those of its dtype, made by counting: zeros are one value."""
    every = torch.arange(1 << 8 * tensor.element_size(), dtype=torch.int64)
    small = every.to(torch.uint8 if tensor.element_size() == 1 else torch.uint16).view(tensor.dtype).double()
    known = small[torch.isfinite(small)].unique()  # sorted
    return torch.searchsorted(known, tensor.double())


def assert_delta(found: Delta, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
    """``a`` and ``b`` in float64, of which the bits count (NaNs aside)."""
    differ = (a.view(np.uint64) != b.view(np.uint64)) & ~(np.isnan(a) & np.isnan(b))
    finite = np.isfinite(a) & np.isfinite(b)
    assert found.count == len(a)
    assert found.nan_mismatch == (~finite & differ).sum()
    gap = np.abs(a[finite] - b[finite])
    assert found.max_abs == pytest.approx(gap.max(initial=0.0), rel=1e-7)
    assert found.mean_abs == pytest.approx(gap.mean() if len(gap) else 0.0, rel=1e-5)
    reference = np.linalg.norm(a[finite])
    if reference:
        assert found.relative_norm == pytest.approx(np.linalg.norm(gap) / reference, rel=1e-5)
    else:
        assert found.relative_norm is None
    if gap.any():
        assert found.at is not None
        assert abs(a[found.at] - b[found.at]) == found.max_abs
    else:
        assert found.at is None
    if not (np.isnan(a) & np.isnan(b)).any():
        assert found.differing == differ.sum()
        assert found.first == (differ.argmax() if differ.any() else None)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"])
@pytest.mark.parametrize("block", [None, 1000])
def test_any_two_small_floats(dtype: str, block: int | None) -> None:
    size = DTYPES[dtype].bits // 8
    a, b = noise(70_000 * size, 1), noise(70_000 * size, 2)
    found = compared(dtype, a, dtype, b, block)
    x, y = doubles(dtype, a), doubles(dtype, b)
    assert_delta(found, x, y)
    codes = [np.frombuffer(data, f"<u{size}") for data in (a, b)]
    assert found.differing == (codes[0] != codes[1]).sum()
    finite = torch.from_numpy(np.isfinite(x) & np.isfinite(y))
    places = [ordered(as_torch(dtype, data)[finite]) for data in (a, b)]
    assert found.max_ulp == int((places[0] - places[1]).abs().max())


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F8_E5M2"])
@pytest.mark.parametrize("share", [0, 0.001, 0.5])
def test_steps_between_values_of_which_some_have_other_signs(dtype: str, share: float) -> None:
    random = np.random.default_rng(3)
    size = DTYPES[dtype].bits // 8
    magnitudes = random.integers(0, 1 << (8 * size - 3), (2, 4000))
    magnitudes[1] = np.minimum(magnitudes[0] + random.integers(0, 9, 4000), (1 << (8 * size - 3)) - 1)
    signs = np.where(random.random((2, 4000)) < np.array([[0.5], [0.0]]), -1, 1)
    signs[1] = np.where(random.random(4000) < share, -signs[0], signs[0])
    codes = (magnitudes + (signs < 0) * (1 << (8 * size - 1))).astype(f"<u{size}")
    found = compared(dtype, codes[0].tobytes(), dtype, codes[1].tobytes())
    assert found.max_ulp == int(np.abs(signs[0] * magnitudes[0] - signs[1] * magnitudes[1]).max())


@pytest.mark.parametrize("dtype", ["F64", "F32", "I16", "I8", "U16", "U8", "I32", "U32"])
@pytest.mark.parametrize("block", [None, 1000])
def test_any_two_others(dtype: str, block: int | None) -> None:
    a, b = (bytearray(noise(70_000 * DTYPES[dtype].bits // 8, seed)) for seed in (1, 2))
    if dtype == "F64":  # sums of numbers near the largest overflow in numpy
        a, b = (bytearray(np.random.default_rng(seed).normal(size=70_000).tobytes()) for seed in (1, 2))
    assert_delta(compared(dtype, a, dtype, b, block), doubles(dtype, a), doubles(dtype, b))


@pytest.mark.parametrize(("dtype", "number"), [("F64", np.float64), ("F32", np.float32)])
def test_steps_between_large_floats(dtype: str, number: Any) -> None:
    cases = [
        (1.0, np.nextafter(number(1), number(2)), 1),
        (1.0, np.nextafter(number(1), number(0)), 1),
        (0.0, -0.0, 0),
        (0.0, np.nextafter(number(0), number(1)), 1),
        (np.nextafter(number(0), number(-1)), np.nextafter(number(0), number(1)), 2),
        (np.finfo(number).max, np.finfo(number).min, 2 * int(np.finfo(number).max.view(f"u{number().nbytes}"))),
    ]
    for one, other, steps in cases:
        a, b = np.array([one], number).tobytes(), np.array([other], number).tobytes()
        delta = compared(dtype, a, dtype, b)
        assert (delta.differing, delta.max_ulp) == (1, steps)
        assert compared(dtype, b, dtype, a).max_ulp == steps


def test_zeros_of_both_signs_differ_by_nothing() -> None:
    for dtype in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"):
        zero, negative = (
            bits(torch.tensor([1.0, value]).to(getattr(torch, DTYPES[dtype].torch))) for value in (0.0, -0.0)
        )
        found = compared(dtype, zero, dtype, negative)
        assert found == Delta(
            count=2, differing=1, max_abs=0.0, mean_abs=0.0, relative_norm=0.0, max_ulp=0, at=None, first=1
        )


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_nan_and_infinity_do_not_poison_the_rest(dtype: str) -> None:
    inf, nan = math.inf, math.nan
    a, b = (
        bits(torch.tensor(values, dtype=torch.float64).to(getattr(torch, DTYPES[dtype].torch)))
        for values in ([1.0, nan, 2.0, inf, inf, 4.0, nan, inf, 8.0], [1.0, 2.0, nan, inf, -inf, 5.0, nan, nan, inf])
    )
    found = compared(dtype, a, dtype, b)
    assert (found.count, found.differing, found.nan_mismatch) == (9, 6, 5)
    assert (found.max_abs, found.mean_abs, found.at, found.first) == (1.0, 0.5, 5, 1)
    assert found.relative_norm == pytest.approx(1 / math.sqrt(17))


def test_nans_are_equal_only_in_every_bit() -> None:
    one, other = (np.array([0x7FC0, 0x3F80, payload], "<u2").tobytes() for payload in (0x7FC1, 0xFFC1))
    assert compared("BF16", one, "BF16", one).differing == 0
    found = compared("BF16", one, "BF16", other)
    assert (found.differing, found.nan_mismatch, found.max_abs, found.first) == (1, 0, 0.0, 2)


def test_equal_tensors_of_any_bits() -> None:
    for dtype in (*FLOATS, *INTEGERS[:-1], "F4", "C64"):
        data = noise(240_000)
        found = compared(dtype, data, dtype, data, 10_000)
        assert (found.differing, found.max_abs, found.nan_mismatch, found.at, found.first) == (0, 0.0, 0, None, None)
        assert found.relative_norm == 0.0


@pytest.mark.parametrize("number", ["F32", "BF16", "F16", "F8_E5M2"])
def test_the_norm_counts_the_equal_blocks_too(number: str) -> None:
    tensor = torch.randn(300_000, generator=torch.Generator().manual_seed(0)).to(getattr(torch, DTYPES[number].torch))
    other = tensor.clone()
    other[250_000] = 3.0
    found = compared(number, bits(tensor), number, bits(other), 50_000)
    x, y = tensor.double(), other.double()
    assert found.relative_norm == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-5)
    assert (found.first, found.at, found.differing) == (250_000, 250_000, 1)


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        ("BF16", "F32"),
        ("F16", "F32"),
        ("F8_E4M3", "BF16"),
        ("F32", "F64"),
        ("I8", "F32"),
        ("I32", "F32"),
    ],
)
def test_other_dtypes_are_compared_after_an_exact_upcast(narrow: str, wide: str) -> None:
    integer = narrow.startswith("I")
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 50
    small = values.to(getattr(torch, DTYPES[narrow].torch))
    exact = small.double().to(getattr(torch, DTYPES[wide].torch))
    same = compared(narrow, bits(small), wide, bits(exact), 7_000)
    assert (same.differing, same.max_abs, same.max_ulp) == (0, 0.0, None)
    large = values.to(getattr(torch, DTYPES[wide].torch))
    found = compared(narrow, bits(small), wide, bits(large), 7_000)
    assert_delta(found, small.double().numpy(), large.double().numpy())
    assert found.differing > 0 or not integer


def test_long_integers_are_compared_exactly() -> None:
    a = np.array([2**62, 2**53, -(2**63), 5, 2**63 - 1], np.int64)
    b = np.array([2**62 + 1, 2**53 + 1, 2**63 - 1, 5, 2**63 - 1], np.int64)
    found = compared("I64", a.tobytes(), "I64", b.tobytes())
    assert (found.differing, found.max_abs, found.at, found.first, found.max_ulp) == (3, 2.0**64, 2, 0, None)
    assert compared("I64", a[:2].tobytes(), "I64", b[:2].tobytes()).max_abs == 1.0
    assert compared("U64", a[:2].tobytes(), "U64", b[:2].tobytes()).max_abs == 1.0


def test_long_integers_and_others() -> None:
    signed = np.array([2**53 + 1, -1, 7, 2**62, 0], np.int64).tobytes()
    unsigned = np.array([2**53 + 1, 2**64 - 1, 7, 2**62 + 1, 0], np.uint64).tobytes()
    found = compared("I64", signed, "U64", unsigned)
    assert (found.differing, found.max_abs, found.first) == (2, 2.0**64, 1)
    floats = np.array([2.0**53, -1.0, 7.5, 2.0**62, 0.0], np.float64).tobytes()
    for found in (compared("I64", signed, "F64", floats), compared("F64", floats, "I64", signed)):
        assert (found.differing, found.max_abs, found.first, found.at) == (2, 0.5, 0, 2)
    odd = np.array([np.nan, np.inf, 1e300, -0.0], np.float64).tobytes()
    found = compared("I64", np.array([0, 0, 2**63 - 1, 0], np.int64).tobytes(), "F64", odd)
    assert (found.differing, found.nan_mismatch, found.max_abs) == (4, 2, 1e300)
    small = np.array([1, -1, 7, 0, 0], np.int32).tobytes()
    found = compared("I32", small, "I64", signed)
    assert (found.differing, found.first) == (2, 0)


def test_complex_numbers_are_as_far_apart_as_their_parts() -> None:
    a = np.array([1 + 1j, 2 + 2j, 3 + 3j], np.complex64)
    b = np.array([1 + 1j, 2.5 + 4j, 3 + 3j], np.complex64)
    found = compared("C64", a.tobytes(), "C64", b.tobytes())
    assert (found.count, found.differing, found.max_abs, found.at, found.first) == (3, 1, 2.0, 1, 1)
    assert found.relative_norm == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a))
    wide = compared("C64", a.tobytes(), "C128", b.astype(np.complex128).tobytes())
    assert (wide.count, wide.differing, wide.max_abs) == (3, 1, 2.0)
    assert not comparable("C64", "F32")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), max_size=50), st.integers(1, 60))
def test_any_two_tensors_in_any_blocks(pairs: list[tuple[float, float]], block: int) -> None:
    a = np.array([one for one, _ in pairs], np.float32)
    b = np.array([other for _, other in pairs], np.float32)
    found = compared("F32", a.tobytes(), "F32", b.tobytes(), block)
    assert_delta(found, a.astype(np.float64), b.astype(np.float64))
    again = compared("F32", a.tobytes(), "F64", b.astype(np.float64).tobytes(), block)
    assert again.max_abs == pytest.approx(found.max_abs, rel=1e-7)
    assert (again.nan_mismatch, again.differing) == (found.nan_mismatch, found.differing)
