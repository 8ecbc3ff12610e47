"""``frozen`` against ``@dataclass(frozen=True)``: the same values, but for when their methods are made."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from threading import Thread
from typing import Any

import pytest

from ckpt_convert.values import frozen


@dataclass(frozen=True)
class _Expected:
    """What dataclasses makes."""

    name: str
    sizes: tuple[int, ...] = ()
    seen: dict[str, int] = field(default_factory=dict, compare=False)
    hidden: int = field(default=3, repr=False)
    also: bool = field(default=False, kw_only=True)


@frozen()
class _Plain:
    """The same fields."""

    name: str
    sizes: tuple[int, ...] = ()
    seen: dict[str, int] = field(default_factory=dict, compare=False)
    hidden: int = field(default=3, repr=False)
    also: bool = field(default=False, kw_only=True)

    @cached_property
    def longest(self) -> int:
        return max(self.sizes)


@frozen(slots=True)
class _Slotted:
    """The same fields, without a ``__dict__``."""

    name: str
    sizes: tuple[int, ...] = ()
    seen: dict[str, int] = field(default_factory=dict, compare=False)
    hidden: int = field(default=3, repr=False)
    also: bool = field(default=False, kw_only=True)


@frozen(eq=False)
class _ByIdentity:
    size: int


@frozen()
class _Checked:
    size: int

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("negative")


@frozen()
class _Derived(_Plain):
    more: str = ""


BOTH = pytest.mark.parametrize("kind", [_Plain, _Slotted], ids=["plain", "slots"])


@BOTH
class TestLikeADataclass:
    def test_values(self, kind: type[Any]) -> None:
        value = kind("a", (1, 2), also=True)
        expected = _Expected("a", (1, 2), also=True)
        assert dataclasses.asdict(value) == dataclasses.asdict(expected)
        assert repr(value) == repr(expected).replace("_Expected", kind.__name__)
        assert hash(value) == hash(expected)
        assert value.seen is not kind("a").seen

    def test_equality(self, kind: type[Any]) -> None:
        assert kind("a", (1,)) == kind("a", (1,), {"x": 1})
        assert kind("a") != kind("b")
        assert kind("a") != _Expected("a")
        assert len({kind("a"), kind("a"), kind("b")}) == 2

    def test_what_is_known_of_the_class(self, kind: type[Any]) -> None:
        assert str(inspect.signature(kind)) == str(inspect.signature(_Expected))
        assert [each.name for each in dataclasses.fields(kind)] == ["name", "sizes", "seen", "hidden", "also"]

    @pytest.mark.parametrize("arguments", [(), ("a", (), {}, 3, True), ("a", (), {}, 3, True, 4)])
    def test_arguments_that_do_not_fit(self, kind: type[Any], arguments: tuple[Any, ...]) -> None:
        with pytest.raises(TypeError) as error:
            kind(*arguments)
        with pytest.raises(TypeError) as expected:
            _Expected(*arguments)
        assert str(error.value) == str(expected.value).replace("_Expected", kind.__name__)

    def test_nothing_is_assigned(self, kind: type[Any]) -> None:
        value = kind("a")
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'name'"):
            value.name = "b"
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete field 'name'"):
            del value.name

    def test_copies(self, kind: type[Any]) -> None:
        value = kind("a", (1,), {"x": 1}, 5, also=True)
        for copied in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value), dataclasses.replace(value)):
            assert dataclasses.astuple(copied) == dataclasses.astuple(value)
        assert dataclasses.replace(value, name="b").name == "b"


@pytest.mark.parametrize("slots", [False, True], ids=["plain", "slots"])
class TestTheFirstValues:
    """They are made without the ``__init__`` that is compiled for the third."""

    @pytest.fixture
    def kind(self, slots: bool) -> type[Any]:
        @frozen(slots=slots)
        class Fresh:
            name: str
            sizes: tuple[int, ...] = ()
            seen: dict[str, int] = field(default_factory=dict, compare=False)
            hidden: int = field(default=3, repr=False)
            also: bool = field(default=False, kw_only=True)

        return Fresh

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            (("a",), {}),
            ((), {"name": "a"}),
            (("a", (1,)), {"also": True}),
            ((), {"hidden": 4, "seen": {"x": 1}, "name": "a"}),
            (("a", (), {}, 5), {}),
        ],
    )
    def test_values(self, kind: type[Any], given: tuple[Any, ...], named: dict[str, Any]) -> None:
        values = [kind(*given, **named) for _ in range(4)]
        expected = _Expected(*given, **named)
        assert [list(dataclasses.asdict(value).items()) for value in values] == [
            list(dataclasses.asdict(expected).items())
        ] * 4
        assert len({id(value.seen) for value in values}) == (1 if "seen" in named or len(given) > 2 else 4)

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ((), {}),
            (("a", (), {}, 3, True), {}),
            (("a",), {"name": "b"}),
            (("a",), {"other": 1}),
            ((), {"sizes": (), "nothing": 0}),
        ],
    )
    def test_arguments_that_do_not_fit(self, kind: type[Any], given: tuple[Any, ...], named: dict[str, Any]) -> None:
        with pytest.raises(TypeError) as expected:
            _Expected(*given, **named)
        for _ in range(4):
            with pytest.raises(TypeError) as error:
                kind(*given, **named)
            assert str(error.value).replace(kind.__qualname__, "_Expected") == str(expected.value)

    def test_checks(self, slots: bool) -> None:
        @frozen(slots=slots)
        class Fresh:
            size: int

            def __post_init__(self) -> None:
                if self.size < 0:
                    raise ValueError("negative")

        for _ in range(4):
            with pytest.raises(ValueError, match="negative"):
                Fresh(-1)
        assert Fresh(1).size == 1


def test_a_value_may_be_unpickled_before_one_is_made() -> None:
    @frozen()
    class Fresh:
        size: int

    value = Fresh.__new__(Fresh)
    value.__dict__["size"] = 3
    other = Fresh.__new__(Fresh)
    other.__dict__["size"] = 3
    assert value == other


def test_what_a_class_defines_itself_stays() -> None:
    assert _Plain("a", (1, 3)).longest == 3
    with pytest.raises(ValueError, match="negative"):
        _Checked(-1)
    assert _Derived("a", more="b") == _Derived("a", more="b") != _Derived("a")
    assert _ByIdentity(1) != _ByIdentity(1)


def test_threads_that_make_the_first_values_at_once() -> None:
    for _ in range(50):

        @frozen()
        class Fresh:
            sizes: dict[str, int] = field(default_factory=dict)
            name: str = "a"

        made: list[Any] = []

        def make(kind: Callable[[], object] = Fresh, made: list[Any] = made) -> None:
            made.append(kind())

        threads = [Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [(value.sizes, value.name) for value in made] == [({}, "a")] * 4


def test_threads_that_count_past_the_second_value_leave_it_to_the_compiled_init() -> None:
    @frozen()
    class Fresh:
        size: int

    Fresh.__dict__["__init__"]._made = 3
    assert Fresh(1).size == 1
    assert inspect.isfunction(Fresh.__dict__["__init__"])
