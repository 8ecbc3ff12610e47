"""Pickles of our own, against those that CPython's pickler writes of the same objects."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckpt_convert.containers.pickle import pickle_writer
from ckpt_convert.containers.pickle.pickle_writer import Call, Constant, Global, Instance, Items, Persistent, Text

PROTOCOLS: tuple[Literal[2, 4], ...] = (2, 4)


@dataclass
class Point:
    """A class whose objects are pickled by their attributes."""

    x: Any
    y: Any


class Row(list[int]):
    """A class whose objects are what calling it makes."""

    def __reduce__(self) -> tuple[type, tuple[tuple[int, ...]]]:
        return Row, (tuple(self),)


numbers = st.one_of(
    st.integers(0, 1 << 20), st.sampled_from([n + d for n in (1 << 8, 1 << 16, 1 << 31, 1 << 63) for d in (-1, 0)])
)
texts = st.one_of(
    st.text(max_size=20), st.sampled_from(["a" * 255, "é" * 128, "a" * 256, "\ud800", "x" * 65535, "x" * 65536])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(texts, inner), st.builds(Point, inner, inner)
    ),
    max_leaves=40,
)


def fresh(value: Any, strings: dict[str, str]) -> Any:
    """The same value with no object in two places but for its strings, of which equal ones are one object."""
    if isinstance(value, str):
        return strings.setdefault(value, value)
    if isinstance(value, list | tuple):
        return type(value)([fresh(item, strings) for item in value])
    if isinstance(value, dict):
        return {fresh(key, strings): fresh(item, strings) for key, item in value.items()}
    if isinstance(value, Point):
        return Point(fresh(value.x, strings), fresh(value.y, strings))
    return value


def described(value: Any, globals_: dict[str, Global], strings: dict[str, str]) -> Any:
    """The value with objects put into words."""
    if isinstance(value, Row):
        return Call(globals_["Row"], (tuple(value),))
    if isinstance(value, Point):
        return Instance(
            globals_["Point"], {name: described(item, globals_, strings) for name, item in vars(value).items()}
        )
    if isinstance(value, list | tuple):
        return type(value)([described(item, globals_, strings) for item in value])
    if isinstance(value, dict):
        return {key: described(item, globals_, strings) for key, item in value.items()}
    return value


def ours(value: Any, protocol: Literal[2, 4] = 4) -> bytes:
    found = {kind.__name__: Global(__name__, kind.__name__) for kind in (Point, Row)}
    return pickle_writer.dumps(described(value, found, {}), protocol)


def by_python(value: Any, protocol: Literal[2, 4] = 4) -> bytes:
    own = {text: text for text in ("x", "y", "Point", "Row", __name__)}
    return pickle.dumps(fresh(value, own), protocol)


@pytest.mark.cli
@settings(max_examples=300, deadline=None)
@given(values)
@example([None] * 1001)
@example([list(range(1000)), list(range(2000))])
@example({str(number): number for number in range(1000)})
@example({str(number): number for number in range(2001)})
@example([["s" * 200, number, "s" * 200] for number in range(9000)])  # several frames, and references of either length
@example([str(number) for number in range(300)] + [str(number) for number in range(300)])
@example(["x" * 100_000, 1, "y" * 70_000])
@example([0] * 65525 + ["x" * 10])
def test_writes_what_pythons_pickler_writes(value: object) -> None:
    for protocol in PROTOCOLS:
        assert ours(value, protocol) == by_python(value, protocol)
        assert pickle.loads(ours(value, protocol)) == value


@pytest.mark.parametrize("size", range(65525, 65545))
def test_a_frame_ends_where_pythons_does(size: int) -> None:
    for value in (["x" * size, "yz", 5], [["x" * 1000] * 10, *[[0, "x" * (size - 65500)] for _ in range(30000)]]):
        assert ours(value) == by_python(value)


def test_objects_that_a_function_makes() -> None:
    rows = [Row(), Row([1]), Row([1, 2, 3]), Row(range(300))]
    assert ours(rows) == pickle.dumps(rows, protocol=4)
    assert pickle.loads(ours(rows)) == rows


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_constant_is_made_once(protocol: Literal[2, 4]) -> None:
    row = Row([7])
    constant = Constant(Global(__name__, "Row"), ((7,),))
    data = pickle_writer.dumps([constant, 1, constant], protocol)
    assert data == pickle.dumps([row, 1, row], protocol)
    first, _, second = pickle.loads(data)
    assert first is second


class _Elsewhere(pickle.Pickler):
    """Leaves points out."""

    def persistent_id(self, value: object) -> object:
        return ("point", value.x) if isinstance(value, Point) else None


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_not_in_the_pickle(protocol: Literal[2, 4]) -> None:
    file = io.BytesIO()
    _Elsewhere(file, protocol).dump([Point(1, 0), Point("two", 0)])
    assert pickle_writer.dumps([Persistent(("point", 1)), Persistent(("point", "two"))], protocol) == file.getvalue()


def test_texts_are_told_apart_although_equal() -> None:
    one, other = Text("same"), Text("same")
    first, second = ("".join(["sa", "me"]) for _ in range(2))
    assert pickle_writer.dumps([one, other, one]) == pickle.dumps([first, second, first], protocol=4)


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 1001])
def test_items_are_made_while_they_are_written(count: int) -> None:
    data = pickle_writer.dumps(Items(count, ((number, [number]) for number in range(count))))
    assert data == pickle.dumps({number: [number] for number in range(count)}, protocol=4)


@pytest.mark.parametrize("value", [1.5, {1}, b"bytes", object(), [{"a": 1j}]])
def test_refuses_what_it_does_not_know(value: object) -> None:
    with pytest.raises(TypeError, match="is not among what is pickled here"):
        pickle_writer.dumps(value)
