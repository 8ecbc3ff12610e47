from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner

import ckpt_convert
from ckpt_convert.analysis.check.run import check_checkpoint
from ckpt_convert.cli import cli
from ckpt_convert.cli.formats import formats
from ckpt_convert.convert.api import plan_conversion
from ckpt_convert.errors import UsageError
from ckpt_convert.formats import ALL
from ckpt_convert.models import FAMILIES, Family, grouped
from ckpt_convert.models.llama import table
from tests.helpers import GOLDEN


@pytest.fixture
def doubtful(monkeypatch: pytest.MonkeyPatch) -> Family:
    """Llama, with a column that is said to be confirmed by nothing."""
    family = FAMILIES["llama"].replace(unverified={"native": "nobody has such a thing."})
    monkeypatch.setattr(table, "LLAMA", family)
    return family


def shown() -> str:
    result = CliRunner().invoke(formats, [])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_family_and_format_is_listed() -> None:
    lines = shown().splitlines()
    assert lines[0].split() == ["FAMILY", *ALL, "COVERS"]
    for family in FAMILIES.values():
        at = next(at for at, line in enumerate(lines) if line.split()[:1] == [family.name])
        words = lines[at].split()[1:]
        expected = ["yes" if format in family.formats else "-" for format in ALL]
        assert [word.rstrip("*") for word in words[: len(ALL)]] == expected
        titles = [words[len(ALL) :], *(line.split() for line in lines[at + 1 :] if line.startswith(" " * 40))]
        assert " ".join(word for title in titles for word in title).startswith(family.title)
    kinds = lines[lines.index("FORMAT      CONTAINERS                      LAYOUT") + 1 :]
    assert [line.split()[0] for line in kinds] == list(ALL)
    assert "\t" not in shown()
    assert "\x1b" not in shown()


def test_every_family_is_in_one_group() -> None:
    lines = shown().splitlines()
    assert [name for name in lines if name in grouped()] == list(grouped())
    assert sum(map(len, grouped().values())) == len(FAMILIES)


def test_json_says_the_same() -> None:
    result = CliRunner().invoke(formats, ["--json"])
    document = json.loads(result.output)
    assert document["schema"] == 1
    assert [entry["name"] for entry in document["families"]] == list(FAMILIES)
    for entry in document["families"]:
        family = FAMILIES[entry["name"]]
        assert entry["formats"] == list(family.formats)
        assert entry["model_types"] == list(family.model_types)
        assert entry["title"] == family.title
        assert entry["unverified"] == family.unverified
        assert family in grouped()[entry["group"]]
    assert {entry["name"]: entry["containers"] for entry in document["formats"]} == {
        format.name: list(format.containers) for format in ALL.values()
    }
    assert all(entry["layout"] for entry in document["formats"])


def test_lines_fit_80_columns() -> None:
    assert max(map(len, shown().splitlines())) <= 80


def test_a_column_that_nothing_confirms_has_a_footnote(doubtful: Family) -> None:
    page = " ".join(shown().split())
    assert "llama yes yes yes* yes" in page
    assert "* native of llama: not confirmed by anything outside; nobody has such a thing." in page


@pytest.mark.parametrize(("source", "to"), [("hf", "native"), ("native.safetensors", "hf")])
def test_its_use_is_said_in_the_plan(source: str, to: str, doubtful: Family) -> None:
    made = plan_conversion(GOLDEN / "llama" / source, to=to, config=GOLDEN / "llama" / "hf" / "config.json")
    (said,) = [notice for notice in made.notices if "nobody has such a thing" in notice]
    assert said == "llama: nothing outside the project confirms this family's native keys: nobody has such a thing."


