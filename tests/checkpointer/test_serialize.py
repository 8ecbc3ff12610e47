"""A nested state comes back exactly as it was, with its tensors under readable paths."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckpt_convert.checkpointer.state.serialize import SerializedState, deserialize, serialize
from ckpt_convert.errors import CorruptFileError, UsageError

Point = namedtuple("Point", "x y")


class Colour(Enum):
    RED = 1


class Twice(torch.Tensor):
    """A tensor that is more than its bytes."""


def through_json(tree: Any) -> Any:
    packed = serialize(tree)
    return deserialize(SerializedState(json.loads(json.dumps(packed.skeleton, allow_nan=False)), packed.tensors))


def same(found: Any, expected: Any) -> bool:
    """Equal, and of the same types all the way down, to the last bit."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, torch.Tensor):
        alike = found.dtype == expected.dtype and found.shape == expected.shape
        return alike and raw(found) == raw(expected)
    if isinstance(expected, (np.ndarray, np.generic)):
        return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()
    if isinstance(expected, float):
        return struct.pack("<d", found) == struct.pack("<d", expected)
    if isinstance(expected, complex):
        return same(found.real, expected.real) and same(found.imag, expected.imag)
    if isinstance(expected, dict):
        return (
            len(found) == len(expected)
            and all(
                same(a, b) and same(found[a], expected[b])
                for a, b in zip(found, expected, strict=True)  # in the same order
            )
            and getattr(found, "default_factory", None) is getattr(expected, "default_factory", None)
        )
    if isinstance(expected, (list, tuple, deque)) and not isinstance(expected, torch.Size):
        alike = len(found) == len(expected) and getattr(found, "maxlen", 0) == getattr(expected, "maxlen", 0)
        return alike and all(same(a, b) for a, b in zip(found, expected, strict=True))
    return bool(found == expected)


def raw(tensor: torch.Tensor) -> bytes:
    dense = tensor.detach().contiguous().reshape(-1)
    return dense.view(torch.uint8).numpy().tobytes() if dense.numel() else b""


PLAIN = [
    None, True, False, 0, -1, 2**63 - 1, 2**63, -(2**63), 1 << 20000, -(10**30), 0.0, -0.0, 0.1, 5e-324, 1e308,
    math.inf, -math.inf, math.nan, struct.unpack("<d", b"\x01\0\0\0\0\0\xf8\xff")[0],
    complex(-0.0, math.nan), complex(1, math.inf), "", "ü\n\0", "\ud800", "$", b"", b"\0\xff", bytes(range(256)) * 40,
    torch.Size([2, 3]), torch.Size([]), torch.bfloat16, torch.float8_e4m3fn, torch.device("cpu"),
    torch.device("cuda", 1),
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_values(value: object) -> None:
    assert same(through_json(value), value)


CONTAINERS: list[Any] = [
    {}, [], (), set(), frozenset(), OrderedDict(), deque(), Counter(), defaultdict(int),
    {"b": 1, "a": 2}, {"$": 1}, {"$": "tensor", "at": "x"}, {1: "int", "1": "str", True and 2: 3, None: 4},
    {(0, "a"): [1], (): 2}, {0.5: 1, b"k": 2, frozenset({1}): 3, -0.0: 4},
    [1, [2, (3, [4.0])]], (1,), ((), ((),)), {1, 2, "three", (4, 5)}, frozenset({"a", 1}),
    OrderedDict([("z", 1), ("a", {"b": 2})]), deque([1, [2]], maxlen=3), Counter({3: 2, 1: 5}),
    defaultdict(list, {"a": [1]}), defaultdict(None, {1: 2}), defaultdict(set, {1: {2}}),
]  # fmt: skip


@pytest.mark.parametrize("value", CONTAINERS, ids=lambda value: type(value).__name__)
def test_containers_keep_type_and_order(value: object) -> None:
    assert same(through_json(value), value)


DTYPES = [found for found in vars(torch).values() if isinstance(found, torch.dtype) and "q" not in str(found)]


@pytest.mark.parametrize("dtype", sorted(set(DTYPES), key=str), ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 3)])
def test_tensors_of_every_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    try:
        element = torch.empty((), dtype=dtype).element_size()
        data = torch.arange(math.prod(shape) * element, dtype=torch.int64).to(torch.uint8)
        tensor = data.view(dtype).reshape(shape) if data.numel() else torch.empty(shape, dtype=dtype)
    except (RuntimeError, TypeError, ValueError) as error:
        pytest.skip(f"torch cannot make one: {error}")
    assert same(through_json({"a": tensor})["a"], tensor)


def test_tensors_that_are_views() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tree = [base.t(), base[:, 1:3], base[1:2].expand(3, 6), torch.tensor([1 + 2j]).conj(), torch._neg_view(base)]
    for found, expected in zip(through_json(tree), tree, strict=True):
        assert torch.equal(found, expected)
        assert not found.is_conj()  # nor negative: the bytes are the values
        assert not found.is_neg()


