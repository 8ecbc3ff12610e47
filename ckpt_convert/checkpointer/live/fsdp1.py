"""Models in FSDP1, ``FullyShardedDataParallel``: their slices, and those of their optimizers, as torch gives them out.

FSDP1 has flattened its parameters, so there is no tensor to read a slice from. Asked for its state, torch gathers each
unit and gives this process the rows that are its own, as tensors of their own. Here they are kept, brought up to date
before a save, and given back after loading. All processes do that at the same time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
)
from torch.distributed.tensor import DTensor, Shard

from ckpt_convert.checkpointer.distributed.ranks import Ranks
from ckpt_convert.checkpointer.distributed.slices import local_of
from ckpt_convert.errors import UsageError

log = logging.getLogger("ckpt_convert")


class Fsdp1Model(dict[str, torch.Tensor]):
    """What this process has of a model in FSDP1, by key; a rank has rows of each tensor."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        units = FullyShardedDataParallel.fsdp_modules(module)
        self.is_sharded = any(unit.sharding_strategy != ShardingStrategy.NO_SHARD for unit in units)
        self._options = StateDictOptions(full_state_dict=not self.is_sharded)
        super().__init__({key: _owned(one) for key, one in self._state().items()})

    def refresh(self) -> None:
        """Take the values that the model has now."""
        _copy(self._state(), self)

    def put(self) -> None:
        """Give the model the values that are here."""
        state = self._state()
        _copy(self, state)
        set_model_state_dict(self.module, state, options=self._options)

    def _state(self) -> dict[str, Any]:
        return dict(get_model_state_dict(self.module, options=self._options))


class Fsdp1Optimizer(torch.optim.Optimizer):
    """An optimizer of a model in FSDP1, with the parameters that ``Fsdp1Model`` has."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: Fsdp1Model) -> None:
        known = {id(one) for one in model.module.parameters()}
        if any(id(one) not in known for group in optimizer.param_groups for one in group["params"]):
            raise UsageError(
                "optimizer: has parameters that are not the model's; with FullyShardedDataParallel give these an "
                "optimizer of their own, or use fully_shard (FSDP2)"
            )
        self._optimizer, self._model = optimizer, model
        groups = self._taken()["param_groups"]
        super().__init__([{**group, "params": [model[name] for name in group["params"]]} for group in groups], {})

    def state_dict(self) -> dict[str, Any]:
        """The state as the optimizer has it now."""
        taken = self._taken()
        for group, now in zip(self.param_groups, taken["param_groups"], strict=True):
            group.update({name: value for name, value in now.items() if name != "params"})
        self.state.clear()
        for name, state in taken["state"].items():
            self.state[self._model[name]] = {key: _owned(value) for key, value in state.items()}
        return super().state_dict()

    def put(self) -> None:
        """Give the optimizer the state and the options that are here."""
        names = {id(tensor): name for name, tensor in self._model.items()}
        state = {
            "state": {names[id(one)]: dict(values) for one, values in self.state.items()},
            "param_groups": [
                {**group, "params": [names[id(one)] for one in group["params"]]} for group in self.param_groups
            ],
        }
        with self._as_slices():
            given = FullyShardedDataParallel.optim_state_dict_to_load(self._model.module, self._optimizer, state)
        self._optimizer.load_state_dict(given)

    def _taken(self) -> dict[str, Any]:
        with self._as_slices():
            return FullyShardedDataParallel.optim_state_dict(self._model.module, self._optimizer)

    def _as_slices(self) -> Any:
        kinds: tuple[Any, ...] = StateDictType.FULL_STATE_DICT, FullStateDictConfig(), FullOptimStateDictConfig()
        if self._model.is_sharded:
            kinds = StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig()
        return FullyShardedDataParallel.state_dict_type(self._model.module, *kinds)


def as_model(model: Any, ranks: Ranks | None) -> Any:
    """The model as it is read and written: what it has of its slices, if it is in FSDP1 and its ranks save together."""
    units = FullyShardedDataParallel.fsdp_modules(model) if isinstance(model, nn.Module) else []
    is_sharded = any(unit.sharding_strategy != ShardingStrategy.NO_SHARD for unit in units)
    is_flat = any(not unit._use_orig_params for unit in units)
    if (is_sharded and ranks is None) or not (is_sharded or is_flat):
        return model
    return Fsdp1Model(model)


def as_optimizer(optimizer: Any, model: Any) -> Any:
    """An optimizer, or a dict of them, as it is read and written, for a model that ``as_model`` gave."""
    if not isinstance(model, Fsdp1Model):
        return optimizer
    if isinstance(optimizer, Mapping):
        return {name: as_optimizer(one, model) for name, one in optimizer.items()}
    return Fsdp1Optimizer(optimizer, model) if isinstance(optimizer, torch.optim.Optimizer) else optimizer


def put(model: Any, optimizer: Any = None) -> None:
    """Give a model in FSDP1, and its optimizers, what was loaded for them; nothing for other models."""
    if isinstance(model, Fsdp1Model):
        model.put()
    for one in optimizer.values() if isinstance(optimizer, Mapping) else (optimizer,):
        if isinstance(one, Fsdp1Optimizer):
            one.put()


@torch.no_grad()
def _copy(source: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    for key, tensor in source.items():
        local_of(_as_dtensor(target[key])).copy_(local_of(_as_dtensor(tensor)))


def _owned(value: Any) -> Any:
    """A value of a state; a tensor is detached."""
    return _as_dtensor(value).detach() if isinstance(value, torch.Tensor) else value


def _as_dtensor(tensor: Any) -> Any:
    """A tensor of a state; of units that were made without a mesh, torch gives a class that is older than DTensor."""
    if not hasattr(tensor, "local_shards"):
        return tensor
    shards = tensor.local_shards()
    local = shards[0].tensor if shards else torch.empty((0, *tensor.shape[1:]), dtype=tensor.dtype)
    mesh = DeviceMesh.from_group(tensor._process_group, local.device.type)
    stride = torch.empty(tensor.shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=stride)
