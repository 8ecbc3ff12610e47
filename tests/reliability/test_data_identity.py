"""The data that a resumed run sees: generators and counters of samplers, and a loader that two checkpointers share."""

from __future__ import annotations

import functools
import logging
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_convert import Checkpointer, Progress, UsageError
from tests.checkpointer.training import LLAMA, make_model

SIZE = 10
OWN = random.Random(9)
"""What a function of this module draws from."""


class Shuffled(Sampler[int]):
    """An order for each epoch, drawn by ``draw`` from whatever that has."""

    def __init__(self, draw: Callable[[list[int]], Any]) -> None:
        self.draw = draw

    def __iter__(self) -> Iterator[int]:
        order = list(range(SIZE))
        drawn = self.draw(order)
        return iter(order if drawn is None else [int(one) for one in drawn])

    def __len__(self) -> int:
        return SIZE


class Counted(Sampler[int]):
    """Seeds each epoch by a number that it counts itself, when the first index is asked for."""

    def __init__(self) -> None:
        self.epoch = 0
        self.size = SIZE

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        yield from torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist()

    def __len__(self) -> int:
        return self.size


class Lazy(Sampler[int]):
    """Draws while it is read, from a generator in a slot of another object."""

    class Holder:
        __slots__ = ("random",)

        def __init__(self) -> None:
            self.random = np.random.default_rng(7)

    def __init__(self) -> None:
        self.parts = {"holders": [self.Holder()]}

    def __iter__(self) -> Iterator[int]:
        return (int(self.parts["holders"][0].random.integers(SIZE)) for _ in range(SIZE))

    def __len__(self) -> int:
        return SIZE


class Numbers(Dataset[torch.Tensor]):
    def __init__(self, noise: Any = None) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), self.noise.random() if self.noise is not None else 0.0])


def of_module(order: list[int]) -> None:
    OWN.shuffle(order)


def loader(sampler: Any = None, dataset: Any = None, kind: Any = DataLoader, **options: Any) -> Any:
    return kind(dataset or Numbers(), 3, sampler=sampler, **options)


def permuted(generator: torch.Generator) -> Callable[[list[int]], Any]:
    return lambda order, own=generator: torch.randperm(SIZE, generator=own)  # type: ignore[misc]


def closed_over() -> Any:
    generator = np.random.Generator(np.random.MT19937(3))
    return loader(Shuffled(lambda order: generator.shuffle(order)))


def module_level() -> Any:
    OWN.seed(9)
    return loader(Shuffled(of_module))


def batches() -> Any:
    return DataLoader(Numbers(), batch_sampler=BatchSampler(Shuffled(random.Random(1).shuffle), 3, False))


def batch_noise(noise: random.Random, examples: Any) -> Any:
    return torch.stack(examples) + noise.random()


LOADERS: dict[str, Callable[[], Any]] = {
    "random.Random": lambda: loader(Shuffled(random.Random(1).shuffle)),
    "numpy Generator": lambda: loader(Shuffled(np.random.default_rng(1).shuffle)),
    "numpy RandomState": lambda: loader(Shuffled(np.random.RandomState(1).shuffle)),
    "torch Generator": lambda: loader(Shuffled(permuted(torch.Generator().manual_seed(1)))),
    "a partial": lambda: loader(Shuffled(functools.partial(np.random.RandomState.shuffle, np.random.RandomState(2)))),
    "a closure": closed_over,
    "a module": module_level,
    "a batch sampler's sampler": batches,
    "drawn while read": lambda: loader(Lazy()),
    "an epoch of its own": lambda: loader(Counted()),
    "a dataset": lambda: loader(dataset=Numbers(np.random.default_rng(4))),
    "a collate function": lambda: loader(collate_fn=functools.partial(batch_noise, random.Random(5))),
    "torchdata": lambda: loader(Shuffled(random.Random(1).shuffle), kind=StatefulDataLoader),
    "torchdata, an epoch of its own": lambda: loader(Counted(), kind=StatefulDataLoader),
}