def test_tensors_are_references_and_detached() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    tensor = torch.ones(2, requires_grad=True)
    packed = serialize([parameter, tensor])
    assert packed.tensors["0"].data_ptr() == parameter.data_ptr()
    assert type(packed.tensors["0"]) is torch.Tensor
    assert not any(found.requires_grad for found in packed.tensors.values())


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=dtype).reshape(2, 3) if np.dtype(dtype).kind != "b" else np.array([[True, False]])
        for dtype in ("?", *"iIfg", "i1", "i2", "i8", "u1", "u2", "u8", "f2", "f8", "F", "D", ">i4", ">f8")
    ]
    + [np.array(5.0), np.empty((0, 3), np.int16), np.array(["ab", "ü"]), np.array([b"x", b"yz"]),
       np.array(["2024-01-01", "NaT"], "datetime64[D]"), np.arange(6).reshape(2, 3).T, np.arange(6)[::-2],
       np.broadcast_to(np.float32(1), (2, 2))],
    ids=lambda array: f"{array.dtype} {array.shape}",
)  # fmt: skip
def test_numpy_arrays(array: np.ndarray[Any, Any]) -> None:
    assert same(through_json((array,))[0], array)


@pytest.mark.parametrize(
    "scalar",
    [np.float64(0.1), np.float32("nan"), np.int8(-3), np.uint64(2**64 - 1), np.bool_(True), np.complex64(1j),
     np.str_("ab"), np.bytes_(b"x"), np.datetime64("2024-02-29T12:00:00"), np.timedelta64(3, "h"),
     np.longdouble("0.1")],
    ids=lambda scalar: type(scalar).__name__,
)  # fmt: skip
def test_numpy_scalars(scalar: np.generic) -> None:
    assert same(through_json([scalar])[0], scalar)


def test_paths_are_readable() -> None:
    tree = {
        "state": {"layers.0.attn.q_proj.weight": {"exp_avg": torch.ones(1), "step": torch.tensor(3.0)}},
        "groups": [{"lr": torch.tensor(0.1)}],
        0: torch.ones(2),
        ("a", 1): np.ones(2),
    }
    assert list(serialize(tree).tensors) == [
        "state/layers.0.attn.q_proj.weight/exp_avg",
        "state/layers.0.attn.q_proj.weight/step",
        "groups/0/lr",
        "0",
        "('a', 1)",
    ]


def test_paths_are_unique() -> None:
    tree = {
        1: torch.tensor(0), "1": torch.tensor(1), "a/b": torch.tensor(2), "a": {"b": torch.tensor(3)},
        "a%2Fb": torch.tensor(4), "": torch.tensor(5), "%": torch.tensor(6), "\n": torch.tensor(7),
        "\ud800": torch.tensor(8),
    }  # fmt: skip
    packed = serialize(tree)
    assert list(packed.tensors) == ["1", "1~2", "a%2Fb", "a/b", "a%252Fb", "%", "%25", "%0A", "%ED%A0%80"]
    assert same(through_json(tree), tree)


def test_a_lone_tensor_has_a_path() -> None:
    assert list(serialize(torch.ones(2)).tensors) == ["value"]


def test_the_same_set_gives_the_same_skeleton() -> None:
    one, other = {8, 0}, {0, 8}  # in a table of 8, the one that came first is first
    assert list(one) != list(other)
    assert serialize(one).skeleton == serialize(other).skeleton


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (lambda: None, "function"),
        (Point(1, 2), "Point"),
        (Colour.RED, "Colour"),
        (Path("x"), "PosixPath"),
        (object(), "builtins.object"),
        (np.array([object()]), "dtype object"),
        (np.zeros(1, "i4,f4"), "numpy value of dtype"),
        (np.ma.masked_array([1]), "MaskedArray"),
        (defaultdict(lambda: 1), "defaultdict whose factory"),
        (torch.ones(2).as_subclass(Twice), "Twice"),
        (torch.eye(2).to_sparse(), "sparse_coo"),
        (torch.empty(2, device="meta"), "meta tensor"),
        (torch.Generator(), "Generator"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_anything_else_is_refused_by_name(value: object, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        serialize({"a": [{"b": value}]}, "extra")
    assert str(caught.value).startswith("extra/a/0/b: is a")
    assert what in str(caught.value)
    assert "give plain values, tensors, numpy arrays, or an object with state_dict()" in str(caught.value)


def test_a_container_that_holds_itself_is_refused() -> None:
    tree: dict[str, Any] = {"a": []}
    tree["a"].append(tree)
    with pytest.raises(UsageError, match="a/0: is a container that holds itself"):
        serialize(tree)
    twice = [1]
    assert through_json([twice, twice]) == [[1], [1]]


def test_nested_too_deeply_is_refused() -> None:
    tree: list[Any] = []
    for _ in range(100_000):
        tree = [tree]
    with pytest.raises(UsageError, match="nested too deeply"):
        serialize(tree)


@pytest.mark.parametrize(
    "skeleton",
    [
        {"$": "function"},
        {"$": []},
        {"$": "tensor"},
        {"$": "tensor", "at": "nowhere"},
        {"$": "tensor", "at": "t", "dtype": "save", "shape": [1]},
        {"$": "tensor", "at": "t", "dtype": "int32", "shape": [7]},
        {"$": "dtype", "name": "load"},
        {"$": "array", "at": "t", "dtype": "O", "shape": [1]},
        {"$": "array", "at": "t", "dtype": "<f8", "shape": [-5]},
        {"$": "scalar", "dtype": "O", "bytes": "00" * 8},
        {"$": "scalar", "dtype": "<f8", "bytes": "zz"},
        {"$": "dict", "of": [[[], 1]]},
        {"$": "dict", "of": [1]},
        {"$": "defaultdict", "factory": "eval", "of": []},
        {"$": "bytes", "base64": "?"},
        {"$": "tuple"},
    ],
    ids=str,
)
def test_a_foreign_skeleton_is_refused(skeleton: object) -> None:
    with pytest.raises(CorruptFileError):
        deserialize(SerializedState([skeleton], {"t": torch.zeros(3)}))
