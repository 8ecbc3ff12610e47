"""What a run has counted, and whether that makes a save due."""

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
    """The progress and the metrics of a run, held against its schedule. What they were before is kept for ``due``."""

    def __init__(
        self, schedule: Schedule, policy: retention.RetentionPolicy, *, save_first: bool, save_best: bool
    ) -> None:
        self.progress, self.step_metrics = Progress(), StepMetrics()
        self.started_from: int | None = None
        """The step that the run was at when it began, None for a fresh start."""
        self.watch = UnusedOptions(schedule, policy.best)
        self._before = self.progress
        self._schedule, self._policy = schedule, policy
        self._save_first, self._save_best = save_first, save_best
        self._best_value: float | None = None
        self._clock = 0.0
        self._said: set[str] = set()

    @property
    def has_trained(self) -> bool:
        """Whether a step was counted since the run began."""
        return self.progress.step > (self.started_from or 0)

    def start_clock(self) -> None:
        """The time until the next step counts from now on."""
        self._clock = time.monotonic()

    def begin_watch(self, steps: Sequence[SavedStep]) -> None:
        """What is there already counts for what is the best so far, and for what ever took effect."""
        found = retention.best_step(steps, self._policy)
        self._best_value = found.metrics[self._policy.best[0]] if found and self._policy.best else None
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
        """Count an evaluation that found these numbers, of all that it names; by name, how one differs from before."""
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
        """Whether to save for what was just counted; ``on`` is what that was."""
        due = self._schedule.due(self._before, self.progress, on)
        return due or (on == "step" and self._save_first and self.progress.step == 1)

    def is_new_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether these metrics are to be saved for being the best so far (``save_best``)."""
        if not self._save_best or self._policy.best is None or self._policy.best[0] not in metrics:
            return False
        value, sign = metrics[self._policy.best[0]], 1 if self._policy.best[1] == "min" else -1
        if self._best_value is not None and sign * value >= sign * self._best_value:
            return False
        self._best_value = value
        return True

    def warn_of_report(self, wrong: Mapping[str, str], changed: Mapping[str, str], saved_step: int | None) -> None:
        """Warn of metrics that do nothing, or not what they seem to; of each name once."""
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
