"""What ``--json`` prints is what docs/schemas says, and docs/json.md explains every field of it.

``python -m tests.cli.test_schemas`` writes the tables of docs/json.md anew, from the schemas.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import jsonschema
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint
from click.testing import CliRunner

from ckpt_convert.cli import cli
from ckpt_convert.convert.api import convert_checkpoint
from ckpt_convert.models import FAMILIES
from ckpt_convert.models.core.table import FORMATS
from tests.helpers import CASES, GOLDEN

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = DOCS / "json.md"
SCHEMAS = sorted((DOCS / "schemas").glob("*.schema.json"))
FORMS = [
    GOLDEN / case / form
    for case in CASES
    for form in ("hf", "meta-mp1", "meta-mp2", "meta-mp4", "native.safetensors")
    if (GOLDEN / case / form).exists()
]


def schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "schemas" / f"{name}.schema.json").read_text())
    return found


def check(name: str, *words: object) -> dict[str, Any]:
    """Run a command; what it prints has to be JSON, in the strict sense, and as its schema says."""
    result = CliRunner().invoke(cli, [*map(str, words), "--json"], standalone_mode=False)
    assert result.exception is None, result.output

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    document: dict[str, Any] = json.loads(result.stdout, parse_constant=refuse)
    jsonschema.Draft202012Validator(schema(name)).validate(document)
    return document


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_a_schema_is_one_and_lets_no_unknown_field_pass(path: Path) -> None:
    content = json.loads(path.read_text())
    jsonschema.Draft202012Validator.check_schema(content)
    for where, node in objects(content, path.name):
        assert "additionalProperties" in node, where


@pytest.mark.parametrize("path", FORMS, ids=lambda path: f"{path.parent.name}-{path.name}")
@pytest.mark.parametrize("options", [[], ["--stats"]], ids=["headers", "stats"])
def test_inspect_of_every_form(path: Path, options: list[str]) -> None:
    document = check("inspect", "inspect", path, *options)
    assert all(("stats" in tensor) == bool(options) for tensor in document["tensors"])


def test_the_formats_are_those_that_there_are() -> None:
    assert schema("inspect")["properties"]["format"]["enum"] == [*FORMATS, None]


class TestOddFiles:
    def test_values_that_json_has_no_word_for(self, tmp_path: Path) -> None:
        tensors = {
            "all.nan": torch.full((3,), float("nan")),
            "some.inf": torch.tensor([1.0, float("inf"), float("-inf")]),
            "huge": torch.tensor([1.7e308, -1.7e308], dtype=torch.float64),
            "empty": torch.zeros(0, 4),
            "scalar": torch.tensor(3, dtype=torch.int64),
            "flags": torch.tensor([True, False]),
            "small": torch.zeros(4, dtype=torch.float8_e4m3fn),
            "\x1b[31m\n\u202e": torch.zeros(1),
        }
        safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
        stats = {t["key"]: t["stats"] for t in check("inspect", "inspect", tmp_path, "--stats")["tensors"]}
        assert (stats["all.nan"]["nan"], stats["all.nan"]["mean"]) == (3, None)
        assert (stats["some.inf"]["inf"], stats["some.inf"]["max"]) == (2, 1.0)
        assert stats["empty"]["zero_fraction"] is None
        assert stats["flags"]["zero_fraction"] == 0.5

    def test_torch_files_old_new_and_of_training(self, tmp_path: Path) -> None:
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
        torch.save(state, tmp_path / "step.pt")
        torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        torch.save({"turned": torch.arange(6.0).reshape(2, 3).t()}, tmp_path / "strided.pt")
        assert check("inspect", "inspect", tmp_path / "step.pt", "--stats")["notices"]
        assert all("offset" in tensor for tensor in check("inspect", "inspect", tmp_path / "old.pt")["tensors"])
        (turned,) = check("inspect", "inspect", tmp_path / "strided.pt", "--stats")["tensors"]
        assert turned["parts"][0]["strides"] == [1, 3]

    def test_a_distributed_checkpoint(self, tmp_path: Path) -> None:
        state = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)}
        with pytest.warns(UserWarning, match="single process"):
            torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
        document = check("inspect", "inspect", tmp_path / "dcp", "--stats")
        assert (document["format"], document["facts"][0]["label"]) == (None, "container")
        assert document["tensors"][1]["stats"]["mean"] == 2.5

    def test_gguf(self, tmp_path: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        packed = np.zeros((4, 144), np.uint8)
        writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
        writer.add_tensor("blk.0.attn_norm.weight", np.ones(256, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        document = check("inspect", "inspect", tmp_path / "m.gguf", "--stats")
        found = {tensor["key"]: (tensor["dtype"], tensor["stats"]["mean"]) for tensor in document["tensors"]}
        assert found == {"blk.0.attn_q.weight": ("Q4_K", None), "blk.0.attn_norm.weight": ("F32", 1.0)}
        assert document["facts"] == [{"label": "architecture", "text": "llama (GGUF)"}]
        head = CliRunner().invoke(cli, ["inspect", str(tmp_path / "m.gguf")]).stdout.partition("\n\n")[0]
        assert "\narchitecture  llama (GGUF)\n" in head
        assert "unknown" not in head  # what is known to be of no format is no riddle

    def test_ranks_that_nothing_says_how_to_join(self, tmp_path: Path) -> None:
        for file in (GOLDEN / "llama" / "meta-mp2").glob("*.pth"):
            shutil.copy(file, tmp_path)
        document = check("inspect", "inspect", tmp_path, "--stats")
        assert document["parameters"] is None
        assert all(tensor["shape"] is None for tensor in document["tensors"])

    def test_an_unknown_family(self, tmp_path: Path) -> None:
        safetensors.torch.save_file({"h.0.w": torch.zeros(2)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"model_type": "gpt9", "n_embd": 12, "n_layer": true, "n_head": 3}')
        assert check("inspect", "inspect", tmp_path)["dims"] == {"dim": 12, "n_heads": 3}


class TestConversions:
    @pytest.mark.parametrize(
        ("case", "target"), [(c, t) for c in CASES for t in FORMATS if (c, t) != ("mistral", "torchtitan")]
    )
    def test_plans(self, case: str, target: str, tmp_path: Path) -> None:
        check("plan", "convert", GOLDEN / case / "hf", tmp_path / "out", "--to", target, "--dry-run")

    def test_a_plan_that_drops_and_casts(self, tmp_path: Path) -> None:
        words = [GOLDEN / "llama2" / "meta-mp1", tmp_path / "out", "--to", "hf", "--dtype", "bfloat16", "--dry-run"]
        document = check("plan", "convert", *words)
        assert document["drops"] == ["rope.freqs"]
        assert document["moves"]["cast"] > document["moves"]["copied"]

    def test_reports(self, tmp_path: Path) -> None:
        words = [GOLDEN / "llama_tied" / "hf", tmp_path / "out", "--model-parallel", "2", "--verify"]
        assert check("report", "hf-to-meta", *words)["verified"] == 30
        report = convert_checkpoint(tmp_path / "out", tmp_path / "back", to="hf").as_dict()
        jsonschema.Draft202012Validator(schema("report")).validate(report)


class TestFamilies:
    def test_families_and_formats(self) -> None:
        document = check("formats", "formats")
        assert [family["name"] for family in document["families"]] == list(FAMILIES)
        assert [format["name"] for format in document["formats"]] == list(FORMATS)

    @pytest.mark.parametrize("name", list(FAMILIES))
    def test_the_table_of_every_family(self, name: str) -> None:
        document = check("table", "formats", "--family", name, "--keys")
        assert [row["name"] for row in document["rows"]] == [row.name for row in FAMILIES[name].rows]

    def test_a_table_with_numbered_layers(self) -> None:
        rows = check("table", "formats", "--family", "llama", "--keys", "--layers", "2")["rows"]
        assert [row["name"] for row in rows if row["name"].startswith("ffn.up.") and "bias" not in row["name"]] == [
            "ffn.up.0",
            "ffn.up.1",
        ]


class TestPage:
    @pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
    def test_the_tables_are_those_of_the_schemas(self, path: Path) -> None:
        name = path.name.partition(".")[0]
        assert table(json.loads(path.read_text())) in PAGE.read_text(), (
            f"run python -m tests.cli.test_schemas, with a <!-- schema: {name} --> in {PAGE.name}"
        )


def objects(node: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every description of an object in a schema, and where it stands."""
    if isinstance(node, dict):
        if "properties" in node:
            yield where, node
        for name, below in node.items():
            yield from objects(below, f"{where}/{name}")


