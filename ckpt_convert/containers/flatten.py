"""Flattens nested dicts of tensors to one level of keys."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeGuard, TypeVar, cast

from ckpt_convert.containers.pickle.pickleglobals import ForeignObject
from ckpt_convert.errors import CorruptFileError, KeyMismatchError
from ckpt_convert.tensors.header import Scalar

_MAX_DEPTH = 100
_MAX_KEY = 4096
_ATOMS = (int, float, bool, str, bytes, type(None))
_PLAIN = (list, tuple)  # exactly these: torch.Size and named tuples are values, not containers
_ROOT = "tensor"
_MODULE = ("_parameters", "_buffers", "_modules")
"""The attributes of a torch module that make up its state dict."""

_LIST = 8
"""A longer list of plain values is reported as one object."""

_MAX_TEXT = 200
_MAX_BITS = 64
"""Limits of a value that is kept: a pickle may use one long text a million times."""

T = TypeVar("T")


class Flattened(NamedTuple, Generic[T]):
    """The leaves by path; the type names of all other values, and those of them that are plain and short."""

    tensors: dict[str, T]
    objects: dict[str, str]
    values: dict[str, Scalar]


_Pending = tuple[str, object, int, bool]
"""Path, value, depth, and whether it is part of a foreign object."""


def flatten(name: str, root: object, leaf: type[T], limit: int) -> Flattened[T]:
    """The instances of ``leaf`` in nested dicts, lists and tuples, and what is known of all other values, by path.

    Paths are joined with "."; an empty container is another value; a foreign object is one value, but leaves in it are
    listed, too. A root that is itself a leaf is called "tensor". Raises CorruptFileError if ``root`` contains itself,
    is nested too deep, or expands to more than ``limit`` values; KeyMismatchError if two values have the same path.
    """
    tensors: dict[str, T] = {}
    objects: dict[str, str] = {}
    values: dict[str, Scalar] = {}
    pending: list[_Pending] = _children("", root, 0, False) if _is_container(root) else [(_ROOT, root, 0, False)]
    left = limit - len(pending)
    while pending:
        path, value, depth, is_inside = pending.pop()
        if left < 0 or depth > _MAX_DEPTH or len(path) > _MAX_KEY:
            raise CorruptFileError(
                f"{name}: {path[:80]!r}… is nested deeper than {_MAX_DEPTH} levels or contains itself, or its parts "
                "repeat each other far more often than a checkpoint's would; save a plain state dict"
            )
        is_leaf = isinstance(value, leaf)
        if (is_leaf or not is_inside) and (path in tensors or path in objects):
            if not is_inside:
                raise KeyMismatchError(f"{name}: two values are called {path!r} once nested keys are joined with '.'")
            path = f"{path}#{len(tensors)}"
        if is_leaf:
            tensors[path] = cast(T, value)
            continue
        children: list[_Pending] = []
        kind = _kind(value)
        if isinstance(value, ForeignObject):
            children = _parts("" if value is root else f"{path}.", value, depth + 1)
        elif isinstance(value, list | tuple) and type(value) in _PLAIN and _is_plain(value):
            kind = f"{kind} of {len(value)}"
            left -= len(value)
        elif _is_container(value):
            children = _children(path + ".", value, depth + 1, is_inside)
        pending += children
        left -= len(children)
        if not is_inside and (isinstance(value, ForeignObject) or not children):
            path = "(all)" if value is root else path
            objects[path] = kind
            if _is_scalar(value):
                values[path] = _shortened(value)
    return Flattened(tensors, objects, values)


def _is_scalar(value: object) -> TypeGuard[Scalar]:
    """Whether a value is plain; longer integers than those of any counter or seed are not printed."""
    if type(value) is int:
        return value.bit_length() <= _MAX_BITS
    return value is None or type(value) in (bool, float, str)


def _shortened(value: Scalar) -> Scalar:
    return f"{value[:_MAX_TEXT]}…" if isinstance(value, str) and len(value) > _MAX_TEXT else value


def _is_container(value: object) -> bool:
    return isinstance(value, dict) or type(value) in _PLAIN


def _is_plain(values: Any) -> bool:
    return len(values) > _LIST and all(type(value) in _ATOMS for value in values)


def _children(prefix: str, value: Any, depth: int, is_inside: bool) -> list[_Pending]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    children = [(f"{prefix}{_name(key)}", child, depth, is_inside) for key, child in items]
    children.reverse()  # the caller pops them from the end
    return children


def _parts(prefix: str, value: ForeignObject, depth: int) -> list[_Pending]:
    """The parts that a pickle gave an object: attributes, items, members, and the arguments of its constructor."""
    attributes = value.attributes
    inner = [attributes[name] for name in _MODULE if isinstance(attributes.get(name), dict)]
    rest = {name: held for name, held in attributes.items() if name not in _MODULE}
    held = (value.arguments, value.members, value.items, *inner, rest or ((value.state,) if not attributes else ()))
    return [part for parts in held if parts for part in _children(prefix, parts, depth, True)]


def _name(key: object) -> str:
    if isinstance(key, ForeignObject):
        return key.name
    # Tuples and the like are shortened: a pickle may nest them arbitrarily deep.
    return str(key) if isinstance(key, _ATOMS) else reprlib.repr(key)


def _kind(value: object) -> str:
    # The placeholders for torch's objects carry the name of the type.
    return str(getattr(value, "kind", type(value).__name__))
