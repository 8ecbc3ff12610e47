"""What a checkpoint holds beside the model: optimizers, schedulers, random numbers, data, and whatever else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt_convert.checkpointer import optimizers, rng, stateful
from ckpt_convert.checkpointer.dataloader import Tracked, track
from ckpt_convert.checkpointer.live import Model, names_of
from ckpt_convert.checkpointer.pack import Packed, pack


@dataclass(frozen=True)
class Entry:
    """One entry of the training state: how it is taken, held against a state (problems), and put back (problems)."""

    take: Callable[[], Any]
    compare: Callable[[Any], list[str]]
    put: Callable[[Any], list[str]]


@dataclass(frozen=True)
class Parts:
    """What a recipe handed over to be saved and loaded, as its own objects.

    A dict of several optimizers, schedulers, scalers or data loaders goes for one; ``loaders`` are the data loaders,
    made to count what they hand out.
    """

    model: Model
    optimizer: Any = None
    lr_scheduler: Any = None
    grad_scaler: Any = None
    loaders: Mapping[str, Tracked] = field(default_factory=dict)
    extra: Any = None

    def entries(self) -> dict[str, Entry]:
        """Each entry of the training state by name."""
        out: dict[str, Entry] = {}
        if self.optimizer is not None:
            out["optimizer"] = _optimizer(self.optimizer, names_of(self.model))
        for name in ("lr_scheduler", "grad_scaler", "extra"):
            if (one := getattr(self, name)) is not None:
                out[name] = _stateful(name, one)
        for name, loader in self.loaders.items():
            out[name] = Entry(loader.state, lambda state: [], _quiet(loader.load))
        out["rng"] = Entry(rng.capture, lambda state: [], _quiet(rng.restore))  # last: putting others back may draw
        return out

    def capture(self) -> dict[str, Packed]:
        """The state of every entry, by name; tensors are those in use, not copies."""
        return {name: pack(entry.take(), name) for name, entry in self.entries().items()}

    def compare(self, state: Mapping[str, Any], wanted: Callable[[str], bool]) -> list[str]:
        """What of the wanted entries is missing, unexpected or does not fit; nothing is changed."""
        entries = self.entries()
        problems = [
            f"{name}: is in the checkpoint, but was not given" for name in state if name not in entries and wanted(name)
        ]
        for name, entry in entries.items():
            if wanted(name):
                problems += entry.compare(state[name]) if name in state else [f"{name}: is not in the checkpoint"]
        return problems

    def restore(self, state: Mapping[str, Any], wanted: Callable[[str], bool]) -> list[str]:
        """Put back every wanted entry that is there; returns what did not fit."""
        problems = []
        for name, entry in self.entries().items():
            if wanted(name) and name in state:
                problems += entry.put(state[name])
        return problems

    @property
    def epoch_is_over(self) -> bool:
        """Whether what was restored stands after the last batch of an epoch; of several loaders nobody knows."""
        return len(self.loaders) == 1 and all(loader.epoch_is_over for loader in self.loaders.values())

    def end_epoch(self) -> None:
        for loader in self.loaders.values():
            loader.end_epoch()

    def untrack(self) -> None:
        """Leave the data loaders as they were."""
        for loader in self.loaders.values():
            loader.untrack()


def make(*, model: Model, optimizer: Any, lr_scheduler: Any, grad_scaler: Any, dataloader: Any, extra: Any) -> Parts:
    """The parts, with the data loaders made to count; raises UsageError for a loader whose place cannot be known."""
    if dataloader is None:
        loaders: dict[str, Any] = {}
    elif isinstance(dataloader, Mapping):
        loaders = {f"dataloader/{name}": one for name, one in dataloader.items()}
    else:
        loaders = {"dataloader": dataloader}
    tracked = {name: track(one) for name, one in loaders.items()}
    return Parts(model, optimizer, lr_scheduler, grad_scaler, tracked, extra)


def _optimizer(optimizer: Any, names: Mapping[int, str]) -> Entry:
    return Entry(
        lambda: optimizers.capture(optimizer, names),
        lambda state: optimizers.compare(optimizer, state, names),
        lambda state: optimizers.restore(optimizer, state, names, strict=False),
    )


def _stateful(name: str, one: Any) -> Entry:
    return Entry(
        lambda: stateful.capture(one, name),
        lambda state: stateful.compare(one, state, name),
        lambda state: stateful.restore(one, state, name, strict=False),
    )


def _quiet(put: Callable[[Any], Any]) -> Callable[[Any], list[str]]:
    def restored(state: Any) -> list[str]:
        put(state)
        return []

    return restored
