"""What a training loop reports (steps, evaluations, epochs), and the saves that are due for it or for a signal."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckpt_convert.checkpointer.distributed.ranks import Ranks, first_speaks
from ckpt_convert.checkpointer.run.metrics import finite_metrics
from ckpt_convert.checkpointer.save.saver import Saver
from ckpt_convert.checkpointer.save.signals import Signals
from ckpt_convert.checkpointer.state.parts import TrainingParts, make_parts

log = logging.getLogger("ckpt_convert")


class TrainingLoop:
    """Counts the events of a training loop, and saves the steps that are due.

    ``signal_saved`` says whether a signal asked the run to end, and the step was saved; ``over`` whether all of its
    epochs are.
    """

    def __init__(self, saver: Saver, signals: Sequence[int], ranks: Ranks | None) -> None:
        """``signals`` are those that ask the run to end."""
        self.signal_saved = self.over = False
        self._saver, self._counts, self._ranks = saver, saver.counts, ranks
        self._signals = Signals(signals, is_told=ranks is None or ranks.is_first) if signals else None

    @property
    def interrupted(self) -> int | None:
        """The signal that asked the run to end, None if there was none."""
        return self._signals.received if self._signals is not None else None

    def begin(self, *objects: Any) -> TrainingParts:
        """Begin a run of these objects: lock its directory, and handle signals.

        Raises UsageError for signals outside of the main thread.
        """
        self._saver.open()
        if self._signals is not None:
            self._signals.install()
        self.signal_saved = self.over = False
        parts = make_parts(*objects, ranks=self._ranks)
        self._saver.begin(parts)
        return parts

    @first_speaks
    def finish(self) -> None:
        """Save the last step if it is not saved yet, and wait until it is complete; raises what failed."""
        self._saver.finish(over=self.over, stopped=self.signal_saved)

    def release(self) -> None:
        """Release everything that the run holds, the handlers of signals too."""
        self._saver.release(self._signals.restore if self._signals is not None else lambda: None)

    @first_speaks
    def step(self, parts: TrainingParts, tokens: int, samples: int) -> None:
        """Count an optimizer step, and save if a save is due; raises what failed in a save behind the training."""
        self._counts.step(tokens, samples)
        self._saver.after_step(parts)
        signalled = self._signals is not None and not self.signal_saved
        signalled = signalled and self._saver.is_stopped(self.interrupted is not None)
        if signalled:
            self.signal_saved = True
        # An error of a background save is raised after this step is counted and saved, so that a recipe may catch it.
        due = self._counts.due("step") | self._saver.due_by_clock()
        if signalled:
            self._saver.save()
        elif due:
            self._saver.save_or_hold()
        else:
            self._saver.check()
        progress = self._counts.progress
        self._counts.watch.warn_missed(progress)
        if signalled:
            self._saver.wait()
            log.warning("saved step %d; end the loop where checkpointer.should_stop says so", progress.step)

    @first_speaks
    def report(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of this step, count an evaluation, and save if a save is due."""
        saver, counts = self._saver, self._counts
        found, wrong = finite_metrics(metrics)
        changed = counts.report(found, metrics)
        due = saver.agreed(counts.due("eval") | counts.is_new_best(found))
        if saver.saved_step == counts.progress.step:
            saver.amend()
            # What the evaluation drew is to be saved as well.
            saver.is_save_held |= saver.holds_saves and self.signal_saved
        elif due:
            saver.save_or_hold()
        counts.warn_of_report(wrong, changed, saver.saved_step)
        saver.check()

    @first_speaks
    def end_epoch(self, parts: TrainingParts) -> None:
        """Count an epoch, and save if a save is due and this step is not saved yet."""
        self._counts.end_epoch()
        parts.end_epoch()
        if self._counts.due("epoch") and self._saver.saved_step != self._counts.progress.step:
            self._saver.save_or_hold()
        self._counts.watch.warn_missed(self._counts.progress)
        self._saver.check()

    def epochs(self, parts: TrainingParts, count: int | None) -> Iterator[int]:
        """The indices of the remaining epochs; the end of each is counted, unless the loop is left."""
        counts = self._counts
        while (count is None or counts.progress.epoch < count) and not self.signal_saved:
            epoch = counts.progress.epoch
            yield epoch
            if not self.signal_saved and counts.progress.epoch == epoch:  # else the body has called end_epoch()
                self.end_epoch(parts)
        self.over = not self.signal_saved
