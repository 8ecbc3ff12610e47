"""A resumed run sees the batches, and draws the random numbers, that the uninterrupted one did."""

from __future__ import annotations

import copy
import logging
import pickle
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_convert.checkpointer.state import rng
from ckpt_convert.checkpointer.state.dataloader import track_loader
from ckpt_convert.checkpointer.state.serialize import deserialize, serialize
from ckpt_convert.errors import CorruptFileError, UsageError

SIZE = 23
Seen = list[tuple[Any, ...]]


class Numbers(Dataset[torch.Tensor]):
    """Coded items, augmented at random from every generator."""

    def __init__(self, augment: bool = True) -> None:
        self.augment = augment

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        if not self.augment:
            return torch.tensor([float(index)])
        return torch.tensor([float(index), random.random(), np.random.rand(), torch.rand(()).item()])


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in range(SIZE):
            yield torch.tensor([float(number), torch.rand(()).item()])


class Counting:
    """A loader of a user's own, with a state."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < SIZE:
            self.at += 1
            yield torch.tensor([float(self.at)])
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


LOADERS: dict[str, Callable[[], Any]] = {
    "in order": lambda: DataLoader(Numbers(), batch_size=4),
    "one by one": lambda: DataLoader(Numbers(), batch_size=None),
    "shuffled": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True),
    "drop_last": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True, drop_last=True),
    "generator": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True, generator=generator()),
    "replacement": lambda: DataLoader(
        Numbers(), batch_size=4, sampler=RandomSampler(Numbers(), replacement=True, num_samples=90)
    ),
    "replacement with a generator": lambda: DataLoader(
        Numbers(), batch_size=16, sampler=RandomSampler(Numbers(), True, num_samples=200, generator=generator())
    ),
    "weights": lambda: DataLoader(Numbers(), batch_size=4, sampler=WeightedRandomSampler([1.0, 2.0, 3.0] * 7, 30)),
    "batch sampler": lambda: DataLoader(
        Numbers(), batch_sampler=BatchSampler(RandomSampler(Numbers(), generator=generator(6)), 5, False)
    ),
    "batch sampler in order": lambda: DataLoader(
        Numbers(), batch_sampler=BatchSampler(SequentialSampler(Numbers()), 5, True)
    ),
    "iterable": lambda: DataLoader(Stream(), batch_size=4),
    "workers": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=2),
    "workers and a generator": lambda: DataLoader(
        Numbers(), batch_size=4, shuffle=True, num_workers=2, generator=generator()
    ),
    "iterable with workers": lambda: DataLoader(Stream(), batch_size=4, num_workers=2),
    "kept workers": lambda: DataLoader(
        Numbers(augment=False), batch_size=4, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "torchdata": lambda: StatefulDataLoader(Numbers(), batch_size=4, shuffle=True),
    "torchdata with a generator": lambda: StatefulDataLoader(
        Numbers(), batch_size=4, shuffle=True, generator=generator()
    ),
    "torchdata with torch's sampler": lambda: StatefulDataLoader(
        Numbers(), batch_size=4, sampler=RandomSampler(Numbers())
    ),
    "torchdata with workers": lambda: StatefulDataLoader(
        Numbers(augment=False), batch_size=4, shuffle=True, num_workers=2
    ),
    "of a user's own": Counting,
}
SLOW = [name for name in LOADERS if "workers" in name]
BREAK = 4
EPOCHS = 3


def train(
    loader: Any, tracked: Any, epoch: int = 0, save_at: int | None = None, breaks: bool = False, done: int = 0
) -> tuple[Seen, Any]:
    """The rest of a run: what it sees and draws, and the state that was saved after ``save_at`` batches or epochs.

    With ``breaks`` every epoch ends after BREAK batches, of which ``done`` were seen before.
    """
    seen: Seen = []
    saved = None

    def save() -> Any:
        return copy.deepcopy(
            serialize({"loader": tracked.state(), "rng": rng.get_rng_state(), "seen": len(seen), "epoch": epoch})
        )

    if save_at == 0:
        saved = save()
    while epoch < EPOCHS:
        for number, batch in enumerate(loader):
            seen.append((epoch, batch.tolist(), torch.rand(()).item(), random.random(), np.random.rand()))
            if len(seen) == save_at:
                saved = save()
            if breaks and number + done == BREAK - 1:
                break
        done = 0
        tracked.end_epoch()
        epoch += 1
        if save_at == -epoch:
            saved = save()
    return seen, saved


def check(name: str, save_at: int, breaks: bool = False) -> None:
    seed(1)
    loader = LOADERS[name]()
    whole, saved = train(loader, track_loader(loader), save_at=save_at, breaks=breaks)
    seed(99)
    loader = LOADERS[name]()
    again = track_loader(loader)
    state = deserialize(saved)
    again.load(state["loader"])
    rng.set_rng_state(state["rng"])
    done = max(state["seen"] - state["epoch"] * BREAK, 0) if breaks else 0
    rest, _ = train(loader, again, state["epoch"], breaks=breaks, done=done)
    assert rest == whole[state["seen"] :]
    assert rest


@pytest.mark.parametrize("name", [name for name in LOADERS if name not in SLOW])
@pytest.mark.parametrize("save_at", [0, 1, 3, 8, -1, -2])
def test_resumed_run_is_the_uninterrupted_one(name: str, save_at: int) -> None:
    check(name, save_at)


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("save_at", [8, -1])
def test_resumed_run_with_workers_is_the_uninterrupted_one(name: str, save_at: int) -> None:
    check(name, save_at)


@pytest.mark.parametrize("name", ["shuffled", "generator", "torchdata", "torchdata with a generator"])
@pytest.mark.parametrize("save_at", [2, 3, 5, -1, -2])
def test_epochs_that_are_cut_short(name: str, save_at: int) -> None:
    check(name, save_at, breaks=True)


def test_saved_after_the_last_batch_of_an_epoch() -> None:
    check("shuffled", 6)
    check("torchdata", 6)
    check("generator", 12)


def test_tracking_changes_nothing_that_a_run_sees() -> None:
    seed(1)
    plain = DataLoader(Numbers(), batch_size=4, shuffle=True)
    expected = [(batch.tolist(), torch.rand(()).item()) for _ in range(2) for batch in plain]
    seed(1)
    tracked = DataLoader(Numbers(), batch_size=4, shuffle=True)
    place = track_loader(tracked)
    found = []
    for _ in range(2):
        for batch in tracked:
            found.append((batch.tolist(), torch.rand(()).item()))
            place.state()
    assert found == expected


def test_asking_torchdata_before_its_first_epoch_draws_nothing() -> None:
    seed(1)
    loader = StatefulDataLoader(Numbers(), shuffle=True)
    before = torch.get_rng_state()
    track_loader(loader).state()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resumed_run_that_saves_again_can_be_resumed() -> None:
    seed(1)
    loader = LOADERS["shuffled"]()
    whole, saved = train(loader, track_loader(loader), save_at=2)
    done = 2
    for total in (4, 5, 9):
        seed(total)
        loader = LOADERS["shuffled"]()
        tracked = track_loader(loader)
        state = deserialize(saved)
        tracked.load(state["loader"])
        assert tracked.state()["position"] == state["loader"]["position"]  # saved again before anything was taken
        rng.set_rng_state(state["rng"])
        rest, saved = train(loader, tracked, state["epoch"], save_at=total - done)
        assert rest == whole[done:]
        done = total


def test_a_loader_iterated_by_hand_whose_first_batch_comes_late() -> None:
    seed(1)
    loader = LOADERS["shuffled"]()
    tracked = track_loader(loader)
    batches = iter(loader)
    torch.rand(7)  # the sampler draws its seed at the first batch, so after this
    seen = [(next(batches).tolist(), torch.rand(()).item()) for _ in range(3)]
    state = copy.deepcopy(tracked.state())
    seen += [(batch.tolist(), torch.rand(()).item()) for batch in batches]
    seed(2)
    loader = LOADERS["shuffled"]()
    track_loader(loader).load(state)
    assert [(batch.tolist(), torch.rand(()).item()) for batch in loader] == seen[3:]


def test_a_look_at_one_batch_does_not_lose_the_place() -> None:
    seed(1)
    loader = LOADERS["shuffled"]()
    tracked = track_loader(loader)
    batches = iter(loader)
    next(batches)
    next(batches)
    next(iter(loader))
    next(batches)
    assert tracked.state()["position"] == 3


def test_the_loader_stays_what_it_was() -> None:
    for loader in (DataLoader(Numbers(), batch_size=4), StatefulDataLoader(Numbers(), batch_size=4)):
        kind = type(loader)
        tracked = track_loader(loader)
        assert isinstance(loader, kind)
        assert type(loader).__name__ == kind.__name__
        assert type(loader).__qualname__ == kind.__qualname__
        assert type(loader).__module__ == kind.__module__
        assert len(loader) == 6
        assert loader.batch_size == 4
        assert type(pickle.loads(pickle.dumps(loader))) is kind
        assert type(copy.copy(loader)) is kind
        with pytest.raises(ValueError, match="batch_size attribute should not be set"):
            loader.batch_size = 5
        assert len(iter(loader)) == 6
        tracked.untrack()
        assert type(loader) is kind
        assert len(list(loader)) == 6


def test_a_tracked_loader_ends_when_nothing_holds_it() -> None:
    loader = DataLoader(Numbers(), batch_size=4)
    tracked = track_loader(loader)
    batches = iter(loader)
    gone = weakref.ref(loader)
    del loader
    assert len(list(batches)) == 6
    del batches
    assert gone() is None
    with pytest.raises(UsageError, match="the loader that was given is gone"):
        tracked.state()


def test_workers_end_when_the_training_loop_drops_the_iterator() -> None:
    loader = DataLoader(Numbers(), batch_size=2, num_workers=1)
    track_loader(loader)
    batches = iter(loader)
    next(batches)
    worker = batches._workers[0]
    assert worker.is_alive()
    del batches
    worker.join(5)
    assert not worker.is_alive()


def test_fast_forward_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    loader = LOADERS["shuffled"]()
    tracked = track_loader(loader)
    batches = iter(loader)
    next(batches)
    next(batches)
    state = tracked.state()
    with caplog.at_level(logging.INFO, "ckpt_convert"):
        track_loader(other := LOADERS["shuffled"]()).load(state)
        list(other)
        list(other)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert "the 2 batches that the checkpoint has seen" in caplog.text


def test_torchdata_goes_there_without_reading() -> None:
    loader = LOADERS["torchdata"]()
    tracked = track_loader(loader)
    batches = iter(loader)
    next(batches)
    next(batches)
    read: list[int] = []

    class Recorded(Numbers):
        def __getitem__(self, index: int) -> torch.Tensor:
            read.append(index)
            return super().__getitem__(index)

    other = StatefulDataLoader(Recorded(), batch_size=4, shuffle=True)
    track_loader(other).load(tracked.state())
    assert len(list(other)) == 4
    assert len(read) == SIZE - 8


def test_data_that_became_too_short_is_refused() -> None:
    loader = LOADERS["in order"]()
    tracked = track_loader(loader)
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    shorter = DataLoader(Subset(Numbers(), range(12)), batch_size=4)
    track_loader(shorter).load(tracked.state())
    with pytest.raises(UsageError, match=r"should give at least the 5 batches .* but gave 3"):
        iter(shorter)


def test_what_has_no_state_is_refused() -> None:
    with pytest.raises(UsageError, match=r"train_loader: a builtins\.list has no state.*wrap the data in a torch"):
        track_loader([1, 2, 3], "train_loader")


def test_the_state_of_another_kind_of_loader_is_refused() -> None:
    torchdata = LOADERS["torchdata"]()
    tracked = track_loader(torchdata)
    next(iter(torchdata))
    for loader in (LOADERS["shuffled"](), Counting()):
        with pytest.raises(UsageError, match="another kind of loader"):
            track_loader(loader).load(tracked.state())
    with pytest.raises(CorruptFileError, match="no state of a loader"):
        track_loader(LOADERS["shuffled"]()).load({"kind": "counted"})


def test_plain_state_fits_torchdata() -> None:
    """The other way round is fine: batches are dropped."""
    seed(1)
    loader = DataLoader(Numbers(augment=False), batch_size=4)
    tracked = track_loader(loader)
    batches = iter(loader)
    next(batches)
    state = copy.deepcopy(tracked.state())
    expected = [batch.tolist() for batch in batches]
    other = StatefulDataLoader(Numbers(augment=False), batch_size=4)
    track_loader(other).load(state)
    assert [batch.tolist() for batch in other] == expected


@pytest.mark.parametrize(("stateful", "save_at"), [(False, 3), (False, 8), (False, -1), (True, 3), (True, 8)])
def test_loaders_of_accelerate(stateful: bool, save_at: int) -> None:
    accelerate = pytest.importorskip("accelerate")

    def make() -> Any:
        config = accelerate.DataLoaderConfiguration(use_stateful_dataloader=stateful, use_seedable_sampler=True)
        accelerator = accelerate.Accelerator(cpu=True, dataloader_config=config)
        return accelerator.prepare(DataLoader(Numbers(augment=False), batch_size=4, shuffle=True))

    seed(1)
    loader = make()
    whole, saved = train(loader, track_loader(loader), save_at=save_at)
    seed(1)
    loader = make()
    tracked = track_loader(loader)
    state = deserialize(saved)
    tracked.load(state["loader"])
    rng.set_rng_state(state["rng"])
    rest, _ = train(loader, tracked, state["epoch"])
    assert rest == whole[state["seen"] :]
