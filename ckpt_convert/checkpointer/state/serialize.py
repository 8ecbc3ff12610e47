"""Splitting a nested state into a JSON skeleton and a flat dict of tensors, losslessly.

A value without a JSON equivalent is an object whose key ``"$"`` holds its kind. Tensors are not copied.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from ckpt_convert.checkpointer.distributed.slices import local_of
from ckpt_convert.checkpointer.state.deserialize import FACTORIES, KIND, WORD_SIZE, flattening_class, rebuild
from ckpt_convert.dtypes import FROM_TORCH, torch_name
from ckpt_convert.errors import UsageError

_PLAIN_BYTES = 4096
"""Longer bytes are stored as a tensor: base64 in JSON takes a third more, and is parsed as a whole."""

_WAY_OUT = "give plain values, tensors, numpy arrays, or an object with state_dict() and load_state_dict()"
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


@dataclass(frozen=True)
class SerializedState:
    """``skeleton`` is what ``json`` takes; ``tensors`` are by readable path, and share the memory of the state's."""

    skeleton: Any
    tensors: dict[str, torch.Tensor]


def serialize(tree: Any, name: str = "") -> SerializedState:
    """Take a nested state apart; ``name`` is what messages call it.

    Raises UsageError, naming the path and the type, for anything that could not be given back exactly.
    """
    packer = _Packer(name)
    return SerializedState(packer.node(tree, ()), packer.tensors)


def deserialize(packed: SerializedState) -> Any:
    """Rebuild the state, with the tensors of ``packed``; raises CorruptFileError for an invalid skeleton."""
    return rebuild(packed.skeleton, packed.tensors)


def path_segment(key: object) -> str:
    """A key as one segment of a path: readable, without slashes and unprintable characters."""
    text = key if isinstance(key, str) else repr(key)
    escaped = "".join(c if c.isprintable() and c not in "/%" else _escape(c) for c in text)
    return escaped or "%"


