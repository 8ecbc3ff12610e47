"""A callback that lets transformers' Trainer save through a ``Checkpointer``."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback

from ckpt_convert.checkpointer import rng
from ckpt_convert.checkpointer.checkpointer import Checkpointer
from ckpt_convert.errors import CheckpointNotFoundError

_STATE = "trainer_state.json"
"""Trainer's own file: with it, ``train(resume_from_checkpoint=...)`` takes a step's directory for one of its own."""


class CheckpointerCallback(TrainerCallback):
    """Saves through a checkpointer with model_format="hf"; switch Trainer's own saving off (save_strategy="no").

    Resume with ``trainer.train(resume_from_checkpoint=callback.newest())``: Trainer goes to the place in the data, and
    the callback puts back weights, optimizer, scheduler and random numbers. Evaluations are reported under Trainer's
    names ("eval_loss"). The checkpointer is closed, and the last step saved, when training ends.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer
        self._random: Any = None
        self._within_epoch = False
        self._tokens = 0

    def newest(self) -> str | None:
        """The directory of the newest checkpoint that is sound, None for a fresh start."""
        found = self.checkpointer.newest()
        return str(found.path) if found is not None else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parts: dict[str, Any] = {name: kwargs.get(name) for name in ("model", "optimizer", "lr_scheduler")}
        self._tokens = int(state.num_input_tokens_seen)
        self.checkpointer.add_files(lambda: {_STATE: _rendered(state)})
        if state.global_step == 0:
            self.checkpointer.register(**parts)
            return
        at = next((one for one in reversed(self.checkpointer.saved) if one.step == state.global_step), None)
        if at is None:
            raise CheckpointNotFoundError(
                f"{self.checkpointer.output_dir}: has no checkpoint of step {state.global_step}, which Trainer resumes "
                "from; pass resume_from_checkpoint=callback.newest()"
            )
        self.checkpointer.resume(**parts, from_=at.path, exclude=["dataloader*"])
        # Trainer draws random numbers while it goes to its place in the data: they are put back after that.
        self._random = rng.capture()
        batches: Any = kwargs.get("train_dataloader")
        per_epoch = math.ceil(len(batches) / args.gradient_accumulation_steps) if hasattr(batches, "__len__") else 0
        self._within_epoch = not per_epoch or state.global_step % per_epoch != 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._within_epoch:
            self._put_back()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._put_back()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen = int(state.num_input_tokens_seen)
        samples = args.train_batch_size * args.gradient_accumulation_steps
        self.checkpointer.step(tokens=seen - self._tokens, samples=samples)
        self._tokens = seen
        if self.checkpointer.should_stop:
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        numbers = {
            name: value for name, value in (metrics or {}).items() if type(value) in (int, float) and name != "epoch"
        }
        self.checkpointer.report(**numbers)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.checkpointer.end_epoch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.checkpointer.close()

    def _put_back(self) -> None:
        if self._random is not None:
            rng.restore(self._random)
            self._random = None


def _rendered(state: Any) -> bytes:
    return (json.dumps(asdict(state), indent=2, sort_keys=True) + "\n").encode()
