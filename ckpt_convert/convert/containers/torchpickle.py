"""The pickle inside torch's zip files, read without torch and without running anything.

This is an interpreter of its own for the few opcodes that ``torch.save`` writes, not a subclass of pickle's
Unpickler: there, what BUILD and REDUCE do is up to the objects on the stack, one opcode can claim gigabytes for the
memo, and hashing a deeply nested key can exhaust the C stack. Here every opcode, global and dict key is on a list,
nothing recurses, and the work is linear in the number of bytes.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from ckpt_convert.dtypes import DTYPES, FROM_STORAGE, FROM_TORCH
from ckpt_convert.errors import CorruptFileError, InputError, UnsafeFileError

MAX_DIMS = 64


class Storage(NamedTuple):
    """A reference to the member ``data/<key>``: ``numel`` elements of ``dtype`` (bytes where it is untyped)."""

    key: str
    dtype: str
    numel: int
    kind: str

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].bits // 8


class Tensor(NamedTuple):
    """A view of a storage; offset, shape and strides in elements, as the pickle says them: unchecked but for type."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Other(NamedTuple):
    """Something of torch's that is no tensor; ``kind`` is the name of its type."""

    kind: str


class OrderedDict(dict[Any, Any]):
    """Stands for collections.OrderedDict; the attributes that a pickle gives it (``_metadata``) are not kept."""

    __slots__ = ()


class _Global(NamedTuple):
    name: str
    kind: str = "type"


class _StorageType(NamedTuple):
    dtype: str
    kind: str


class _DType(NamedTuple):
    name: str
    kind: str = "dtype"


class _MalformedError(ValueError):
    """The pickle is not one that torch.save writes; ``load`` adds the file's name."""


def load(name: str, data: bytes) -> object:
    """Return what the pickle holds, with Tensor and Storage for torch's.

    Raises UnsafeFileError when it asks for any global or opcode that rebuilding tensors does not need,
    CorruptFileError when it is malformed; ``name`` is the file's, for the message.
    """
    try:
        return _run(name, data)
    except (ValueError, TypeError, LookupError, struct.error, OverflowError, MemoryError) as error:
        problem = str(error) if isinstance(error, _MalformedError) else f"{type(error).__name__}: {error}"
        raise CorruptFileError(
            f"{name}: data.pkl should rebuild a dict of tensors, but is malformed ({problem:.300}); "
            "the file is damaged, so download or copy it again"
        ) from None


def _int(value: object) -> int:
    if type(value) is not int:
        raise _MalformedError(f"expected an integer, found {type(value).__name__}")
    return value


def _ints(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > MAX_DIMS:
        raise _MalformedError(f"expected {MAX_DIMS} integers at most, found {type(values).__name__}")
    return tuple([_int(value) for value in values])


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    if not isinstance(storage, Storage) or len(rest) > 3:
        raise _MalformedError(f"a tensor should be rebuilt from a storage, not from {type(storage).__name__}")
    _refuse_lazy(rest[2] if len(rest) > 2 else None)
    return Tensor(storage, storage.dtype, _int(offset), _ints(shape), _ints(strides))


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, *rest: Any) -> Tensor:
    if not rest or not isinstance(rest[0], _DType):
        raise _MalformedError("a tensor of an untyped storage should name a dtype")
    return _tensor(storage, offset, shape, strides, grad, hooks, *rest[1:])._replace(dtype=rest[0].name)


def _refuse_lazy(metadata: object) -> None:
    """Conjugation and negation may be flags on a view: the stored bytes are then not the tensor's values."""
    if isinstance(metadata, dict) and any(value is not False for value in metadata.values()):
        raise InputError(
            f"holds a tensor whose values are not its bytes ({', '.join(map(str, metadata))}); load it with torch and "
            "save tensor.resolve_conj().resolve_neg()"
        )
    if metadata is not None and not isinstance(metadata, dict):
        raise _MalformedError(f"a tensor's metadata should be a dict, not {type(metadata).__name__}")


