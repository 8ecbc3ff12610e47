from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from ckpt_convert.cli.tree import Entry, Numbering, Row, collapse, natural, split


def entries(keys: Iterable[str], shape: tuple[int, ...] = (4, 2), dtype: str = "BF16") -> list[Entry]:
    return [Entry(key, shape, dtype, 16) for key in keys]


def patterns(rows: Iterable[Row]) -> list[str]:
    return [row.pattern for row in rows]


def test_numbers_are_collapsed_where_shape_and_dtype_agree() -> None:
    rows = collapse(entries(f"layers.{layer}.wq" for layer in range(16)))
    assert rows == [Row("layers.{0..15}.wq", (4, 2), "BF16", 16, 256)]


def test_a_single_number_stays_a_number() -> None:
    assert patterns(collapse(entries(["layers.0.wq", "norm"]))) == ["layers.0.wq", "norm"]


def test_two_numbers_are_no_range() -> None:
    assert patterns(collapse(entries(["layers.0.wq", "layers.1.wq"]))) == ["layers.{0,1}.wq"]


@pytest.mark.parametrize(
    "odd",
    [
        Entry("layers.4.wq", (9, 9), "BF16", 16),
        Entry("layers.4.wq", (4, 2), "F32", 16),
        Entry("layers.4.wq", (4, 2), "BF16", 16, "2 × [2, 2]"),
    ],
)
def test_an_exception_has_its_own_line_and_is_not_missing(odd: Entry) -> None:
    keys = (f"layers.{layer}.wq" for layer in range(16) if layer != 4)
    usual, exception = collapse([*entries(keys), odd])
    assert (usual.pattern, usual.count, usual.missing) == ("layers.{0..3,5..15}.wq", 15, "")
    assert exception == Row("layers.4.wq", odd.shape, odd.dtype, 1, odd.nbytes, odd.note)


def test_a_hole_in_the_numbering_is_pointed_out() -> None:
    (row,) = collapse(entries(f"layers.{layer}.wq" for layer in range(16) if layer not in (4, 8, 9, 10)))
    assert row.pattern == "layers.{0..3,5..7,11..15}.wq"
    assert row.missing == "4, 8..10"


def test_layers_at_equal_distances_are_not_missing_others() -> None:
    (row,) = collapse(entries(f"layers.{layer}.cross_attn.wq" for layer in range(3, 39, 5)))
    assert (row.pattern, row.missing) == ("layers.{3..38..5}.cross_attn.wq", "")


def test_layers_that_begin_late_are_not_missing_the_first() -> None:
    (row,) = collapse(entries(f"layers.{layer}.experts.wq" for layer in range(3, 61)))
    assert (row.pattern, row.missing) == ("layers.{3..60}.experts.wq", "")


def test_several_numbers_in_a_key() -> None:
    keys = [f"layers.{layer}.experts.{expert}.w1" for layer in range(4) for expert in range(128)]
    (row,) = collapse(entries(keys))
    assert (row.pattern, row.count) == ("layers.{0..3}.experts.{0..127}.w1", 512)


def test_a_missing_expert_is_named_with_its_layer() -> None:
    keys = [f"layers.{x}.experts.{y}.w1" for x in range(4) for y in range(8) if (x, y) != (2, 5)]
    whole, broken = collapse(entries(keys))
    assert (whole.pattern, whole.count, whole.missing) == ("layers.{0,1,3}.experts.{0..7}.w1", 24, "")
    assert (broken.pattern, broken.missing) == ("layers.2.experts.{0..4,6,7}.w1", "experts.5")


def test_a_missing_layer_of_experts() -> None:
    keys = [f"layers.{x}.experts.{y}.w1" for x in range(6) for y in range(8) if x != 2]
    (row,) = collapse(entries(keys))
    assert (row.pattern, row.missing) == ("layers.{0,1,3..5}.experts.{0..7}.w1", "layers.2")


def test_an_odd_expert_is_not_missing() -> None:
    keys = [f"layers.{x}.experts.{y}.w1" for x in range(4) for y in range(8) if (x, y) != (2, 5)]
    rows = collapse([*entries(keys), Entry("layers.2.experts.5.w1", (1,), "F32", 4)])
    assert patterns(rows) == [
        "layers.{0,1,3}.experts.{0..7}.w1",
        "layers.2.experts.{0..4,6,7}.w1",
        "layers.2.experts.5.w1",
    ]
    assert not any(row.missing for row in rows)


def test_what_lies_elsewhere_is_not_missing() -> None:
    keys = [f"layers.{layer}.wq" for layer in range(8)]
    (row,) = collapse(entries(keys[:2] + keys[5:]), Numbering(keys))
    assert (row.pattern, row.missing) == ("layers.{0,1,5..7}.wq", "")


