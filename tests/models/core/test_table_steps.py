"""Every step of the table language against numpy: what a column stores, on every rank, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from ckpt_convert.checkpoint import mapping
from ckpt_convert.checkpoint.tensor_info import SourceTensor
from ckpt_convert.convert import writing
from ckpt_convert.errors import KeyMismatchError
from ckpt_convert.models.core import table_check
from ckpt_convert.models.core.table import Dims, Family, Key, Row
from ckpt_convert.models.llama.table import LLAMA
from ckpt_convert.tensors.lazy import from_source
from tests.tensors.test_lazy import evaluate

Arrays = dict[str, np.ndarray]  # type: ignore[type-arg]

SIZES = {
    "n_layers": 3,
    "n_experts": 4,
    "dim": 6,
    "ffn": 10,
    "n_heads": 4,
    "n_kv": 2,
    "head_dim": 6,
    "copies": 2,
    "tied": 0,
}
DIMS = Dims(SIZES, {"dense": (0,), "moe": (1, 2)})
INDICES = {"layer": "n_layers", "expert": "n_experts"}


def family(*rows: Row) -> Family:
    made = Family(
        "f", "F", ("f",), rows, lambda config: SIZES, LLAMA.params, indices=INDICES, sets=lambda config: DIMS.sets
    )
    table_check.check_table(made)
    return made


def coded(shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Arrays in which no two elements are equal."""
    out, start = {}, 0
    for key, shape in shapes.items():
        size = int(np.prod(shape))
        out[key] = np.arange(start, start + size).reshape(shape)
        start += size
    return out


def moved(table: Family, source: str, target: str, given: list[Arrays], ranks: int = 1) -> list[Arrays]:
    """The arrays of each rank, converted."""
    arrays: list[Any] = []
    sources: list[dict[str, SourceTensor]] = []
    for number, rank in enumerate(given):
        sources.append({})
        for key, array in rank.items():
            sources[-1][key] = SourceTensor(key, "I64", from_source(len(arrays), array.shape), f"rank {number}")
            arrays.append(array)
    logicals = mapping.read_column(table, source, DIMS, sources, "source")
    for check in logicals.replica_checks:
        assert (evaluate(check.left, *arrays) == evaluate(check.right, *arrays)).all(), check.message
    made = writing.write_column(table, target, DIMS, logicals, ranks=ranks, keep_tied=None, source_name="source")
    out: list[Arrays] = [{} for _ in range(ranks)]
    for item in made.targets:
        out[item.rank][item.key] = evaluate(item.tensor, *arrays)
    return out


def check(rows: list[Row], shapes: Mapping[str, tuple[int, ...]], expected: Callable[[Arrays], list[Arrays]]) -> None:
    """hf to meta is as expected on every rank, and meta to hf gives the original."""
    table, arrays = family(*rows), coded(shapes)
    wanted = expected(arrays)
    found = moved(table, "hf", "meta", [arrays], len(wanted))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for key, array in theirs.items():
            assert mine[key].shape == array.shape, key
            assert (mine[key] == array).all(), key
    (back,) = moved(table, "meta", "hf", wanted)
    assert back.keys() == arrays.keys()
    assert all((back[key] == array).all() for key, array in arrays.items())


def test_fused_rows_lie_one_after_another_in_the_order_of_the_table() -> None:
    check(
        [
            Row("q", ("n_heads*head_dim", "dim"), hf=Key("q"), meta=Key("qkv", fused=0)),
            Row("k", ("n_kv*head_dim", "dim"), hf=Key("k"), meta=Key("qkv", fused=0)),
            Row("v", ("n_kv*head_dim", "dim"), hf=Key("v"), meta=Key("qkv", fused=0)),
        ],
        {"q": (24, 6), "k": (12, 6), "v": (12, 6)},
        lambda given: [{"qkv": np.concatenate([given["q"], given["k"], given["v"]])}],
    )


def test_fused_rows_are_cut_before_they_are_fused() -> None:
    def expected(given: Arrays) -> list[Arrays]:
        cut = {key: np.split(array, 2) for key, array in given.items()}
        return [{"qkv": np.concatenate([cut["q"][rank], cut["k"][rank]])} for rank in range(2)]

    rows = [
        Row("q", ("n_heads*head_dim", "dim"), hf=Key("q"), meta=Key("qkv", fused=0, tp_dim=0)),
        Row("k", ("n_kv*head_dim", "dim"), hf=Key("k"), meta=Key("qkv", fused=0, tp_dim=0)),
    ]
    check(rows, {"q": (24, 6), "k": (12, 6)}, expected)


