"""Work in several processes: results in order, progress that adds up, and no failure that goes unnoticed."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from ckpt_convert.errors import CkptConvertError, CorruptFileError
from ckpt_convert.tensors import pool
from ckpt_convert.tensors.progress import ProgressCounter, TransferProgress

MB = 1 << 20
ITEMS = [(at, size * 8) for at, size in enumerate([0, 1, 40 * MB, 5, 70 * MB, 0, 3, 33 * MB, 9, 40 * MB, 2])]
Work = Callable[[int], tuple[int, int]]
LeftBehind = Callable[[], set[psutil.Process]]


@dataclass(frozen=True)
class Here:
    """Where the test runs: one of the workers is a thread there, the others are processes of their own."""

    pid: int = field(default_factory=os.getpid)

    @property
    def left(self) -> bool:
        return os.getpid() != self.pid


def doubled(counter: ProgressCounter) -> Work:
    """Twice the number and the process it was made in, once its bytes have been reported in two parts."""

    def work(number: int) -> tuple[int, int]:
        size = ITEMS[number][1]
        counter.add(size // 2)
        counter.add(size - size // 2)
        return 2 * number, os.getpid()

    return work


@dataclass(frozen=True)
class Shared:
    """As ``doubled``, but the thread waits, some items on, until a process has done one: so both have some."""

    done: Path
    here: Here = field(default_factory=Here)

    def __call__(self, counter: ProgressCounter) -> Work:
        work, started = doubled(counter), time.monotonic()

        def do(number: int) -> tuple[int, int]:
            if self.here.left:
                self.done.touch()
            while number > 2 and not self.done.exists() and time.monotonic() < started + 60:
                time.sleep(0.01)
            return work(number)

        return do


@dataclass(frozen=True)
class Failing:
    """Work that fails at a number, wherever that is done."""

    at: int
    fail: Callable[[], None]

    def __call__(self, counter: ProgressCounter) -> Work:
        work = doubled(counter)

        def do(number: int) -> tuple[int, int]:
            if number == self.at:
                self.fail()
            return work(number)

        return do


def damaged() -> None:
    raise CorruptFileError("model.safetensors: ends early")


class UnpicklableError(Exception):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


def unpicklable() -> None:
    raise UnpicklableError("one", "other")


@dataclass(frozen=True)
class Killed:
    """Work in which a process is killed; the thread waits for that."""

    here: Here = field(default_factory=Here)

    def __call__(self, counter: ProgressCounter) -> Work:
        def do(number: int) -> tuple[int, int]:
            if self.here.left:
                os.kill(os.getpid(), signal.SIGKILL)
            while True:
                counter.add(0)
                time.sleep(0.01)

        return do


@dataclass(frozen=True)
class Mask:
    """The signals that are blocked in a process, none in the thread, which waits until a process has told them."""

    done: Path
    here: Here = field(default_factory=Here)

    def __call__(self, counter: ProgressCounter) -> Callable[[int], set[int]]:
        started = time.monotonic()

        def do(number: int) -> set[int]:
            if self.here.left:
                self.done.touch()
                return {int(one) for one in signal.pthread_sigmask(signal.SIG_BLOCK, ())}
            while number and not self.done.exists() and time.monotonic() < started + 60:
                time.sleep(0.01)
            return set()

        return do


def where(counter: ProgressCounter) -> Callable[[int], int]:
    return lambda _: os.getpid()


def run(start: Callable[[ProgressCounter], Work], workers: int, **options: Any) -> list[tuple[int, int]]:
    return list(pool.run_in_processes(ITEMS, start, workers=workers, phase="working", **options))


@pytest.fixture
def left_behind() -> LeftBehind:
    """What the test has started and that still runs; another test may have left a child, such as a fork server."""
    before = set(psutil.Process().children())
    return lambda: set(psutil.Process().children()) - before


@pytest.mark.parametrize("workers", [1, 2, 3, 99])
def test_results_are_in_order_and_all_bytes_are_reported(workers: int, tmp_path: Path, left_behind: LeftBehind) -> None:
    seen: list[TransferProgress] = []
    found = run(doubled if workers == 1 else Shared(tmp_path / "done"), workers, progress=seen.append)
    assert [value for value, _ in found] == [2 * number for number, _ in ITEMS]
    total = sum(size for _, size in ITEMS)
    assert (seen[0].done, seen[-1].done) == (0, total)
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert {(progress.phase, progress.total) for progress in seen} == {("working", total)}
    processes = {process for _, process in found}
    assert os.getpid() in processes
    assert (processes == {os.getpid()}) == (workers == 1)
    assert not left_behind()


def test_small_items_go_to_a_worker_together() -> None:
    items = [(0, 1 << 18)] * 5000
    found = list(pool.run_in_processes(items, where, workers=2, phase="working"))
    assert len(found) == 5000
    assert len(set(found[:128])) == 1


def test_what_is_not_worth_a_process_is_done_here() -> None:
    items = [(0, 100 << 20)] * 10
    assert set(pool.run_in_processes(items, where, workers=4, phase="working")) == {os.getpid()}


def test_nothing_to_do() -> None:
    assert list(pool.run_in_processes([], doubled, workers=4, phase="working")) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_work_is_raised_as_it_is(workers: int, left_behind: LeftBehind) -> None:
    with pytest.raises(CorruptFileError) as caught:
        run(Failing(7, damaged), workers)
    assert str(caught.value) == "model.safetensors: ends early"
    said = "".join(traceback.format_exception(caught.value))
    assert "in damaged" in said
    assert not left_behind()


def test_an_error_that_cannot_be_sent_is_told_by_its_type_and_text() -> None:
    with pytest.raises(CkptConvertError, match="worker process failed: UnpicklableError: one and other") as caught:
        run(Failing(7, unpicklable), 2)
    assert any("in unpicklable" in note for note in caught.value.__notes__)


def test_a_worker_that_is_killed_is_an_error(left_behind: LeftBehind) -> None:
    with pytest.raises(CkptConvertError, match=r"working: a worker process was killed.*try `workers=1`"):
        run(Killed(), 2)
    assert not left_behind()


def test_whoever_has_enough_leaves_no_process_and_no_thread_behind(left_behind: LeftBehind) -> None:
    threads = set(threading.enumerate())
    found = pool.run_in_processes(ITEMS, doubled, workers=2, phase="working")
    assert next(found)[0] == 0
    found.close()  # type: ignore[attr-defined]
    assert not left_behind()
    assert set(threading.enumerate()) <= threads


def test_an_interruption_ends_the_workers(left_behind: LeftBehind) -> None:
    def interrupt(progress: TransferProgress) -> None:
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(doubled, 2, progress=interrupt)
    assert not left_behind()


def test_what_a_terminal_sends_to_all_is_not_heard_by_processes(tmp_path: Path) -> None:
    mine = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    items = [(at, 128 * MB) for at in range(8)]
    found = list(pool.run_in_processes(items, Mask(tmp_path / "done"), workers=2, phase="working"))
    assert [one for one in found if one] != []
    assert all({signal.SIGINT, signal.SIGHUP} <= one for one in found if one)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mine


def test_progress_is_told_by_one_thread_at_a_time_under_no_lock_and_never_falls() -> None:
    seen: list[int] = []
    telling = threading.Lock()
    counter: ProgressCounter | None = None

    def tell(progress: TransferProgress) -> None:
        assert telling.acquire(blocking=False), "two threads tell at once"
        if counter is not None and progress.done % 7 == 0:
            other = threading.Thread(target=counter.add, args=(0,))  # would wait for ever if a lock were held
            other.start()
            other.join(10)
            assert not other.is_alive()
        seen.append(progress.done)
        telling.release()

    counter = ProgressCounter("working", 400, tell)
    pool.run_threaded(range(400), 4, counter, lambda: lambda _: counter.add(1))
    assert seen == sorted(seen)
    assert seen[-1] == 400


def test_a_callback_that_fails_ends_the_work() -> None:
    def fail(progress: TransferProgress) -> None:
        if progress.done == 3:
            raise ValueError("enough")

    counter = ProgressCounter("working", 100, fail)
    with pytest.raises(ValueError, match="enough"):
        pool.run_threaded(range(100), 2, counter, lambda: lambda _: counter.add(1))
