"""The counters of a run, and whether a save is due."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckpt_convert.checkpointer.run import retention
from ckpt_convert.checkpointer.run.metrics import StepMetrics
from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.checkpointer.run.saved_steps import SavedStep
from ckpt_convert.checkpointer.run.schedule import Event, Schedule
from ckpt_convert.checkpointer.run.unused_options import UnusedOptions

log = logging.getLogger("ckpt_convert")


class RunCounters:
    """The progress and metrics of a run. The progress before the last event is kept, as ``due`` compares the two."""

    def __init__(
        self,
        schedule: Schedule,
        policy: retention.RetentionPolicy,
        *,
        save_first: bool,
        save_best: bool,
        several_clocks: bool = False,
    ) -> None:
        """``several_clocks`` says that other ranks count as well, whose clocks differ."""
        self.progress, self.step_metrics = Progress(), StepMetrics()
        self.started_from: int | None = None
        """The step at which the run was resumed, None for a fresh start."""
        self.watch = UnusedOptions(schedule, policy.best)
        self._before = self.progress
        self._policy = policy
        self._schedule, self._timed = schedule.split_by_clock() if several_clocks else (schedule, Schedule())
        self._save_first, self._save_best = save_first, save_best
        self._best_values: dict[str, float] = {}
        self._clock = 0.0
        self._said: set[str] = set()

    @property
    def has_trained(self) -> bool:
        """Whether a step was counted since the run was started or resumed."""
        return self.progress.step > (self.started_from or 0)

    def start_clock(self) -> None:
        """Start timing the next step."""
        self._clock = time.monotonic()

    def begin_watch(self, steps: Sequence[SavedStep]) -> None:
        """Take the best values so far, and the metrics that exist, from the saved steps."""
        found = {metric[0]: retention.best_step(steps, metric) for metric in self._policy.best}
        self._best_values = {name: one.metrics[name] for name, one in found.items() if one is not None}
        self.watch.begin(self.progress, [saved.metrics for saved in steps])

    def step(self, tokens: int, samples: int) -> None:
        """Count an optimizer step."""
        now = time.monotonic()
        self._count(
            step=self.progress.step + 1,
            tokens=self.progress.tokens + tokens,
            samples=self.progress.samples + samples,
            seconds=self.progress.seconds + now - self._clock,
        )
        self._clock = now
        self.step_metrics = StepMetrics(self.progress.evals)

    def report(self, metrics: Mapping[str, float], names: Mapping[str, Any]) -> dict[str, str]:
        """Count an evaluation with these metrics, of all reported names; by name, which replaced another value."""
        self._count(evals=self.progress.evals + 1)
        changed = self.step_metrics.add(metrics)
        self.watch.reported(self.progress.step, names)
        return changed

    def end_epoch(self) -> None:
        """Count an epoch."""
        self._count(epoch=self.progress.epoch + 1)

    def _count(self, **changed: Any) -> None:
        self._before, self.progress = self.progress, replace(self.progress, **changed)

    def due(self, on: Event) -> bool:
        """Whether a save is due for the event ``on`` that was just counted."""
        due = self._schedule.due(self._before, self.progress, on)
        return due or (on == "step" and self._save_first and self.progress.step == 1)

    @property
    def looks_at_clock(self) -> bool:
        """Whether there are rules apart, which look at the clock of one of several ranks."""
        return bool(self._timed.rules)

    def due_by_clock(self) -> bool:
        """Whether to save for the time that has passed with this step, as this rank's clock has it."""
        return self._timed.due(self._before, self.progress, "step")

    def is_new_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether one of these metrics is the best so far, so that ``save_best`` saves the step."""
        if not self._save_best:
            return False
        better = {
            metric[0]: metrics[metric[0]]
            for metric in self._policy.best
            if metric[0] in metrics and retention.improves(metric, metrics[metric[0]], self._best_values.get(metric[0]))
        }
        self._best_values |= better
        return bool(better)

    def warn_of_report(self, wrong: Mapping[str, str], changed: Mapping[str, str], saved_step: int | None) -> None:
        """Warn of metrics without effect, or replaced ones; once for each name."""
        step = self.progress.step
        for name, why in wrong.items():
            self._warn_once(
                f"{name} is none", f"step {step}: the metric {name!r} {why}; it is left out, and never best"
            )
        for name, how in changed.items():
            self._warn_once(
                f"{name} twice", f"step {step}: the metric {name!r} {how}; a step has the one reported last"
            )
        if step == (self.started_from or 0) != saved_step:
            self._warn_once(
                "before the first step",
                f"report() before the first step(): step {step} is not saved, so no checkpoint has these metrics; "
                "save() before it, or report after step()",
            )

    def _warn_once(self, about: str, text: str) -> None:
        if about not in self._said:
            self._said.add(about)
            log.warning("%s", text)
