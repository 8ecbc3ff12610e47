"""The globals that a pickle may name: those that rebuild tensors, and those of plain data. None is ever imported.

Every name on these lists maps to a placeholder of ours. Any other name is *foreign*: it is refused or, if the file is
only inspected, becomes an object of which only its name and its parts are known.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ckpt_convert.dtypes import DTYPES, FROM_STORAGE, FROM_TORCH
from ckpt_convert.errors import InputError

MAX_DIMS = 64
_MOST_FLAGS = 16
_MOST_ARGUMENTS = 64
_MOST_BITS = 1024


class MalformedError(ValueError):
    """A malformed pickle; ``torchpickle.load_pickle`` adds the file's name."""


class PickledStorage(NamedTuple):
    """A reference to the member ``data/<key>``: ``numel`` elements of ``dtype`` (bytes if it is untyped)."""

    key: str
    dtype: str
    numel: int
    kind: str

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].bits // 8


class PickledTensor(NamedTuple):
    """A view of a storage; offset, shape and strides in elements. Only their types are checked here."""

    storage: PickledStorage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Other(NamedTuple):
    """A value without tensors; ``kind`` is the name of its type."""

    kind: str


class Size(tuple[int, ...]):
    """Placeholder for torch.Size."""

    kind = "Size"


class OrderedDict(dict[Any, Any]):
    """Placeholder for all kinds of dicts; attributes that a pickle sets (``_metadata``) are dropped."""

    __slots__ = ()


class ForeignObject:
    """An object of a foreign class: the class name, and the parts that the pickle gives it. Hashed by identity."""

    __slots__ = ("arguments", "items", "members", "name", "state")

    def __init__(self, name: str, arguments: tuple[object, ...] = ()) -> None:
        self.name = name
        self.arguments = arguments
        self.state: object = None
        self.items: dict[Any, object] = {}
        self.members: list[object] = []

    @property
    def kind(self) -> str:
        return self.name

    @property
    def attributes(self) -> Mapping[Any, Any]:
        """The state as a dict, also if it is a pair with that of slots; empty if it is something else.

        Never a copy: a pickle may share one dict among a million objects.
        """
        states = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        found = [state for state in states if isinstance(state, dict)]
        return found[0] if len(found) == 1 else ChainMap(*reversed(found))


class Global(NamedTuple):
    """A class or function that the pickle names; ``foreign`` if it is not on the allow-list."""

    name: str
    foreign: bool = False
    kind: str = "type"


class StorageType(NamedTuple):
    """A storage class, such as torch.FloatStorage."""

    dtype: str
    kind: str


class DTypeName(NamedTuple):
    """A torch dtype, by its safetensors name."""

    name: str
    kind: str = "dtype"


def integer(value: object) -> int:
    """Check a size, an offset or a stride; the limit keeps arithmetic and messages cheap."""
    if type(value) is not int:
        raise MalformedError(f"expected an integer, found {type(value).__name__}")
    if value.bit_length() > _MOST_BITS:
        raise MalformedError(f"expected a size, found an integer of {value.bit_length():,} bits")
    return value


def integers(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > MAX_DIMS:
        raise MalformedError(f"expected {MAX_DIMS} integers at most, found {type(values).__name__}")
    return tuple([integer(value) for value in values])


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> object:
    if isinstance(storage, ForeignObject):
        return ForeignObject(storage.name, (storage,))
    if not isinstance(storage, PickledStorage) or len(rest) > 3:
        raise MalformedError(f"a tensor should be rebuilt from a storage, not from {type(storage).__name__}")
    _refuse_lazy(rest[2] if len(rest) > 2 else None)
    return PickledTensor(storage, storage.dtype, integer(offset), integers(shape), integers(strides))


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, *rest: Any) -> object:
    if not rest or not isinstance(rest[0], DTypeName):
        raise MalformedError("a tensor of an untyped storage should name a dtype")
    made = _tensor(storage, offset, shape, strides, grad, hooks, *rest[1:])
    return made._replace(dtype=rest[0].name) if isinstance(made, PickledTensor) else made


def _refuse_lazy(metadata: object) -> None:
    """Refuse tensors with lazy conjugation or negation: their values are not the stored bytes."""
    if isinstance(metadata, dict) and len(metadata) > _MOST_FLAGS:  # it may be shared by a million tensors
        raise MalformedError(f"a tensor's metadata should be a few flags, not {len(metadata)}")
    if isinstance(metadata, dict) and any(value is not False for value in metadata.values()):
        raise InputError(
            f"holds a tensor whose values are not its bytes ({', '.join(map(str, metadata))}); load it with torch and "
            "save tensor.resolve_conj().resolve_neg()"
        )
    if metadata is not None and not isinstance(metadata, dict):
        raise MalformedError(f"a tensor's metadata should be a dict, not {type(metadata).__name__}")


def _parameter(tensor: Any, requires_grad: Any, hooks: Any, state: Any = None) -> object:
    if not isinstance(tensor, PickledTensor | ForeignObject):
        raise MalformedError(f"a parameter should be made from a tensor, not from {type(tensor).__name__}")
    return tensor