def test_its_use_is_said_by_inspect_and_verify(
    doubtful: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ckpt_convert.convert_checkpoint(GOLDEN / "llama" / "hf", tmp_path / "native", to="native")
    with ckpt_convert.open_checkpoint(tmp_path / "native") as found:
        assert [notice for notice in found.notices if "nobody has such a thing" in notice]
    result = CliRunner().invoke(cli, ["inspect", str(tmp_path / "native")])
    assert "nobody has such a thing" in result.output
    with caplog.at_level(logging.WARNING):
        report = check_checkpoint(tmp_path / "native")
    assert report.findings == ()
    assert [record for record in caplog.records if "nobody has such a thing" in record.getMessage()]


def test_a_column_that_is_not_used_is_not_mentioned(doubtful: Family) -> None:
    made = plan_conversion(GOLDEN / "llama" / "hf", to="meta")
    assert not [notice for notice in made.notices if "nobody has such a thing" in notice]


def table_of(*words: str) -> str:
    result = CliRunner().invoke(cli, ["formats", "--family", *words])
    assert result.exit_code == 0, result.output
    return result.output


def block(page: str, name: str) -> list[str]:
    """The lines of one row."""
    (found,) = [part for part in page.split("\n\n") if part.split()[0] == name]
    return [" ".join(line.split()) for line in found.splitlines()]


def test_the_table_of_a_family_says_what_each_format_does_with_a_row() -> None:
    page = table_of("llama", "--keys")
    assert page.startswith("llama: Llama 1")
    assert block(page, "attention.k") == [
        "attention.k [n_kv_heads*head_dim, dim] rotates: heads n_kv_heads",
        "hf model.layers.{layer}.self_attn.k_proj.weight rope half",
        "meta layers.{layer}.attention.wk.weight",
        "rope interleaved; tp 0; copies beyond n_kv_heads",
        "native layers.{layer}.attn.k_proj.weight rope interleaved",
        "torchtitan layers.{layer}.attention.qkv_linear.wk.weight rope interleaved",
    ]
    assert block(page, "output")[:2] == [
        "output [vocab_size, dim] may be tied to tok_embeddings",
        "hf lm_head.weight absent if tied",
    ]


def test_the_table_shows_the_shape_that_is_stored() -> None:
    """Stacked over experts, transposed, one axis with the next, fused: what a person would look for in a file."""
    assert block(table_of("mixtral_2023", "--keys"), "moe.experts.down") == [
        "moe.experts.down [dim, ffn_dim]",
        "hf model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
        "meta layers.{layer}.block_sparse_moe.w2",
        "[n_experts*ffn_dim, dim]; stacked; transposed",
        "in memory model.layers.{layer}.mlp.experts.down_proj",
        "[n_experts, dim, ffn_dim]; stacked",
    ]
    assert block(table_of("phi3", "--keys"), "attention.k")[1:3] == [
        "hf model.layers.{layer}.self_attn.qkv_proj.weight",
        "rope half; fused on axis 0, part 2 of 3",
    ]


def test_parts_are_counted_among_those_of_the_same_layers() -> None:
    up = block(table_of("deepseek_v3", "--keys"), "mtp.moe.experts.up")
    assert up[-1] == "[n_experts, expert_dim, dim]; stacked; fused on axis 1, part 2 of 2"


def test_layers_are_numbered_on_request() -> None:
    page = table_of("llama", "--keys", "--layers", "2")
    assert "{layer}" not in page.partition("\n\n")[2]
    names = [part.split()[0] for part in page.split("\n\n")[1:]]
    assert names.index("ffn.up.0") < names.index("attention_norm.1")
    assert "attention_norm.2" not in names
    assert block(page, "ffn.up.1")[1] == "hf model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_table_fits_100_columns_and_names_every_row(name: str) -> None:
    page = table_of(name, "--keys")
    assert max(map(len, page.splitlines())) <= 100
    assert [part.split()[0] for part in page.split("\n\n")[1:]] == [row.name for row in FAMILIES[name].rows]


def test_json_says_the_same_of_a_table() -> None:
    document = json.loads(table_of("llama4", "--keys", "--json"))
    assert (document["schema"], document["family"]) == (1, "llama4")
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == [row.name for row in FAMILIES["llama4"].rows]
    gate = {column["format"]: column for column in rows["experts.gate"]["columns"]}
    assert gate["hf"]["shape"] == ["n_experts", "dim", "ffn_dim"]
    assert gate["meta"]["tp"] is not None
    numbered = json.loads(table_of("llama4", "--keys", "--json", "--layers", "1"))
    assert "experts.gate.0" in {row["name"] for row in numbered["rows"]}


@pytest.mark.parametrize("words", [["--keys"], ["--family", "llama"], ["--layers", "2"]])
def test_keys_and_family_go_together(words: list[str]) -> None:
    result = CliRunner().invoke(cli, ["formats", *words])
    assert result.exit_code == 2
    assert "--keys shows the table of one --family" in result.output


def test_the_table_of_no_family_is_refused() -> None:
    result = CliRunner().invoke(cli, ["formats", "--family", "llamas", "--keys"])
    assert isinstance(result.exception, UsageError)
    assert "is no family; known: " in str(result.exception)
