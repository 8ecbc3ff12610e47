"""A run goes on within an epoch with other ranks, or batches of another size: no sample twice, none left out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, Sampler, SequentialSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_convert import Checkpointer
from ckpt_convert.checkpointer.state import rng, sharding
from ckpt_convert.checkpointer.state.dataloader import LoaderTracker, track_loader
from ckpt_convert.checkpointer.state.serialize import deserialize, serialize
from ckpt_convert.errors import KeyMismatchError, UsageError
from tests.checkpointer.training import LLAMA, make_model


class Numbers(Dataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class Rank:
    """One rank of a run: its loader, tracked, and its iterator."""

    def __init__(self, size: int, ranks: int, rank: int, batch: int, kind: Any = DataLoader, **options: Any) -> None:
        data = Numbers(size)
        self.sampler = DistributedSampler(data, ranks, rank, seed=3, **options)
        self.sampler.set_epoch(2)
        self.loader = kind(data, batch_size=batch, sampler=self.sampler, num_workers=0)
        self.tracked = track_loader(self.loader)

    def batches(self, count: int | None = None) -> list[list[int]]:
        taken = []
        for batch in self.loader:
            taken.append(batch.tolist())
            if len(taken) == count:
                break
        return taken


def run(size: int, ranks: int, batch: int, **options: Any) -> list[Rank]:
    return [Rank(size, ranks, rank, batch, **options) for rank in range(ranks)]


def saved(tracked: LoaderTracker) -> Any:
    return deserialize(serialize(tracked.state()))


def dealt(batches: list[list[list[int]]]) -> list[int]:
    """The samples that ranks have seen in the order of the sampler, which deals them out one by one."""
    by_rank = [[sample for batch in one for sample in batch] for one in batches]
    return [sample for turn in zip(*by_rank, strict=True) for sample in turn]


def order(size: int, ranks: int) -> list[int]:
    """What the sampler deals to so many ranks: a permutation, filled up from its beginning."""
    generator = torch.Generator().manual_seed(3 + 2)
    found = torch.randperm(size, generator=generator).tolist()
    return (found + found)[: -(-size // ranks) * ranks]


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize(
    ("before", "after"),
    [((4, 3), (2, 3)), ((2, 3), (4, 3)), ((4, 3), (1, 4)), ((1, 6), (3, 1)), ((3, 4), (2, 2)), ((2, 4), (2, 2))],
)
@pytest.mark.parametrize("size", [101, 96])
def test_every_sample_is_seen_once(size: int, before: tuple[int, int], after: tuple[int, int], kind: Any) -> None:
    earlier = run(size, *before, kind=kind)
    seen = dealt([rank.batches(2) for rank in earlier])
    states = [saved(rank.tracked) for rank in earlier]
    assert len(seen) == 2 * before[0] * before[1]
    later = run(size, *after, kind=kind)
    for rank in later:
        assert rank.tracked.compare(states[0]) == []
        rank.tracked.load(states[0])
    rest = dealt([rank.batches() for rank in later])
    assert seen + rest == order(size, after[0])
    whole = dealt([rank.batches() for rank in later])  # the next epoch is a whole one
    assert len(whole) == len(order(size, after[0]))


def test_the_same_ranks_go_on_exactly() -> None:
    earlier = run(50, 2, 3)
    before = [rank.batches(4) for rank in earlier]
    states = [saved(rank.tracked) for rank in earlier]
    later = run(50, 2, 3)
    for rank, state in zip(later, states, strict=True):
        rank.tracked.load(state)
    after = [rank.batches() for rank in later]
    assert [one + other for one, other in zip(before, after, strict=True)] == [rank.batches() for rank in run(50, 2, 3)]


def test_the_end_of_an_epoch_is_its_end_for_other_ranks(caplog: pytest.LogCaptureFixture) -> None:
    earlier = run(50, 4, 3)
    for rank in earlier:
        assert len(rank.batches(5)) == len(rank.loader)
    state = saved(earlier[0].tracked)
    for rank in (later := run(50, 3, 4)):
        with caplog.at_level(logging.INFO, "ckpt_convert"):
            rank.tracked.load(state)
        assert rank.tracked.epoch_is_over
    assert [rank.batches() for rank in later] == [[], [], []]


def test_what_does_not_come_out_even_is_refused_with_the_ways_out() -> None:
    earlier = run(100, 2, 5)
    for rank in earlier:
        rank.batches(3)
    state = saved(earlier[0].tracked)
    later = Rank(100, 4, 1, 4)
    tracked = later.tracked
    expected = (
        "dataloader: 30 samples of this epoch were seen (3 batches on 2 ranks with batches of 5), and 4 ranks with "
        "batches of 4 take 16 at once, which does not come out even; choose ranks × batch size that divide 30; "
        'data="restart" begins this epoch again, data="skip" leaves out as few samples as possible, and '
        'exclude=["dataloader*"] begins with new data'
    )
    assert tracked.compare(state) == [expected]
    with pytest.raises(UsageError) as caught:
        tracked.load(state)
    assert str(caught.value) == expected


@pytest.mark.parametrize(("elsewhere", "first"), [("restart", 0), ("skip", 32)])
def test_what_does_not_come_out_even_begins_again_or_leaves_out_little(
    elsewhere: sharding.DataPolicy, first: int
) -> None:
    earlier = run(100, 2, 5)
    for rank in earlier:
        rank.batches(3)
    state = saved(earlier[0].tracked)
    for rank in (later := run(100, 4, 4)):
        assert rank.tracked.compare(state, elsewhere) == []
        rank.tracked.load(state, elsewhere)
    assert dealt([rank.batches() for rank in later]) == order(100, 4)[first:]


class Own(Sampler[int]):
    """A sampler of a user's own, of which nobody knows how it deals out samples."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Any:
        return iter(range(self.size))

    def __len__(self) -> int:
        return self.size


