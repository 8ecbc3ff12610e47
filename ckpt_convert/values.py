"""``frozen``: ``@dataclass(frozen=True)`` for the classes that ``inspect`` imports, completed with the first value.

``dataclasses`` compiles six methods for a class, which takes 0.45 ms; with sixty classes that was longer than all that
``inspect`` does with them, and of a third it makes no value. Here one method is compiled, ``__init__``, when somebody
looks for it; the others are the same for all classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, FrozenInstanceError, dataclass, field, fields
from functools import cache, partial
from operator import attrgetter
from threading import RLock
from typing import Any, NoReturn, TypeVar, dataclass_transform

T = TypeVar("T")


class _Factory:
    """The default of a parameter, in signatures, where every value gets its own."""

    def __repr__(self) -> str:
        return "<factory>"


_FACTORY = _Factory()
_LOCK = RLock()
_set = object.__setattr__
_described = partial(dataclass, init=False, repr=False, eq=False)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(*, eq: bool = True, slots: bool = False) -> Callable[[type[T]], type[T]]:
    """``@dataclass(frozen=True)``, for a class whose fields are all parameters of ``__init__``."""

    def make(cls: type[T]) -> type[T]:
        made: type[T] = _described(slots=True)(cls) if slots else cls
        methods: dict[str, Any] = {
            "__init__": _OnFirstUse(made, "__init__", lambda: _init(made)),
            "__repr__": _repr,
            "__setattr__": _refuse_assignment,
            "__delattr__": _refuse_deletion,
        }
        if eq:
            methods |= {"__eq__": _equals, "__hash__": _hash}
        if slots:
            methods |= {"__getstate__": _state, "__setstate__": _restore}
        else:
            methods["__dataclass_fields__"] = _OnFirstUse(made, "__dataclass_fields__", lambda: _fields(made))
        for name in methods.keys() - cls.__dict__.keys():
            setattr(made, name, methods[name])
        return made

    return make


class _OnFirstUse:
    """An attribute of a class, computed when somebody looks for it, which it then replaces."""

    def __init__(self, cls: type, name: str, compute: Callable[[], Any]) -> None:
        self._cls, self._name, self._compute = cls, name, compute

    def __get__(self, value: object, cls: type) -> Any:
        with _LOCK:
            if self._cls.__dict__.get(self._name) is self:
                setattr(self._cls, self._name, self._compute())
        return getattr(cls if value is None else value, self._name)


def _fields(cls: type) -> Any:
    return _described()(cls).__dataclass_fields__


def _init(cls: type) -> Callable[..., None]:
    """``__init__``: compiled, since values are made a hundred thousand times."""
    described = fields(cls)
    scope: dict[str, Any] = {"_set": _set, "_FACTORY": _FACTORY}
    parameters: dict[bool, list[str]] = {False: [], True: []}
    lines = []
    for each in described:
        name, value, default = each.name, each.name, f"_default_{each.name}"
        has_factory = each.default_factory is not MISSING
        if has_factory:
            scope[default] = each.default_factory
            value = f"{default}() if {name} is _FACTORY else {name}"
        elif each.default is not MISSING:
            scope[default] = each.default
        optional = "=_FACTORY" if has_factory else f"={default}" if default in scope else ""
        parameters[bool(each.kw_only)].append(name + optional)
        lines.append(f"    _set(self, {name!r}, {value})")
    if hasattr(cls, "__post_init__"):
        lines.append("    self.__post_init__()")
    listed = ", ".join(["self", *parameters[False], *(["*", *parameters[True]] if parameters[True] else [])])
    exec("\n".join([f"def __init__({listed}):", *(lines or ["    pass"])]), scope)
    method: Callable[..., None] = scope["__init__"]
    method.__qualname__ = f"{cls.__qualname__}.__init__"
    method.__annotations__ = {**{each.name: each.type for each in described}, "return": None}
    return method


@cache
def _getter(cls: Any, which: Callable[[Field[Any]], bool]) -> Callable[[Any], tuple[Any, ...]]:
    names = [each.name for each in fields(cls) if which(each)]
    return attrgetter(*names) if len(names) > 1 else lambda value: tuple([getattr(value, name) for name in names])


def _values(value: Any, which: Callable[[Field[Any]], bool]) -> tuple[Any, ...]:
    """The values of some fields."""
    kind: Any = value.__class__
    return _getter(kind, which)(value)


_compared, _any = attrgetter("compare"), attrgetter("name")


def _equals(self: Any, other: Any) -> bool:
    same_kind = other.__class__ is self.__class__
    return _values(self, _compared) == _values(other, _compared) if same_kind else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self, _compared))


def _state(self: Any) -> tuple[Any, ...]:
    return _values(self, _any)


def _restore(self: Any, state: tuple[Any, ...]) -> None:
    for each, value in zip(fields(self), state, strict=True):
        _set(self, each.name, value)


def _repr(self: Any) -> str:
    shown = [f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if each.repr]
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _refuse_assignment(self: object, name: str, value: object) -> NoReturn:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_deletion(self: object, name: str) -> NoReturn:
    raise FrozenInstanceError(f"cannot delete field {name!r}")
