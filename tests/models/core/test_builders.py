"""Builders of rows: the keys, shapes and biases of linear layers and norms."""

from __future__ import annotations

import pytest

from ckpt_convert.models.core.builders import layer_norm, linear, rms_norm
from ckpt_convert.models.core.picking import prefixed, with_rope
from ckpt_convert.models.core.rows import Key, Row


def test_a_linear_layer_has_a_weight_in_each_of_its_formats() -> None:
    (row,) = linear("ffn.up", ("ffn_dim", "dim"), hf="mlp.up", meta=Key("w3", tp_dim=0), layer_set="dense")
    assert row == Row(
        "ffn.up", ("ffn_dim", "dim"), layer_set="dense", hf=Key("mlp.up.weight"), meta=Key("w3.weight", tp_dim=0)
    )


def test_a_bias_has_one_axis_and_rotates_with_its_weight() -> None:
    shape = ("n_heads*head_dim", "dim")
    weight, bias = linear("q", shape, bias="has_bias", heads="n_heads", hf=Key("q", rope="half", fused=0))
    assert (weight.enabled_by, weight.shape, weight.hf) == (None, shape, Key("q.weight", rope="half", fused=0))
    assert (bias.name, bias.enabled_by, bias.shape, bias.heads) == ("q.bias", "has_bias", shape[:1], "n_heads")
    assert bias.hf == Key("q.bias", rope="half", fused=0)


def test_a_bias_that_is_always_there_is_switched_with_its_weight() -> None:
    assert [row.enabled_by for row in linear("q", ("dim", "dim"), bias=True, enabled_by="vision", hf="q")] == [
        "vision",
        "vision",
    ]


@pytest.mark.parametrize(("weight", "bias"), [(0, 0), (1, None), ("axis", "axis"), (None, None)])
def test_a_bias_is_split_over_ranks_where_the_outputs_are(weight: int | str | None, bias: int | str | None) -> None:
    """Row-parallel layers, whose inputs are split, add their bias once."""
    rows = linear("o", ("dim", "dim"), bias=True, meta=Key("wo", tp_dim=weight))
    assert [row.meta and row.meta.tp_dim for row in rows] == [weight, bias]


def test_a_bias_takes_no_part_in_what_its_weight_goes_through() -> None:
    shape = ("out", "in", "1", "1")
    _, bias = linear("c", ("out", "in"), bias=True, hf=Key("c", shape=shape), native=Key("d", transposed=True))
    assert (bias.hf, bias.native) == (Key("c.bias"), Key("d.bias"))


def test_native_calls_the_weight_of_an_rms_norm_scale() -> None:
    assert rms_norm("norm", hf="model.norm", native="norm", torchtitan="norm") == (
        Row("norm", ("dim",), hf=Key("model.norm.weight"), native=Key("norm.scale"), torchtitan=Key("norm.weight")),
    )


def test_a_layer_norm_has_weight_and_bias_everywhere() -> None:
    weight, bias = layer_norm("norm", "width", hf="ln", native="sa_norm")
    assert weight == Row("norm", ("width",), hf=Key("ln.weight"), native=Key("sa_norm.weight"))
    assert bias == Row("norm.bias", ("width",), hf=Key("ln.bias"), native=Key("sa_norm.bias"))


def test_prefixes_go_before_the_keys_of_their_formats_alone() -> None:
    (row,) = prefixed(rms_norm("norm", hf="norm", meta="norm"), hf="model.layers.{layer}.")
    assert (row.hf, row.meta) == (Key("model.layers.{layer}.norm.weight"), Key("norm.weight"))


def test_one_rope_layout_is_that_of_every_column() -> None:
    rows = linear("q", ("n_heads*head_dim", "dim"), heads="n_heads", hf=Key("q", rope="half"), meta=Key("wq"))
    (row,) = with_rope(rows, "interleaved")
    assert (row.hf and row.hf.rope, row.meta and row.meta.rope) == ("interleaved", "interleaved")
    (row,) = with_rope(rows, None)
    assert (row.heads, row.hf and row.hf.rope) == (None, None)
