"""The language of the tables: what it says, and what it refuses."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ckpt_convert
from ckpt_convert.analysis.check.run import check_checkpoint
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
    assert LLAMA.knows("hf", key) is known


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
        ([Row("a", ("dim",), hf=Key("x.{expert}"))], "counts nothing"),
        ([Row("a", ("dim",), heads="n_heads", hf=Key("x"))], "needs a rope order"),
        ([Row("a", ("dim",), hf=Key("x", rope="half"))], "needs a rope order"),
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


PAGE = (DOCS / "adding-a-family.md").read_text()


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page's code defines, its family registered and nothing else done."""
    space: dict[str, Any] = {}
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)):
        exec(compile(code, f"adding-a-family.md, code {number}", "exec"), space)
    monkeypatch.setitem(FAMILIES.registered, "starcoder2", space["STARCODER2"])
    return space


def test_the_example_of_the_docs_is_not_built_in() -> None:
    assert not any("starcoder2" in family.model_types for family in FAMILIES.values())


@pytest.mark.parametrize(("use_bias", "tied"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_worked_example_of_the_docs(example: dict[str, Any], use_bias: bool, tied: bool, tmp_path: Path) -> None:
    example["test_starcoder2"](tmp_path, use_bias, tied)
    with ckpt_convert.open_checkpoint(tmp_path / "native") as found:
        assert (found.format, found.family) == ("native", "starcoder2")
    assert check_checkpoint(tmp_path / "hf").findings == ()
    with pytest.raises(ckpt_convert.CkptConvertError, match="the starcoder2 table has no meta column"):
        ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "meta", to="meta")


def test_the_example_has_every_key_of_transformers_model(example: dict[str, Any]) -> None:
    config = transformers.Starcoder2Config(hidden_size=72, num_attention_heads=12, num_hidden_layers=3, vocab_size=56)
    with torch.device("meta"):
        model = transformers.Starcoder2ForCausalLM(config)
    family = example["STARCODER2"]
    dims = family.symbols({**config.to_dict(), "model_type": "starcoder2"})
    found = {e.key: e.shape("hf", dims) for e in family.entries("hf", dims) if e.first.row.required}
    assert found == {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def test_the_defaults_of_the_example_are_those_of_transformers(example: dict[str, Any]) -> None:
    sizes = {"hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 12}
    found = example["dims"]({**sizes, "vocab_size": 56})
    config = transformers.Starcoder2Config(**sizes)
    assert found["n_kv_heads"] == config.num_key_value_heads
    assert found["tied"] == config.tie_word_embeddings
    assert found["use_bias"] == config.use_bias


@pytest.mark.parametrize("kind", [Row, Key, Family])
def test_the_page_explains_every_field(kind: type) -> None:
    part = PAGE.partition("## What a row can say")[2]
    table = next(text for text in part.split("\n\n") if text.startswith(f"| `{kind.__name__}` |"))
    said = {name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert said == {field.name for field in dataclasses.fields(kind)}
