"""The language of the tables: what it says, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt_convert.models import FAMILIES
from ckpt_convert.models.core import table_check
from ckpt_convert.models.core.table import Family, Key, Row, evaluate
from ckpt_convert.models.llama.table import LLAMA
from ckpt_convert.models.mistral.table import MISTRAL

DIMS = {"n_layers": 2, "n_heads": 12, "n_kv_heads": 4, "head_dim": 6, "dim": 72, "ffn_dim": 104, "vocab_size": 56,
        "tied": 0, "attention_bias": 0, "mlp_bias": 0, "embedding_cut": 0}  # fmt: skip
DOCS = Path(__file__).parents[3] / "docs"


def family(*rows: Row, **settings: Any) -> Family:
    made = Family("toy", "Toy", ("toy",), rows, dims=lambda config: dict(DIMS), **settings)
    table_check.check_table(made)
    return made


def test_every_row_at_every_index_in_the_order_of_the_layers() -> None:
    keys = [instance.key("hf") for instance in LLAMA.instances(DIMS)]
    keys = [key for key in keys if key and "inv_freq" not in key]
    assert keys[0] == "model.embed_tokens.weight"
    assert keys[1] == "model.layers.0.input_layernorm.weight"
    assert keys[10] == "model.layers.1.input_layernorm.weight"
    assert keys[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert len(keys) == 3 + 2 * 9


def test_when_switches_rows() -> None:
    names = {i.name for i in LLAMA.instances({**DIMS, "attention_bias": 1})} - {i.name for i in LLAMA.instances(DIMS)}
    assert names == {f"attention.{part}.bias.{layer}" for part in "qkvo" for layer in range(2)}


def test_several_placeholders_count_in_the_order_of_the_indices() -> None:
    toy = family(
        Row("w", ("dim",), hf=Key("layers.{layer}.experts.{expert}.w")),
        indices={"layer": "n_layers", "expert": "n_kv_heads"},
    )
    keys = [instance.key("hf") for instance in toy.instances(DIMS)]
    assert keys[:5] == [
        "layers.0.experts.0.w", "layers.0.experts.1.w", "layers.0.experts.2.w", "layers.0.experts.3.w",
        "layers.1.experts.0.w",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("model.layers.126.self_attn.q_proj.weight", True),
        ("model.layers.01.self_attn.q_proj.weight", False),
        ("model.layers.x.self_attn.q_proj.weight", False),
        ("model.layers.²3.self_attn.q_proj.weight", False),
        ("prefix.model.layers.0.self_attn.q_proj.weight", False),
        ("model.layers.0.self_attn.q_proj.weight.more", False),
        ("model.layers.0.self_attn.q_proj", False),
    ],
)
def test_templates_match_whole_keys(key: str, known: bool) -> None:
    assert LLAMA.has_key("hf", key) is known


@pytest.mark.parametrize(
    ("expression", "value"), [("dim", 72), ("n_heads*head_dim", 72), ("head_dim/2", 3), ("2*ffn_dim", 208)]
)
def test_shapes_are_products_of_symbols(expression: str, value: int) -> None:
    assert evaluate(expression, DIMS) == value


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([Row("a", ("dim",), hf=Key("x.{layer}")), Row("b", ("dim",), hf=Key("x.3"))], "could have the same hf key"),
        ([Row("a", ("dim",), hf=Key("x")), Row("b", ("dim",), hf=Key("x"))], "could have the same hf key"),
        ([Row("a", ("dim",), hf=Key("x")), Row("a", ("dim",), hf=Key("y"))], "is there twice"),
        ([Row("a", ("dim",))], "has no column"),
        ([Row("a", ("dim",), hf=Key("x.{layer}"), native=Key("y"))], "one tensor for every layer"),
        ([Row("a", ("dim",), hf=Key("x.{expert}"))], "a placeholder without an index"),
        ([Row("a", ("dim",), heads="n_heads", hf=Key("x"))], "needs a RoPE layout"),
        ([Row("a", ("dim",), hf=Key("x", rope="half"))], "needs a RoPE layout"),
        ([Row("a", ("dim",), hf=Key("x", omitted_if_tied=True))], "is tied to nothing"),
        ([Row("a", ("dim",), tied_to="b", hf=Key("x"))], "which is no row"),
        ([Row("a", ("dim",), hf=Key("x"), native=Key("x", tp_dim=1))], "has no axis 1 to split"),
    ],
)
def test_a_table_that_could_be_read_in_two_ways_is_refused(rows: list[Row], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        family(*rows)


def test_mistral_is_llama_without_biases() -> None:
    assert {row.name for row in LLAMA.rows} - {row.name for row in MISTRAL.rows} == {
        row.name for row in LLAMA.rows if row.name.endswith(".bias")
    }


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_no_table_could_be_read_in_two_ways(name: str) -> None:
    table_check.check_table(FAMILIES[name])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_column_holds_every_required_row(name: str) -> None:
    family = FAMILIES[name]
    for row in family.rows:
        if row.required and not row.enabled_by and not row.tied_to:
            assert set(row.columns) == set(family.formats), row.name
