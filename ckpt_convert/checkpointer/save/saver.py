"""Saving the steps of a run, synchronously or in a background thread."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ckpt_convert._version import __version__
from ckpt_convert.checkpointer.distributed.appointments import Appointment
from ckpt_convert.checkpointer.distributed.ranks import on_all_ranks
from ckpt_convert.checkpointer.live.copy_check import CopyCheck
from ckpt_convert.checkpointer.live.fsdp1 import Fsdp1Model
from ckpt_convert.checkpointer.live.tensors import model_tensors
from ckpt_convert.checkpointer.run import saved_steps
from ckpt_convert.checkpointer.run.counters import RunCounters
from ckpt_convert.checkpointer.run.source import CONFIG, STARTED_FROM
from ckpt_convert.checkpointer.save.buffers import CopyBuffers
from ckpt_convert.checkpointer.save.options import Options
from ckpt_convert.checkpointer.save.planner import SavePlanner, Settings
from ckpt_convert.checkpointer.save.run_directory import RunDirectory
from ckpt_convert.checkpointer.save.unclosed import Unclosed
from ckpt_convert.checkpointer.state import optimizers
from ckpt_convert.checkpointer.state.parts import TrainingParts
from ckpt_convert.errors import UsageError
from ckpt_convert.storage.place import Place
from ckpt_convert.tensors.pool import Background

log = logging.getLogger("ckpt_convert")


class Saver:
    """Takes the state of a run and writes it, while training waits or in the background.

    ``parts`` are what the run is made of, None as long as none has begun; ``saved_step`` is the step that was saved
    last, and ``saved_at`` its directory.
    """

    def __init__(self, options: Options, planner: SavePlanner, run: RunDirectory | None, counts: RunCounters) -> None:
        self.planner = planner
        self.counts = counts
        self.parts: TrainingParts | None = None
        self.saved_step: int | None = None
        self.saved_at: Place | None = None
        self.lacks_final = False
        """Whether the resumed step was not saved with the settings of ``final=``."""
        self.more_files: Callable[[], Mapping[str, bytes]] = dict
        self.background = Background()
        self.holds_saves = self.is_save_held = False
        self._options, self._run, self._ranks = options, run, options.ranks
        self._stop = None if options.ranks is None else Appointment(options.ranks, "stop")
        self._clock = None if options.ranks is None else Appointment(options.ranks, "clock")
        self._settings, self._last = options.settings, options.last
        self._buffers = CopyBuffers()
        self._copy_check: CopyCheck | None = None
        self._captured_trained = False
        self._unclosed: Unclosed | None = None

    @property
    def directory(self) -> RunDirectory:
        """The directory of the steps; raises UsageError for a checkpointer without output_dir."""
        if self._run is None:
            raise UsageError("there is no output_dir, so nothing can be saved or resumed; give one")
        return self._run

    @property
    def next_destination(self) -> Place:
        """The directory that a save of this step would write."""
        return self.directory.destination(self.counts.progress, self.counts.step_metrics.metrics)

    @property
    def next_location(self) -> Path | str:
        """Where that directory stays: its path, or its URL in a store."""
        place = self.directory.stays_at(self.next_destination)
        return place.local if place.is_local else str(place)

    def require(self, what: str) -> TrainingParts:
        """The objects of the run; raises UsageError for a call before resume() or register()."""
        if self.parts is None:
            raise UsageError(f"{what}: nothing says what to save; call resume(model=..., ...) or register(...) first")
        return self.parts

    def open(self) -> None:
        """Lock the directory for a new run, and untrack the objects of the previous one."""
        if self.parts is not None:
            self.parts.untrack()
        for path in self._settings.extra:
            if not path.is_regular_file():
                raise UsageError(f"{path}: no such file; extra_files are copied into every checkpoint")
        self.directory.open(self.planner.source, self._options.as_text())
        self.is_save_held = self.lacks_final = self._captured_trained = False
        self.saved_step = None

    def begin(self, parts: TrainingParts) -> None:
        """Set the objects of the run."""
        self.parts = parts
        given = None if parts.optimizer is None else optimizers.optimizer_parameters(parts.optimizer)
        self._copy_check = (
            CopyCheck(parts.model, given)
            if isinstance(parts.model, Mapping) and not isinstance(parts.model, Fsdp1Model)
            else None
        )
        self.counts.start_clock()
        self._forget_unclosed()
        save_last = self._options.save_last
        self._unclosed = Unclosed(self.directory, self.counts, self.background, save_last=save_last)

    def _forget_unclosed(self) -> None:
        if self._unclosed is not None:
            self._unclosed.forget()
            self._unclosed = None

    def plan_ahead(self) -> None:
        """Raise now what would fail at a later save, and warn once about the saved steps."""
        parts = self.require("plan_ahead()")
        trained = list(optimizers.optimizer_parameters(parts.optimizer))
        emitted = self._options.hooks.emitted()
        for settings in dict.fromkeys((self._settings, self._last)):
            for notice in self.planner.plan_ahead(parts.model, settings, trained, emitted):
                log.warning("%s", notice)
        if self._saves_state:
            parts.get_state()  # what cannot be saved is an error now, not at the first save
        if self._copy_check is not None:
            self._copy_check.restart(self.counts.progress.step)
        self._refuse_others()
        self.counts.start_clock()

    @property
    def _saves_state(self) -> bool:
        return "full" in (self._settings.contents, self._last.contents)

    def after_step(self, parts: TrainingParts) -> None:
        """Mark the gradients as used; after the first step, check that the optimizer's new state can be saved."""
        if not self._saves_state:
            return
        parts.mark_gradients_used()
        if not self._captured_trained:
            self._captured_trained = True
            parts.get_state()

    def check(self) -> None:
        """Raise what has failed behind the training; never waits."""
        self.background.check()
        self.directory.raise_failures()

    def wait(self, *, alone: bool = False) -> None:
        """Wait until what was saved is complete where it belongs; raises what has failed.

        ``alone``: other ranks may not wait as well.
        """
        self.background.wait()
        if self._run is not None:
            self._run.settle(alone=alone)

    def save_or_hold(self) -> None:
        """Save a step that is due: now, or if saves are held, at ``save_held``."""
        if self.holds_saves:
            self.is_save_held = True
        else:
            self.save(may_skip=True)

    def save_held(self) -> None:
        """Save the step now if a save was due since the last one."""
        if self.is_save_held:
            self.save()

    def is_stopped(self, signalled: bool) -> bool:
        """Whether to save this step for a signal: the one it came at, or where ranks save together, two later."""
        if self._stop is None:
            return signalled
        stopped = self._stop.is_at(self.counts.progress.step, signalled)
        if stopped and self._stop.asked_by:
            log.warning("rank %d received a signal to stop: all save this step", self._stop.asked_by)
        return stopped

    def due_by_clock(self) -> bool:
        """Whether to save this step as the clock of the first rank says; ranks that count alone ask their schedule."""
        if self._clock is None or self._ranks is None or not self.counts.looks_at_clock:
            return False
        return self._clock.is_at(self.counts.progress.step, self._ranks.is_first and self.counts.due_by_clock())

    def agreed(self, due: bool) -> bool:
        """Whether a save is due after a report, where ranks may have reported different numbers: as the first one says.

        Nothing is asked where no number decides it.
        """
        if self._ranks is None or not self._options.save_best:
            return due
        return self._ranks.first("report()", lambda: b"due" if due else b"") == b"due"

    @on_all_ranks
    def save(self, settings: Settings | None = None, *, may_skip: bool = False) -> None:
        """Take the current state, and write it: in the background, or before this returns.

        ``may_skip``: it may be left out where earlier steps are still on their way.
        """
        parts, step = self.require("save()"), self.counts.progress.step
        self.is_save_held = False
        self._refuse_others()
        if self._copy_check is not None:
            self._copy_check.refuse_copies(step)
        if self.background.is_busy:
            log.info("step %d waits for the save before it", step)
        failed = self.background.settle()
        if self.directory.await_room(step, may_skip=may_skip):
            with self._options.hooks.around_save():
                self._write(parts, settings or self._settings)
        if failed is not None:
            raise failed

    def _write(self, parts: TrainingParts, settings: Settings) -> None:
        progress = self.counts.progress
        self.counts.watch.step_saved(progress.step)
        tensors = model_tensors(parts.model)
        state = parts.get_state() if settings.contents == "full" else None
        destination = self.next_destination
        buffers, emitted = self._buffers if self._options.asynchronous else None, self._options.hooks.emitted()
        job = self.planner.prepare_save(tensors, state, settings, buffers, emitted)
        files = dict(self.more_files())
        training = self._training(settings, destination)
        previous, self.saved_step, self.saved_at = self.saved_step, progress.step, destination

        def attempt() -> None:
            try:
                self.directory.write(job(training, files), destination, self._options.workers, self._options.progress)
            except BaseException:
                if self.saved_step == progress.step:  # it may be tried again
                    self.saved_step = previous
                raise

        if self._options.asynchronous:
            self.background.run(attempt)
        else:
            attempt()

    def _training(self, settings: Settings, destination: Place) -> Callable[[], dict[str, Any]]:
        """A function for the manifest's training section, which includes metrics reported until it is called."""
        directory, progress, reported = self.directory, self.counts.progress, self.counts.step_metrics
        section = {
            "version": saved_steps.VERSION,
            "saver": "default",
            "directory": destination.name,
            "sequence": directory.next_sequence(),
            "contents": settings.contents,
            "model_format": settings.model_format,
            "run_name": directory.run_name,
            "versions": {"ckpt_convert": __version__, "torch": str(torch.__version__)},
            STARTED_FROM: "checkpoint" if self.planner.source.files else CONFIG,
        }
        if settings is self._last and settings != self._settings:
            section["final"] = True
        if self._options.hooks.emit is not None:
            section[saved_steps.EMITTED] = True

        def training() -> dict[str, Any]:
            evals, metrics = reported.snapshot
            return {**section, "progress": {**progress.as_dict(), "evals": evals}, "metrics": dict(metrics)}

        return training

    def amend(self) -> None:
        """Write metrics that were reported after a save into its checkpoint, once that is complete."""
        directory, destination = self.directory, self.saved_at
        if destination is None:
            return
        evals, metrics = self.counts.step_metrics.snapshot
        if self.background.is_busy:
            self.background.enqueue(lambda: directory.amend(destination, metrics, evals))
        else:
            directory.amend(destination, metrics, evals)

    def finish(self, *, over: bool, stopped: bool) -> None:
        """End a run: save the last step, and warn of options that never took effect.

        ``over``: its epochs are over; ``stopped``: a signal ended it.
        """
        failed = self.background.settle()  # told at the end: the last step is to be saved all the same
        trained = self.parts is not None and self.counts.has_trained
        different = self.saved_step != self.counts.progress.step or self._last != self._settings
        # The run may have been killed between the save of the last step and that of final=.
        if self._options.save_last and different and (trained or (over and self.lacks_final)):
            self.save(self._last)
        else:
            self.save_held()
        if trained and not stopped:
            self.counts.watch.warn_at_end(self.counts.progress)
        self.wait()
        if failed is not None:
            raise failed

    @property
    def conflict(self) -> str | None:
        """Why nothing may be written: another process of this run writes here. None if there is no conflict."""
        return self._run.conflict if self._run is not None else None

    def _refuse_others(self) -> None:
        """Raise UsageError if another process of this run has a checkpointer for the same directory."""
        if (trouble := self.conflict) is not None:
            raise UsageError(trouble)

    def release(self, also: Callable[[], None]) -> None:
        """Release everything that a run holds, and call ``also``, even if a part of it fails."""
        tracked, self.parts = self.parts, None
        self._forget_unclosed()
        with contextlib.ExitStack() as stack:
            if self._run is not None:
                stack.callback(self._run.close)
            stack.callback(also)
            if tracked is not None:
                stack.callback(tracked.untrack)
            stack.callback(self._buffers.clear)
            stack.callback(self.background.close)
