"""The training state of a checkpoint: optimizers, schedulers, random numbers, data, and objects of the user.

Two entries are there only where there is something to say, and no problem where they are not: "gradients", of an update
that is not complete yet, and "wrapper", what a wrapper around the model has of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ckpt_convert.checkpointer.distributed.ranks import Ranks
from ckpt_convert.checkpointer.live import fsdp1
from ckpt_convert.checkpointer.live.fsdp1 import Fsdp1Model
from ckpt_convert.checkpointer.live.tensors import (
    MemoryRanges,
    Model,
    key_finder,
    model_tensors,
    parameter_names,
    wrapper_tensors,
)
from ckpt_convert.checkpointer.state import optimizers, rng, stateful
from ckpt_convert.checkpointer.state.dataloader import LoaderTracker, track_loader
from ckpt_convert.checkpointer.state.gradients import PendingGradients
from ckpt_convert.checkpointer.state.serialize import SerializedState, serialize
from ckpt_convert.checkpointer.state.sharding import DataPolicy
from ckpt_convert.errors import UsageError

log = logging.getLogger("ckpt_convert")

_OCCASIONAL = ("wrapper", "gradients")


@dataclass(frozen=True)
class StateEntry:
    """One entry of the training state: getting it, comparing a saved one (problems), and setting it (problems)."""

    get: Callable[[], Any]
    compare: Callable[[Any], list[str]]
    set: Callable[[Any], list[str]]


@dataclass(frozen=True)
class TrainingParts:
    """The objects of a recipe that are saved and loaded.

    A dict of several optimizers, schedulers, scalers or data loaders goes for one; ``loaders`` are the data loaders,
    made to count their batches; ``data`` says what they do where they cannot go on exactly.
    """

    model: Model
    optimizer: Any = None
    lr_scheduler: Any = None
    grad_scaler: Any = None
    loaders: Mapping[str, LoaderTracker] = field(default_factory=dict)
    extra: Any = None
    gradients: PendingGradients = field(default_factory=PendingGradients)
    data: DataPolicy = "exact"

    def parameters(self) -> dict[str, torch.Tensor]:
        """The parameters of the model and of the optimizers, by name."""
        names = parameter_names(self.model)
        own = {names[id(one)]: one for one in self.model.parameters()} if isinstance(self.model, nn.Module) else {}
        return {**own, **(optimizers.named_parameters(self.optimizer, names) if self.optimizer is not None else {})}

    def names(self) -> set[str]:
        """The keys of the model, and the names of all parameters."""
        return {*model_tensors(self.model), *self.parameters()}

    def mark_gradients_used(self) -> None:
        """Mark the current gradients as used, after an optimizer step."""
        module = self.model.module if isinstance(self.model, Fsdp1Model) else self.model
        own = module.parameters() if isinstance(module, nn.Module) else ()
        if isinstance(self.model, Fsdp1Model):
            self.gradients.mark_used(own)
            return
        self.gradients.mark_used(own if self.optimizer is None else optimizers.optimizer_parameters(self.optimizer))

    def entries(self) -> dict[str, StateEntry]:
        """Each entry of the training state by name."""
        out: dict[str, StateEntry] = {}
        if self.optimizer is not None:
            out["optimizer"] = _optimizer(self.optimizer, self.model)
        for name in ("lr_scheduler", "grad_scaler", "extra"):
            if (one := getattr(self, name)) is not None:
                out[name] = _stateful(name, one)
        for name, loader in self.loaders.items():
            out[name] = _loader(loader, self.data)
        out["wrapper"] = StateEntry(lambda: wrapper_tensors(self.model), lambda state: [], self._put_into_wrapper)
        out["gradients"] = StateEntry(
            self._pending_gradients,
            lambda state: self.gradients.compare_state(self.parameters(), state),
            lambda state: self.gradients.set_state(self.parameters(), state),
        )
        out["rng"] = StateEntry(
            rng.get_rng_state, lambda state: [], _quiet(rng.set_rng_state)
        )  # last: putting others back may draw
        return out

    @property
    def required_entries(self) -> list[str]:
        """The names of the entries that are required in every training state."""
        return [name for name in self.entries() if name not in _OCCASIONAL]

    def get_state(self) -> dict[str, SerializedState]:
        """The serialized state of every entry, by name; tensors are not copied."""
        taken = {name: entry.get() for name, entry in self.entries().items()}
        return {name: serialize(state, name) for name, state in taken.items() if state or name not in _OCCASIONAL}

    def compare_state(self, state: Mapping[str, Any], wanted: Callable[[str], bool]) -> list[str]:
        """The missing, unexpected and mismatched ones of the wanted entries; nothing is changed."""
        entries = self.entries()
        problems = [
            f"{name}: is in the checkpoint, but was not given" for name in state if name not in entries and wanted(name)
        ]
        for name, entry in entries.items():
            if wanted(name) and name in state:
                problems += entry.compare(state[name])
            elif wanted(name) and name not in _OCCASIONAL:
                problems.append(f"{name}: is not in the checkpoint")
        return problems

    def set_state(self, state: Mapping[str, Any], wanted: Callable[[str], bool]) -> list[str]:
        """Restore every wanted entry that the state has; returns what did not fit."""
        problems = []
        for name, entry in self.entries().items():
            if wanted(name) and name in state:
                problems += entry.set(state[name])
        return problems

    def _pending_gradients(self) -> Any:
        if not isinstance(self.model, Fsdp1Model):
            return self.gradients.get_state(self.parameters())
        own = {str(number): one for number, one in enumerate(self.model.module.parameters())}
        if self.gradients.get_state(own):
            log.warning(
                "the gradients of an update that is not complete are not saved with a model in "
                "FullyShardedDataParallel: save after the optimizer's step, or use fully_shard (FSDP2)"
            )
        return {}

    @property
    def epoch_is_over(self) -> bool:
        """Whether the restored position is after the last batch of an epoch; unknown (False) for several loaders."""
        return len(self.loaders) == 1 and all(loader.epoch_is_over for loader in self.loaders.values())

    def _put_into_wrapper(self, state: Mapping[str, torch.Tensor]) -> list[str]:
        for name, tensor in wrapper_tensors(self.model).items():
            if name in state:
                tensor.copy_(state[name])
        return []

    def start_at(self, step: int) -> None:
        """Set the step that is resumed; raises UsageError for a loader that another checkpointer resumed elsewhere."""
        for name, loader in self.loaders.items():
            if loader.resumed_at not in (None, step):
                raise UsageError(
                    f"{name}: another checkpointer that has the same loader resumed at step {loader.resumed_at}, and "
                    f"this one would go on from step {step}, with other weights; register(..., progress=...) this one "
                    f"with the progress that the other one resumed, or resume(from_={loader.resumed_at})"
                )
        for loader in self.loaders.values():
            loader.resumed_at = step

    def end_epoch(self) -> None:
        for loader in self.loaders.values():
            loader.end_epoch()

    def untrack(self) -> None:
        """Restore the classes of the data loaders."""
        for loader in self.loaders.values():
            loader.untrack()


def make_parts(
    model: Model,
    optimizer: Any,
    lr_scheduler: Any,
    grad_scaler: Any,
    dataloader: Any,
    extra: Any,
    data: DataPolicy = "exact",
    *,
    ranks: Ranks | None = None,
) -> TrainingParts:
    """The parts, with tracked data loaders; raises UsageError for a loader whose position cannot be determined."""
    if dataloader is None:
        loaders: dict[str, Any] = {}
    elif isinstance(dataloader, Mapping):
        loaders = {f"dataloader/{name}": one for name, one in dataloader.items()}
    else:
        loaders = {"dataloader": dataloader}
    tracked = {name: track_loader(one) for name, one in loaders.items()}
    model = fsdp1.as_model(model, ranks)
    optimizer = fsdp1.as_optimizer(optimizer, model)
    if isinstance(model, Fsdp1Model) and (ranks is None or ranks.is_first):
        log.info(
            "the model is in FullyShardedDataParallel, which gathers each of its units to give its slices out: at each "
            "save, before the training goes on; fully_shard (FSDP2) has them at hand"
        )
    return TrainingParts(model, optimizer, lr_scheduler, grad_scaler, tracked, extra, data=data)


def _optimizer(optimizer: Any, model: Model) -> StateEntry:
    names = parameter_names(model)
    unnamed = any(id(one) not in names for one in optimizers.named_parameters(optimizer, names).values())
    memory = MemoryRanges(model_tensors(model).values() if unnamed else ())

    def called_as_now(state: Any) -> Any:
        return optimizers.rename_parameters(state, key_finder(model))

    return StateEntry(
        lambda: optimizers.get_optimizer_state(optimizer, names, model=memory),
        lambda state: optimizers.compare_optimizer_state(optimizer, called_as_now(state), names),
        lambda state: optimizers.set_optimizer_state(
            optimizer, called_as_now(state), names, strict=False, model=memory
        ),
    )


def _loader(loader: LoaderTracker, data: DataPolicy) -> StateEntry:
    def put(state: Any) -> list[str]:
        problems = loader.compare(state, data)
        if not problems:
            loader.load(state, data)
        return problems

    return StateEntry(loader.state, lambda state: loader.compare(state, data), put)


def _stateful(name: str, one: Any) -> StateEntry:
    return StateEntry(
        lambda: stateful.get_state(one, name),
        lambda state: stateful.compare_state(one, state, name),
        lambda state: stateful.set_state(one, state, name, strict=False),
    )


def _quiet(put: Callable[[Any], Any]) -> Callable[[Any], list[str]]:
    def restored(state: Any) -> list[str]:
        put(state)
        return []

    return restored