def _parameter(tensor: Any, requires_grad: Any, hooks: Any, state: Any = None) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise _MalformedError(f"a parameter should be made from a tensor, not from {type(tensor).__name__}")
    return tensor


_CALLS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "collections.OrderedDict": lambda: OrderedDict(),
    "torch.Size": lambda sizes: Other("Size") if _ints(sizes) is not None else None,
    "torch.device": lambda *place: Other("device"),
}
_UNTYPED = ("torch.UntypedStorage", "torch.storage.UntypedStorage", "torch.storage._UntypedStorage")
_VALUES: dict[str, object] = {
    **{name: _Global(name) for name in _CALLS},
    **{f"torch.{kind}": _StorageType(dtype.name, kind) for kind, dtype in FROM_STORAGE.items()},
    **{name: _StorageType("U8", "UntypedStorage") for name in _UNTYPED},
    **{f"torch.{kind}": _DType(dtype.name) for kind, dtype in FROM_TORCH.items()},
}


def _resolve(name: str, module: object, attribute: object) -> object:
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise _MalformedError("the name of a global should be two strings")
    full = f"{module}.{attribute}"
    if full not in _VALUES:
        raise UnsafeFileError(
            f"{name}: data.pkl asks for {full!r}, which rebuilding tensors never needs; nothing was executed. If you "
            "trust the file, load it with torch and save a plain state dict, or better a safetensors file"
        )
    return _VALUES[full]


def _call(name: str, function: object, arguments: object) -> object:
    if not isinstance(function, _Global) or type(arguments) is not tuple:
        raise _MalformedError(f"REDUCE calls {type(function).__name__} with {type(arguments).__name__}")
    try:
        return _CALLS[function.name](*arguments)
    except TypeError as error:
        raise _MalformedError(f"{function.name} with {len(arguments)} arguments: {error}") from None
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _storage(reference: object) -> Storage:
    """Resolve a persistent id: ("storage", type, key, location, number of elements)."""
    if type(reference) is not tuple or len(reference) != 5 or reference[0] != "storage":
        raise _MalformedError("a persistent id should be a storage")
    _, kind, key, _, numel = reference
    if not isinstance(kind, _StorageType) or not isinstance(key, str):
        raise _MalformedError("a storage should have a type and a key")
    return Storage(key, kind.dtype, _int(numel), kind.kind)


def _key(value: object) -> object:
    """Let only keys pass whose hash is cheap and whose text is plain."""
    kind = type(value)
    if kind is str or kind is bool or value is None or (isinstance(value, int) and abs(value) < 2**60):
        return value
    raise _MalformedError(f"a dict key should be a string or a small integer, not {kind.__name__}")


