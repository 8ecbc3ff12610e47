"""Rebuilding a state from its skeleton, which is validated; only known kinds of values are created.

The class of a tensor subclass is looked up only in modules that the program has already imported.
"""

from __future__ import annotations

import base64
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ckpt_convert.errors import CorruptFileError, UsageError

KIND = "$"
WORD_SIZE = 63
"""Bits of the largest integers that are written as JSON numbers; other JSON readers do not support larger ones."""

FACTORIES: dict[str, Any] = {
    "none": None,
    "int": int,
    "float": float,
    "str": str,
    "list": list,
    "dict": dict,
    "set": set,
}

Tensors = Mapping[str, torch.Tensor]


def rebuild(skeleton: Any, tensors: Tensors) -> Any:
    """Create the state that ``skeleton`` describes; raises CorruptFileError for an invalid one."""
    try:
        return _node(skeleton, tensors)
    except CorruptFileError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:  # RecursionError is among them
        raise CorruptFileError(
            f"the description of the state is damaged ({type(error).__name__}: {str(error)[:200]}); "
            "copy the checkpoint again, or resume from another one"
        ) from error


def tensor_keys(skeleton: Any) -> Iterator[str]:
    """The path of every tensor that a skeleton refers to."""
    pending = [skeleton]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            if node.get(KIND) in ("tensor", "array", "bytes") and isinstance(node.get("at"), str):
                yield node["at"]
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)


def _node(node: Any, tensors: Tensors) -> Any:
    if isinstance(node, list):
        return [_node(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if KIND not in node:
        return {key: _node(item, tensors) for key, item in node.items()}
    make = _MAKE.get(node[KIND])
    if make is None:
        raise CorruptFileError(
            f"the state has a value of kind {node[KIND]!r}, which this version does not know; update"
        )
    return make(node, tensors)


def _items(node: dict[str, Any], tensors: Tensors) -> list[Any]:
    return [_node(item, tensors) for item in node["of"]]


def _pairs(node: dict[str, Any], tensors: Tensors) -> dict[Any, Any]:
    return {_node(key, tensors): _node(item, tensors) for key, item in node["of"]}


def _found(node: dict[str, Any], tensors: Tensors) -> torch.Tensor:
    tensor = tensors.get(node["at"])
    if tensor is None:
        raise CorruptFileError(f"the state asks for the tensor {node['at']!r}, which is not there; copy it again")
    return tensor


def _tensor(node: dict[str, Any], tensors: Tensors) -> torch.Tensor:
    tensor = _found(node, tensors)
    if "dtype" not in node:
        return tensor
    shape = tuple(node["shape"])
    dtype = _dtype(node["dtype"])
    return tensor.view(dtype).reshape(shape) if tensor.numel() else torch.empty(shape, dtype=dtype)


def flattening_class(module: str, name: str) -> Any:
    """The tensor subclass of this name with ``__tensor_flatten__`` and ``__tensor_unflatten__``; None if there is none.

    Only modules that are already imported are searched.
    """
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    is_class = isinstance(found, type) and issubclass(found, torch.Tensor)
    return (
        found if is_class and all(hasattr(found, f"__tensor_{name}__") for name in ("flatten", "unflatten")) else None
    )


def _subclass(node: dict[str, Any], tensors: Tensors) -> torch.Tensor:
    kind = flattening_class(node["module"], node["class"])
    if kind is None:
        raise UsageError(
            f"the state has tensors of the class {node['module']}.{node['class']}, which this program has not "
            'imported; make the optimizer that has them before resume(), or resume without it (exclude=["optimizer"])'
        )
    parts = {name: _node(one, tensors) for name, one in node["of"].items()}
    context, shape = _node(node["context"], tensors), torch.Size(node["shape"])
    made = kind.__tensor_unflatten__(parts, context, shape, tuple(node["stride"]))
    if not isinstance(made, torch.Tensor):
        raise CorruptFileError(f"the state has a {kind.__qualname__} that is no tensor; copy it again")
    return made


def _array(node: dict[str, Any], tensors: Tensors) -> np.ndarray[Any, Any]:
    dtype = np.dtype(node["dtype"])
    if dtype.hasobject:
        raise CorruptFileError("the state has an array of objects, which is never written; copy it again")
    flat = _found(node, tensors).contiguous().reshape(-1)
    if not flat.numel():
        return np.empty(node["shape"], dtype)
    found: np.ndarray[Any, Any] = flat.view(torch.uint8).numpy().view(dtype).reshape(node["shape"])
    return found


def _scalar(node: dict[str, Any], _: Tensors) -> Any:
    dtype = np.dtype(node["dtype"])
    if dtype.hasobject:
        raise CorruptFileError("the state has a number that is an object, which is never written; copy it again")
    data = bytes.fromhex(node["bytes"])
    return np.frombuffer(data, dtype)[0] if data else dtype.type()


def _bytes(node: dict[str, Any], tensors: Tensors) -> bytes:
    if "base64" in node:
        return base64.b64decode(node["base64"], validate=True)
    return _found(node, tensors).numpy().tobytes()


def _default(node: dict[str, Any], tensors: Tensors) -> defaultdict[Any, Any]:
    return defaultdict(FACTORIES[node["factory"]], _pairs(node, tensors))


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise CorruptFileError(f"the state has a tensor of dtype {name!r}, which torch does not know; update torch")
    return found


_MAKE: dict[Any, Callable[[dict[str, Any], Tensors], Any]] = {
    "int": lambda node, _: int(node["hex"], 16),
    "float": lambda node, _: np.frombuffer(bytes.fromhex(node["bits"]), np.float64)[0].item(),
    "complex": lambda node, tensors: complex(*[_node(value, tensors) for value in node["parts"]]),
    "tensor": _tensor,
    "subclass": _subclass,
    "array": _array,
    "scalar": _scalar,
    "bytes": _bytes,
    "size": lambda node, _: torch.Size(node["of"]),
    "dtype": lambda node, _: _dtype(node["name"]),
    "device": lambda node, _: torch.device(node["name"]),
    "dict": _pairs,
    "tuple": lambda node, tensors: tuple(_items(node, tensors)),
    "set": lambda node, tensors: set(_items(node, tensors)),
    "frozenset": lambda node, tensors: frozenset(_items(node, tensors)),
    "deque": lambda node, tensors: deque(_items(node, tensors), node["maxlen"]),
    "OrderedDict": lambda node, tensors: OrderedDict(_pairs(node, tensors)),
    "Counter": lambda node, tensors: Counter(_pairs(node, tensors)),
    "defaultdict": _default,
}