def table(content: dict[str, Any]) -> str:
    """The fields of a document: the outermost ones first, then those of the objects within."""
    lines = ["| field | type | meaning |", "|---|---|---|"]
    lines += rows(content, content, "")
    return "\n".join(lines) + "\n"


def rows(node: dict[str, Any], root: dict[str, Any], prefix: str) -> Iterator[str]:
    later = []
    for name, field in node.get("properties", {}).items():
        inner, below = resolve(field, root), f"{prefix}{name}"
        text = field.get("description", inner.get("description", "")).replace("|", "\\|")
        yield f"| `{below}` | {kind(inner, root)} | {text} |"
        if inner.get("type") == "array":
            inner, below = resolve(inner["items"], root), f"{below}[]."
        elif "properties" in inner:
            below = f"{below}."
        else:
            inner, below = resolve(inner.get("additionalProperties") or {}, root), f"{below}.*."
        later += [(inner, below)] if "properties" in inner else []
    for inner, below in later:
        yield from rows(inner, root, below)


def resolve(node: Any, root: dict[str, Any]) -> dict[str, Any]:
    """The node that a reference, or the one choice that is not null, leads to."""
    if not isinstance(node, dict):
        return {}
    if "anyOf" in node:
        return resolve(next(choice for choice in node["anyOf"] if choice != {"type": "null"}), root) | {"null": True}
    if "$ref" in node:
        return {
            **resolve(root["$defs"][node["$ref"].rpartition("/")[2]], root),
            **{k: node[k] for k in node if k != "$ref"},
        }
    return node


def kind(node: dict[str, Any], root: dict[str, Any]) -> str:
    """The type in words."""
    if "const" in node:
        return json.dumps(node["const"])
    if "enum" in node:
        return ", ".join("null" if value is None else str(value) for value in node["enum"])
    types = node.get("type", "any")
    names = [types] if isinstance(types, str) else list(types)
    if names[0] == "array":
        items = resolve(node["items"], root)
        names[0] = f"list of {kind(items, root)}s" if "type" in items else "list"
    return " or ".join(names + (["null"] if node.get("null") else []))


def write() -> None:
    text = PAGE.read_text()
    for path in SCHEMAS:
        name = path.name.partition(".")[0]
        found = table(json.loads(path.read_text()))
        place = rf"(<!-- schema: {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(place, lambda match: f"{match[1]}{found}{match[2]}", text, flags=re.DOTALL)  # noqa: B023
        assert count == 1, f"{PAGE}: needs one <!-- schema: {name} --> with an <!-- end -->"
    PAGE.write_text(text)


if __name__ == "__main__":
    write()
