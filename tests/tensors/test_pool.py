"""Work in several processes: results in order, progress that adds up, and no failure that goes unnoticed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable

import pytest

from ckpt_convert.errors import CkptConvertError, CorruptFileError
from ckpt_convert.tensors import pool
from ckpt_convert.tensors.progress import Meter, Progress

ITEMS = [(number, size) for number, size in enumerate([0, 1, 40 << 20, 5, 70 << 20, 0, 3, 33 << 20, 9, 40 << 20, 2])]
Work = Callable[[int], tuple[int, int]]


def doubled(meter: Meter) -> Work:
    """Twice the number and the process it was made in, once its bytes have been reported in two parts."""

    def work(number: int) -> tuple[int, int]:
        size = ITEMS[number][1]
        meter.add(size // 2)
        meter.add(size - size // 2)
        return 2 * number, os.getpid()

    return work


def failing(at: int, fail: Callable[[], None]) -> Callable[[Meter], Work]:
    def start(meter: Meter) -> Work:
        work = doubled(meter)

        def do(number: int) -> tuple[int, int]:
            if number == at:
                fail()
            return work(number)

        return do

    return start


@pytest.mark.parametrize("workers", [1, 2, 3, 99])
def test_results_are_in_order_and_all_bytes_are_reported(workers: int) -> None:
    seen: list[Progress] = []
    found = list(pool.results(ITEMS, doubled, workers=workers, phase="working", progress=seen.append))
    assert [value for value, _ in found] == [2 * number for number, _ in ITEMS]
    total = sum(size for _, size in ITEMS)
    assert (seen[0].done, seen[-1].done) == (0, total)
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert {(progress.phase, progress.total) for progress in seen} == {("working", total)}
    processes = {process for _, process in found}
    assert (processes == {os.getpid()}) == (workers == 1)
    assert not multiprocessing.active_children()


def test_small_items_go_to_a_worker_together() -> None:
    items = [(0, 1)] * 5000
    found = list(pool.results(items, lambda meter: lambda _: os.getpid(), workers=2, phase="working"))
    assert len(found) == 5000
    assert len(set(found[:1000])) == 1


def test_nothing_to_do() -> None:
    assert list(pool.results([], doubled, workers=4, phase="working")) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_work_is_raised_as_it_is(workers: int) -> None:
    def fail() -> None:
        raise CorruptFileError("model.safetensors: ends early")

    with pytest.raises(CorruptFileError) as caught:
        list(pool.results(ITEMS, failing(7, fail), workers=workers, phase="working"))
    assert str(caught.value) == "model.safetensors: ends early"
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_an_error() -> None:
    def fail() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(CkptConvertError, match=r"working: a worker process was killed.*try `workers=1`"):
        list(pool.results(ITEMS, failing(4, fail), workers=2, phase="working"))
    assert not multiprocessing.active_children()


def test_whoever_has_enough_leaves_no_process_behind() -> None:
    found = pool.results(ITEMS, doubled, workers=2, phase="working")
    assert next(found)[0] == 0
    found.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_an_interruption_ends_the_workers() -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(pool.results(ITEMS, doubled, workers=2, phase="working", progress=interrupt))
    assert not multiprocessing.active_children()
