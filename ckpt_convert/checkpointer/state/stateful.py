"""Getting and setting the state of objects: schedulers, scalers, and objects of the user."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from ckpt_convert.errors import UsageError

log = logging.getLogger("ckpt_convert")


def has_state(obj: object) -> bool:
    """Whether an object has state_dict() and load_state_dict()."""
    return callable(getattr(obj, "state_dict", None)) and callable(getattr(obj, "load_state_dict", None))


def get_state(obj: Any, name: str = "state") -> Any:
    """The state of an object with state_dict() and load_state_dict(), or of a dict of objects and plain values.

    Tensors are those of the object, not copies. Raises UsageError for anything else; ``name`` is what it is called.
    """
    if has_state(obj):
        return obj.state_dict()
    if type(obj) is not dict:
        raise UsageError(
            f"{name}: a {type(obj).__module__}.{type(obj).__qualname__} has no state that can be saved; give an object "
            "with state_dict() and load_state_dict(), or a dict of such objects or of plain values"
        )
    return {
        "objects": {key: get_state(value, f"{name}/{key}") for key, value in obj.items() if _is_object(value)},
        "values": {key: value for key, value in obj.items() if not _is_object(value)},
    }


def set_state(obj: Any, state: Any, name: str = "state", strict: bool = True) -> list[str]:
    """Restore a state, the values of a dict in place; returns the problems, an empty list if there are none.

    With ``strict``, nothing is changed if objects are missing on either side. An error of an object's own
    load_state_dict() is a problem too, and leaves the object in the state that it caused.
    """
    problems = compare_state(obj, state, name)
    if problems and strict:
        return problems
    return problems + _put(obj, state, name)


def compare_state(obj: Any, state: Any, name: str = "state") -> list[str]:
    """The missing and unexpected entries of a state for an object; nothing is changed."""
    if has_state(obj):
        return []
    if type(obj) is not dict:
        get_state(obj, name)  # says what is wrong with it
    if not _is_captured_dict(state):
        return [f"{name}: a dict was given, but the checkpoint has the state of a single object"]
    live = {key: value for key, value in obj.items() if _is_object(value)}
    problems = [f"{name}/{key}: is not in the checkpoint" for key in live if key not in state["objects"]]
    problems += [
        f"{name}/{key}: is in the checkpoint, but was not given" for key in state["objects"] if key not in live
    ]
    for key, value in live.items():
        if key in state["objects"]:
            problems += compare_state(value, state["objects"][key], f"{name}/{key}")
    return problems


def _put(obj: Any, state: Any, name: str) -> list[str]:
    if has_state(obj):
        return _load(obj, state, name)
    if not _is_captured_dict(state):
        return []
    problems = []
    for key, one in state["objects"].items():
        if key in obj and _is_object(obj[key]):
            problems += _put(obj[key], one, f"{name}/{key}")
    for key, value in state["values"].items():
        if not _is_object(obj.get(key)):
            obj[key] = value
    return problems


def _load(obj: Any, state: Any, name: str) -> list[str]:
    if isinstance(obj, torch.amp.GradScaler) and not state:  # one that is not enabled has no state
        if obj.is_enabled():
            log.warning("%s: was not enabled when the checkpoint was saved, so it keeps its initial state", name)
        return []
    try:
        obj.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        said = " ".join(str(error).split())[:500]
        return [f"{name}: {type(obj).__qualname__}.load_state_dict() refused the state: {said or type(error).__name__}"]
    return []


def _is_object(value: Any) -> bool:
    return has_state(value) or (type(value) is dict and any(_is_object(item) for item in value.values()))


def _is_captured_dict(state: Any) -> bool:
    return isinstance(state, Mapping) and set(state) == {"objects", "values"}