def train(loader: Any, output: Path, epochs: int, until: int | None = None) -> list[list[float]]:
    """The batches that a run sees, each of which is a step; it is saved at step ``until``, and dies there."""
    seen: list[list[float]] = []
    with Checkpointer(LLAMA, output, save_every=until) as checkpointer:
        progress = checkpointer.resume(model=model(), dataloader=loader)
        for _ in range(progress.epoch if progress else 0, epochs):
            for batch in loader:
                seen.append(batch.flatten().tolist())
                checkpointer.step()
                if checkpointer.progress.step == until:
                    return seen
            checkpointer.end_epoch()
    return seen


@functools.cache
def model() -> nn.Module:
    return make_model(LLAMA)


@pytest.mark.parametrize("until", [2, 6], ids=["in epoch 1", "in epoch 2"])
@pytest.mark.parametrize("make", LOADERS.values(), ids=list(LOADERS))
def test_a_resumed_run_sees_the_batches_of_the_run_that_goes_on(
    make: Callable[[], Any], until: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make()
    whole = [batch.flatten().tolist() for _ in range(3) for batch in dataset]
    assert whole[:4] != whole[4:8] != whole[8:]
    found = train(make(), tmp_path, 3, until)
    found += train(make(), tmp_path, 3)
    assert found == whole
    said = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING and one.name == "ckpt_convert"]
    assert not [line for line in said if "has no state of its own" not in line]


class Endless(Sampler[int]):
    def __init__(self) -> None:
        self.order = (number % SIZE for number in range(10**9))

    def __iter__(self) -> Iterator[int]:
        return (next(self.order) for _ in range(SIZE))

    def __len__(self) -> int:
        return SIZE


UNTRACKED: dict[str, tuple[Callable[[], Any], str]] = {
    "the system's": (lambda: loader(Shuffled(random.SystemRandom().shuffle)), r"random\.SystemRandom has no state"),
    "of another make": (lambda: loader(dataset=Numbers(type("RandomState", (), {})())), "dataset.noise: a .*no state"),
    "a place in a function": (lambda: loader(Endless()), "sampler.order: is a generator function's iterator"),
    "a batch sampler in torchdata": (
        lambda: StatefulDataLoader(Numbers(), batch_sampler=batches().batch_sampler),
        r"batch_sampler\.sampler.*use torch's DataLoader",
    ),
    "workers that live on": (
        lambda: loader(dataset=Numbers(np.random.default_rng(4)), num_workers=1, persistent_workers=True),
        r"dataset\.noise: is drawn from in workers",
    ),
}