@pytest.mark.parametrize(("elsewhere", "rest"), [("restart", 20), ("skip", 0)])
def test_a_sampler_that_does_not_say_how_it_deals_is_refused_on_other_ranks(
    elsewhere: sharding.DataPolicy, rest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> Any:
        return DataLoader(Numbers(40), batch_size=2, sampler=Own(40))

    first = made()
    tracked = track_loader(first)
    for _, _ in zip(range(7), first, strict=False):
        pass
    state = saved(tracked)
    second = made()
    other = track_loader(second)
    monkeypatch.setattr(sharding, "world", lambda: 2)
    (problem,) = other.compare(state)
    assert problem.startswith(
        "dataloader: was saved by 1 rank with batches of 2, and is now on 2 ranks with batches of 2, so which samples "
        "were seen cannot be known; a torch.utils.data.DistributedSampler in both would say it; "
    )
    with pytest.raises(UsageError, match="cannot be known"):
        other.load(state)
    other.load(state, elsewhere)
    assert len(list(second)) == (rest or 20)  # of the same epoch, or of the next one


@pytest.mark.parametrize("sampler", [SequentialSampler, RandomSampler])
@pytest.mark.parametrize("batch", [2, 3, 8])
def test_one_rank_goes_on_with_batches_of_another_size(sampler: Any, batch: int) -> None:
    def made(size: int) -> Any:
        data = Numbers(67)
        options = {"generator": torch.Generator().manual_seed(5)} if sampler is RandomSampler else {}
        return DataLoader(data, batch_size=size, sampler=sampler(data, **options))

    whole = [sample for one in made(4) for sample in one.tolist()]
    first = made(4)
    tracked = track_loader(first)
    seen = [sample for _, one in zip(range(6), first, strict=False) for sample in one.tolist()]
    state = saved(tracked)
    second = made(batch)
    track_loader(second).load(state)
    rest = [sample for one in second for sample in one.tolist()]
    assert seen + rest == whole


def test_a_rank_keeps_the_random_numbers_that_it_has() -> None:
    """The loader's state is another rank's, and so are the random numbers in it."""
    earlier = run(96, 2, 4)
    for rank in earlier:
        rank.batches(2)
    state = saved(earlier[0].tracked)
    later = Rank(96, 4, 1, 4)
    later.tracked.load(state)
    torch.manual_seed(123)
    expected = rng.get_rng_state()
    iterator = iter(later.loader)
    assert torch.equal(rng.get_rng_state()["torch"], expected["torch"])
    assert next(iterator) is not None


def test_a_state_from_before_shardings_were_saved_is_loaded_as_ever() -> None:
    earlier = Rank(50, 2, 0, 3)
    seen = earlier.batches(4)
    state = saved(earlier.tracked)
    del state["sharding"]
    later = Rank(50, 2, 0, 3)
    later.tracked.load(state)
    assert seen + later.batches() == Rank(50, 2, 0, 3).batches()


def test_a_checkpointer_goes_on_with_batches_of_another_size(tmp_path: Path) -> None:
    def parts(batch: int) -> dict[str, Any]:
        torch.manual_seed(0)
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return {"model": model, "optimizer": optimizer, "dataloader": DataLoader(Numbers(24), batch_size=batch)}

    seen = []
    with Checkpointer(LLAMA, tmp_path, save_every=3) as checkpointer:
        given = parts(4)
        checkpointer.resume(**given)
        for number, batch in enumerate(given["dataloader"]):
            seen += batch.tolist()
            checkpointer.step()
            if number == 2:
                break
    with Checkpointer(LLAMA, tmp_path) as checkpointer, pytest.raises(KeyMismatchError, match="take 8 at once, which"):
        checkpointer.resume(**parts(8))
    with (
        Checkpointer(LLAMA, tmp_path) as checkpointer,
        pytest.raises(UsageError, match="expected exact, restart, skip"),
    ):
        checkpointer.resume(**parts(8), data="again")  # type: ignore[arg-type]
    for batch_size, data, first in ((6, "exact", 12), (8, "skip", 16), (8, "restart", 0)):
        with Checkpointer(LLAMA, tmp_path) as checkpointer:
            given = parts(batch_size)
            assert checkpointer.resume(**given, data=data) is not None  # type: ignore[arg-type]
            assert [one for batch in given["dataloader"] for one in batch.tolist()] == list(range(first, 24))
