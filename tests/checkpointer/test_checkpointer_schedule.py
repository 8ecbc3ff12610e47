"""When a step is saved: every so often, first, last, on a signal; and what is there when."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ckpt_convert import Checkpointer
from ckpt_convert.checkpointer.run import counters as module
from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.errors import UsageError
from tests.checkpointer.training import LLAMA, Trained, make_model

MODEL = make_model()
BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@contextmanager
def opened(output_dir: Path, **options: Any) -> Iterator[Checkpointer]:
    """A checkpointer of weights alone, without a save at the end."""
    chosen = {"contents": "weights", "save_last": False, **options}
    with Checkpointer(LLAMA, output_dir, **chosen) as checkpointer:
        checkpointer.register(model=MODEL)
        yield checkpointer


def steps(checkpointer: Checkpointer) -> list[int]:
    checkpointer.wait()
    return [saved.step for saved in checkpointer.saved]


@pytest.mark.parametrize("every", [3, "3 steps", "3ba", "3"])
def test_every_n_steps(every: Any, tmp_path: Path) -> None:
    with opened(tmp_path, save_every=every) as checkpointer:
        for _ in range(7):
            checkpointer.step()
        assert steps(checkpointer) == [3, 6]


@pytest.mark.parametrize("every", ["100 tokens", "1_00 tokens", "100tok"])
def test_tokens_are_crossed_and_not_hit(every: str, tmp_path: Path) -> None:
    with opened(tmp_path, save_every=every) as checkpointer:
        for tokens in (60, 39, 2, 98, 250, 40, 20):  # 60 99 101 199 449 489 509
            checkpointer.step(tokens=tokens)
        assert steps(checkpointer) == [3, 5, 7]
        assert checkpointer.progress.tokens == 509


@pytest.mark.parametrize("every", ["10 samples", "10sp"])
def test_samples(every: str, tmp_path: Path) -> None:
    with opened(tmp_path, save_every=every) as checkpointer:
        for _ in range(5):
            checkpointer.step(samples=4)
        assert steps(checkpointer) == [3, 5]


@pytest.mark.parametrize("every", ["90 s", "90sec", "1.5 min"])
def test_seconds(every: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with opened(tmp_path, save_every=every) as checkpointer:
        for seconds in (50, 39, 2, 80, 200):
            now[0] += seconds
            checkpointer.step()
        assert steps(checkpointer) == [3, 5]
        assert checkpointer.progress.seconds == 371


def test_seconds_go_on_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with opened(tmp_path, save_last=True, save_every="100 s") as checkpointer:
        now[0] += 70
        checkpointer.step()
    now[0] += 5000  # the machine was off
    with Checkpointer(LLAMA, tmp_path, contents="weights", save_every="100 s", save_last=False) as checkpointer:
        checkpointer.resume(model=MODEL, weights_only=True)
        for _ in range(2):
            now[0] += 20
            checkpointer.step()
        assert steps(checkpointer) == [1, 3]
        assert checkpointer.progress.seconds == 110


@pytest.mark.parametrize("every", ["2 epochs", "2ep"])
def test_epochs(every: str, tmp_path: Path) -> None:
    with opened(tmp_path, save_every=every) as checkpointer:
        for step in range(1, 13):
            checkpointer.step()
            if step % 3 == 0:
                checkpointer.end_epoch()
        assert steps(checkpointer) == [6, 12]
        assert [saved.progress.epoch for saved in checkpointer.saved] == [2, 4]


def test_an_epoch_that_ends_where_a_step_is_saved_makes_no_second_save(tmp_path: Path) -> None:
    with opened(tmp_path, save_every=[3, "1 epoch"]) as checkpointer:
        for _ in range(3):
            checkpointer.step()
        checkpointer.end_epoch()
        assert [(saved.step, saved.sequence) for saved in checkpointer.saved] == [(3, 1)]


def test_evaluations_are_saved_after_the_metric_is_known(tmp_path: Path) -> None:
    with opened(tmp_path, save_every="2 evals") as checkpointer:
        for step in range(1, 9):
            checkpointer.step()
            if step % 2 == 0:
                checkpointer.report(val_loss=step / 10)
        assert steps(checkpointer) == [4, 8]
        assert [saved.metrics for saved in checkpointer.saved] == [{"val_loss": 0.4}, {"val_loss": 0.8}]


def test_a_function_decides(tmp_path: Path) -> None:
    asked: list[Progress] = []

    def decides(progress: Progress) -> bool:
        asked.append(progress)
        return progress.step in (2, 5)

    with opened(tmp_path, save_every=decides) as checkpointer:
        for _ in range(6):
            checkpointer.step(samples=2)
        assert steps(checkpointer) == [2, 5]
    assert [progress.samples for progress in asked] == [2, 4, 6, 8, 10, 12]


def test_a_list_of_schedules(tmp_path: Path) -> None:
    with opened(tmp_path, save_every=[4, "10 samples", lambda progress: progress.step == 1]) as checkpointer:
        for _ in range(8):
            checkpointer.step(samples=2)
        assert steps(checkpointer) == [1, 4, 5, 8]


@pytest.mark.parametrize("every", [0, "often", "3 moons", [], 1.5, True])
def test_what_is_no_schedule(every: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="save_every"):
        Checkpointer(LLAMA, tmp_path, save_every=every)


def test_never_unless_asked(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpointer:
        for _ in range(3):
            checkpointer.step()
        assert steps(checkpointer) == []
        checkpointer.save()
        checkpointer.save()  # this step is saved already
        assert [(saved.step, saved.sequence) for saved in checkpointer.saved] == [(3, 1)]


def test_the_first_step(tmp_path: Path) -> None:
    with opened(tmp_path, save_every=3, save_first=True) as checkpointer:
        for _ in range(4):
            checkpointer.step()
        assert steps(checkpointer) == [1, 3]


@BOTH
@pytest.mark.parametrize("last", [4, 5, 6])
def test_the_last_step_is_saved_once(last: int, asynchronous: bool, tmp_path: Path) -> None:
    with opened(tmp_path, save_every=3, save_last=True, asynchronous=asynchronous) as checkpointer:
        for _ in range(last):
            checkpointer.step()
    assert [saved.step for saved in checkpointer.saved] == sorted({3, last} | ({6} if last == 6 else set()))
    assert [saved.sequence for saved in checkpointer.saved] == [1, 2]


def test_the_last_step_when_the_data_ends_early(tmp_path: Path) -> None:
    trained = Trained()
    with Checkpointer(LLAMA, tmp_path, save_every=100) as checkpointer:
        checkpointer.register(**trained.parts)
        for tokens in trained.dataloader:
            trained.update(tokens)
            checkpointer.step()
        checkpointer.end_epoch()
    assert [(saved.step, saved.progress.epoch) for saved in checkpointer.saved] == [(7, 1)]


def test_nothing_is_saved_at_the_end_of_a_run_without_a_step(tmp_path: Path) -> None:
    with opened(tmp_path, save_last=True):
        pass
    assert not list(tmp_path.glob("step_*"))

    with opened(tmp_path, save_last=True) as checkpointer:
        checkpointer.step()
    before = (tmp_path / "step_1").stat().st_ino
    with Checkpointer(LLAMA, tmp_path, contents="weights") as checkpointer:
        checkpointer.resume(model=MODEL)
    assert [saved.step for saved in checkpointer.saved] == [1]
    assert (tmp_path / "step_1").stat().st_ino == before


def test_steps_are_those_of_the_optimizer_over_all_restarts(tmp_path: Path) -> None:
    for _ in range(3):
        with Checkpointer(LLAMA, tmp_path, contents="weights", save_every=4) as checkpointer:
            checkpointer.resume(model=MODEL)
            for _ in range(3):
                checkpointer.step()
    assert [saved.step for saved in checkpointer.saved] == [3, 4, 6, 8, 9]


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@BOTH
def test_a_signal_saves_once_at_the_next_step(asynchronous: bool, number: int, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    with opened(tmp_path, save_on_signal=True, asynchronous=asynchronous) as checkpointer:
        checkpointer.step()
        assert checkpointer.interrupted is None
        os.kill(os.getpid(), number)
        assert checkpointer.interrupted == number
        assert [saved.step for saved in checkpointer.saved] == []
        checkpointer.step()
        assert [saved.step for saved in checkpointer.saved] == [2]  # complete when step() returns
        checkpointer.step()
        assert steps(checkpointer) == [2]
    assert signal.getsignal(number) == before


def test_a_signal_ends_what_is_in_flight_first(tmp_path: Path) -> None:
    with opened(tmp_path, save_every=1, save_on_signal=True, asynchronous=True) as checkpointer:
        checkpointer.step()
        os.kill(os.getpid(), signal.SIGTERM)
        checkpointer.step()
        assert [saved.step for saved in checkpointer.saved] == [1, 2]


def test_signals_are_left_alone_unless_asked(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with opened(tmp_path):
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
