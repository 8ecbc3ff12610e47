"""The state of optimizers by parameter name, and exact: no value changes its dtype.

Parameters outside of the model, such as float32 master weights or a learnable temperature, are in no weight file, so
their values are a part of the state.

torch numbers the parameters, so its state fits only an optimizer with the same parameters in the same order; and it
casts state to the dtype of the parameter, which rounds the float32 moments of a bfloat16 parameter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ckpt_convert.checkpointer.state.serialize import path_segment
from ckpt_convert.errors import UsageError

log = logging.getLogger("ckpt_convert")

Tree = dict[str, Any]
Names = Mapping[int, str]


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer inside wrappers such as accelerate's, which hold it as ``.optimizer``."""
    while not (isinstance(optimizer, torch.optim.Optimizer) and "param_groups" in vars(optimizer)):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or inner is optimizer:
            return optimizer
        optimizer = inner
    return optimizer


def optimizer_parameters(optimizer: Any) -> Iterator[torch.Tensor]:
    """The parameters of an optimizer, or of a dict of them; none for None and for objects without param_groups."""
    if isinstance(optimizer, Mapping):
        for one in optimizer.values():
            yield from optimizer_parameters(one)
        return
    groups = getattr(unwrap_optimizer(optimizer), "param_groups", None)
    for group in groups if isinstance(groups, list) else ():
        yield from group["params"]


def named_parameters(optimizer: Any, names: Names, name: str = "optimizer") -> dict[str, torch.Tensor]:
    """The same by name: the model's, or one prefixed with the optimizer's for a parameter outside of the model."""
    if isinstance(optimizer, Mapping):
        every = [named_parameters(one, names, f"{name}/{key}") for key, one in optimizer.items()]
        return {called: param for one in every for called, param in one.items()}
    optimizer = unwrap_optimizer(optimizer)
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        return {}
    called = (one for group in _named(optimizer, names, name) for one in group)
    return {
        one if id(param) in names else f"{name}/{one}": param
        for one, param in zip(called, optimizer_parameters(optimizer), strict=True)
    }


def get_optimizer_state(
    optimizer: Any, names: Names, name: str = "optimizer", model: Container[torch.Tensor] = ()
) -> Tree:
    """The state of an optimizer, or of a dict of them, as a tree for ``serialize``.

    ``names`` are those of the parameters by ``id``; one without a name is called "param_{group}_{index}". Tensors are
    those of the optimizer, not copies. The values of parameters that are neither named nor of the memory of the
    ``model`` are kept. Raises UsageError when two parameters have one name.
    """
    if isinstance(optimizer, Mapping):
        return {
            "optimizers": {
                key: get_optimizer_state(one, names, f"{name}/{key}", model) for key, one in optimizer.items()
            }
        }
    optimizer = unwrap_optimizer(optimizer)
    if not hasattr(optimizer, "state_dict"):
        raise UsageError(f"{name}: a {type(optimizer).__qualname__} has no state_dict(); give the optimizer itself")
    state = optimizer.state_dict()
    if not _is_usual(optimizer, state):
        return {"opaque": state}
    groups = _named(optimizer, names, name)
    numbered = [
        (number, name)
        for g, ns in zip(state["param_groups"], groups, strict=True)
        for number, name in zip(g["params"], ns, strict=True)
    ]
    called = dict(numbered)
    return {
        "state": {called[key]: value for key, value in state["state"].items() if key in called},
        "other_state": {key: value for key, value in state["state"].items() if key not in called},
        "groups": [
            {**{key: value for key, value in group.items() if key != "params"}, "params": ns}
            for group, ns in zip(state["param_groups"], groups, strict=True)
        ],
        "params": {
            name: {"dtype": param.dtype, "shape": param.shape}
            for group, ns in zip(optimizer.param_groups, groups, strict=True)
            for name, param in zip(ns, group["params"], strict=True)
        },
        "other": {key: value for key, value in state.items() if key not in ("state", "param_groups")},
        **({"values": values} if (values := dict(_beside(optimizer, groups, names, model))) else {}),
    }


