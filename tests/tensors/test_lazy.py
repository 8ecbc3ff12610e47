"""Lazy tensors against numpy: every step, and every way of cutting, gives the elements that numpy gives."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_convert.tensors.lazy import LazyTensor, concat, from_source, row_major_strides, stack


def evaluate(tensor: LazyTensor, *sources: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """The elements, moved one by one as ``copies`` says; every element has to be written once."""
    out = np.full(tensor.size, -1)
    for copy in tensor.copies():
        flat = sources[copy.source].reshape(-1)
        for index in np.ndindex(*(count for count, _, _ in copy.dims)):
            source = copy.source_offset + sum(i * dim[1] for i, dim in zip(index, copy.dims, strict=True))
            target = copy.target_offset + sum(i * dim[2] for i, dim in zip(index, copy.dims, strict=True))
            assert out[target] == -1
            out[target] = flat[source]
    assert (out >= 0).all()
    return out.reshape(tensor.shape)


def numbers(*shape: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.arange(prod(shape)).reshape(shape)


def interleave(array: np.ndarray, heads: int) -> np.ndarray:  # type: ignore[type-arg]
    half = array.shape[0] // heads // 2
    return array.reshape(heads, 2, half, -1).transpose(0, 2, 1, 3).reshape(array.shape)


def lazily(tensor: LazyTensor, heads: int) -> LazyTensor:
    return tensor.reorder(0, (heads, 2, tensor.shape[0] // heads // 2), (0, 2, 1))


def back(tensor: LazyTensor, heads: int) -> LazyTensor:
    return tensor.reorder(0, (heads, tensor.shape[0] // heads // 2, 2), (0, 2, 1))


@pytest.mark.parametrize(("heads", "head_dim", "dim"), [(12, 6, 5), (4, 10, 3), (1, 8, 1), (3, 2, 4)])
def test_rope_order(heads: int, head_dim: int, dim: int) -> None:
    array = numbers(heads * head_dim, dim)
    assert (evaluate(lazily(from_source(0, array.shape), heads), array) == interleave(array, heads)).all()


def test_a_step_and_its_inverse_are_a_plain_copy() -> None:
    tensor = back(lazily(from_source(3, (72, 5)), 12), 12)
    assert tensor.contiguous_source == (3, 0)
    assert lazily(from_source(3, (72, 5)), 12).contiguous_source is None


@given(st.data())
def test_narrow_at_any_place(data: st.DataObject) -> None:
    array = numbers(24, 5)
    tensor = lazily(from_source(0, array.shape), 4)
    expected = interleave(array, 4)
    start = data.draw(st.integers(0, 24))
    size = data.draw(st.integers(0, 24 - start))
    assert (evaluate(tensor.narrow(0, start, size), array) == expected[start : start + size]).all()
    left = data.draw(st.integers(0, 4))
    width = data.draw(st.integers(0, 5 - left))
    cut = tensor.narrow(0, start, size).narrow(1, left, width)
    assert (evaluate(cut, array) == expected[start : start + size, left : left + width]).all()


@given(st.integers(1, 200), st.permutations([0, 1, 2]))
def test_blocks_of_any_size_are_contiguous_and_in_order(most: int, order: list[int]) -> None:
    array = numbers(4, 6, 5)
    tensor = from_source(0, array.shape).permute(order)
    expected = array.transpose(order).reshape(-1)
    at = 0
    for offset, block in tensor.blocks(most):
        assert offset == at
        assert block.size <= most
        at += block.size
        assert (evaluate(block, array).reshape(-1) == expected[offset:at]).all()
    assert at == array.size


def test_blocks_keep_groups_whole_where_they_can() -> None:
    tensor = lazily(from_source(0, (72, 5)), 12)
    assert {block.shape[0] % 6 for _, block in tensor.blocks(100)} == {0}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("axis", [0, 1])
def test_cut_over_ranks_and_joined_again(ranks: int, axis: int) -> None:
    array = numbers(24, 8)
    tensor = lazily(from_source(0, array.shape), 4)
    step = array.shape[axis] // ranks
    parts = [tensor.narrow(axis, rank * step, step) for rank in range(ranks)]
    for part, expected in zip(parts, np.split(interleave(array, 4), ranks, axis), strict=True):
        assert (evaluate(part, array) == expected).all()
    assert (evaluate(back(concat(parts, axis), 4), array) == array).all()


def test_joined_from_several_sources() -> None:
    arrays = [numbers(6, 4), numbers(6, 4) + 100]
    whole = concat([from_source(0, (6, 4)), from_source(1, (6, 4))], 0)
    expected = interleave(np.concatenate(arrays), 2)
    assert (evaluate(lazily(whole, 2), *arrays) == expected).all()


def test_strided_sources() -> None:
    array = numbers(6, 4)
    tensor = from_source(0, (4, 6), strides=(1, 4))
    assert (evaluate(tensor, array) == array.T).all()
    assert tensor.permute((1, 0)).contiguous_source == (0, 0)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (1, 1, 1)])
def test_scalars_and_empty_tensors(shape: tuple[int, ...]) -> None:
    tensor = from_source(0, shape)
    assert evaluate(tensor, numbers(*shape) if shape else np.array(0)).shape == shape
    assert sum(block.size for _, block in tensor.blocks(4)) == prod(shape)
    assert tensor.contiguous_source == (0, 0)


def test_what_cannot_be_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a multiple of groups of 6"):
        from_source(0, (8, 2)).reorder(0, (1, 2, 3), (0, 2, 1))
    with pytest.raises(ValueError, match="must stay first"):
        from_source(0, (12, 2)).reorder(0, (2, 2, 3), (1, 0, 2))
    with pytest.raises(ValueError, match=r"\[4, 6\] cannot be reshaped to \[5, 5\]"):
        from_source(0, (4, 6)).reshape((5, 5))


def test_groups_that_were_cut_anywhere_are_reordered_all_the_same() -> None:
    top, bottom = numbers(37, 5), numbers(35, 5) + 1000
    whole = np.concatenate([top, bottom])
    torn = concat([from_source(0, top.shape), from_source(1, bottom.shape)], 0)
    assert (evaluate(lazily(torn, 12), top, bottom) == interleave(whole, 12)).all()
    assert (evaluate(back(lazily(torn, 12), 12), top, bottom) == whole).all()


@given(st.data())
def test_any_steps_give_what_numpy_gives(data: st.DataObject) -> None:
    sizes = st.sampled_from([1, 2, 3, 4, 6])
    shape = tuple(data.draw(st.lists(sizes, min_size=1, max_size=3)))
    sources = (numbers(*shape), numbers(*shape) + 1000)
    tensor, array = from_source(0, shape), sources[0]
    if data.draw(st.booleans()):
        tensor, array = concat([tensor, from_source(1, shape)], 0), np.concatenate(sources)
    for step in data.draw(st.lists(st.sampled_from(["narrow", "permute", "reshape", "concat"]), max_size=6)):
        axis = data.draw(st.integers(0, len(array.shape) - 1))
        if step == "narrow":
            start = data.draw(st.integers(0, array.shape[axis] - 1))
            size = data.draw(st.integers(1, array.shape[axis] - start))
            tensor, array = tensor.narrow(axis, start, size), np.take(array, range(start, start + size), axis)
        elif step == "permute":
            order = data.draw(st.permutations(range(len(array.shape))))
            tensor, array = tensor.permute(order), array.transpose(order)
        elif step == "reshape":
            new = data.draw(st.sampled_from(shapes(array.size)))
            tensor, array = tensor.reshape(new), array.reshape(new)
        else:
            size = data.draw(st.integers(1, array.shape[axis]))
            starts = range(0, array.shape[axis], size)
            tensor = concat([tensor.narrow(axis, at, min(size, array.shape[axis] - at)) for at in starts], axis)
    assert (evaluate(tensor, *sources) == array).all()


def shapes(size: int) -> list[tuple[int, ...]]:
    """Every way to write a size as a product of up to three numbers, also with axes of size 1."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return [(size,), *((a, b, size // a // b) for a in divisors for b in divisors if size % (a * b) == 0), (size, 1)]


