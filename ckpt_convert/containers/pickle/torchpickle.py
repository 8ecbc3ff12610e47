"""Reads the pickles in torch's files without torch and without executing anything.

This is our own interpreter for the opcodes of pickle protocols 2 to 5, not a subclass of pickle's Unpickler, in which
the objects on the stack decide what BUILD and REDUCE do, one opcode can allocate gigabytes for the memo, and hashing a
deeply nested key can exhaust the C stack. Here every opcode, global and type of dict key is on an allow-list, nothing
is imported or called except our own placeholders (``pickleglobals``), nothing recurses, and the work is linear in the
number of bytes.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_convert.containers.pickle import pickleglobals
from ckpt_convert.containers.pickle.pickleglobals import (
    ForeignObject,
    Global,
    MalformedError,
    OrderedDict,
    Other,
    PickledStorage,
    PickledTensor,
    Size,
    StorageType,
    integer,
)
from ckpt_convert.errors import CorruptFileError, InputError, UnsafeFileError
from ckpt_convert.tensors.header import SHARDED_TENSOR_CLASSES

__all__ = ["ForeignObject", "LoadedPickle", "Other", "PickledStorage", "PickledTensor", "Size", "load_pickle"]

_MAX_KEY_PARTS = 64
_MAX_ARGUMENTS = 1 << 10
_MAX_NAME = 1 << 10
"""Limits on what is copied at each use: a pickle may use one object a million times."""


@dataclass(frozen=True, slots=True)
class LoadedPickle:
    """The value of a pickle, the globals it names that are not on the allow-list, and its storages by key."""

    value: Any
    foreign: tuple[str, ...]
    storages: Mapping[str, PickledStorage]


def load_pickle(name: str, data: bytes, *, foreign: bool = False, part: str = "data.pkl") -> LoadedPickle:
    """Read a pickle; torch's tensors and storages become PickledTensor and PickledStorage.

    With ``foreign``, objects of classes that are not on the allow-list become ForeignObject; without it, naming such a
    class raises UnsafeFileError, as do opcodes that bypass names. Raises CorruptFileError if the pickle is malformed.
    ``name`` and ``part`` are the names of the file, and of the pickle in it, in messages.
    """
    loaded, end = _load(_Machine(name, data, part, foreign))
    if end != len(data):
        raise _malformed(name, part, "it does not end where it stops")
    return loaded


def load_row(name: str, data: bytes, count: int, *, foreign: bool = False) -> tuple[list[LoadedPickle], int]:
    """Read ``count`` consecutive pickles; returns them and the offset of their end, else as ``load_pickle``."""
    out, end = [], 0
    for _ in range(count):
        loaded, end = _load(_Machine(name, data, "its pickle", foreign, end))
        out.append(loaded)
    return out, end


def _load(machine: _Machine) -> tuple[LoadedPickle, int]:
    """The value of a pickle, and the offset of its end."""
    try:
        value = _run(machine)
    except (ValueError, TypeError, LookupError, struct.error, OverflowError, MemoryError) as error:
        problem = str(error) if isinstance(error, MalformedError) else f"{type(error).__name__}: {error}"
        raise _malformed(machine.name, machine.part, problem) from None
    return LoadedPickle(value, tuple(machine.foreign), machine.storages), machine.position


def _malformed(name: str, part: str, problem: str) -> CorruptFileError:
    what = "rebuild a dict of tensors" if part == "data.pkl" else "say what the checkpoint holds"
    return CorruptFileError(
        f"{name}: {part} should {what}, but is malformed ({problem:.300}); "
        "the file is damaged, so download or copy it again"
    )


def refusal_error(name: str, part: str, foreign: str, *more: str) -> UnsafeFileError:
    """The error for a pickle that names classes that are not on the allow-list."""
    asked = f"{foreign!r}" + (f" and {len(more)} others" if len(more) > 1 else f" and {more[0]!r}" if more else "")
    if SHARDED_TENSOR_CLASSES.intersection((foreign, *more)):
        return UnsafeFileError(
            f"{name}: holds what one rank has of tensors that are distributed over several (DTensor), so no such file "
            "is the whole, and what is saved of it is a part; nothing was executed. Save the model in a run of as many "
            "ranks, by torch.distributed.checkpoint or ckpt_convert.Checkpointer, or gathered first "
            "(get_model_state_dict with full_state_dict=True); what verl saved, its own tool merges (python -m "
            "verl.model_merger)"
        )
    return UnsafeFileError(
        f"{name}: {part} asks for {asked}, which rebuilding tensors never needs; nothing was executed. If you "
        "trust the file, load it with torch and save a plain state dict, or better a safetensors file"
    )


def _call(name: str, function: object, arguments: object) -> object:
    if not isinstance(function, Global) or type(arguments) is not tuple:
        raise MalformedError(f"REDUCE calls {type(function).__name__} with {type(arguments).__name__}")
    try:
        return pickleglobals.call_global(function, arguments)
    except TypeError as error:
        raise MalformedError(f"{function.name} with {len(arguments)} arguments: {error}") from None
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _storage(reference: object) -> object:
    """Resolve a persistent id: ("storage", type, key, location, number of elements), and None in old files."""
    if type(reference) is not tuple or len(reference) not in (5, 6) or reference[0] != "storage":
        raise MalformedError("a persistent id should be a storage")
    _, kind, key, _, numel, *view = reference
    if view not in ([], [None]):
        raise MalformedError("a storage is a part of another, as torch before 0.4 wrote them")
    if isinstance(kind, Global) and kind.foreign:
        return ForeignObject(kind.name)
    # torch also accepts an integer as key, which litgpt writes.
    if not isinstance(kind, StorageType) or not (isinstance(key, str) or type(key) is int):
        raise MalformedError("a storage should have a type and a key")
    if isinstance(key, str) and len(key) > _MAX_NAME:
        raise MalformedError(f"the key of a storage has {len(key)} letters")
    return PickledStorage(key if isinstance(key, str) else str(integer(key)), kind.dtype, integer(numel), kind.kind)


def _key(value: object) -> object:
    """Accept only dict keys that are cheap to hash and plain to print."""
    if _plain(value) or isinstance(value, ForeignObject):  # which is hashed by identity
        return value
    if type(value) is tuple and len(value) <= _MAX_KEY_PARTS and all(map(_plain, value)):
        return value
    raise MalformedError(f"a dict key should be a string or a small number, not {type(value).__name__}")


def _plain(value: object) -> bool:
    kind = type(value)
    return (
        kind is str or kind is bool or kind is float or kind is bytes or value is None
        or (isinstance(value, int) and abs(value) < 2**60)
    )  # fmt: skip


def _fill(target: object, items: list[object]) -> None:
    filled = target.items if isinstance(target, ForeignObject) else target
    if len(items) % 2 or not isinstance(filled, dict):
        raise MalformedError("SETITEMS without a dict or without a value")
    for position in range(0, len(items), 2):
        filled[_key(items[position])] = items[position + 1]


def _extend(target: object, items: list[object]) -> None:
    extended = target.members if isinstance(target, ForeignObject) else target
    if type(extended) is not list:
        raise MalformedError("APPENDS without a list")
    extended += items


class _Machine:
    """The interpreter's state: the stack, the stacks below each mark, and the memo."""

    __slots__ = ("allowed", "data", "foreign", "marked", "memo", "name", "part", "position", "stack", "storages")

    def __init__(self, name: str, data: bytes, part: str, allowed: bool, position: int = 0) -> None:
        self.name = name
        self.data = data
        self.part = part
        self.allowed = allowed
        self.foreign: dict[str, None] = {}  # in the order of their use
        self.position = position
        self.storages: dict[str, PickledStorage] = {}
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, object] = {}  # a dict: an arbitrary index allocates nothing

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise MalformedError("it ends too early")
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
            raise MalformedError("its stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def resolve(self, module: object, attribute: object) -> None:
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise MalformedError("the name of a global should be two strings")
        if len(module) + len(attribute) > _MAX_NAME:
            raise MalformedError(f"the name of a global has {len(module) + len(attribute)} letters")
        full = f"{module}.{attribute}"
        found = pickleglobals.find_global(full)
        if found is None:
            if not self.allowed:
                raise refusal_error(self.name, self.part, full)
            self.foreign[full] = None
            found = Global(full, foreign=True)
        self.push(found)

    def instance(self) -> None:
        self.resolve(self.line(), self.line())
        raise MalformedError("it makes an instance of a class as only protocols 0 and 1 do")

    def persistent(self) -> None:
        storage = _storage(self.stack.pop())
        if isinstance(storage, PickledStorage):
            self.storages.setdefault(storage.key, storage)
        self.push(storage)

    def call(self) -> None:
        function, arguments = self.last(2)
        self.push(_call(self.name, function, arguments))

    def call_with_names(self) -> None:
        function, arguments, names = self.last(3)
        if not isinstance(names, dict) or type(arguments) is not tuple:
            raise MalformedError("NEWOBJ_EX without a tuple and a dict")
        if names and len(arguments) > _MAX_ARGUMENTS:
            raise MalformedError(f"NEWOBJ_EX with {len(arguments)} arguments")
        self.push(_call(self.name, function, (*arguments, names) if names else arguments))

    def build(self) -> None:
        target, state = self.last(2)
        if isinstance(target, ForeignObject):
            target.state = state
        elif not isinstance(target, OrderedDict | Other):
            raise MalformedError(f"BUILD sets the state of {type(target).__name__}")
        self.push(target)


_OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: lambda m: _check_protocol(m.byte()),
    pickle.FRAME: lambda m: _check_frame(m, m.number(8)),
    pickle.MARK: _Machine.mark,
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT2: lambda m: m.push(m.number(2)),
    pickle.BININT: lambda m: m.push(m.signed(4)),
    pickle.LONG1: lambda m: m.push(m.signed(m.byte())),
    pickle.LONG4: lambda m: m.push(m.signed(m.number(4))),
    pickle.BINFLOAT: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    pickle.SHORT_BINSTRING: lambda m: m.push(m.take(m.byte()).decode()),  # what Python 2 wrote
    pickle.SHORT_BINUNICODE: lambda m: m.push(m.take(m.byte()).decode()),
    pickle.BINUNICODE: lambda m: m.push(m.take(m.number(4)).decode()),
    pickle.BINUNICODE8: lambda m: m.push(m.take(m.number(8)).decode()),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.byte())),
    pickle.BINBYTES: lambda m: m.push(m.take(m.number(4))),
    pickle.BINBYTES8: lambda m: m.push(m.take(m.number(8))),
    pickle.BYTEARRAY8: lambda m: m.push(m.take(m.number(8))),
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
    pickle.EMPTY_SET: lambda m: m.push([]),  # a set's members by their position
    pickle.ADDITEMS: lambda m: _extend_marked(m),
    pickle.FROZENSET: lambda m: m.push(tuple(m.since_mark())),
    pickle.POP: lambda m: _discard(m),
    pickle.POP_MARK: lambda m: _forget(m),
    pickle.LONG_BINPUT: lambda m: m.put(m.number(4)),
    pickle.GLOBAL: lambda m: m.resolve(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.resolve(*m.last(2)),
    pickle.INST: _Machine.instance,
    pickle.REDUCE: _Machine.call,
    pickle.NEWOBJ: _Machine.call,
    pickle.NEWOBJ_EX: _Machine.call_with_names,
    pickle.BUILD: _Machine.build,
    pickle.BINPERSID: _Machine.persistent,
}
_BY_CODE = {opcode[0]: action for opcode, action in _OPCODES.items()}
_STOP, _PUT, _MEMOIZE = pickle.STOP[0], pickle.BINPUT[0], pickle.MEMOIZE[0]
_GET, _LONG_GET, _INT1 = pickle.BINGET[0], pickle.LONG_BINGET[0], pickle.BININT1[0]
_NAMES = {
    value[0]: name
    for name, value in vars(pickle).items()
    if name.isupper() and isinstance(value, bytes) and len(value) == 1
}


