"""The random generators and counters of a data loader's samplers, dataset and functions.

They are found by traversing the attributes of these objects, the closures of their functions, and the globals that
these use. ``random.Random``, numpy's ``Generator`` and ``RandomState`` and torch's ``Generator`` have a state that can
be read and set.
"""

from __future__ import annotations

import functools
import itertools
import random
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from ckpt_convert.checkpointer.state import rng
from ckpt_convert.checkpointer.state.stateful import has_state

State = dict[str, Any]

_KINDS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_NAMES = {"Random", "RandomState", "Generator"}
"""Class names of generators in other libraries."""

_LEAVES = (str, bytes, int, float, complex, torch.Tensor, np.ndarray, torch.nn.Module, type, types.ModuleType)
_LIMIT = 1000
_WIDTH = 100
"""Limits on visited objects, in total and per container: a dataset may hold all of its examples."""


def find_generators(loader: Any) -> dict[str, Any]:
    """The generators of a loader, each once, by their path."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for place, value in (*_given(loader), *_walk(loader)):
        if isinstance(value, _KINDS) and not isinstance(value, random.SystemRandom) and id(value) not in seen:
            seen.add(id(value))
            found[place] = value
    return found


def untrackable_sources(loader: Any) -> list[str]:
    """A line for each part of a loader that determines its order or values and cannot be saved."""
    lines = []
    batches = getattr(loader, "batch_sampler", None)
    if hasattr(loader, "next_iter_state") and not has_state(batches) and not _is_torchdatas(batches):
        lines = [
            f"{place}: torchdata asks a batch_sampler without state_dict() for its order too late; give it one, or use "
            "torch's DataLoader"
            for place in find_generators(loader)
            if place.startswith("batch_sampler")
        ]
    workers = loader.num_workers > 0 and loader.persistent_workers
    for place, value in _walk(loader):
        kind = f"a {type(value).__module__}.{type(value).__qualname__}"
        sampling = place.startswith(("sampler", "batch_sampler"))
        if isinstance(value, random.SystemRandom) or (type(value).__name__ in _NAMES and not isinstance(value, _KINDS)):
            lines.append(f"{place}: {kind} has no state that can be saved")
        elif sampling and isinstance(value, types.GeneratorType):
            lines.append(f"{place}: is a generator function's iterator, whose position cannot be saved")
        elif workers and not sampling and isinstance(value, _KINDS):
            lines.append(f"{place}: is drawn from in workers that live on over epochs (persistent_workers)")
    return lines


def sampler_counters(loader: Any) -> dict[str, int]:
    """The integer attributes of samplers, such as an epoch counter."""
    return {
        f"{place}.{name}": number
        for place, sampler in _samplers(loader)
        for name, number in vars(sampler).items()
        if type(number) is int
    }


def set_sampler_counters(loader: Any, values: Mapping[str, int]) -> None:
    """Set these attributes on samplers that still have them."""
    for place, sampler in _samplers(loader):
        for name, number in vars(sampler).items():
            if type(number) is int and f"{place}.{name}" in values:
                setattr(sampler, name, values[f"{place}.{name}"])


def get_generator_state(generator: Any) -> Any:
    """The state of a generator, as a tree for ``serialize``."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return {"python": rng.get_python_state(generator)}
    if isinstance(generator, np.random.Generator):
        return {"numpy": generator.bit_generator.state}
    return {"numpy_legacy": generator.get_state(legacy=False)}


def set_generator_state(generator: Any, state: Any) -> bool:
    """Set the state of a generator; False if the state is of another kind of generator."""
    try:
        if isinstance(generator, torch.Generator):
            generator.set_state(state)
        elif isinstance(generator, random.Random):
            rng.set_python_state(generator, state["python"])
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = state["numpy"]
        else:
            generator.set_state(state["numpy_legacy"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    return True


def _given(loader: Any) -> Iterator[tuple[str, Any]]:
    """The generators at torch's own attributes, under the paths that every checkpoint has."""
    batches = getattr(loader, "batch_sampler", None)
    yield "loader", getattr(loader, "generator", None)
    yield "sampler", getattr(getattr(loader, "sampler", None), "generator", None)
    yield "batch_sampler", getattr(batches, "generator", None)
    yield "batch_sampler.sampler", getattr(getattr(batches, "sampler", None), "generator", None)


def _walk(loader: Any) -> Iterator[tuple[str, Any]]:
    """The objects reachable from a loader, breadth first, with their paths; each once."""
    roots = ("sampler", "batch_sampler", "dataset", "collate_fn", "worker_init_fn")
    pending = deque((name, getattr(loader, name, None)) for name in roots)
    seen = {id(loader)}
    for _ in range(_LIMIT):
        if not pending:
            return
        place, value = pending.popleft()
        if value is None or id(value) in seen:
            continue
        seen.add(id(value))
        yield place, value
        if not isinstance(value, (*_KINDS, DataLoader)):
            parts = ((name, one) for name, one in _parts(value) if one is not None and not isinstance(one, _LEAVES))
            pending.extend((f"{place}.{name}", one) for name, one in parts)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((str(key), one) for key, one in itertools.islice(value.items(), _WIDTH))
    elif isinstance(value, (list, tuple)):
        yield from ((str(number), one) for number, one in enumerate(value[:_WIDTH]))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield "__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value)
    else:
        yield from getattr(value, "__dict__", {}).items()
        for kind in type(value).__mro__:
            for name, one in vars(kind).items():
                if isinstance(one, types.MemberDescriptorType):  # a slot
                    yield name, getattr(value, name, None)
                elif isinstance(one, _KINDS):
                    yield name, one
                elif isinstance(one, types.FunctionType):
                    yield from ((f"{name}.{at}", used) for at, used in _of_function(one))


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not set yet
            continue
    for number, value in enumerate((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())):
        yield f"default {number}", value
    for name in function.__code__.co_names:
        if isinstance(used := function.__globals__.get(name), _KINDS):
            yield name, used


def _is_torchdatas(sampler: object) -> bool:
    return type(sampler).__module__.startswith("torchdata.")


def _samplers(loader: Any) -> Iterator[tuple[str, Any]]:
    return (
        (place, value) for place, value in _walk(loader) if isinstance(value, Sampler) and hasattr(value, "__dict__")
    )