def split_as(parameters: Mapping[str, torch.Tensor]) -> Callable[[str, tuple[int, ...]], torch.Tensor | None]:
    """For the key of a tensor in a training state: the parameter, split over processes, that it is as large as."""
    split = {path_segment(name): one.detach() for name, one in parameters.items() if isinstance(one, DTensor)}

    def like(key: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        named = (split[one] for one in key.split("/") if one in split)
        return next((one for one in named if tuple(one.shape) == shape), None)

    return like


def rename_parameters(tree: Mapping[str, Any], key: Callable[[str], str]) -> Mapping[str, Any]:
    """A state with other names for its parameters: an older version used those of wrappers for some."""
    if "optimizers" in tree:
        return {"optimizers": {name: rename_parameters(one, key) for name, one in tree["optimizers"].items()}}
    if "groups" not in tree:
        return tree
    by_name = {
        part: {key(name): value for name, value in tree[part].items()}
        for part in ("state", "params", "values")
        if part in tree
    }
    groups = [{**group, "params": [key(name) for name in group["params"]]} for group in tree["groups"]]
    return {**tree, **by_name, "groups": groups}


def set_optimizer_state(
    optimizer: Any,
    tree: Mapping[str, Any],
    names: Names,
    name: str = "optimizer",
    strict: bool = True,
    model: Container[torch.Tensor] = (),
) -> list[str]:
    """Load a state; returns the problems, an empty list if all of it was loaded.

    With ``strict`` nothing is loaded when there are problems, without it all that fits is. Options of the groups
    (learning rates, betas, whatever a scheduler put there) become those of the state. The optimizer may keep the
    tree's tensors as its own.
    """
    problems = compare_optimizer_state(optimizer, tree, names, name)
    if not problems or not strict:
        _put(optimizer, tree, names, name, model)
    return problems


def compare_optimizer_state(
    optimizer: Any, tree: Mapping[str, Any], names: Names, name: str = "optimizer"
) -> list[str]:
    """The mismatches between a state and an optimizer; nothing is loaded."""
    if isinstance(optimizer, Mapping) != ("optimizers" in tree):
        here, there = ("a dict of them", "one") if isinstance(optimizer, Mapping) else ("one", "a dict of them")
        return [f"{name}: {here} was given, but the checkpoint has {there}"]
    if isinstance(optimizer, Mapping):
        saved = tree["optimizers"]
        problems = [f"{name}/{key}: is not in the checkpoint" for key in optimizer if key not in saved]
        problems += [f"{name}/{key}: is in the checkpoint, but was not given" for key in saved if key not in optimizer]
        for key, one in optimizer.items():
            problems += compare_optimizer_state(one, saved[key], names, f"{name}/{key}") if key in saved else []
        return problems
    optimizer = unwrap_optimizer(optimizer)
    usual = hasattr(optimizer, "param_groups")
    if "opaque" in tree or not usual:
        fits = "opaque" in tree and not (usual and _is_usual(optimizer, optimizer.state_dict()))
        return [] if fits else [f"{name}: the state in the checkpoint is that of another kind of optimizer"]
    return list(_differences(optimizer, tree, _named(optimizer, names, name), name))


def _differences(optimizer: Any, tree: Mapping[str, Any], groups: list[list[str]], where: str) -> Iterator[str]:
    if len(groups) != len(tree["groups"]):
        yield f"{where}: has {len(groups)} parameter groups, but {len(tree['groups'])} in the checkpoint"
    before = {name: number for number, group in enumerate(tree["groups"]) for name in group["params"]}
    for number, (group, ns) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        for param, name in zip(group["params"], ns, strict=True):
            if name not in before:
                yield f"{where}: {name} is not in the checkpoint"
            elif tuple(tree["params"][name]["shape"]) != tuple(param.shape):
                shape = list(tree["params"][name]["shape"])
                yield f"{where}: {name} is of shape {list(param.shape)}, but {shape} in the checkpoint"
            elif before.pop(name) != number:
                there = next(at for at, g in enumerate(tree["groups"]) if name in g["params"])
                yield f"{where}: {name} is in parameter group {number}, but in group {there} in the checkpoint"
    live = {name for ns in groups for name in ns}
    yield from (
        f"{where}: {name} is in the checkpoint, but not in the optimizer" for name in before if name not in live
    )


def _put(optimizer: Any, tree: Mapping[str, Any], names: Names, name: str, model: Container[torch.Tensor]) -> None:
    if isinstance(optimizer, Mapping):
        for key, one in optimizer.items():
            if key in tree.get("optimizers", {}):
                _put(one, tree["optimizers"][key], names, f"{name}/{key}", model)
        return
    optimizer = unwrap_optimizer(optimizer)
    if "opaque" in tree:
        optimizer.load_state_dict(tree["opaque"])
        return
    if "groups" not in tree or not hasattr(optimizer, "param_groups"):
        return
    groups = _named(optimizer, names, name)
    live = optimizer.state_dict()
    state: dict[Any, Any] = dict(tree["other_state"])
    fitting: dict[Any, torch.Tensor] = {}  # by number, where saved state is loaded
    param_groups = []
    for at, (group, ns) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        numbers = live["param_groups"][at]["params"]
        for number, one, param in zip(numbers, ns, group["params"], strict=True):
            saved = tree["params"].get(one)
            if saved is not None and tuple(saved["shape"]) == tuple(param.shape):
                fitting[number] = param
                if one in tree["state"]:
                    state[number] = tree["state"][one]
            elif number in live["state"]:
                state[number] = live["state"][number]
        param_groups.append(_group(live["param_groups"][at], tree["groups"], at, ns))
    devices = [_devices(group) for group in optimizer.param_groups]
    optimizer.load_state_dict({**tree["other"], "state": state, "param_groups": param_groups})
    _put_values(dict(_beside(optimizer, groups, names, model)), tree, name)
    for group, wanted in zip(optimizer.param_groups, devices, strict=True):
        for key, device in wanted.items():  # such as a learning rate that is a tensor
            if isinstance(group.get(key), torch.Tensor):
                group[key] = group[key].to(device)
    called = {
        number: one
        for ns, g in zip(groups, live["param_groups"], strict=True)
        for number, one in zip(g["params"], ns, strict=True)
    }
    changed = []
    for number, param in fitting.items():
        if number not in state or param not in optimizer.state:
            continue
        if tree["params"][called[number]]["dtype"] == param.dtype:
            optimizer.state[param] = _exact(state[number], optimizer.state[param])
        else:
            changed.append(called[number])
    if changed:
        log.warning(
            "%s: %d parameters (%s first) have another dtype than in the checkpoint, so torch casts their state to it",
            *(name, len(changed), changed[0]),
        )


def _put_values(beside: Mapping[str, torch.Tensor], tree: Mapping[str, Any], name: str) -> None:
    values = tree.get("values", {})
    unknown = [one for one in beside if one in tree["params"] and one not in values]
    if unknown:
        log.warning(
            "%s: %d parameters (%s first) are not the model's, and the checkpoint, which an older version wrote, does "
            "not have their values: they stay as they are",
            *(name, len(unknown), unknown[0]),
        )
    with torch.no_grad():
        for one, param in beside.items():
            if one in values and values[one].shape == param.shape:
                param.copy_(values[one])


def _beside(
    optimizer: Any, groups: list[list[str]], names: Names, model: Container[torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters outside of the model, by name."""
    for group, ns in zip(optimizer.param_groups, groups, strict=True):
        for one, param in zip(ns, group["params"], strict=True):
            if id(param) not in names and param not in model:
                yield one, param


def _exact(saved: Any, loaded: Any) -> Any:
    """The loaded state, but with the saved values if loading changed their type."""
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor):
        cast = saved.dtype != loaded.dtype or type(saved) is not torch.Tensor is type(loaded)
        if not cast or saved.shape != loaded.shape or type(loaded) not in (torch.Tensor, type(saved)):
            return loaded
        return saved if saved.device == loaded.device else saved.to(loaded.device)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        for key in loaded:
            if key in saved:
                loaded[key] = _exact(saved[key], loaded[key])
        return loaded
    if type(saved) is type(loaded) and isinstance(saved, (list, tuple)) and len(saved) == len(loaded):
        return type(saved)(_exact(one, other) for one, other in zip(saved, loaded, strict=True))
    return saved if isinstance(saved, (str, bytes)) else loaded  # torch treats a string as a list of characters


def _group(live: dict[str, Any], saved: list[dict[str, Any]], at: int, names: list[str]) -> dict[str, Any]:
    """The options of a saved group, for the parameters of the live one."""
    if at >= len(saved):
        return live
    group = {**saved[at], "params": live["params"]}
    if "param_names" in group:  # torch's own names, in the order of the saved parameters
        if len(group["param_names"]) == len(saved[at]["params"]):
            called = dict(zip(saved[at]["params"], group["param_names"], strict=True))
            group["param_names"] = [called.get(name, name) for name in names]
        else:
            del group["param_names"]
    return group


def _devices(group: Mapping[str, Any]) -> dict[str, torch.device]:
    return {key: value.device for key, value in group.items() if isinstance(value, torch.Tensor)}


def _is_usual(optimizer: Any, state: Mapping[str, Any]) -> bool:
    """Whether a state has torch's numbered parameters: other wrappers may use any structure."""
    groups, live = state.get("param_groups"), getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list) or not isinstance(live, list) or not isinstance(state.get("state"), Mapping):
        return False
    return [len(group.get("params", ())) for group in groups] == [len(group["params"]) for group in live]


def _named(optimizer: Any, names: Names, where: str) -> list[list[str]]:
    """For each group, the names of its parameters."""
    out = [
        [names.get(id(param), f"param_{number}_{index}") for index, param in enumerate(group["params"])]
        for number, group in enumerate(optimizer.param_groups)
    ]
    every = [name for group in out for name in group]
    if len(set(every)) != len(every):
        twice = sorted({name for name in every if every.count(name) > 1})
        raise UsageError(f"{where}: several parameters are called {', '.join(twice[:5])}; give each a name of its own")
    return out
