"""The options of parameter groups (learning rate, weight decay, …) where a recipe and a checkpoint differ.

A checkpoint's options replace the recipe's, as torch's ``load_state_dict`` does it: an edit of the recipe would be lost
without a word. So the differences are told, and options that are asked for keep the recipe's value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch

from ckpt_convert.checkpointer.state.optimizers import unwrap_optimizer
from ckpt_convert.errors import UsageError

_TOLD = (
    *("lr", "weight_decay", "momentum", "betas", "eps", "alpha", "dampening", "nesterov", "amsgrad", "maximize"),
    *("centered", "rho", "lambd", "lr_decay", "momentum_decay", "etas", "step_sizes"),
)
"""The options of torch's optimizers that a recipe chooses; others are counters, or how a step is computed."""

_INITIAL = "initial_lr"
"""Where a scheduler keeps the learning rate that the recipe gave; "lr" is that times the factor of the step."""

_CYCLED = {"momentum", "betas"}
"""What OneCycleLR and CyclicLR change at each step, if the group has a ``max_momentum``."""

Groups = dict[str, list[dict[str, Any]]]


class GroupOptions:
    """The groups' options as the recipe gave them, taken before a checkpoint is loaded."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._given: Groups = {
            name: [{key: deepcopy(value) for key, value in group.items() if key != "params"} for group in groups]
            for name, groups in _param_groups(optimizer)
        }

    def check(self, keep: Sequence[str]) -> None:
        """Raise UsageError for a name that is no option of any group."""
        known = {key for groups in self._given.values() for group in groups for key in group}
        for name in keep:
            if name not in known:
                listed = ", ".join(sorted(known - {_INITIAL})) or "none, as there is no optimizer with groups"
                raise UsageError(f"keep={[*keep]!r}: {name!r} is no option of the optimizer; its options: {listed}")

    def differences(self, keep: Sequence[str] = ()) -> list[str]:
        """The options that the recipe gave otherwise than the loaded groups have them, but for those to keep."""
        found = []
        for name, number, given, now in self._pairs():
            where = f"{name}, group {number}" if len(self._given[name]) > 1 else name
            for key in (key for key in _TOLD if key not in keep):
                at = _INITIAL if key == "lr" and _INITIAL in given and _INITIAL in now else key
                if at not in given or at not in now or (key in _CYCLED and "max_momentum" in now):
                    continue
                if not _equal(given[at], now[at]):
                    found.append(
                        f"{where}: {key} is {_shown(given[at])} in the recipe, {_shown(now[at])} in the checkpoint"
                    )
        return found

    def restore(self, keep: Sequence[str], schedulers: Any) -> None:
        """Give the loaded groups the recipe's values of some options.

        A learning rate under a scheduler is the recipe's times the factor that the schedule has come to.
        """
        for _, _, given, now in self._pairs():
            for key in keep:
                if key == "lr" and _INITIAL in given and now.get(_INITIAL):
                    now["lr"] = now["lr"] * (given[_INITIAL] / now[_INITIAL])
                    now[_INITIAL] = given[_INITIAL]
                elif key in given:
                    now[key] = deepcopy(given[key])
        if "lr" in keep:
            for scheduler in _schedulers(schedulers):
                _rebase(scheduler)

    def _pairs(self) -> Iterator[tuple[str, int, dict[str, Any], dict[str, Any]]]:
        for name, groups in _param_groups(self._optimizer):
            for number, (given, now) in enumerate(zip(self._given[name], groups, strict=False)):
                yield name, number, given, now


def _param_groups(optimizer: Any, name: str = "optimizer") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    if isinstance(optimizer, Mapping):
        for key, one in optimizer.items():
            yield from _param_groups(one, f"{name}/{key}")
        return
    inner = unwrap_optimizer(optimizer)
    if isinstance(groups := getattr(inner, "param_groups", None), list):
        yield name, groups


def _schedulers(given: Any) -> Iterator[Any]:
    """The schedulers, also those inside SequentialLR and ChainedScheduler."""
    for one in given.values() if isinstance(given, Mapping) else [given] if given is not None else []:
        yield one
        for inner in getattr(one, "_schedulers", ()):
            yield from _schedulers(inner)


def _rebase(scheduler: Any) -> None:
    """Let a scheduler go on from the learning rates that its groups have now."""
    groups = unwrap_optimizer(getattr(scheduler, "optimizer", None)).param_groups
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group[_INITIAL] for group in groups]
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [group["lr"] for group in groups]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return bool((torch.as_tensor(one).cpu() == torch.as_tensor(other).cpu()).all())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _shown(value: Any) -> str:
    return str(value.tolist()) if isinstance(value, torch.Tensor) else str(value)
