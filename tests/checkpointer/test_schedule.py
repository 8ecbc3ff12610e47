"""Schedules: what a recipe may ask for, and that a save is due when a multiple of the interval is passed."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest

from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.checkpointer.run.schedule import Event, Schedule, parse_schedule
from ckpt_convert.errors import UsageError

ALL = {"step": "step", "epoch": "epoch", "evals": "eval", "tokens": "step", "samples": "step", "seconds": "step"}
"""Each counter and the event on which it is looked at."""


def due(every: Any, counter: str, before: float, now: float, on: Event | None = None) -> bool:
    event: Any = on or ALL[counter]
    return parse_schedule(every).due(
        replace(Progress(), **{counter: before}), replace(Progress(), **{counter: now}), event
    )


@pytest.mark.parametrize(
    ("every", "counter", "interval"),
    [
        (500, "step", 500),
        (1, "step", 1),
        ("500", "step", 500),
        ("500 steps", "step", 500),
        ("1 step", "step", 1),
        ("1_000 steps", "step", 1000),
        ("500ba", "step", 500),
        ("1 epoch", "epoch", 1),
        ("2 epochs", "epoch", 2),
        ("1ep", "epoch", 1),
        ("1 eval", "evals", 1),
        ("3 evals", "evals", 3),
        ("1 token", "tokens", 1),
        ("2_000_000 tokens", "tokens", 2_000_000),
        ("1000tok", "tokens", 1000),
        ("1 sample", "samples", 1),
        ("10_000 samples", "samples", 10_000),
        ("64sp", "samples", 64),
        ("90 s", "seconds", 90),
        ("900sec", "seconds", 900),
        ("90 secs", "seconds", 90),
        ("1 second", "seconds", 1),
        ("90 seconds", "seconds", 90),
        ("30 min", "seconds", 1800),
        ("1 minute", "seconds", 60),
        ("30 minutes", "seconds", 1800),
        ("2 h", "seconds", 7200),
        ("1 hour", "seconds", 3600),
        ("2 hours", "seconds", 7200),
        ("1.5 hours", "seconds", 5400),
        ("0.5 s", "seconds", 0.5),
        ("  30  Min ", "seconds", 1800),
    ],
)
def test_what_may_be_said_and_what_it_means(every: Any, counter: str, interval: float) -> None:
    small = 1 if counter != "seconds" else 0.25
    if interval > small:
        assert not due(every, counter, 0, interval - small)
        assert not due(every, counter, interval, 2 * interval - small)
    assert due(every, counter, interval - small, interval)
    assert due(every, counter, 2 * interval - small, 2 * interval)
    assert not due(every, counter, interval, interval)


@pytest.mark.parametrize(("counter", "own"), ALL.items())
def test_a_counter_is_looked_at_on_its_own_event_only(counter: str, own: str) -> None:
    unit = {"evals": "eval", "seconds": "second"}.get(counter, counter)
    events: list[Any] = ["step", "eval", "epoch"]
    assert [event for event in events if due(f"5 {unit.removesuffix('s')}", counter, 4, 5, event)] == [own]


def test_other_counters_do_not_matter() -> None:
    before = Progress(step=1)
    assert not parse_schedule("10 tokens").due(before, Progress(step=100, samples=100, seconds=100.0), "step")


def test_a_multiple_that_is_stepped_over_counts() -> None:
    """Batches of 700 tokens never end on a multiple of 1000, but pass one at 1400, 2100, 3500, …"""
    totals = range(0, 7001, 700)
    passed = [now for before, now in itertools.pairwise(totals) if due("1000 tok", "tokens", before, now)]
    assert passed == [1400, 2100, 3500, 4200, 5600, 6300, 7000]


def test_several_multiples_at_once_are_one_save() -> None:
    assert due(10, "step", 5, 95)


def test_a_resumed_run_goes_on_with_the_same_multiples() -> None:
    assert [step for step in range(731, 1501) if due(500, "step", step - 1, step)] == [1000, 1500]


def test_a_function_sees_the_progress_after_each_step() -> None:
    seen: list[Progress] = []

    def at_seven(progress: Progress) -> bool:
        seen.append(progress)
        return progress.step == 7

    schedule = parse_schedule(at_seven)
    now = Progress(step=7, tokens=70)
    assert schedule.due(Progress(step=6), now, "step")
    assert not schedule.due(Progress(step=7), Progress(step=8), "step")
    assert seen == [now, Progress(step=8)]


@pytest.mark.parametrize("event", ["step", "eval", "epoch"])
def test_a_function_is_asked_on_every_event(event: Any) -> None:
    now, seen = Progress(step=1), []

    def decides(progress: Progress, on: Event) -> bool:
        seen.append((progress, on))
        return on == "epoch"

    # It is asked where another rule suffices, too: it may count.
    schedules = parse_schedule(decides), parse_schedule([lambda progress: True, decides])
    assert [schedule.due(Progress(), now, event) for schedule in schedules] == [event == "epoch", True]
    assert seen == [(now, event)] * 2


class _Rule:
    def __call__(self, progress: Progress, event: Event) -> bool:
        return event == "eval"


@pytest.mark.parametrize(
    ("decides", "expected"),
    [
        (lambda progress: True, [True, True]),
        (lambda progress, threshold=3: threshold == 3, [True, True]),
        (lambda progress, event: event == "eval", [False, True]),
        (lambda progress, event="step": event == "eval", [False, True]),
        (lambda *args: len(args) == 1, [True, True]),
        (_Rule(), [False, True]),
        (functools.partial(lambda limit, progress: limit == 4, 4), [True, True]),
    ],
)
def test_a_function_may_want_the_event(decides: Any, expected: list[bool]) -> None:
    events: list[Any] = ["step", "eval"]
    assert [parse_schedule(decides).due(Progress(), Progress(step=1), event) for event in events] == expected


async def _waits(progress: Progress) -> bool:
    return False


@pytest.mark.parametrize("decides", [lambda: True, lambda a, b, c: True, lambda progress, *, key: True, _Rule, _waits])
def test_a_function_that_cannot_be_asked_is_refused(decides: Any) -> None:
    with pytest.raises(UsageError, match="save_every"):
        parse_schedule(decides)


def test_of_a_list_one_suffices() -> None:
    every = ["500 steps", ("1 epoch", lambda progress: progress.tokens > 99), None]
    assert due(every, "step", 499, 500)
    assert due(every, "epoch", 0, 1)
    assert due(every, "tokens", 0, 100)
    assert not due(every, "step", 500, 501)


def test_none_is_never() -> None:
    assert parse_schedule(None) == Schedule()
    events: list[Any] = ["step", "eval", "epoch"]
    after = Progress(10**9, 10**9, 10**9, 10**9, 10**9, 1e9)
    assert not any(parse_schedule(None).due(Progress(), after, event) for event in events)


def test_a_schedule_is_taken_as_it_is() -> None:
    schedule = parse_schedule("3 steps")
    assert parse_schedule(schedule) is schedule
    assert parse_schedule([schedule, "1 epoch"]) == parse_schedule(["3 steps", "1 epoch"])


@pytest.mark.parametrize(
    "every",
    [
        "often",
        "",
        "steps",
        "500 parsecs",
        "2M tokens",
        "1e3 steps",
        "-5 steps",
        "+5 steps",
        "5 steps!",
        "1__000",
        "_1",
        "1_",
        "1,000 steps",
        "٣ steps",
        "5 steps or 1 epoch",
        "1.",
        ".5 h",
        1.5,
        True,
        False,
        b"500",
        {"steps": 5},
        object(),
        [500, "often"],
    ],
)
def test_anything_else_is_refused_with_what_may_be_said(every: Any) -> None:
    with pytest.raises(UsageError) as caught:
        parse_schedule(every)
    wrong = "often" if isinstance(every, list) else every
    assert str(caught.value).startswith(f"save_every={wrong!r}: is no schedule; give 500")
    for example in ('"1 epoch"', '"30 min"', '"500ba"', "a function", "None"):
        assert example in str(caught.value)


@pytest.mark.parametrize("every", [0, -1, "0 steps", "0", "0.0 s", "0ep"])
def test_an_interval_of_nothing_is_refused(every: Any) -> None:
    with pytest.raises(UsageError, match="more than 0; give None"):
        parse_schedule(every)


@pytest.mark.parametrize("every", ["1.5 steps", "0.5 epochs", "2.0"])
def test_only_times_have_fractions(every: str) -> None:
    with pytest.raises(UsageError, match="only times have fractions"):
        parse_schedule(every)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(UsageError, match="is empty; give None"):
        parse_schedule([])


def test_a_message_names_the_option() -> None:
    with pytest.raises(UsageError, match=r"^weights_every='often'"):
        parse_schedule("often", "weights_every")


@pytest.mark.parametrize(
    ("every", "words"),
    [
        (None, "never"),
        (1, "every step"),
        ("2000000tok", "every 2_000_000 tokens"),
        ("1 h", "every hour"),
        ("1.5 h", "every 1.5 hours"),
        (["500ba", "30 min", "1ep"], "every 500 steps or every 30 minutes or every epoch"),
    ],
)
def test_it_can_be_said_in_words(every: Any, words: str) -> None:
    assert parse_schedule(every).describe() == words


def test_a_function_is_described_by_its_name() -> None:
    def loss_is_low(progress: Progress) -> bool:
        return True

    class Rule:
        def __call__(self, progress: Progress) -> bool:
            return True

    assert parse_schedule(loss_is_low).describe().endswith("loss_is_low says so")
    assert parse_schedule(Rule()).describe().endswith("Rule says so")


@pytest.mark.parametrize("every", ["30 min", "2_000 tokens", "1 epoch", "0.5 s", "7"])
def test_its_words_are_a_schedule_again(every: str) -> None:
    words = parse_schedule(every).describe().removeprefix("every ")
    assert parse_schedule(words if words[0].isdigit() else f"1 {words}") == parse_schedule(every)
