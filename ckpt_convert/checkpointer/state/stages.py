"""Optimizers of pipeline stages: each rank's has the parameters of its own layers, and the checkpoint those of all.

These functions take the serialized description of an optimizer's state, or of a dict of optimizers.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from ckpt_convert.checkpointer.state.optimizers import Tree
from ckpt_convert.errors import UsageError

_BY_NAME = ("state", "params", "values")
"""What an optimizer's state has by the name of a parameter."""

_LISTS = ("params", "param_names")
"""What a parameter group has one of for each parameter."""


def names_in(tree: Mapping[str, Any]) -> Iterator[str]:
    """The names of the parameters of a state, each once in each of its tables."""
    for one in tree.get("optimizers", {}).values():
        yield from names_in(one)
    for table in _BY_NAME:
        yield from tree.get(table, ())


def merge(trees: Sequence[Mapping[str, Any]]) -> Tree:
    """One state with the parameters of all; raises UsageError where the options of a group are not the same."""
    first = dict(trees[0])
    if "optimizers" in first:
        every = dict.fromkeys(name for tree in trees for name in tree["optimizers"])
        found = {name: [tree["optimizers"][name] for tree in trees if name in tree["optimizers"]] for name in every}
        return {"optimizers": {name: merge(ones) for name, ones in found.items()}}
    if "groups" not in first:
        return first
    tables = {
        table: {name: value for tree in trees for name, value in tree.get(table, {}).items()}
        for table in _BY_NAME
        if any(table in tree for tree in trees)
    }
    groups = zip_longest(*(tree["groups"] for tree in trees))
    return {**first, **tables, "groups": [_merged(number, group) for number, group in enumerate(groups)]}


def _merged(number: int, groups: Sequence[Mapping[str, Any] | None]) -> Tree:
    there = [group for group in groups if group is not None]
    options = [{key: value for key, value in group.items() if key not in _LISTS} for group in there]
    if other := next((one for one in options if one != options[0]), None):
        name = next(key for key in (*options[0], *other) if options[0].get(key) != other.get(key))
        raise UsageError(
            f"optimizer: {name} of parameter group {number} is {options[0].get(name)} on one rank and "
            f"{other.get(name)} on another; give the group the same options on all ranks"
        )
    lists = {key: [one for group in there for one in group.get(key, ())] for key in _LISTS if key in there[0]}
    return {**options[0], **{key: list(dict.fromkeys(values)) for key, values in lists.items()}}


def without(tree: Mapping[str, Any], names: Container[str]) -> Tree:
    """The state without these parameters."""
    if "optimizers" in tree:
        return {"optimizers": {name: without(one, names) for name, one in tree["optimizers"].items()}}
    if "groups" not in tree:
        return dict(tree)
    tables = {
        table: {name: value for name, value in tree[table].items() if name not in names}
        for table in _BY_NAME
        if table in tree
    }
    return {**tree, **tables, "groups": [_without(group, names) for group in tree["groups"]]}


def _without(group: Mapping[str, Any], names: Container[str]) -> Tree:
    kept = [name not in names for name in group["params"]]
    lists = {
        key: [one for one, stays in zip(group[key], kept, strict=True) if stays]
        for key in _LISTS
        if len(group.get(key, ())) == len(kept)
    }
    return {**group, **lists}
