"""Writes pickles byte for byte as CPython's pickler does, of objects whose classes need not be installed.

Follows protocols 2 and 4 as in ``Modules/_pickle.c`` of CPython 3.11: which objects are memoized, in which order, and
where a frame ends. CPython memoizes by identity. Here, equal strings are one object unless they are ``Text``, and
values without an identity of their own are written out each time.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

_FRAME = 64 << 10
"""A frame ends before the object at which it reaches this many bytes; a string of this length is in no frame."""

_SMALLEST_FRAME = 4
_TUPLES = (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
_BATCH = 1000
"""Items per APPENDS or SETITEMS."""


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A string with an identity: memoized as one object, distinct from equal strings."""

    value: str

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A class or a function, by its module and name."""

    module: str | Text
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """The result of a call, memoized as one object wherever it is used."""

    function: Global
    arguments: tuple[Any, ...]


class Call(NamedTuple):
    """The result of a call, a new object at every use."""

    function: Global
    arguments: tuple[Any, ...]


class Instance(NamedTuple):
    """An object of a class without constructor arguments, and its state: attributes, or for ``__setstate__``."""

    kind: Global
    state: Any


class Persistent(NamedTuple):
    """A persistent id, for an object that is stored outside the pickle."""

    id: Any


class Items(NamedTuple):
    """A dict of ``size`` items, which are generated while it is written."""

    size: int
    pairs: Iterable[tuple[Any, Any]]


def dumps(value: object, protocol: Literal[2, 4] = 4) -> bytes:
    """The pickle of None, booleans, non-negative integers, strings, tuples, lists, dicts, and the classes above.

    Raises TypeError for anything else.
    """
    writer = _Writer(protocol)
    writer.save(value)
    return writer.finish()


class _Writer:
    def __init__(self, protocol: Literal[2, 4]) -> None:
        self._protocol = protocol
        self._done = bytearray(pickle.PROTO + bytes((protocol,)))
        self._frame = bytearray()
        self._memo: dict[object, int] = {}
        self._count = 0

    def save(self, value: object) -> None:
        if len(self._frame) >= _FRAME:
            self._end_frame()
        saver = _SAVERS.get(type(value))
        if saver is None:
            raise TypeError(f"a {type(value).__name__} is not among what is pickled here")
        saver(self, value)

    def finish(self) -> bytes:
        self._frame += pickle.STOP
        self._end_frame()
        return bytes(self._done)

    def _end_frame(self) -> None:
        if len(self._frame) >= _SMALLEST_FRAME and self._protocol == 4:
            self._done += pickle.FRAME + struct.pack("<Q", len(self._frame))
        self._done += self._frame
        self._frame.clear()

    def _memoize(self) -> None:
        if self._protocol == 4:
            self._frame += pickle.MEMOIZE
        else:
            self._frame += _indexed(pickle.BINPUT, pickle.LONG_BINPUT, self._count)
        self._count += 1

    def _is_known(self, value: object) -> bool:
        """Write a reference to a memoized object."""
        index = self._memo.get(value)
        if index is None:
            return False
        self._frame += _indexed(pickle.BINGET, pickle.LONG_BINGET, index)
        return True

    def _remember(self, value: object) -> None:
        self._memo[value] = self._count
        self._memoize()

    def _none(self, value: None) -> None:
        self._frame += pickle.NONE

    def _bool(self, value: bool) -> None:
        self._frame += pickle.NEWTRUE if value else pickle.NEWFALSE

    def _int(self, value: int) -> None:
        self._frame += _whole_number(value)

    def _text(self, value: str | Text) -> None:
        if self._is_known(value):
            return
        data = str(value).encode("utf-8", "surrogatepass")
        is_long = len(data) >= _FRAME
        if len(data) < 1 << 8 and self._protocol == 4:
            data = pickle.SHORT_BINUNICODE + bytes((len(data),)) + data
        else:
            data = pickle.BINUNICODE + struct.pack("<I", len(data)) + data
        if is_long:
            self._end_frame()
            self._done += data
        else:
            self._frame += data
        self._remember(value)

    def _global(self, value: Global) -> None:
        if self._is_known(value):
            return
        if self._protocol == 4:
            self.save(value.module)
            self.save(value.name)
            self._frame += pickle.STACK_GLOBAL
        else:
            self._frame += pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode()
        self._remember(value)

    def _constant(self, value: Constant) -> None:
        if not self._is_known(value):
            self._called(value)
            self._remember(value)

    def _call(self, value: Call) -> None:
        self._called(value)
        self._memoize()

    def _called(self, value: Call | Constant) -> None:
        self.save(value.function)
        self.save(value.arguments)
        self._frame += pickle.REDUCE

    def _instance(self, value: Instance) -> None:
        self.save(value.kind)
        self.save(())
        self._frame += pickle.NEWOBJ
        self._memoize()
        self.save(value.state)
        self._frame += pickle.BUILD

    def _persistent(self, value: Persistent) -> None:
        self.save(value.id)
        self._frame += pickle.BINPERSID

    def _tuple(self, value: tuple[Any, ...]) -> None:
        if not value:
            self._frame += pickle.EMPTY_TUPLE
            return
        if len(value) > 3:
            self._frame += pickle.MARK
        for item in value:
            self.save(item)
        self._frame += _TUPLES[len(value) - 1] if len(value) <= 3 else pickle.TUPLE
        self._memoize()

    def _list(self, value: list[Any]) -> None:
        self._frame += pickle.EMPTY_LIST
        self._memoize()
        for number, item in enumerate(value):
            if len(value) > 1 and number % _BATCH == 0:
                self._frame += pickle.APPENDS + pickle.MARK if number else pickle.MARK
            self.save(item)
        if value:
            self._frame += pickle.APPENDS if len(value) > 1 else pickle.APPEND

    def _dict(self, value: dict[Any, Any]) -> None:
        self._items(Items(len(value), value.items()))

    def _items(self, value: Items) -> None:
        self._frame += pickle.EMPTY_DICT
        self._memoize()
        for number, (key, item) in enumerate(value.pairs):
            if value.size > 1 and number % _BATCH == 0:
                self._frame += pickle.SETITEMS + pickle.MARK if number else pickle.MARK
            self.save(key)
            self.save(item)
        if (
            value.size > 1 and value.size % _BATCH == 0
        ):  # CPython follows a full batch of a dict by another, even if that is empty
            self._frame += pickle.SETITEMS + pickle.MARK
        if value.size:
            self._frame += pickle.SETITEMS if value.size > 1 else pickle.SETITEM


_SAVERS: Mapping[type, Callable[[_Writer, Any], None]] = {
    type(None): _Writer._none,
    bool: _Writer._bool,
    int: _Writer._int,
    str: _Writer._text,
    Text: _Writer._text,
    Global: _Writer._global,
    Constant: _Writer._constant,
    Call: _Writer._call,
    Instance: _Writer._instance,
    Persistent: _Writer._persistent,
    tuple: _Writer._tuple,
    list: _Writer._list,
    dict: _Writer._dict,
    Items: _Writer._items,
}


def _indexed(short: bytes, long: bytes, index: int) -> bytes:
    return short + bytes((index,)) if index < 1 << 8 else long + struct.pack("<I", index)


def _whole_number(value: int) -> bytes:
    if value < 1 << 8:
        return pickle.BININT1 + bytes((value,))
    if value < 1 << 16:
        return pickle.BININT2 + struct.pack("<H", value)
    if value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1  # including the sign bit
    return pickle.LONG1 + bytes((size,)) + value.to_bytes(size, "little")
