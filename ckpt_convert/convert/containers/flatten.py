"""Nested dicts of tensors as one level of keys."""

from __future__ import annotations

from typing import Any, TypeVar

from ckpt_convert.errors import CorruptFileError, KeyMismatchError

_MAX_DEPTH = 100
_MAX_KEY = 4096
_PLAIN = (list, tuple)  # exactly these: torch.Size and named tuples are values, not containers
T = TypeVar("T")


def flatten(name: str, root: object, leaf: type[T], limit: int) -> tuple[dict[str, T], dict[str, str]]:
    """Return the instances of ``leaf`` in nested dicts, lists and tuples, and the type names of all else, by path.

    Paths are joined with "."; empty containers count as something else. Raises CorruptFileError when ``root`` is no
    dict, contains itself, is nested too deep, or unfolds to more than ``limit`` values; KeyMismatchError when two
    values have the same path.
    """
    if not isinstance(root, dict):
        raise CorruptFileError(
            f"{name}: a checkpoint should be a dict of tensors, but is a {_kind(root)}; save a state dict"
        )
    tensors: dict[str, T] = {}
    objects: dict[str, str] = {}
    pending = _children("", root, 0)
    left = limit - len(pending)
    while pending:
        path, value, depth = pending.pop()
        if left < 0 or depth > _MAX_DEPTH or len(path) > _MAX_KEY:
            raise CorruptFileError(
                f"{name}: {path[:80]!r}… is nested deeper than {_MAX_DEPTH} levels or contains itself, or its parts "
                "repeat each other far more often than a checkpoint's would; save a plain state dict"
            )
        if path in tensors or path in objects:
            raise KeyMismatchError(f"{name}: two values are called {path!r} once nested keys are joined with '.'")
        if isinstance(value, leaf):
            tensors[path] = value
        elif isinstance(value, dict | list | tuple) and value and (isinstance(value, dict) or type(value) in _PLAIN):
            pending += _children(path + ".", value, depth + 1)
            left -= len(value)
        else:
            objects[path] = _kind(value)
    return tensors, objects


def _children(prefix: str, value: Any, depth: int) -> list[tuple[str, object, int]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    children = [(f"{prefix}{key}", child, depth) for key, child in items]
    children.reverse()  # the caller takes them from the end
    return children


def _kind(value: object) -> str:
    # The stand-ins for torch's objects say what they stand for.
    return str(getattr(value, "kind", type(value).__name__))
