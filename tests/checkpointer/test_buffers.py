"""Copies for a background save hold every bit of what they copy, large or small, and however it lies in memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ckpt_convert.checkpointer.save.buffers import CopyBuffers

SIZES = (0, 3, 1 << 10, (1 << 18) + 5)
DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64)


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def any_bits(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Values of every bit pattern that the dtype has room for, NaNs with payloads among them."""
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (rows, columns * dtype.itemsize), dtype=torch.uint8)
    return data.reshape(-1).view(dtype).reshape(rows, columns)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_is_copied(dtype: torch.dtype, size: int) -> None:
    given = {"plain": any_bits(size, 2, dtype), "transposed": any_bits(2, size, dtype).T}
    given |= {"apart": any_bits(size, 4, dtype)[:, ::2], "later": any_bits(size + 1, 2, dtype)[1:]}
    buffers = CopyBuffers()
    for _ in range(2):  # into new buffers, and into the same ones again
        copies = buffers.copy(given)
        assert {name: bits_of(copy) for name, copy in copies.items()} == {name: bits_of(t) for name, t in given.items()}
        assert all(copy.is_contiguous() and copy.shape == given[name].shape for name, copy in copies.items())
        given = {name: tensor.clone() for name, tensor in reversed(given.items())}


@pytest.mark.parametrize("rows", [2, 1 << 17])
def test_views_that_are_computed_when_they_are_read_are_copied_as_they_read(rows: int) -> None:
    values = any_bits(rows, 2, torch.int32).to(torch.complex64)
    given = {"conjugate": values.conj(), "negative": values.conj().imag, "parameter": nn.Parameter(values.real.clone())}
    copies = CopyBuffers().copy(given)
    for name, tensor in given.items():
        assert not copies[name].requires_grad
        assert torch.equal(copies[name], tensor.resolve_conj().resolve_neg()), name


def test_a_scalar_and_a_large_vector_are_copied() -> None:
    given = {"scalar": torch.tensor(0.1, dtype=torch.float64), "vector": torch.arange(1 << 18, dtype=torch.float32)}
    copies = CopyBuffers().copy(given)
    assert all(torch.equal(copies[name], tensor) for name, tensor in given.items())
