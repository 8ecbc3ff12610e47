"""What one of several writers has to write of a tensor: held against who owns each of its elements."""

from __future__ import annotations

import random
from math import prod

import pytest

from ckpt_convert.convert.partition import spans
from ckpt_convert.tensors.lazy import LazyTensor, concat, from_source


def owners(tensor: LazyTensor) -> list[int]:
    """The source of each element, in row-major order."""
    out = [-1] * tensor.size
    for copy in tensor.copies():
        places = [copy.target_offset]
        for count, _, step in copy.dims:
            places = [place + at * step for place in places for at in range(count)]
        for place in places:
            assert out[place] == -1
            out[place] = copy.source
    return out


def made(random: random.Random) -> LazyTensor:
    """A tensor of three sources, cut, permuted and reshaped."""
    shape = [random.randint(1, 4) for _ in range(random.randint(1, 3))]
    axis = random.randrange(len(shape))
    parts = []
    for source in range(3):
        shape[axis] = random.randint(1, 4)
        parts.append(from_source(source, shape))
    tensor = concat(parts, axis)
    order = list(range(len(shape)))
    random.shuffle(order)
    tensor = tensor.permute(order)
    if random.random() < 0.3:
        tensor = tensor.reshape((tensor.shape[0], prod(tensor.shape[1:])))
    return concat([tensor, tensor.narrow(0, 0, 1)], 0) if random.random() < 0.3 else tensor


@pytest.mark.parametrize("seed", range(300))
def test_the_runs_of_a_writer_are_the_elements_that_it_owns(seed: int) -> None:
    chance = random.Random(seed)
    tensor = made(chance)
    start, stop = sorted(chance.sample(range(tensor.size + 1), 2))
    for owner in range(3):
        found = spans(tensor, start, stop, owner.__eq__)
        covered = [place for first, last in found for place in range(first, last)]
        assert covered == [at for at, one in enumerate(owners(tensor)) if one == owner and start <= at < stop]


def test_a_slice_of_rows_is_one_run() -> None:
    tensor = concat([from_source(0, (3, 5)), from_source(1, (4, 5))], 0)
    assert spans(tensor, 0, 35, lambda source: source == 1) == [(15, 35)]