def test_rotating_rows_are_put_in_order_before_they_are_fused() -> None:
    def expected(given: Arrays) -> list[Arrays]:
        q = given["q"].reshape(4, 2, 3, 6).transpose(0, 2, 1, 3).reshape(24, 6)
        return [{"qv": np.concatenate([q, given["v"]])}]

    rows = [
        Row("q", ("n_heads*head_dim", "dim"), heads="n_heads", hf=Key("q", rope="half"),
            meta=Key("qv", rope="interleaved", fused=0)),
        Row("v", ("n_kv*head_dim", "dim"), hf=Key("v"), meta=Key("qv", fused=0)),
    ]  # fmt: skip
    check(rows, {"q": (24, 6), "v": (12, 6)}, expected)


EXPERTS = {f"layers.{layer}.experts.{expert}.w": (10, 6) for layer in range(3) for expert in range(4)}


def stacked(given: Arrays, layer: int) -> Any:
    return np.stack([given[f"layers.{layer}.experts.{expert}.w"] for expert in range(4)])


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (Key("layers.{layer}.w"), lambda whole: whole),
        (Key("layers.{layer}.w", transposed=True), lambda whole: whole.transpose(0, 2, 1)),
        (Key("layers.{layer}.w", flatten_stacked=True), lambda whole: whole.reshape(40, 6)),
        (
            Key("layers.{layer}.w", transposed=True, flatten_stacked=True),
            lambda whole: whole.transpose(0, 2, 1).reshape(24, 10),
        ),
        (Key("layers.{layer}.w", shape=("2", "5", "dim")), lambda whole: whole.reshape(4, 2, 5, 6)),
    ],
)
def test_a_placeholder_that_is_not_in_the_template_is_stacked_over(key: Key, expected: Any) -> None:
    row = Row("w", ("ffn", "dim"), hf=Key("layers.{layer}.experts.{expert}.w"), meta=key)
    check([row], EXPERTS, lambda given: [{f"layers.{n}.w": expected(stacked(given, n)) for n in range(3)}])


@pytest.mark.parametrize(("axis", "flat"), [(0, False), (1, False), (1, True), (0, True)])
def test_stacked_parts_are_cut_one_by_one(axis: int, flat: bool) -> None:
    def expected(given: Arrays) -> list[Arrays]:
        out: list[Arrays] = [{}, {}]
        for layer in range(3):
            for rank, part in enumerate(np.split(stacked(given, layer).transpose(0, 2, 1), 2, axis + 1)):
                out[rank][f"layers.{layer}.w"] = part.reshape(-1, part.shape[-1]) if flat else part
        return out

    key = Key("layers.{layer}.w", transposed=True, tp_dim=axis, flatten_stacked=flat)
    check([Row("w", ("ffn", "dim"), hf=Key("layers.{layer}.experts.{expert}.w"), meta=key)], EXPERTS, expected)


def test_stacked_and_fused_as_llama_4_has_its_experts() -> None:
    shapes = {f"layers.0.experts.{expert}.{name}": (10, 6) for expert in range(4) for name in ("gate", "up")}

    def expected(given: Arrays) -> list[Arrays]:
        both = [
            np.concatenate([given[f"layers.0.experts.{e}.gate"].T, given[f"layers.0.experts.{e}.up"].T], 1)
            for e in range(4)
        ]
        return [{"layers.0.gate_up": np.stack(both)}]

    rows = [
        Row(name, ("ffn", "dim"), layer_set="dense", hf=Key("layers.{layer}.experts.{expert}." + name),
            meta=Key("layers.{layer}.gate_up", transposed=True, fused=1))
        for name in ("gate", "up")
    ]  # fmt: skip
    check(rows, shapes, expected)


def test_sets_limit_rows_and_give_positions() -> None:
    rows = [
        Row("dense", ("dim",), layer_set="dense", hf=Key("h.{layer}.x"), meta=Key("dense.{layer:dense}.x")),
        Row("moe", ("dim",), layer_set="moe", hf=Key("h.{layer}.y"), meta=Key("moe.{layer:moe}.y")),
    ]
    shapes = {"h.0.x": (6,), "h.1.y": (6,), "h.2.y": (6,)}
    check(
        rows,
        shapes,
        lambda given: [{"dense.0.x": given["h.0.x"], "moe.0.y": given["h.1.y"], "moe.1.y": given["h.2.y"]}],
    )
    assert [entry.key for entry in family(*rows).stored_specs("hf", DIMS)] == ["h.0.x", "h.1.y", "h.2.y"]