def _typed(function: Any, kind: Any, arguments: Any, state: Any) -> object:
    """A tensor of a subclass; its attributes are dropped, as those of a dict are."""
    if not isinstance(function, Global) or not isinstance(kind, Global) or type(arguments) is not tuple:
        raise MalformedError("a tensor of a class should be rebuilt by a function from arguments")
    made = call_global(function, arguments)
    if isinstance(made, ForeignObject):
        made = ForeignObject(kind.name, arguments)
        made.state = state
    return made


def _reconstructed(kind: Any, *rest: Any) -> object:
    if not isinstance(kind, Global):
        raise MalformedError(f"an object should be made of a class, not of {type(kind).__name__}")
    return ForeignObject(kind.name) if kind.foreign else Other(_last(kind.name))


def _dict(*values: Any) -> object:
    """A dict with the given initial content, or empty; other arguments are default factories."""
    return values[-1] if values and isinstance(values[-1], dict) else OrderedDict()


def _ordered_dict() -> object:
    return OrderedDict()


def _list(*values: Any) -> object:
    # Never a copy: a pickle may use one list a million times.
    return values[0] if values and isinstance(values[0], list | tuple) and values[0] else []


def _size(sizes: Any = ()) -> object:
    return Size(integers(sizes))


_CALLS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    **{f"{module}._reconstructor": _reconstructed for module in ("copyreg", "copy_reg")},
    "collections.defaultdict": _dict,
    "collections.Counter": _dict,
    "collections.deque": _list,
    # protocol 2 writes Python 2's names
    **{f"{module}.dict": _dict for module in ("builtins", "__builtin__")},
    **{f"{m}.{name}": _list for m in ("builtins", "__builtin__") for name in ("list", "set", "frozenset", "tuple")},
}
_PLAIN_NAMES = {
    "torch": ("device", "Tensor", "nn.parameter.Parameter", "nn.parameter.Buffer", "serialization._get_layout"),
    "torch.torch_version": ("TorchVersion",),
    "_codecs": ("encode",),
    "_io": ("BytesIO",),  # extra state of Transformer Engine's modules, in Llama 4's files
    "types": ("SimpleNamespace",),
    "argparse": ("Namespace",),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "uuid": ("UUID",),
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),  # Python 3.13
    "numpy": (
        *("ndarray", "dtype", "bool", "bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"),
        *("uint64", "float16", "float32", "float64", "longdouble", "complex64", "complex128", "str_", "bytes_"),
        *("void", "datetime64", "timedelta64"),
    ),
    "numpy.core": ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer"),
    "numpy._core": ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer"),
    "numpy.random": (
        *("_mt19937.MT19937", "_pcg64.PCG64", "_philox.Philox", "bit_generator.SeedSequence"),
        "bit_generator.__pyx_unpickle_SeedSequence",
        *("_pickle.__randomstate_ctor", "_pickle.__generator_ctor", "_pickle.__bit_generator_ctor"),
    ),
    "builtins": ("int", "float", "complex", "str", "bytes", "bytearray", "bool", "object", "slice", "range"),
    "__builtin__": ("int", "long", "float", "complex", "str", "unicode", "bytes", "bytearray", "bool", "object"),
}
_UNTYPED = ("torch.UntypedStorage", "torch.storage.UntypedStorage", "torch.storage._UntypedStorage")
_PLAIN = [f"{module}.{name}" for module, names in _PLAIN_NAMES.items() for name in names]
_VALUES: dict[str, object] = {
    **{name: Global(name) for name in (*_CALLS, *_PLAIN)},
    **{f"torch.{kind}": StorageType(dtype.name, kind) for kind, dtype in FROM_STORAGE.items()},
    **{name: StorageType("U8", "UntypedStorage") for name in _UNTYPED},
    **{f"torch.{kind}": DTypeName(dtype.name) for kind, dtype in FROM_TORCH.items()},
}
_KINDS = {"encode": "bytes", "_reconstruct": "ndarray", "_frombuffer": "ndarray", "_get_layout": "layout"}


def find_global(name: str) -> object | None:
    """The placeholder for a global on the allow-list; None for any other."""
    found = _VALUES.get(name)
    return Global(name) if found is None and name.startswith("numpy.dtypes.") and name.count(".") == 2 else found


def call_global(function: Global, arguments: tuple[Any, ...]) -> object:
    """The placeholder for the result of calling a global; raises TypeError for wrong arguments."""
    if function.foreign:
        return ForeignObject(function.name, arguments)
    call = _CALLS.get(function.name)
    if call is None:
        return Other(_last(function.name))
    if len(arguments) > _MOST_ARGUMENTS:  # each call copies them
        raise MalformedError(f"{function.name} with {len(arguments)} arguments")
    return call(*arguments)


def _last(name: str) -> str:
    last = name.rpartition(".")[2]
    return _KINDS.get(last, last.removeprefix("__").removeprefix("pyx_unpickle_").removesuffix("_ctor"))