def test_what_was_cut_apart_is_a_plain_copy_again() -> None:
    fused = from_source(2, (12, 10))
    assert concat([fused.narrow(0, 0, 6), fused.narrow(0, 6, 2), fused.narrow(0, 8, 4)], 0).contiguous_source == (2, 0)
    experts = from_source(2, (4, 6, 10))
    apart = [experts.narrow(0, at, 1).reshape((6, 10)) for at in range(4)]
    assert stack(apart, (4,)).contiguous_source == (2, 0)
    assert len(stack([expert.permute((1, 0)) for expert in apart], (4,)).tiles) == 1
    assert stack(apart, (4,)).reshape((24, 10)).contiguous_source == (2, 0)
    assert len(stack(apart[::-1], (4,)).tiles) == 4


@pytest.mark.parametrize("sizes", [(4,), (2, 2)])
def test_stack(sizes: tuple[int, ...]) -> None:
    arrays = [numbers(3, 5) + 100 * at for at in range(4)]
    tensor = stack([from_source(at, (3, 5)) for at in range(4)], sizes)
    assert (evaluate(tensor, *arrays) == np.stack(arrays).reshape(*sizes, 3, 5)).all()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,)])
def test_empty_tensors_are_reshaped(shape: tuple[int, ...]) -> None:
    assert from_source(0, shape).reshape((0, 7, 1)).shape == (0, 7, 1)


def test_row_major() -> None:
    assert row_major_strides((2, 3, 4)) == (12, 4, 1)
    assert row_major_strides(()) == ()
