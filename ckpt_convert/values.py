"""``frozen``: the dataclasses that ``inspect`` imports, made in a third of the time.

``@dataclass(frozen=True)`` compiles six methods for a class, which takes 0.45 ms; with sixty classes that was longer
than all that ``inspect`` does with them. Here one is compiled, ``__init__``; the others are closures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, FrozenInstanceError, dataclass, field, fields
from operator import attrgetter
from typing import Any, NoReturn, TypeVar, dataclass_transform

T = TypeVar("T")

_set = object.__setattr__


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(*, eq: bool = True, slots: bool = False) -> Callable[[type[T]], type[T]]:
    """``@dataclass(frozen=True)``, for a class whose fields are all parameters of ``__init__``."""

    def make(cls: type[T]) -> type[T]:
        made = dataclass(init=False, repr=False, eq=False, slots=slots)(cls)
        described = fields(made)  # type: ignore[arg-type]
        methods = {
            "__init__": _init(made, described),
            "__repr__": _repr([each.name for each in described if each.repr]),
            "__setattr__": _refuse_assignment,
            "__delattr__": _refuse_deletion,
        }
        if eq:
            methods |= _comparison([each.name for each in described if each.compare])
        if slots:
            methods |= _state([each.name for each in described])
        for name in methods.keys() - cls.__dict__.keys():
            setattr(made, name, methods[name])
        return made

    return make


def _init(cls: type, described: tuple[Field[Any], ...]) -> Callable[..., None]:
    """``__init__``: compiled, since values are made a hundred thousand times."""
    scope: dict[str, Any] = {"_set": _set, "_MISSING": MISSING}
    parameters: dict[bool, list[str]] = {False: [], True: []}
    lines = []
    for each in described:
        name, value, default = each.name, each.name, f"_default_{each.name}"
        has_factory = each.default_factory is not MISSING
        if has_factory:
            scope[default] = each.default_factory
            value = f"{default}() if {name} is _MISSING else {name}"
        elif each.default is not MISSING:
            scope[default] = each.default
        optional = "=_MISSING" if has_factory else f"={default}" if default in scope else ""
        parameters[bool(each.kw_only)].append(name + optional)
        lines.append(f"    _set(self, {name!r}, {value})")
    if hasattr(cls, "__post_init__"):
        lines.append("    self.__post_init__()")
    listed = ", ".join(["self", *parameters[False], *(["*", *parameters[True]] if parameters[True] else [])])
    exec("\n".join([f"def __init__({listed}):", *(lines or ["    pass"])]), scope)
    method: Callable[..., None] = scope["__init__"]
    method.__qualname__ = f"{cls.__qualname__}.__init__"
    method.__annotations__ = {each.name: each.type for each in described}
    return method


def _repr(names: list[str]) -> Callable[..., Any]:
    def __repr__(self: object) -> str:  # noqa: N807
        return f"{type(self).__qualname__}({', '.join([f'{name}={getattr(self, name)!r}' for name in names])})"

    return __repr__


def _comparison(names: list[str]) -> dict[str, Callable[..., Any]]:
    values = _values(names)

    def __eq__(self: object, other: object) -> bool:  # noqa: N807
        return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

    def __hash__(self: object) -> int:  # noqa: N807
        return hash(values(self))

    return {"__eq__": __eq__, "__hash__": __hash__}


def _state(names: list[str]) -> dict[str, Callable[..., Any]]:
    """What pickle needs of an object without a ``__dict__``."""
    values = _values(names)

    def __setstate__(self: object, state: tuple[Any, ...]) -> None:  # noqa: N807
        for name, value in zip(names, state, strict=True):
            _set(self, name, value)

    return {"__getstate__": lambda self: values(self), "__setstate__": __setstate__}


def _values(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    """A function that takes the values under these names from an object."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda value: tuple([getattr(value, name) for name in names])


def _refuse_assignment(self: object, name: str, value: object) -> NoReturn:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_deletion(self: object, name: str) -> NoReturn:
    raise FrozenInstanceError(f"cannot delete field {name!r}")