def test_ranks_in_succession_may_hold_the_same_part() -> None:
    def expected(given: Arrays) -> list[Arrays]:
        first, second = np.split(given["k"], 2)
        return [{"k": first}, {"k": first}, {"k": second}, {"k": second}]

    row = Row("k", ("n_kv*head_dim", "dim"), heads="n_kv", hf=Key("k", rope="half"),
              meta=Key("k", rope="half", tp_dim=0, replicated_heads="copies"))  # fmt: skip
    check([row], {"k": (12, 6)}, expected)


def test_copies_that_differ_are_to_be_found() -> None:
    row = Row("k", ("n_kv*head_dim", "dim"), hf=Key("k"), meta=Key("k", tp_dim=0, replicated_heads="copies"))
    half = np.arange(36).reshape(6, 6)
    with pytest.raises(AssertionError, match=r"rank 3 .* and rank 2 .* differ, but every rank of 2 in succession"):
        moved(family(row), "meta", "hf", [{"k": half}, {"k": half}, {"k": half}, {"k": half + 1}])


def test_a_shape_of_its_own() -> None:
    row = Row("conv", ("dim", "3*4"), hf=Key("conv", shape=("dim", "3", "2", "2")), meta=Key("linear", tp_dim=1))
    check([row], {"conv": (6, 3, 2, 2)}, lambda given: [
        {"linear": half} for half in np.split(given["conv"].reshape(6, 12), 2, 1)
    ])  # fmt: skip


def test_a_group_that_is_not_whole_is_named() -> None:
    row = Row("w", ("ffn", "dim"), hf=Key("layers.{layer}.experts.{expert}.w"), meta=Key("layers.{layer}.w"))
    arrays = coded(EXPERTS)
    del arrays["layers.1.experts.3.w"]
    with pytest.raises(KeyMismatchError, match=r"layers\.1\.experts\.3\.w \[10, 6\]"):
        moved(family(row), "hf", "meta", [arrays])


def test_parts_of_one_tensor_have_one_dtype() -> None:
    rows = [Row(name, ("dim",), hf=Key(name), meta=Key("both", fused=0)) for name in ("a", "b")]
    sources = {
        "a": SourceTensor("a", "F32", from_source(0, (6,)), "file"),
        "b": SourceTensor("b", "BF16", from_source(1, (6,)), "file"),
    }
    logicals = mapping.read_column(family(*rows), "hf", DIMS, [sources], "source")
    with pytest.raises(
        KeyMismatchError, match="b: has dtype BF16, but a has F32, and the meta format has both in one tensor"
    ):
        writing.write_column(family(*rows), "meta", DIMS, logicals, ranks=1, keep_tied=None, source_name="source")


def test_what_the_target_needs_and_the_source_has_no_place_for() -> None:
    rows = [Row("a", ("dim",), hf=Key("a"), meta=Key("a")), Row("b", ("dim",), meta=Key("b"))]
    with pytest.raises(KeyMismatchError, match="the meta format of f needs b, which the source does not have"):
        moved(family(*rows), "hf", "meta", [coded({"a": (6,)})])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([Row("a", ("dim",), hf=Key("x", fused=1))], "has no axis 1 to be fused along"),
        ([Row("a", ("dim",), hf=Key("x", transposed=True))], "has no two axes to transpose"),
        ([Row("a", ("dim",), hf=Key("x.{layer}", flatten_stacked=True))], "is not stacked over anything"),
        ([Row("a", ("dim",), hf=Key("x", replicated_heads="copies"))], "no heads are replicated"),
        ([Row("a", ("dim",), layer_set="moe", hf=Key("x"))], "has a layer_set 'moe', but no placeholder"),
        ([Row("a", ("dim",), hf=Key("x.{layer}.{expert}"), meta=Key("y.{expert}"))], "only the last of"),
        (
            [Row("a", ("dim",), hf=Key("x", fused=0)), Row("b", ("dim",), enabled_by="tied", hf=Key("x", fused=0))],
            "fused rows have to be alike",
        ),
    ],
)
def test_steps_that_make_no_sense_are_refused(rows: list[Row], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        family(*rows)


def test_two_rows_with_one_key_for_this_config_are_refused() -> None:
    rows = [
        Row("a", ("dim",), layer_set="dense", hf=Key("x.{layer}")),
        Row("b", ("dim",), layer_set="moe", hf=Key("x.{layer}")),
    ]
    assert len(list(family(*rows).stored_specs("hf", DIMS))) == 3
    with pytest.raises(ValueError, match=r"f: a, b have one hf key: x\.0"):
        list(family(*rows).stored_specs("hf", Dims(SIZES, {"dense": (0,), "moe": (0, 1)})))
