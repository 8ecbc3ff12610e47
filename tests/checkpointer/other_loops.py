"""Trainers that are not in .venv, with the callbacks in ``recipes/``: a tiny run, by options in JSON.

It has dropout and shuffled data, and takes two epochs of seven batches, or until ``stop`` of its steps are saved.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn

from ckpt_convert import Checkpointer
from tests.checkpointer.training import Trained, loss_of

RECIPES = Path(__file__).parent.parent.parent / "recipes"
EPOCHS = 2


class StepCheckpointer(Checkpointer):
    """Ends the process once so many steps are saved, as a kill does."""

    stop: int | None = None

    def step(self, *, tokens: int = 0, samples: int = 0) -> None:
        super().step(tokens=tokens, samples=samples)
        if self.progress.step == self.stop:
            os._exit(0)


def torchtnt(made: Trained, callback: Any) -> None:
    """``fit`` of an AutoUnit, which evaluates after each epoch."""
    from torchtnt.framework.auto_unit import AutoUnit
    from torchtnt.framework.fit import fit

    class Unit(AutoUnit):  # type: ignore[misc]
        val_loss: float | None = None

        def compute_loss(self, state: Any, data: torch.Tensor) -> tuple[torch.Tensor, None]:
            is_evaluation = state.active_phase.name == "EVALUATE"  # which draws no random numbers here
            return torch.zeros(()) if is_evaluation else loss_of(self.module, data), None

        def configure_optimizers_and_lr_scheduler(self, module: nn.Module) -> tuple[Any, Any]:
            return made.optimizer, made.lr_scheduler

        def on_eval_end(self, state: Any) -> None:
            self.val_loss = 1.0 / self.train_progress.num_epochs_completed

    unit = Unit(module=made.model, step_lr_interval="step", device=torch.device("cpu"))
    held_out = torch.utils.data.DataLoader([torch.arange(7)], generator=torch.Generator())
    fit(unit, made.dataloader, held_out, max_epochs=EPOCHS, callbacks=[callback])


class Absent:
    """Packages that composer imports for what this run does not do."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        absent = name.split(".")[0] in ("torchvision", "mcli", "PIL")
        return ModuleSpec(name, self, is_package=True) if absent else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock(__spec__=spec, __path__=[], __name__=spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def composer(made: Trained, callback: Any) -> None:
    """``fit`` of a Trainer, which evaluates after each epoch."""
    from composer import ComposerModel, Trainer
    from torchmetrics import MeanMetric

    class Model(ComposerModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.val_loss = made.model, MeanMetric()

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return loss_of(self.model, batch)

        def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
            return outputs

        def eval_forward(self, batch: torch.Tensor, outputs: Any = None) -> torch.Tensor:
            return torch.ones(())

        def get_metrics(self, is_train: bool = False) -> dict[str, Any]:
            return {} if is_train else {"val_loss": self.val_loss}

        def update_metric(self, batch: torch.Tensor, outputs: torch.Tensor, metric: Any) -> None:
            metric.update(outputs)

    Trainer(
        model=Model(),
        optimizers=made.optimizer,
        schedulers=made.lr_scheduler,
        step_schedulers_every_batch=True,
        train_dataloader=made.dataloader,
        eval_dataloader=torch.utils.data.DataLoader([torch.arange(7)], generator=torch.Generator()),
        max_duration=f"{EPOCHS}ep",
        callbacks=[callback],
        spin_dataloaders=False,
        device="cpu",
        progress_bar=False,
        seed=3,
    ).fit()


def main() -> None:
    options = json.loads(sys.argv[1])
    sys.path.insert(0, options["packages"])
    sys.meta_path.append(Absent())  # type: ignore[arg-type]
    loops: dict[str, Callable[[Trained, Any], None]] = {"torchtnt": torchtnt, "composer": composer}
    name = options["trainer"]
    given = runpy.run_path(str(RECIPES / f"{name}_callback.py"))["CheckpointerCallback"]
    made = Trained(Path(options["source"]))
    StepCheckpointer.stop = options["stop"]
    with StepCheckpointer(options["source"], options["output"], save_every=1, best="val_loss:min") as checkpointer:
        checkpointer.load_model(made.model)
        argument = made.model if name == "composer" else ["val_loss"]
        loops[name](made, given(checkpointer, argument))


if __name__ == "__main__":
    main()
