"""A callback that lets transformers' Trainer save through a ``Checkpointer``."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy, has_length

from ckpt_convert.checkpointer.checkpointer import Checkpointer, saver_of
from ckpt_convert.checkpointer.run.retention import BestMetric
from ckpt_convert.checkpointer.state import rng
from ckpt_convert.errors import CheckpointNotFoundError, InputError, UsageError
from ckpt_convert.formats.base import TEXT_LIMIT
from ckpt_convert.storage.place import Place

log = logging.getLogger("ckpt_convert")

_STATE = "trainer_state.json"
"""Trainer's state file, with which ``train(resume_from_checkpoint=...)`` accepts a step's directory."""


class CheckpointerCallback(TrainerCallback):
    """Saves through a checkpointer with model_format="hf"; switch Trainer's own saving off (save_strategy="no").

    Resume with ``trainer.train(resume_from_checkpoint=callback.newest())``: Trainer goes to the place in the data, and
    the callback puts back weights, optimizer, scheduler, gradient scaler and random numbers. A step is saved once all
    of it is over, an evaluation included. Evaluations are reported under Trainer's names ("eval_loss"), those outside
    of training are of no step and left alone. When training ends, the last step is saved, and with
    ``load_best_model_at_end`` the best one loaded; ``train`` may be called again, and counts on.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer
        self._saver = saver_of(checkpointer)
        self._newest: Place | None = None
        self._random: Any = None
        self._within_epoch = False
        self._tokens = 0
        self._training = False
        self._sequence_before: int | None = None
        self._save_strategy: Any = None

    def newest(self) -> str | None:
        """The directory of the newest undamaged checkpoint, None for a fresh start.

        Raises UsageError where that is in a store alone: Trainer reads a directory on a disk.
        """
        found = self.checkpointer.newest()
        if found is not None and not found.place.is_local:
            raise UsageError(
                f"{found.place}: Trainer resumes from a directory on a disk, and no newer step is on this one; copy it "
                f"to LOCAL_DIR/{found.place.name}, give the Checkpointer local_dir=LOCAL_DIR, and start again"
            )
        self._newest = found.place if found is not None else None
        return str(found.place) if found is not None else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parts: dict[str, Any] = {name: kwargs.get(name) for name in ("model", "optimizer", "lr_scheduler")}
        # accelerate passes its gradient scaler to the optimizers that it wraps; a callback has no other access to it.
        parts["grad_scaler"] = getattr(parts["optimizer"], "scaler", None)
        self._take_over_saving(args)
        if args.include_num_input_tokens_seen in ("no", False) and _reads_tokens(parts["model"]):
            args.include_num_input_tokens_seen = "all"
        self._tokens = int(state.num_input_tokens_seen)
        self._saver.more_files = lambda: {_STATE: _rendered(state)}
        # Trainer evaluates after a step is counted, and draws random numbers for it: what would be saved before that is
        # not what the run goes on from.
        self._saver.holds_saves = True
        again, self._training = self._training, True
        if self._sequence_before is None:
            self._sequence_before = self._last_sequence()
        if state.global_step == 0:
            self._start(parts, state.train_batch_size if again and args.auto_find_batch_size else None)
        else:
            self._resume(parts, state.global_step)
            # Trainer draws random numbers while it skips to its position in the data: the state is restored after that.
            self._random = rng.get_rng_state()
            batches: Any = kwargs.get("train_dataloader")
            per_epoch = math.ceil(len(batches) / args.gradient_accumulation_steps) if has_length(batches) else 0
            self._within_epoch = not per_epoch or state.global_step % per_epoch != 0

    def _start(self, parts: Mapping[str, Any], smaller_batch: int | None) -> None:
        """Start at Trainer's step 0; if this callback has saved steps before, counting continues after them."""
        counted = self.checkpointer.progress
        if self._last_sequence() == self._sequence_before:
            self.checkpointer.register(**parts)
            return
        if smaller_batch is not None:
            log.warning(
                "step %d ran out of memory: Trainer starts over with batches of %d (auto_find_batch_size), from its "
                "step 0, but with the weights as they are now. What is saved stays, and steps are counted on from %d; "
                "for a run from the beginning, set per_device_train_batch_size=%d and another output_dir",
                *(counted.step + 1, smaller_batch, counted.step, smaller_batch),
            )
        else:
            log.info("training again: steps are counted on from %d", counted.step)
        self.checkpointer.register(**parts, progress=counted)

    def _resume(self, parts: Mapping[str, Any], step: int) -> None:
        there = [saved.place for saved in reversed(self.checkpointer.saved)]
        if self._newest in there:  # of several with Trainer's step, that which Trainer was given
            there.insert(0, self._newest)
        at = next((place for place in there if _trainer_step(place) == step), None)
        if at is None:
            raise CheckpointNotFoundError(
                f"{self.checkpointer.output_dir}: has no checkpoint of step {step}, which Trainer resumes from; pass "
                "resume_from_checkpoint=callback.newest()"
            )
        self.checkpointer.resume(**parts, from_=at)

    def _last_sequence(self) -> int:
        self.checkpointer.wait()
        return max((saved.sequence for saved in self.checkpointer.saved), default=0)

    def _take_over_saving(self, args: Any) -> None:
        """Let the checkpointer do ``load_best_model_at_end``, for which Trainer would save checkpoints itself.

        Raises UsageError where the two have not the same idea of what is best.
        """
        if not args.load_best_model_at_end:
            return
        wanted = _best_metric(args)
        if wanted not in self._saver.directory.policy.best:
            raise UsageError(
                f"load_best_model_at_end=True: the best by {':'.join(wanted)} (metric_for_best_model, "
                f'greater_is_better) is to be loaded; give the Checkpointer best="{":".join(wanted)}", and '
                "save_best=True to save wherever it is reached"
            )
        if args.save_strategy != SaveStrategy.NO:
            self._save_strategy, args.save_strategy = args.save_strategy, SaveStrategy.NO
            log.info("load_best_model_at_end: Trainer saves nothing itself, the checkpointer does")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saver.save_held()
        if not self._within_epoch:
            self._put_back()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saver.save_held()
        self._put_back()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen = int(state.num_input_tokens_seen)
        samples = (state.train_batch_size or args.train_batch_size) * args.gradient_accumulation_steps
        self.checkpointer.step(tokens=seen - self._tokens, samples=samples)
        self._tokens = seen
        if self.checkpointer.should_stop:
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if not self._training or state.global_step == 0:
            return
        best = self._saver.directory.policy.metrics
        numbers = {
            name: value
            for name, value in (metrics or {}).items()
            if type(value) in (int, float) and name != "epoch" and (math.isfinite(value) or name in best)
        }
        self.checkpointer.report(**numbers)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not control.should_training_stop or float(state.epoch or 0).is_integer():  # else it was left, not ended
            self.checkpointer.end_epoch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False
        self.checkpointer.end_run()
        wanted = _best_metric(args)[0] if args.load_best_model_at_end else None
        if wanted is not None and self.checkpointer.load_best(kwargs["model"], wanted) is None:
            log.warning("load_best_model_at_end: no checkpoint has the metric, so the model is that of the last step")
        if self._save_strategy is not None:
            args.save_strategy, self._save_strategy = self._save_strategy, None

    def _put_back(self) -> None:
        if self._random is not None:
            rng.set_rng_state(self._random)
            self._random = None


def _best_metric(args: Any) -> BestMetric:
    """The metric that Trainer calls the best by, under the name that it reports."""
    metric = str(args.metric_for_best_model)
    return metric if metric.startswith("eval_") else f"eval_{metric}", "max" if args.greater_is_better else "min"


def _rendered(state: Any) -> bytes:
    return (json.dumps(asdict(state), indent=2, sort_keys=True) + "\n").encode()


def _trainer_step(directory: Place) -> int | None:
    """Trainer's step in a checkpoint, which differs from the checkpointer's if ``train`` was called again."""
    with contextlib.suppress(InputError, ValueError):
        state = json.loads((directory / _STATE).read(TEXT_LIMIT))
        return state.get("global_step") if isinstance(state, dict) else None
    return None


def _reads_tokens(model: Any) -> bool:
    """Whether Trainer can count a model's input tokens; for others it would warn at every batch."""
    name = getattr(model, "main_input_name", "input_ids")
    return name == "input_ids" and name in inspect.signature(model.forward).parameters