def _escape(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


class _Packer:
    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: dict[str, torch.Tensor] = {}
        self._open: set[int] = set()

    def node(self, value: Any, path: tuple[str, ...]) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if value.bit_length() <= WORD_SIZE else {KIND: "int", "hex": hex(value)}
        if kind is float:
            # hex() has one name for every NaN, so the bits are written
            return value if math.isfinite(value) else {KIND: "float", "bits": np.float64(value).tobytes().hex()}
        if kind is complex:
            return {KIND: "complex", "parts": [self.node(value.real, path), self.node(value.imag, path)]}
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if kind is np.ndarray:
            return self._array(value, path)
        if isinstance(value, np.generic):
            self._check_dtype(value.dtype, path)
            return {KIND: "scalar", "dtype": value.dtype.str, "bytes": value.tobytes().hex()}
        if kind is bytes:
            return self._bytes(value, path)
        if kind is torch.Size:
            return {KIND: "size", "of": list(value)}
        if kind is torch.dtype:
            return {KIND: "dtype", "name": torch_name(value)}
        if kind is torch.device:
            return {KIND: "device", "name": str(value)}
        return self._nested(value, kind, path)

    def _nested(self, value: Any, kind: type, path: tuple[str, ...]) -> Any:
        pack_it = _NESTED.get(kind)
        if pack_it is None:
            raise self._refused(path, f"a {kind.__module__}.{kind.__qualname__}")
        if id(value) in self._open:
            raise self._refused(path, "a container that holds itself")
        self._open.add(id(value))
        try:
            return pack_it(self, value, path)
        except RecursionError:
            raise self._refused(path, "nested too deeply") from None
        finally:
            self._open.discard(id(value))

    def items(self, values: Iterable[Any], path: tuple[str, ...]) -> list[Any]:
        return [self.node(item, (*path, str(number))) for number, item in enumerate(values)]

    def pairs(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> list[Any]:
        return [
            [self.node(key, (*path, "keys")), self.node(item, (*path, path_segment(key)))]
            for key, item in value.items()
        ]

    def mapping(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> Any:
        if all(type(key) is str for key in value) and KIND not in value:
            return {key: self.node(item, (*path, path_segment(key))) for key, item in value.items()}
        return {KIND: "dict", "of": self.pairs(value, path)}

    def members(self, value: Iterable[Any], path: tuple[str, ...]) -> list[Any]:
        items = self.items(value, path)
        return sorted(items, key=repr)  # the order of a set differs between processes

    def default(self, value: defaultdict[Any, Any], path: tuple[str, ...]) -> Any:
        names = [name for name, factory in FACTORIES.items() if factory is value.default_factory]
        if not names:
            raise self._refused(path, f"a defaultdict whose factory is {value.default_factory!r}")
        return {KIND: "defaultdict", "factory": names[0], "of": self.pairs(value, path)}

    def _tensor(self, value: torch.Tensor, path: tuple[str, ...]) -> Any:
        if type(value) not in _PLAIN and not isinstance(value, DTensor):
            return self._subclass(value, path)
        if local_of(value).layout != torch.strided or value.is_quantized or value.device.type == "meta":
            what = "a quantized" if value.is_quantized else f"a {value.layout} {value.device.type}"
            raise self._refused(path, f"{what} tensor instead of a dense one with values")
        dtype = torch_name(value.dtype)
        kept = value.detach() if isinstance(value, DTensor) else value.detach().resolve_conj().resolve_neg()
        known = FROM_TORCH.get(dtype)
        if known is not None and known.bits >= 8:
            return {KIND: "tensor", "at": self._keep(kept, path)}
        if isinstance(value, DTensor):
            raise self._refused(path, f"a {dtype} tensor that is split over processes")
        # readers of the files support fewer dtypes than torch: such a tensor is stored as bytes
        data = kept.contiguous().reshape(-1).view(torch.uint8)
        return {KIND: "tensor", "at": self._keep(data, path), "dtype": dtype, "shape": list(value.shape)}

    def _subclass(self, value: torch.Tensor, path: tuple[str, ...]) -> Any:
        """A tensor subclass with inner tensors, as of 8-bit optimizers: the inner tensors and the class name."""
        kind: Any = type(value)
        module, name = kind.__module__, kind.__qualname__
        if hasattr(kind, "full_tensor") or flattening_class(module, name) is not kind:
            raise self._refused(path, f"a tensor of class {module}.{name}")
        parts, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
        return {
            KIND: "subclass",
            "module": module,
            "class": name,
            "of": {part: self.node(getattr(value, part), (*path, part)) for part in parts},
            "context": self.node(context, (*path, "context")),
            "shape": list(value.shape),
            "stride": list(value.stride()),
        }

    def _array(self, value: np.ndarray[Any, Any], path: tuple[str, ...]) -> Any:
        self._check_dtype(value.dtype, path)
        dense = np.array(value, order="C", copy=None if value.flags.writeable else True)
        data = torch.from_numpy(dense.reshape(-1).view(np.uint8)) if dense.size else torch.empty(0, dtype=torch.uint8)
        if value.dtype.isnative and value.dtype.kind in "biufc" and value.dtype.name in FROM_TORCH:
            data = data.view(getattr(torch, value.dtype.name)).reshape(value.shape)
        return {
            KIND: "array",
            "at": self._keep(data, path),
            "dtype": value.dtype.str,
            "shape": list(value.shape),
        }

    def _check_dtype(self, dtype: np.dtype[Any], path: tuple[str, ...]) -> None:
        if dtype.kind not in "biufcmMSU":
            raise self._refused(path, f"a numpy value of dtype {dtype}")

    def _bytes(self, value: bytes, path: tuple[str, ...]) -> Any:
        if len(value) <= _PLAIN_BYTES:
            return {KIND: "bytes", "base64": base64.b64encode(value).decode()}
        return {KIND: "bytes", "at": self._keep(torch.frombuffer(bytearray(value), dtype=torch.uint8), path)}

    def _keep(self, tensor: torch.Tensor, path: tuple[str, ...]) -> str:
        wanted = unique = "/".join(path) or "value"
        number = 1
        while unique in self.tensors:  # the keys 1 and "1" have the same path
            number += 1
            unique = f"{wanted}~{number}"
        self.tensors[unique] = tensor
        return unique

    def _refused(self, path: tuple[str, ...], what: str) -> UsageError:
        place = "/".join([self.name, *path] if self.name else path) or "the state"
        return UsageError(f"{place}: is {what}, which cannot be saved so that it comes back exactly; {_WAY_OUT}")


_NESTED: dict[type, Callable[[_Packer, Any, tuple[str, ...]], Any]] = {
    dict: _Packer.mapping,
    list: _Packer.items,
    tuple: lambda packer, value, path: {KIND: "tuple", "of": packer.items(value, path)},
    set: lambda packer, value, path: {KIND: "set", "of": packer.members(value, path)},
    frozenset: lambda packer, value, path: {KIND: "frozenset", "of": packer.members(value, path)},
    deque: lambda packer, value, path: {KIND: "deque", "of": packer.items(value, path), "maxlen": value.maxlen},
    OrderedDict: lambda packer, value, path: {KIND: "OrderedDict", "of": packer.pairs(value, path)},
    Counter: lambda packer, value, path: {KIND: "Counter", "of": packer.pairs(value, path)},
    defaultdict: _Packer.default,
}
