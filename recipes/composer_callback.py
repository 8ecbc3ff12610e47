"""A callback that lets Composer's Trainer save through a ``Checkpointer``, and go on from the newest step.

    with Checkpointer(source, "runs/first", model_format="hf", save_every="500ba", keep_last=2) as checkpointer:
        checkpointer.load_model(composer_model.model)
        callback = CheckpointerCallback(checkpointer, composer_model.model)
        Trainer(model=composer_model, callbacks=[callback], spin_dataloaders=False, ...).fit()

It takes the place of save_folder, save_interval and autoresume, so leave these out. ``spin_dataloaders=False`` because
the checkpointer restores the place in the data, for any sampler. Written for composer 0.32.1 (mosaicml).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from composer import Callback, Timestamp
from torch import nn

from ckpt_convert import Checkpointer


class CheckpointerCallback(Callback):  # type: ignore[misc]
    """Counts the batches and epochs of ``fit``; ``model`` is the module whose weights are the checkpoint's."""

    def __init__(self, checkpointer: Checkpointer, model: nn.Module) -> None:
        self.checkpointer, self.model = checkpointer, model

    def fit_start(self, state: Any, logger: Any) -> None:
        """Restore the newest step; the timestamp then says where the loop begins."""
        self.checkpointer.resume(
            model=self.model,
            optimizer={str(at): one for at, one in enumerate(state.optimizers)},
            lr_scheduler={str(at): one for at, one in enumerate(state.schedulers)} or None,
            dataloader=state.train_dataloader,
            extra={"timestamp": _TimestampOf(state)},
        )
        if self.checkpointer.progress.epoch > int(state.timestamp.epoch):
            state.timestamp = state.timestamp.to_next_epoch()  # the step was the last of its epoch, which is over

    def batch_end(self, state: Any, logger: Any) -> None:
        now, before = state.timestamp, state.previous_timestamp
        self.checkpointer.step(tokens=int(now.token - before.token), samples=int(now.sample - before.sample))
        if self.checkpointer.should_stop:
            state.stop_training()

    def epoch_end(self, state: Any, logger: Any) -> None:
        if not self.checkpointer.should_stop:
            self.checkpointer.end_epoch()

    def eval_after_all(self, state: Any, logger: Any) -> None:
        """Report an evaluation during training, under the names of Composer's metrics; one before it is of no step."""
        metrics = {name: value for evaluated in state.eval_metrics.values() for name, value in evaluated.items()}
        if int(state.timestamp.batch) and metrics:
            self.checkpointer.report(**{name: float(value.compute()) for name, value in metrics.items()})


class _TimestampOf:
    """The counters of a state, which replaces its timestamp by another one at every batch."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def state_dict(self) -> dict[str, int | float]:
        counters = self._state.timestamp.state_dict()
        return {name: one.total_seconds() if isinstance(one, timedelta) else one for name, one in counters.items()}

    def load_state_dict(self, counters: dict[str, int | float]) -> None:
        times = {name: timedelta(seconds=one) for name, one in counters.items() if name.endswith("_wct")}
        self._state.timestamp = Timestamp(**{**counters, **times})
