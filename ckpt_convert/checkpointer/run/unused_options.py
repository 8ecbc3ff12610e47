"""Options that never take effect: a schedule whose counter never changes, a metric that no saved step has."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.checkpointer.run.retention import BestMetric
from ckpt_convert.checkpointer.run.schedule import Interval, Schedule

log = logging.getLogger("ckpt_convert")

PATIENCE = 100
"""Steps after which a counter of every step would have changed."""

_COUNTED = {
    "tokens": ("token was counted", "pass step(tokens=...)"),
    "samples": ("sample was counted", "pass step(samples=...)"),
    "evals": ("evaluation was counted", "report(...) counts them"),
    "epoch": ("epoch ended", "loop over epochs(...), or call end_epoch()"),
}


@dataclass
class _Reports:
    """How often a metric was reported, at which step last, and whether a saved step has it."""

    count: int = 0
    last: int | None = None
    met: bool = False


@dataclass
class UnusedOptions:
    """Compares what a run has counted, reported and saved with its schedule and the metrics of ``best``.

    Missing tokens and samples are warned of after 100 steps, or at the end of the first epoch. Evaluations may be far
    apart: they are missed once both have passed, a metric of ``best`` sooner only if others were reported. Each is
    warned of once, and all again at the end of the run. ``saved_at`` is the step that was saved last.
    """

    schedule: Schedule
    best: tuple[BestMetric, ...]
    _start: Progress = field(default_factory=Progress)
    _names: set[str] = field(default_factory=set)
    _reports: dict[str, _Reports] = field(default_factory=dict)
    _saves: int = 0
    saved_at: int | None = None
    _said: set[str] = field(default_factory=set)

    def begin(self, progress: Progress, metrics: Sequence[Mapping[str, float]]) -> None:
        """Start at this progress; ``metrics`` are those of the existing checkpoints."""
        self._start = progress
        self._reports = {name: _Reports(met=any(name in one for one in metrics)) for name, _ in self.best}

    def reported(self, step: int, names: Iterable[str]) -> None:
        names = set(names)
        self._names |= names
        for name in names & self._reports.keys():
            one = self._reports[name]
            one.count, one.last = one.count + 1, step
            one.met |= step == self.saved_at

    def step_saved(self, step: int) -> None:
        self._saves, self.saved_at = self._saves + 1, step
        for one in self._reports.values():
            one.met |= step == one.last

    def warn_missed(self, now: Progress) -> None:
        """Warn once of each thing that should have been counted or reported by now."""
        self._say(self._missed(now, over=False), again=False)

    def warn_at_end(self, now: Progress) -> None:
        """Warn of everything that never took effect."""
        self._say(self._missed(now, over=True), again=True)

    def _say(self, missed: Iterator[tuple[str, str]], *, again: bool) -> None:
        for what, text in missed:
            if again or what not in self._said:
                self._said.add(what)
                log.warning("%s", text)

    def _missed(self, now: Progress, *, over: bool) -> Iterator[tuple[str, str]]:
        steps = now.step - self._start.step
        if not steps:
            return
        waited, epoch_over = steps >= PATIENCE, now.epoch > self._start.epoch
        soon, late = over or waited or epoch_over, over or (waited and epoch_over)
        for rule in self.schedule.rules:
            counter = rule.unit.counter if isinstance(rule, Interval) else ""
            counted_since = self._start if counter in ("tokens", "samples") else Progress()
            missed = {"tokens": soon, "samples": soon, "evals": late, "epoch": over}.get(counter, False)
            if missed and getattr(now, counter) == getattr(counted_since, counter):
                what, way_out = _COUNTED[counter]
                yield counter, f"save_every={rule.describe()!r}: no {what} in {steps} steps; {way_out}"
        for name, mode in self.best:
            yield from self._unmet(name, mode, steps, over=over, soon=soon, late=late)

    def _unmet(
        self, name: str, mode: str, steps: int, *, over: bool, soon: bool, late: bool
    ) -> Iterator[tuple[str, str]]:
        reports = self._reports[name]
        if reports.met:
            return
        option = f"best={f'{name}:{mode}'!r}"
        if not reports.count:
            if late or (soon and self._names):
                others = f" (reported: {', '.join(sorted(self._names))})" if self._names else ""
                yield (
                    f"{name} is missing",
                    f"{option}: no {name!r} was reported in {steps} steps{others}, so no checkpoint is kept as the "
                    f"best; call report({name}=...), or name another metric in best=",
                )
        elif self._saves and (over or (soon and min(reports.count, self._saves) > 1)):
            yield (
                f"{name} is of other steps",
                f"{option}: {name!r} was reported {reports.count} times and {self._saves} steps were saved, but never "
                "the same one, so the best model is not kept; save_best=True saves it",
            )
