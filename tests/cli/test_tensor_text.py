"""A tensor is printed character for character as torch prints it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_convert.cli.tensor_text import printed_part, torch_text, values_of
from ckpt_convert.dtypes import FROM_TORCH
from ckpt_convert.tensors.header import StoredTensor
from ckpt_convert.tensors.lazy import from_source

DTYPES = [name for name, dtype in FROM_TORCH.items() if dtype.bits >= 8]
SHAPES = [(), (1,), (3,), (7,), (40,), (0,), (2, 0), (3, 4), (7, 9), (1, 1, 1), (2, 3, 4), (2, 8, 3), (1001,), (1000,)]
SHAPES += [(40, 40), (7, 7, 30), (6, 300), (2, 3, 200), (1200, 1), (5, 6, 6, 6)]


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def printed(tensor: torch.Tensor, dtype: str) -> str:
    """The tensor as the module prints it, reading only what it asks for."""
    part = printed_part(from_source(0, tuple(tensor.shape)))
    size, flat = tensor.element_size(), as_bytes(tensor)
    out = bytearray(part.size * size)
    from ckpt_convert.tensors.gather import StridedReader

    class File:
        class reader:  # noqa: N801
            @staticmethod
            def readinto(offset: int, buffer: memoryview) -> None:
                buffer[:] = flat[offset : offset + len(buffer)]

    stored = StoredTensor("x", dtype, tuple(tensor.shape), 0)
    out[:] = StridedReader([(File, stored)]).read(part, dtype)
    return torch_text(values_of(bytes(out), dtype), tensor.shape, dtype)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], scale: float) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    if dtype == torch.float8_e8m0fnu:
        return torch.randint(0, 255, shape, dtype=torch.uint8).view(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64) * scale
        return wide.to(dtype)
    most = min(torch.iinfo(dtype).max, int(100 * scale) + 2)
    low = 0 if torch.iinfo(dtype).min == 0 else -most
    return torch.randint(low, most, shape, dtype=torch.int64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_shape(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(len(shape))
    for scale in (1.0, 1e-6, 300.0):
        tensor = random_tensor(getattr(torch, name), shape, scale)
        assert printed(tensor, FROM_TORCH[name].name) == str(tensor)


@pytest.mark.parametrize(
    "name", ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "complex64", "complex128"]
)
@pytest.mark.parametrize(
    "values",
    [
        [float("nan"), 1.5],
        [float("inf"), float("-inf"), 2.0],
        [float("nan"), float("inf")],
        [0.0, -0.0],
        [1.0, 2.0, -3.0],
        [1e-5, 1.0],
        [1e4, 1.0],
        [3e4, 2.0, float("inf")],
        [-1e-5],
        [0.5, 0.25, 1000.0],
    ],
)
def test_values_that_are_odd(name: str, values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float64).to(getattr(torch, name))
    assert printed(tensor, FROM_TORCH[name].name) == str(tensor)
    assert printed(tensor[0], FROM_TORCH[name].name) == str(tensor[0])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=30))
def test_any_floats(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    assert printed(tensor, "F32") == str(tensor)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.complex_numbers(allow_nan=True), min_size=1, max_size=9))
def test_any_complex_numbers(values: list[complex]) -> None:
    tensor = torch.tensor(values, dtype=torch.complex128)
    assert printed(tensor, "C128") == str(tensor)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=9))
def test_large_integers(values: list[int]) -> None:
    tensor = torch.tensor(values, dtype=torch.uint64)
    assert printed(tensor, "U64") == str(tensor)


def test_of_a_large_tensor_only_the_edges_are_asked_for() -> None:
    assert printed_part(from_source(0, (1 << 20, 1 << 20))).size == 36
    assert printed_part(from_source(0, (2, 1 << 30, 5))).size == 2 * 6 * 5
