"""A tiny run to train, to interrupt and to resume: a native Llama, AdamW, a schedule, dropout, shuffled data.

``run`` is a whole training script as a function of JSON-able options, so that a test can have it in a process of its
own, and kill that.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from ckpt_convert import Checkpointer
from recipes.native_llama import NativeLlama
from tests.helpers import GOLDEN, edit_json

LLAMA = GOLDEN / "llama" / "hf"
SYSTEM_CALLS = ("mkdir", "open", "ftruncate", "pwrite", "fsync", "rename", "replace", "symlink", "unlink", "rmdir")


def trainable(into: Path, source: Path = LLAMA, dtype: torch.dtype = torch.float32) -> Path:
    """A golden checkpoint with values that a model can be trained from: the same keys, files and header metadata.

    The golden values are codes of tens of thousands. What is done to them is done element by element, so that every
    layout of the one is the same layout of the other.
    """
    shutil.copytree(source, into)

    def small(key: str, tensor: torch.Tensor) -> torch.Tensor:
        wave = torch.sin(tensor.double()) if key != "rope.freqs" else tensor
        return tensor if wave is tensor else (1 + wave / 8 if tensor.dim() == 1 else wave / 8).to(dtype)

    for file in into.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata()
            tensors = {key: small(key, opened.get_tensor(key)) for key in opened.keys()}  # noqa: SIM118
        safetensors.torch.save_file(tensors, file, metadata)
    for file in into.glob("*.pth"):
        torch.save({key: small(key, tensor) for key, tensor in torch.load(file).items()}, file)
    if (into / "config.json").exists():
        edit_json(into / "config.json", dtype=str(dtype).removeprefix("torch."))
    return into


def train_hf(checkpointer: Checkpointer, model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    """Two steps of a model of transformers."""
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpointer.step()


def bfloat16_source(into: Path, source: Path = LLAMA) -> Path:
    return trainable(into, source, torch.bfloat16)


def make_model(source: Path = LLAMA, dtype: torch.dtype = torch.float32) -> NativeLlama:
    return NativeLlama.from_config(source / "config.json").to(dtype)


def batches(count: int = 26, batch_size: int = 4) -> DataLoader[torch.Tensor]:
    """Shuffled examples of seven tokens each; the last batch of an epoch is smaller."""
    generator = torch.Generator().manual_seed(5)
    examples = torch.randint(0, 56, (count, 7), generator=generator)
    return DataLoader(list(examples), batch_size, shuffle=True)  # type: ignore[arg-type]


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = functional.dropout(model(tokens[:, :-1]).float(), 0.1)
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Trained:
    """A model with all that trains it; ``update`` does one optimizer step without a checkpointer."""

    def __init__(
        self, source: Path = LLAMA, dtype: torch.dtype = torch.float32, model: nn.Module | None = None
    ) -> None:
        torch.set_num_threads(1)  # sums of floats differ with the number of threads
        torch.manual_seed(11)
        random.seed(12)
        np.random.seed(13)
        self.model = model if model is not None else make_model(source, dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 3e-3)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step / 10))
        self.dataloader = batches()

    @property
    def parts(self) -> dict[str, Any]:
        """The arguments of ``resume`` and ``register``."""
        return {name: value for name, value in vars(self).items() if name != "model"} | {"model": self.model}

    def update(self, tokens: torch.Tensor) -> float:
        loss = loss_of(self.model, tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def go(
        self,
        checkpointer: Checkpointer,
        until: int,
        evaluate: int | None = None,
        each: Callable[[int, float], object] = lambda step, loss: None,
    ) -> dict[int, float]:
        """Train to a step, from where the checkpointer is; the loss of each step, which depends on all random state."""
        losses: dict[int, float] = {}
        while checkpointer.progress.step < until:
            for tokens in self.dataloader:
                loss = self.update(tokens) + random.random() / 64 + float(np.random.rand()) / 64
                losses[checkpointer.progress.step + 1] = loss
                each(checkpointer.progress.step + 1, loss)
                checkpointer.step(tokens=tokens[:, 1:].numel(), samples=len(tokens))
                if evaluate is not None and checkpointer.progress.step % evaluate == 0:
                    checkpointer.report(val_loss=loss)
                if checkpointer.progress.step >= until:
                    return losses
            checkpointer.end_epoch()
        return losses


class KillAt:
    """Ends its own process with SIGKILL before the n-th of the system calls that change files below a directory."""

    def __init__(self, number: int) -> None:
        self.left = number
        for name in SYSTEM_CALLS:
            if hasattr(os, name):
                setattr(os, name, self._counting(getattr(os, name)))

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted


def run(options: dict[str, Any]) -> None:
    """Train, or go on; what came of it is appended, step by step, to ``log``, and at the end written to ``result``.

    options: source, output_dir, log, result, steps, dtype; kill_at: see ``KillAt``; ``checkpointer``: its options.
    """
    trained = Trained(Path(options["source"]), getattr(torch, options["dtype"]))
    with (
        Path(options["log"]).open("a", buffering=1) as log,
        Checkpointer(options["source"], options["output_dir"], **options["checkpointer"]) as checkpointer,
    ):
        checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        if options.get("kill_at"):
            KillAt(options["kill_at"])
        trained.go(checkpointer, options["steps"], each=lambda step, loss: log.write(f"{step} {loss.hex()}\n"))
    result = {
        "weights": trained.model.state_dict(),
        "optimizer": trained.optimizer.state_dict(),
        "lr_scheduler": trained.lr_scheduler.state_dict(),
        "drawn": [random.random(), float(np.random.rand()), float(torch.rand(()))],
        "progress": {k: v for k, v in checkpointer.progress.as_dict().items() if k != "seconds"},
    }
    with tempfile.NamedTemporaryFile(dir=Path(options["result"]).parent, delete=False) as file:
        torch.save(result, file)
    os.replace(file.name, options["result"])