def _run(machine: _Machine) -> object:
    data, memo, actions = machine.data, machine.memo, _BY_CODE
    while (code := data[machine.position]) != _STOP:
        machine.position += 1
        # These opcodes are the most frequent, and there may be millions.
        if code == _MEMOIZE:
            memo[len(memo)] = machine.stack[-1]
            continue
        if code == _PUT:
            memo[data[machine.position]] = machine.stack[-1]
            machine.position += 1
            continue
        if code == _GET:
            machine.stack.append(memo[data[machine.position]])
            machine.position += 1
            continue
        if code == _LONG_GET:
            machine.stack.append(memo[machine.number(4)])
            continue
        if code == _INT1:
            machine.stack.append(data[machine.position])
            machine.position += 1
            continue
        action = actions.get(code)
        if action is None:
            if code not in _NAMES:
                raise MalformedError(f"byte {code:#04x} is no opcode")
            raise UnsafeFileError(
                f"{machine.name}: {machine.part} uses the opcode {_NAMES[code]}, which rebuilding tensors never "
                "needs; nothing was executed. If you trust the file, load it with torch and save a plain state dict"
            )
        action(machine)
    machine.position += 1
    (result,) = machine.stack
    if machine.marked:
        raise MalformedError("it does not end where it stops")
    return result


def _check_protocol(protocol: int) -> None:
    if not 2 <= protocol <= 5:
        raise MalformedError(f"its protocol should be 2 to 5, not {protocol}")


def _check_frame(machine: _Machine, size: int) -> None:
    if machine.position + size > len(machine.data):
        raise MalformedError("a frame ends after the file")


def _extend_marked(machine: _Machine) -> None:
    items = machine.since_mark()
    _extend(machine.stack[-1], items)


def _fill_marked(machine: _Machine) -> None:
    items = machine.since_mark()
    _fill(machine.stack[-1], items)


def _discard(machine: _Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:  # nothing is left above the mark, so POP discards the mark itself
        _forget(machine)


def _forget(machine: _Machine) -> None:
    machine.since_mark()
