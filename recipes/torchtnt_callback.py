"""A callback that lets TorchTNT's loops save through a ``Checkpointer``, and go on from the newest step.

    with Checkpointer(source, "runs/first", save_every="500 steps", best="val_loss:min") as checkpointer:
        checkpointer.load_model(unit.module)
        fit(unit, loader, held_out, max_epochs=3, callbacks=[CheckpointerCallback(checkpointer, metrics=["val_loss"])])

It takes the place of TorchTNT's own callbacks for checkpoints. What a unit tracks is saved and restored: its module (of
several, give ``module=``), optimizers, schedulers, progress, and whatever else has a state. Written for torchtnt 0.2.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any

from torch import nn
from torchtnt.framework.auto_unit import AutoUnit
from torchtnt.framework.callback import Callback

from ckpt_convert import Checkpointer


class CheckpointerCallback(Callback):  # type: ignore[misc]
    """Counts the steps and epochs of ``train`` and ``fit``; ``metrics`` are attributes that an evaluation sets."""

    def __init__(self, checkpointer: Checkpointer, metrics: Sequence[str] = (), module: nn.Module | None = None):
        self.checkpointer, self.metrics, self.module = checkpointer, metrics, module

    def on_train_start(self, state: Any, unit: Any) -> None:
        """Restore the newest step; the unit's progress then says where the loop begins."""
        dataloader = state.train_state.dataloader
        self.checkpointer.resume(
            model=self.module or next(iter(unit.tracked_modules().values())),
            optimizer=dict(unit.tracked_optimizers()),
            lr_scheduler=dict(unit.tracked_lr_schedulers()) or None,
            dataloader=dataloader,
            extra={**unit.tracked_progress(), **unit.tracked_misc_statefuls()},
        )
        if self.checkpointer.progress.epoch > unit.train_progress.num_epochs_completed:
            unit.train_progress.increment_epoch()  # the step was the last of its epoch, which is over
        if isinstance(unit, AutoUnit):
            _read_no_batch_ahead(unit, dataloader)

    def on_train_step_end(self, state: Any, unit: Any) -> None:
        """Count an update of the weights, of which gradients that are accumulated have one for several batches."""
        in_epoch, each = (
            unit.train_progress.num_steps_completed_in_epoch,
            getattr(unit, "gradient_accumulation_steps", 1),
        )
        if in_epoch % each == 0 or unit._is_last_batch:
            self.checkpointer.step()
        if self.checkpointer.should_stop:
            state.stop()

    def on_train_epoch_end(self, state: Any, unit: Any) -> None:
        if not self.checkpointer.should_stop:
            self.checkpointer.end_epoch()

    def on_eval_end(self, state: Any, unit: Any) -> None:
        """Report an evaluation within ``fit``; one outside of training is of no step."""
        values = {name: getattr(unit, name, None) for name in self.metrics}
        if state.train_state is not None and self.metrics:
            self.checkpointer.report(**{name: float(value) for name, value in values.items() if value is not None})


def _read_no_batch_ahead(unit: Any, dataloader: Any) -> None:
    """Let a unit take each batch when it trains on it: a step with one that was read before would resume after that."""

    def next_batch(state: Any, batches: Iterator[Any]) -> Any:
        here = unit.train_progress.num_steps_completed_in_epoch + 1
        unit._is_last_batch = isinstance(dataloader, Sized) and here == len(dataloader)
        return unit.move_data_to_device(state, next(batches), non_blocking=False)

    unit.get_next_train_batch = next_batch
