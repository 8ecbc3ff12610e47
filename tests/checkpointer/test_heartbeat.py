"""Who is gone, who is slow and who does not come, of ranks that say again and again that they are alive."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import pytest
import torch.distributed as dist

from ckpt_convert import CkptConvertError
from ckpt_convert.checkpointer.distributed import heartbeat
from ckpt_convert.checkpointer.distributed.heartbeat import BEAT, PATIENCE, SILENCE, Beat, Line, Vigil, read_beat
from ckpt_convert.tensors.pool import CallThread


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def watch(vigil: Vigil, clock: Clock, seconds: float, says: Beat | None, *, alive: bool = True) -> None:
    """Look at rank 2 for so many seconds, in which it is alive or not."""
    for second in range(int(seconds)):
        clock.now += 1
        if vigil.is_due:
            grown = says._replace(number=says.number + second) if says is not None and alive else says
            vigil.look({2: grown})


HERE, ELSEWHERE = Beat(7, {"save": 4}, {"": 0}), Beat(7, {"save": 3, "": 9}, {})


def test_a_slow_rank_is_waited_for_as_long_as_it_lives() -> None:
    vigil = Vigil("save", 4, {}, clock := Clock())
    watch(vigil, clock, 20 * 60, HERE)
    assert (vigil.silent, vigil.away()) == ([], [])


def test_a_rank_in_a_call_of_several_turns_takes_part_in_those_that_are_to_come() -> None:
    vigil = Vigil("save", 4, {}, clock := Clock())
    watch(vigil, clock, 20 * 60, ELSEWHERE._replace(inside={"save": 1}))
    assert (vigil.silent, vigil.away()) == ([], [])


def test_a_rank_that_says_nothing_more_is_gone_within_a_few_beats_of_the_time() -> None:
    vigil = Vigil("save", 4, {}, clock := Clock())
    watch(vigil, clock, 100, HERE)
    watch(vigil, clock, SILENCE - BEAT, HERE, alive=False)
    assert not vigil.silent
    watch(vigil, clock, 3 * BEAT, HERE, alive=False)
    assert vigil.silent == [2]


def test_a_rank_that_was_found_to_be_gone_is_not_waited_for_again_unless_it_is_heard_of() -> None:
    gone: dict[int, int] = {}
    watch(Vigil("save", 4, gone, clock := Clock()), clock, SILENCE + 3 * BEAT, HERE, alive=False)
    again = Vigil("save", 5, gone, clock)
    watch(again, clock, 2, HERE, alive=False)
    assert again.silent == [2]
    back = Vigil("save", 5, gone, clock)
    watch(back, clock, 2, HERE._replace(number=HERE.number + 1))
    assert not back.silent


def test_a_rank_that_is_alive_and_does_not_come() -> None:
    vigil = Vigil("save", 4, {}, clock := Clock())
    watch(vigil, clock, 601, ELSEWHERE)
    assert not vigil.silent
    assert vigil.away(600 - BEAT) == [2]
    watch(vigil, clock, BEAT, HERE)
    assert not vigil.away()


def test_a_rank_that_has_never_said_anything_is_none_that_is_gone() -> None:
    vigil = Vigil("", 1, {}, clock := Clock())
    watch(vigil, clock, 601, None)
    assert not vigil.silent
    assert vigil.away(600 - BEAT) == [2]


def test_time_in_which_this_process_was_stopped_does_not_count_against_others() -> None:
    vigil = Vigil("save", 4, {}, clock := Clock())
    watch(vigil, clock, BEAT, HERE)
    clock.now += 3600
    watch(vigil, clock, 1, HERE, alive=False)
    assert not vigil.silent


def test_it_is_said_whom_this_one_waits_for_at_times_that_double() -> None:
    vigil = Vigil("save", 4, {}, clock := Clock())
    said = []
    for _ in range(600):
        watch(vigil, clock, 1, HERE)
        if vigil.waits_long():
            said.append(vigil.waited)
    assert len(said) == 4
    assert said[0] == pytest.approx(PATIENCE, abs=BEAT)
    assert all(later >= 2 * earlier for earlier, later in pairwise(said))


def until(condition: object, seconds: float = 60) -> bool:
    """Whether something comes true, in a time that is ample."""
    end = time.monotonic() + seconds
    while not (found := bool(condition())) and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.01)
    return found


def test_a_line_beats_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT", 0.01)
    store = dist.HashStore()
    line = Line(store, "alive/0")
    line.heart.turns["save"] = 5

    def beat() -> Beat:
        return read_beat(store.get("alive/0"))

    assert until(lambda: beat().number > 2)
    assert beat().takes_part("save", 5)
    assert not beat().takes_part("save", 6)
    line.close()
    assert beat() == beat()


def test_a_line_that_nobody_has_any_more_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT", 0.01)
    before = threading.active_count()
    line = Line(dist.HashStore(), "alive/0")
    assert threading.active_count() == before + 1
    del line
    assert until(lambda: threading.active_count() == before)


class Stuck:
    """A store that stops answering, or fails."""

    def __init__(self) -> None:
        self.wait = threading.Event()

    def clone(self) -> Stuck:
        return self

    def set(self, key: str, value: str) -> None:
        """Nothing."""

    def get(self, key: str) -> bytes:
        """Nothing, until the end of the test."""
        self.wait.wait()
        return b""

    def check(self, keys: list[str]) -> bool:
        raise ConnectionError("Broken pipe")


def test_a_store_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "SILENCE", 0.05)
    line = Line(store := Stuck(), "alive/0")
    for _ in range(2):
        with pytest.raises(CkptConvertError, match=r"has not answered for 0\.05 s: .* has ended, or is stopped; look"):
            line.call("get", "key")
    store.wait.set()
    line.close()


def test_a_store_that_fails_is_an_error() -> None:
    line = Line(Stuck(), "alive/0")
    with pytest.raises(CkptConvertError, match="does not answer any more: the process that has it, rank 0's or torch"):
        line.call("check", ["key"])
    line.close()


def test_a_thread_that_makes_calls_raises_their_errors_and_goes_on() -> None:
    times = []
    thread = CallThread("test", lambda: times.append(1), 0.01)
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0, 60)
    assert thread.call(lambda: 2, 60) == 2
    assert until(lambda: len(times) > 2)
    thread.close()
    thread.close()