@pytest.mark.parametrize(("make", "text"), UNTRACKED.values(), ids=list(UNTRACKED))
def test_what_cannot_be_tracked_is_said_once_at_the_start(
    make: Callable[[], Any], text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(LLAMA, tmp_path, save_every=1, contents="weights") as checkpointer:
        given = make()
        checkpointer.register(model=model(), dataloader=given)
        checkpointer.step()
        with Checkpointer(LLAMA, tmp_path / "other", contents="weights") as other:
            other.register(model=model(), dataloader=given)
    said = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert len(said) == 1
    assert re.search(text, said[0])


def test_data_of_any_size_is_looked_at_without_delay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All of a million examples would be looked at again at each save."""

    class Watched(list[Any]):
        def __getitem__(self, at: Any) -> Any:
            assert not isinstance(at, slice) or at.stop <= 1000
            return super().__getitem__(at)

        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("all examples are looked at")

    given = loader(dataset=Watched([torch.zeros(1)] * 10))
    with Checkpointer(LLAMA, tmp_path, save_every=1) as checkpointer:
        checkpointer.register(model=model(), dataloader=given)
        for _ in given:
            checkpointer.step()
            break
    assert not caplog.records or all(one.levelno < logging.WARNING for one in caplog.records)


# Two checkpointers


def two(loader: Any, here: Path, until: int, resume: Callable[..., Any]) -> tuple[list[list[float]], list[str]]:
    """One that saves everything every third step, one that saves weights at each; the batches, and what is saved."""
    seen = []
    full = Checkpointer(LLAMA, here / "full", save_every=3, save_last=False)
    weights = Checkpointer(LLAMA, here / "weights", save_every=1, contents="weights", save_last=False)
    with full, weights:
        progress = full.resume(model=model(), dataloader=loader)
        resume(weights, progress, loader)
        for _ in range(progress.epoch if progress else 0, 3):
            for batch in loader:
                seen.append(batch.flatten().tolist())
                for one in (full, weights):
                    one.step()
                if full.progress.step == until:
                    return seen, [saved.path.name for saved in weights.saved]
            for one in (full, weights):
                one.end_epoch()
    return seen, [saved.path.name for saved in weights.saved]


def beside(checkpointer: Checkpointer, progress: Progress | None, given: Any) -> None:
    checkpointer.register(model=model(), dataloader=given, progress=progress)


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("step", [3, 4], ids=["at a full save", "between two"])
def test_two_checkpointers_share_a_loader(step: int, kind: Any, tmp_path: Path) -> None:
    def made() -> Any:
        return loader(Shuffled(random.Random(1).shuffle), kind=kind)

    fresh = made()
    whole = [batch.flatten().tolist() for _ in range(3) for batch in fresh]
    before, _ = two(made(), tmp_path, step, beside)
    after, saved = two(made(), tmp_path, 99, beside)
    assert before[:3] + after == whole
    assert saved == [f"step_{number}" for number in range(1, 13)]


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_batches_are_skipped_once_where_two_checkpointers_resume(kind: Any, tmp_path: Path) -> None:
    def run(until: int) -> list[list[float]]:
        given, seen = loader(Shuffled(random.Random(1).shuffle), kind=kind), []
        both = [Checkpointer(LLAMA, tmp_path / name, save_every=until, save_last=False) for name in ("a", "b")]
        with both[0], both[1]:
            for one in both:
                one.resume(model=model(), dataloader=given)
            for batch in given:
                seen.append(batch.flatten().tolist())
                for one in both:
                    one.step()
                if both[0].progress.step == until:
                    break
        return seen

    fresh = loader(Shuffled(random.Random(1).shuffle), kind=kind)
    assert run(2) + run(99) == [batch.flatten().tolist() for batch in fresh]


def test_a_loader_counts_on_for_one_checkpointer_when_the_other_is_closed(tmp_path: Path) -> None:
    given = loader(Shuffled(random.Random(1).shuffle))
    kind = type(given)
    first, second = Checkpointer(LLAMA, tmp_path / "a", save_last=False), Checkpointer(LLAMA, tmp_path / "b")
    for one in (first, second):
        one.register(model=model(), dataloader=given)
    for number, _ in enumerate(given):
        if number == 0:
            first.close()
        second.step()
        if number == 1:
            break
    second.close()
    assert type(given) is kind
    again = loader(Shuffled(random.Random(1).shuffle))
    whole = [batch.tolist() for batch in loader(Shuffled(random.Random(1).shuffle))]
    with Checkpointer(LLAMA, tmp_path / "b") as checkpointer:
        checkpointer.resume(model=model(), dataloader=again)
        assert [batch.tolist() for batch in again] == whole[2:]


def test_a_second_checkpointer_that_would_go_on_from_another_step_is_refused(tmp_path: Path) -> None:
    """Its weights would be those of a later step than the data, the optimizer and the random numbers."""
    given = loader()
    two(given, tmp_path, 4, beside)
    with pytest.raises(UsageError, match=r"resumed at step 3.*step 4.*register\(\.\.\., progress=\.\.\.\)"):
        two(loader(), tmp_path, 4, lambda one, progress, at: one.resume(model=model(), dataloader=at))
    two(loader(), tmp_path, 5, lambda one, progress, at: one.resume(model=model(), dataloader=at, from_=3))
