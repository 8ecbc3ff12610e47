"""Writing pickles byte by byte as CPython's own pickler does, of objects whose classes need not be there.

The pickler follows protocols 2 and 4 as ``Modules/_pickle.c`` of CPython 3.11 writes them: which objects get a number
in the memo, in which order, and where a frame ends. That tells objects apart by identity. Here, strings of one value
are one object, ``Text`` is for those that are not, and what has no other way of being one is written anew each time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

_FRAME = 64 << 10
"""A frame ends before the first object at which it has this many bytes; a text as long is in no frame."""

_SMALLEST_FRAME = 4
_BATCH = 1000
"""Items of a list or a dict that are put into it at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A string that is one object wherever it stands, but never another string of the same value."""

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
    """What a function returns for some arguments; one object wherever it stands."""

    function: Global
    arguments: tuple[Any, ...]


class Call(NamedTuple):
    """What a function returns for some arguments; an object of its own wherever it stands."""

    function: Global
    arguments: tuple[Any, ...]


class Instance(NamedTuple):
    """An object of a class without arguments, and its state: its attributes, or what its ``__setstate__`` takes."""

    kind: Global
    state: Any


class Persistent(NamedTuple):
    """An object that is not in the pickle, but found by this."""

    id: Any


class Items(NamedTuple):
    """A dict of ``size`` items, which are made while it is written."""

    size: int
    pairs: Iterable[tuple[Any, Any]]


def dumps(value: object, protocol: Literal[2, 4] = 4) -> bytes:
    """The pickle of None, booleans, whole numbers from 0, strings, tuples, lists, dicts, and of the classes above.

    Raises TypeError for anything else.
    """
    writer = _Writer(protocol)
    writer.save(value)
    return writer.finish()


class _Writer:
    def __init__(self, protocol: Literal[2, 4]) -> None:
        self._protocol = protocol
        self._done = bytearray((0x80, protocol))
        self._frame = bytearray()
        self._memo: dict[object, int] = {}
        self._count = 0
        self._savers: Mapping[type, Callable[[Any], None]] = {
            type(None): self._none,
            bool: self._bool,
            int: self._int,
            str: self._str,
            Text: self._text,
            Global: self._global,
            Constant: self._constant,
            Call: self._call,
            Instance: self._instance,
            Persistent: self._persistent,
            tuple: self._tuple,
            list: self._list,
            dict: self._dict,
            Items: self._items,
        }

    def save(self, value: object) -> None:
        if len(self._frame) >= _FRAME:
            self._end_frame()
        saver = self._savers.get(type(value))
        if saver is None:
            raise TypeError(f"a {type(value).__name__} is not among what is pickled here")
        saver(value)

    def finish(self) -> bytes:
        self._frame += b"."
        self._end_frame()
        return bytes(self._done)

    def _end_frame(self) -> None:
        if len(self._frame) >= _SMALLEST_FRAME and self._protocol == 4:
            self._done += b"\x95" + struct.pack("<Q", len(self._frame))
        self._done += self._frame
        self._frame.clear()

    def _memoize(self) -> None:
        self._frame += b"\x94" if self._protocol == 4 else _indexed(b"q", b"r", self._count)
        self._count += 1

    def _is_known(self, value: object) -> bool:
        """Refer to what was written before."""
        index = self._memo.get(value)
        if index is None:
            return False
        self._frame += _indexed(b"h", b"j", index)
        return True

    def _remember(self, value: object) -> None:
        self._memo[value] = self._count
        self._memoize()

    def _none(self, value: None) -> None:
        self._frame += b"N"

    def _bool(self, value: bool) -> None:
        self._frame += b"\x88" if value else b"\x89"

    def _int(self, value: int) -> None:
        self._frame += _whole_number(value)

    def _str(self, value: str) -> None:
        if not self._is_known(value):
            self._characters(value)
            self._remember(value)

    def _text(self, text: Text) -> None:
        if not self._is_known(text):
            self._characters(text.value)
            self._remember(text)

    def _characters(self, value: str) -> None:
        data = value.encode("utf-8", "surrogatepass")
        short = len(data) < 1 << 8 and self._protocol == 4
        head = b"\x8c" + bytes((len(data),)) if short else b"X" + struct.pack("<I", len(data))
        if len(data) < _FRAME:
            self._frame += head + data
            return
        self._end_frame()
        self._done += head + data

    def _global(self, value: Global) -> None:
        if self._is_known(value):
            return
        if self._protocol == 4:
            self.save(value.module)
            self.save(value.name)
            self._frame += b"\x93"
        else:
            self._frame += f"c{value.module}\n{value.name}\n".encode()
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
        self._frame += b"R"

    def _instance(self, value: Instance) -> None:
        self.save(value.kind)
        self.save(())
        self._frame += b"\x81"
        self._memoize()
        self.save(value.state)
        self._frame += b"b"

    def _persistent(self, value: Persistent) -> None:
        self.save(value.id)
        self._frame += b"Q"

    def _tuple(self, value: tuple[Any, ...]) -> None:
        if not value:
            self._frame += b")"
            return
        if len(value) > 3:
            self._frame += b"("
        for item in value:
            self.save(item)
        self._frame += b"t" if len(value) > 3 else (b"\x85", b"\x86", b"\x87")[len(value) - 1]
        self._memoize()

    def _list(self, value: list[Any]) -> None:
        self._frame += b"]"
        self._memoize()
        for number, item in enumerate(value):
            if len(value) > 1 and number % _BATCH == 0:
                self._frame += b"e(" if number else b"("
            self.save(item)
        if value:
            self._frame += b"e" if len(value) > 1 else b"a"

    def _dict(self, value: dict[Any, Any]) -> None:
        self._items(Items(len(value), value.items()))

    def _items(self, value: Items) -> None:
        self._frame += b"}"
        self._memoize()
        for number, (key, item) in enumerate(value.pairs):
            if value.size > 1 and number % _BATCH == 0:
                self._frame += b"u(" if number else b"("
            self.save(key)
            self.save(item)
        if value.size > 1:
            # A batch that is full is followed by another, be it without items.
            self._frame += b"u(u" if value.size % _BATCH == 0 else b"u"
        elif value.size:
            self._frame += b"s"


def _indexed(short: bytes, long: bytes, index: int) -> bytes:
    return short + bytes((index,)) if index < 1 << 8 else long + struct.pack("<I", index)


def _whole_number(value: int) -> bytes:
    if value < 1 << 8:
        return b"K" + bytes((value,))
    if value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1  # with room for the sign
    return b"\x8a" + bytes((size,)) + value.to_bytes(size, "little")
