"""Who writes what of a model that several ranks hold: everything, once, and in equal shares."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pytest

from ckpt_convert import UsageError
from ckpt_convert.checkpointer.distributed import claims
from ckpt_convert.checkpointer.distributed.claims import Claim, Held, Share, divide
from ckpt_convert.checkpointer.distributed.slices import Slice, nothing, whole


def rows(shape: tuple[int, ...], *ranges: tuple[int, int]) -> Held:
    return Held("float32", Slice(shape, (tuple(ranges), *(((0, size),) for size in shape[1:]))))


def replica(*shape: int) -> Held:
    return Held("float32", whole(shape))


def share_out(every: Sequence[Mapping[str, Held]]) -> tuple[tuple[str, ...], list[list[Share]]]:
    """All names, and what each rank writes of each of them."""
    every_claim = []
    for held in every:
        kinds = list(dict.fromkeys(held.values()))
        every_claim.append(
            Claim(tuple(held), tuple(kinds), np.array([kinds.index(one) for one in held.values()], np.int32))
        )
    found = divide(every_claim)
    return found.names, [[shares[group] for group in found.groups] for shares in found.shares]


def test_replicas_share_and_slices_are_written_by_those_that_have_them() -> None:
    shape = (6, 2)
    every = [{"norm": replica(4), "weight": rows(shape, (0, 3))}, {"norm": replica(4), "weight": rows(shape, (3, 6))}]
    names, shares = share_out(every)
    assert names == ("norm", "weight")
    assert shares == [[Share(0, 2), Share(0, 1)], [Share(1, 2), Share(0, 1)]]


def test_pipeline_stages_have_tensors_of_their_own() -> None:
    names, shares = share_out([{"first": replica(4)}, {"last": replica(4)}])
    assert names == ("first", "last")
    assert shares == [[Share(0, 1), Share(0, 0)], [Share(0, 0), Share(0, 1)]]


def test_a_rank_that_holds_nothing() -> None:
    every = [{"weight": rows((1, 2), (0, 1))}, {"weight": Held("float32", nothing((1, 2)))}]
    assert share_out(every)[1] == [[Share(0, 1)], [Share(0, 1)]]


@pytest.mark.parametrize("other", [(4, 6), (2, 6), (0, 6)], ids=str)
def test_what_nobody_holds_or_several_in_part_is_refused(other: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=r"weight \[6, 2\]: its slices leave something out, or overlap in part"):
        share_out([{"weight": rows((6, 2), (0, 3))}, {"weight": rows((6, 2), other)}])


def test_shapes_that_differ_are_refused_with_the_rank() -> None:
    with pytest.raises(UsageError, match=r"weight: rank 1 has float32 \[5\], ranks before it float32 \[4\]"):
        share_out([{"weight": replica(4)}, {"weight": replica(5)}])


def test_strided_slices() -> None:
    parts = [((0, 2), (4, 6)), ((2, 4), (6, 8))]
    assert share_out([{"weight": rows((8, 3), *ranges)} for ranges in parts])[1] == [[Share(0, 1)], [Share(0, 1)]]


def test_slices_over_two_axes() -> None:
    grid = [Slice((4, 4), (((r, r + 2),), ((c, c + 2),))) for r, c in product((0, 2), repeat=2)]
    every = [{"weight": Held("float32", part)} for part in [*grid, grid[0]]]
    assert [shares[0] for shares in share_out(every)[1]] == [Share(0, 2), *[Share(0, 1)] * 3, Share(1, 2)]
    with pytest.raises(UsageError, match="leave something out"):
        share_out(every[1:4])


@pytest.mark.parametrize("table", [1 << 22, 1])
def test_tensors_that_are_held_alike_are_divided_alike(table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_TABLE", table)
    generator = random.Random(4)
    kinds = [lambda rank: replica(4), lambda rank: rows((6, 2), (3 * rank, 3 * rank + 3)), lambda rank: replica(5)]
    order = [generator.randrange(3) for _ in range(200)]
    every = [{f"t{at}": kinds[kind](rank) for at, kind in enumerate(order)} for rank in (0, 1)]
    names, shares = share_out(every)
    assert names == tuple(f"t{at}" for at in range(200))
    for rank in (0, 1):
        assert shares[rank] == [Share(0, 1) if kind == 1 else Share(rank, 2) for kind in order]
    every[1]["t17"] = replica(7)
    with pytest.raises(UsageError, match="t17"):
        share_out(every)
