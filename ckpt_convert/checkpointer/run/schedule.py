"""When to save: at intervals of steps, epochs, evaluations, tokens, samples or seconds, or by a function.

A save is due when a counter reaches or passes a multiple of its interval: batches differ in their number of tokens, and
``count % interval == 0`` would miss most saves.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.errors import UsageError

Event: TypeAlias = Literal["step", "eval", "epoch"]

_EXAMPLES = (
    '500 or "500 steps", "1 epoch", "1 eval", "2_000_000 tokens", "10_000 samples", "90 s", "30 min", "2 hours", '
    'Composer\'s "500ba", "1ep", "1000tok", "64sp", "900sec", a function of (progress) or (progress, event) '
    "that returns a bool, a list of these, or None for no schedule"
)


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit of an interval: ``size`` of a counter of ``Progress``, checked on one event."""

    name: str
    counter: str
    event: Event = "step"
    size: int = 1


_UNITS = {
    ("", "step", "steps", "ba"): Unit("step", "step"),
    ("epoch", "epochs", "ep"): Unit("epoch", "epoch", "epoch"),
    ("eval", "evals"): Unit("eval", "evals", "eval"),
    ("token", "tokens", "tok"): Unit("token", "tokens"),
    ("sample", "samples", "sp"): Unit("sample", "samples"),
    ("s", "sec", "secs", "second", "seconds"): Unit("second", "seconds"),
    ("min", "mins", "minute", "minutes"): Unit("minute", "seconds", size=60),
    ("h", "hour", "hours"): Unit("hour", "seconds", size=3600),
}
_BY_WORD = {word: unit for words, unit in _UNITS.items() for word in words}
_INTERVAL = re.compile(r"\s*([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval: due when its counter passes a multiple of it."""

    amount: int | float
    unit: Unit

    def due(self, before: Progress, now: Progress, on: Event) -> bool:
        interval = self.amount * self.unit.size
        counts = getattr(before, self.unit.counter), getattr(now, self.unit.counter)
        return on == self.unit.event and bool(counts[1] // interval > counts[0] // interval)

    def describe(self) -> str:
        return f"every {self.unit.name}" if self.amount == 1 else f"every {self.amount:_} {self.unit.name}s"


@dataclass(frozen=True, slots=True)
class Predicate:
    """A function that decides after each step, each evaluation and each epoch; it may want to know which."""

    decides: Callable[..., bool]
    takes_event: bool = False

    def due(self, before: Progress, now: Progress, on: Event) -> bool:
        return bool(self.decides(now, on) if self.takes_event else self.decides(now))

    def describe(self) -> str:
        return f"when {getattr(self.decides, '__qualname__', type(self.decides).__qualname__)} says so"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Any number of rules, of which one suffices; none means never."""

    rules: tuple[Interval | Predicate, ...] = ()

    def due(self, before: Progress, now: Progress, on: Event) -> bool:
        """Whether to save now: ``on`` is what just happened, ``before`` the progress before it.

        Steps, tokens, samples and time are looked at on a step, epochs on an epoch, evaluations on an eval, and
        functions on each of them.
        """
        answers = [rule.due(before, now, on) for rule in self.rules]  # a function sees every event, needed or not
        return any(answers)

    def split_by_clock(self) -> tuple[Schedule, Schedule]:
        """The rules that count what a run does, and those that look at the clock."""
        timed = [isinstance(rule, Interval) and rule.unit.counter == "seconds" for rule in self.rules]
        apart = [tuple(r for r, is_timed in zip(self.rules, timed, strict=True) if is_timed == want) for want in (0, 1)]
        return Schedule(apart[0]), Schedule(apart[1])

    def describe(self) -> str:
        """The schedule in words, such as "every 500 steps or every 30 minutes"."""
        return " or ".join(rule.describe() for rule in self.rules) or "never"


def parse_schedule(every: Any, option: str = "save_every") -> Schedule:
    """The schedule that a recipe asks for; ``option`` is what it calls it.

    Takes a number of optimizer steps, a text ("500 steps", "30 min", "500ba"), a function of the progress or of the
    progress and the event ("step", "eval" or "epoch"), a sequence of these, or None. Raises UsageError for anything
    else, also for a function that cannot be called so.
    """
    return every if isinstance(every, Schedule) else Schedule(tuple(_rules(every, option)))


def _rules(every: Any, option: str) -> Iterator[Interval | Predicate]:
    if every is None:
        return
    if isinstance(every, Schedule):
        yield from every.rules
    elif isinstance(every, int) and not isinstance(every, bool):
        yield _interval(every, _BY_WORD[""], every, option)
    elif isinstance(every, str):
        yield _text(every, option)
    elif isinstance(every, Sequence) and not isinstance(every, bytes | bytearray):
        if not every:
            raise UsageError(f"{option}={every!r}: is empty; give None to save never on schedule")
        for one in every:
            yield from _rules(one, option)
    elif callable(every) and not isinstance(every, type):
        yield Predicate(every, _takes_event(every, option))
    else:
        raise _unknown(every, option)


def _takes_event(decides: Callable[..., Any], option: str) -> bool:
    """Whether a function takes the event after the progress: by its second parameter, unless that has a default."""
    name = getattr(decides, "__qualname__", type(decides).__qualname__)
    if inspect.iscoroutinefunction(decides):
        raise UsageError(f"{option}: {name} is a coroutine function, whose result is always true; give a plain one")
    try:
        signature = inspect.signature(decides)
    except (TypeError, ValueError):  # some built-in ones do not tell
        return False
    names = [*signature.parameters]
    takes_one, takes_two = (_accepts(signature, count) for count in (1, 2))
    if not takes_one and not takes_two:
        raise UsageError(
            f"{option}: {name}{signature} is called with the progress alone, or with the progress and the event "
            '("step", "eval" or "epoch"); give a function of one or two parameters'
        )
    return takes_two and (not takes_one or names[1:2] == ["event"])


def _accepts(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def _text(text: str, option: str) -> Interval:
    match = _INTERVAL.fullmatch(text)
    unit = _BY_WORD.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise _unknown(text, option)
    if "." not in match[1]:
        return _interval(int(match[1]), unit, text, option)
    if unit.counter != "seconds":
        raise UsageError(f"{option}={text!r}: expected a whole number of {unit.name}s; only times have fractions")
    return _interval(float(match[1]), unit, text, option)


def _interval(amount: int | float, unit: Unit, given: object, option: str) -> Interval:
    if amount <= 0:
        raise UsageError(f"{option}={given!r}: an interval is more than 0; give None to save never on schedule")
    return Interval(amount, unit)


def _unknown(given: object, option: str) -> UsageError:
    return UsageError(f"{option}={given!r}: is no schedule; give {_EXAMPLES}")