def _fill(target: object, items: list[object]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise _MalformedError("SETITEMS without a dict or without a value")
    for position in range(0, len(items), 2):
        target[_key(items[position])] = items[position + 1]


def _extend(target: object, items: list[object]) -> None:
    if type(target) is not list:
        raise _MalformedError("APPENDS without a list")
    target += items


class _Machine:
    """The state of a run: the stack, the stacks below each mark, and the memo."""

    __slots__ = ("data", "marked", "memo", "name", "position", "stack")

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.data = data
        self.position = 0
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, object] = {}  # a dict: an index out of the blue costs nothing

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise _MalformedError("it ends too early")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def byte(self) -> int:
        value = self.data[self.position]
        self.position += 1
        return value

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def signed(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little", signed=True)

    def line(self) -> str:
        end = self.data.index(b"\n", self.position)
        text = self.data[self.position : end].decode()
        self.position = end + 1
        return text

    def push(self, value: object) -> None:
        self.stack.append(value)

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[object]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def last(self, count: int) -> list[object]:
        if len(self.stack) < count:
            raise _MalformedError("its stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def instance(self) -> None:
        _resolve(self.name, self.line(), self.line())
        raise _MalformedError("it makes an instance of a class")

    def call(self) -> None:
        function, arguments = self.last(2)
        self.push(_call(self.name, function, arguments))

    def build(self) -> None:
        target, _ = self.last(2)
        if type(target) is not OrderedDict:
            raise _MalformedError(f"BUILD sets the state of {type(target).__name__}")
        self.push(target)


_OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: lambda m: _check_protocol(m.byte()),
    pickle.FRAME: lambda m: _check_frame(m, m.number(8)),
    pickle.MARK: _Machine.mark,
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT1: lambda m: m.push(m.byte()),
    pickle.BININT2: lambda m: m.push(m.number(2)),
    pickle.BININT: lambda m: m.push(m.signed(4)),
    pickle.LONG1: lambda m: m.push(m.signed(m.byte())),
    pickle.BINFLOAT: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    pickle.SHORT_BINUNICODE: lambda m: m.push(m.take(m.byte()).decode()),
    pickle.BINUNICODE: lambda m: m.push(m.take(m.number(4)).decode()),
    pickle.BINUNICODE8: lambda m: m.push(m.take(m.number(8)).decode()),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.byte())),
    pickle.BINBYTES: lambda m: m.push(m.take(m.number(4))),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.TUPLE1: lambda m: m.push(tuple(m.last(1))),
    pickle.TUPLE2: lambda m: m.push(tuple(m.last(2))),
    pickle.TUPLE3: lambda m: m.push(tuple(m.last(3))),
    pickle.TUPLE: lambda m: m.push(tuple(m.since_mark())),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.APPEND: lambda m: _extend(m.stack[-2], m.last(1)),
    pickle.APPENDS: lambda m: _extend_marked(m),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.SETITEM: lambda m: _fill(m.stack[-3], m.last(2)),
    pickle.SETITEMS: lambda m: _fill_marked(m),
    pickle.LONG_BINPUT: lambda m: m.put(m.number(4)),
    pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
    pickle.BINGET: lambda m: m.push(m.memo[m.byte()]),
    pickle.LONG_BINGET: lambda m: m.push(m.memo[m.number(4)]),
    pickle.GLOBAL: lambda m: m.push(_resolve(m.name, m.line(), m.line())),
    pickle.STACK_GLOBAL: lambda m: m.push(_resolve(m.name, *m.last(2))),
    pickle.INST: _Machine.instance,
    pickle.REDUCE: _Machine.call,
    pickle.BUILD: _Machine.build,
    pickle.BINPERSID: lambda m: m.push(_storage(m.stack.pop())),
}
_BY_CODE = {opcode[0]: action for opcode, action in _OPCODES.items()}
_STOP, _PUT = pickle.STOP[0], pickle.BINPUT[0]
_NAMES = {
    value[0]: name
    for name, value in vars(pickle).items()
    if name.isupper() and isinstance(value, bytes) and len(value) == 1
}


def _run(name: str, data: bytes) -> object:
    machine = _Machine(name, data)
    memo, actions = machine.memo, _BY_CODE
    while (code := data[machine.position]) != _STOP:
        machine.position += 1
        if code == _PUT:  # every fifth opcode or so
            memo[data[machine.position]] = machine.stack[-1]
            machine.position += 1
            continue
        action = actions.get(code)
        if action is None:
            if code not in _NAMES:
                raise _MalformedError(f"byte {code:#04x} is no opcode")
            raise UnsafeFileError(
                f"{name}: data.pkl uses the opcode {_NAMES[code]}, which rebuilding tensors never needs; nothing was "
                "executed. If you trust the file, load it with torch and save a plain state dict"
            )
        action(machine)
    (result,) = machine.stack
    if machine.marked or machine.position != len(data) - 1:
        raise _MalformedError("it does not end where it stops")
    return result


def _check_protocol(protocol: int) -> None:
    if not 2 <= protocol <= 5:
        raise _MalformedError(f"its protocol should be 2 to 5, not {protocol}")


def _check_frame(machine: _Machine, size: int) -> None:
    if machine.position + size > len(machine.data):
        raise _MalformedError("a frame ends after the file")


def _extend_marked(machine: _Machine) -> None:
    items = machine.since_mark()
    _extend(machine.stack[-1], items)


def _fill_marked(machine: _Machine) -> None:
    items = machine.since_mark()
    _fill(machine.stack[-1], items)