def test_what_a_table_does_not_expect_is_not_missing() -> None:
    wanted = [f"layers.{layer}.wq" for layer in range(10) if layer not in (3, 8)]
    (row,) = collapse(entries(wanted), Numbering(wanted, lambda: wanted))
    assert (row.pattern, row.missing) == ("layers.{0..2,4..7,9}.wq", "")
    there = [key for key in wanted if key != "layers.5.wq"]
    (row,) = collapse(entries(there), Numbering(there, lambda: wanted))
    assert (row.pattern, row.missing) == ("layers.{0..2,4,6,7,9}.wq", "5")
    (row,) = collapse(entries(there), Numbering(there, lambda: None))
    assert row.missing == "3, 5, 8"


def test_an_expert_that_a_table_expects_is_missing() -> None:
    wanted = [f"layers.{x}.experts.{y}.w1" for x in (1, 2, 5) for y in range(4)]
    there = [key for key in wanted if key != "layers.2.experts.1.w1"]
    rows = collapse(entries(there), Numbering(there, lambda: wanted))
    assert [(row.pattern, row.missing) for row in rows] == [
        ("layers.{1,5}.experts.{0..3}.w1", ""),
        ("layers.2.experts.{0,2,3}.w1", "experts.1"),
    ]


def test_the_order_is_natural() -> None:
    keys = ["layers.10.a", "layers.2.b", "conv10.weight", "conv2.weight", "layers.final", "layers.2.a"]
    assert sorted(keys, key=natural) == [
        "conv2.weight",
        "conv10.weight",
        "layers.2.a",
        "layers.2.b",
        "layers.10.a",
        "layers.final",
    ]
    assert patterns(collapse(entries(keys))) == [
        "conv2.weight",
        "conv10.weight",
        "layers.{2,10}.a",
        "layers.2.b",
        "layers.final",
    ]


@pytest.mark.parametrize("part", ["00", "007", "1e5", "-1", "１", "", "12345678901234567890", "9" * 5000])
def test_what_is_no_plain_number_stays_as_it_is(part: str) -> None:
    assert split(f"a.{part}.b") == ((f"a.{part}.b",), ())
    assert patterns(collapse(entries([f"a.{part}.b", f"a.{part}.c"]))) == [f"a.{part}.b", f"a.{part}.c"]


def test_keys_that_look_like_patterns_are_not_mistaken_for_them() -> None:
    keys = ["a.{}.b", "a.0.b", "a.{0..1}.b", "a.None.b", "a.1.b"]
    assert sorted(patterns(collapse(entries(keys)))) == sorted(
        ["a.{}.b", "a.{0..1}.b", "a.None.b", "a.{0,1}.b"]
    )  # fmt: skip


def test_every_tensor_is_on_exactly_one_line() -> None:
    chance = random.Random(7)
    keys = {f"l.{chance.randrange(9)}.e.{chance.randrange(9)}.{chance.choice('wv')}" for _ in range(120)}
    shapes = [(1,), (2,)]
    found = [Entry(key, chance.choice(shapes), "F32", 4) for key in sorted(keys)]
    rows = collapse(found)
    assert sum(row.count for row in rows) == len(found)
    assert sum(row.nbytes for row in rows) == 4 * len(found)


def test_numbers_far_apart_cost_nothing() -> None:
    (row,) = collapse(entries(["a.0.b", "a.1.b", "a.999999999.b"]))
    assert (row.pattern, row.missing) == ("a.{0,1,999999999}.b", "2..999999998")


def test_very_ragged_numbering_is_cut_short() -> None:
    chance = random.Random(3)
    (row,) = collapse(entries(f"a.{value}.b" for value in chance.sample(range(10**8), 5000)))
    assert len(row.pattern) < 300
    assert "…" in row.pattern
    assert row.count == 5000
    assert row.missing.endswith("more gaps")


def test_91_000_keys_of_a_mixture_of_experts() -> None:
    keys = [
        f"model.layers.{layer}.mlp.experts.{expert}.{name}"
        for layer in range(3, 61)
        for expert in range(256)
        for name in (*(f"{p}_proj.weight" for p in ("gate", "up", "down")), *(f"{p}_proj.scale" for p in "abc"))
    ]
    rows = collapse(entries([*keys, "lm_head.weight"]))
    assert len(keys) + 1 == sum(row.count for row in rows) == 89_089
    assert len(rows) == 7
    assert rows[-1].pattern == "model.layers.{3..60}.mlp.experts.{0..255}.up_proj.weight"


def test_nothing_is_nothing() -> None:
    assert collapse([]) == []
