"""``frozen``: ``@dataclass(frozen=True)`` for the classes that ``inspect`` imports, completed with the first value.

``dataclasses`` compiles six methods for a class, which takes 0.45 ms; with sixty classes that was longer than all that
``inspect`` does with them, and of a third it makes no value. Here one method is compiled, ``__init__``, for the third
value, or when somebody looks for it; the others are the same for all classes. ``dataclasses`` is asked for ``fields``
and ``replace``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, FrozenInstanceError, dataclass, field
from functools import cache, partial
from inspect import get_annotations
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
_PLAIN: Field[Any] = field()
_set = object.__setattr__
_as_dataclass = partial(dataclass, init=False, repr=False, eq=False)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(*, eq: bool = True, slots: bool = False) -> Callable[[type[T]], type[T]]:
    """``@dataclass(frozen=True)``, for a class whose annotations are all parameters of ``__init__``."""

    def make(cls: type[T]) -> type[T]:
        described = {**getattr(cls, "__described__", {}), **_describe(cls)}
        made: type[T] = _as_dataclass(slots=True)(cls) if slots else cls
        methods: dict[str, Any] = {
            "__described__": described,
            "__init__": _Init(made, "__init__", lambda: _init(made, described, slots)),
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


def _describe(cls: type) -> dict[str, Field[Any]]:
    """The fields of a class: what its body says of each, if that is more than a default."""
    said = {name: cls.__dict__.get(name, _PLAIN) for name in get_annotations(cls)}
    return {name: value if isinstance(value, Field) else field(default=value) for name, value in said.items()}


class _OnFirstUse:
    """An attribute of a class, computed when somebody looks for it, which it then replaces."""

    def __init__(self, cls: type, name: str, compute: Callable[[], Any]) -> None:
        self._cls, self._name, self._compute = cls, name, compute

    def __get__(self, value: object, cls: type) -> Any:
        with _LOCK:
            if self._cls.__dict__.get(self._name) is self:
                setattr(self._cls, self._name, self._compute())
        return getattr(cls if value is None else value, self._name)


class _Init(_OnFirstUse):
    """``__init__``, compiled for the third value: of most classes there are two at most."""

    _made = 0

    def __get__(self, value: object, cls: type) -> Any:
        if value is None or self._made >= 2:  # threads may count past it
            return super().__get__(value, cls)
        self._made += 1
        return partial(self._fill, value)

    def _fill(self, value: Any, *given: Any, **named: Any) -> None:
        described: dict[str, Field[Any]] = self._cls.__described__  # type: ignore[attr-defined]
        positional = [name for name, each in described.items() if each.kw_only is not True]
        values = {**dict(zip(positional, given, strict=False)), **named}
        for name, each in described.items():
            if name not in values and each.default_factory is not MISSING:
                values[name] = each.default_factory()
            elif each.default is not MISSING:
                values.setdefault(name, each.default)
        if len(given) > len(positional) or named.keys() & positional[: len(given)] or values.keys() != described.keys():
            self._compute()(value, *given, **named)  # says what is wrong with them
        for name in described:
            _set(value, name, values[name])
        if hasattr(value, "__post_init__"):
            value.__post_init__()


def _fields(cls: type) -> Any:
    return _as_dataclass()(cls).__dataclass_fields__


def _init(cls: type, described: dict[str, Field[Any]], slots: bool) -> Callable[..., None]:
    """``__init__``: compiled, since values are made a hundred thousand times."""
    scope: dict[str, Any] = {"_set": _set, "_FACTORY": _FACTORY}
    parameters: dict[bool, list[str]] = {False: [], True: []}
    values = {}
    for name, each in described.items():
        default, optional, values[name] = f"_default_{name}", "", name
        if each.default_factory is not MISSING:
            scope[default], optional = each.default_factory, "=_FACTORY"
            values[name] = f"{default}() if {name} is _FACTORY else {name}"
        elif each.default is not MISSING:
            scope[default], optional = each.default, f"={default}"
        parameters[each.kw_only is True].append(name + optional)
    if slots:
        lines = [f"    _set(self, {name!r}, {value})" for name, value in values.items()]
    else:  # one call is compiled in half the time
        lines = [f"    self.__dict__.update({', '.join(f'{name}={value}' for name, value in values.items())})"]
    if hasattr(cls, "__post_init__"):
        lines.append("    self.__post_init__()")
    listed = ", ".join(["self", *parameters[False], *(["*", *parameters[True]] if parameters[True] else [])])
    exec("\n".join([f"def __init__({listed}):", *lines]), scope)
    method: Callable[..., None] = scope["__init__"]
    method.__qualname__ = f"{cls.__qualname__}.__init__"
    annotations: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        annotations |= get_annotations(base)
    method.__annotations__ = {**annotations, "return": None}
    return method


@cache
def _getter(cls: Any, which: Callable[[Field[Any]], bool]) -> Callable[[Any], tuple[Any, ...]]:
    names = [name for name, each in cls.__described__.items() if which(each)]
    return attrgetter(*names) if len(names) > 1 else lambda value: tuple([getattr(value, name) for name in names])


def _values(value: Any, which: Callable[[Field[Any]], bool]) -> tuple[Any, ...]:
    """The values of some fields."""
    kind: Any = value.__class__
    return _getter(kind, which)(value)


_compared = attrgetter("compare")


def _equals(self: Any, other: Any) -> bool:
    same_kind = other.__class__ is self.__class__
    return _values(self, _compared) == _values(other, _compared) if same_kind else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self, _compared))


def _state(self: Any) -> tuple[Any, ...]:
    return tuple([getattr(self, name) for name in self.__described__])


def _restore(self: Any, state: tuple[Any, ...]) -> None:
    for name, value in zip(self.__described__, state, strict=True):
        _set(self, name, value)


def _repr(self: Any) -> str:
    shown = [f"{name}={getattr(self, name)!r}" for name, each in self.__described__.items() if each.repr]
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _refuse_assignment(self: object, name: str, value: object) -> NoReturn:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_deletion(self: object, name: str) -> NoReturn:
    raise FrozenInstanceError(f"cannot delete field {name!r}")
