"""docs/adding-a-family.md, executed: its package is installed, its test is run, and all else that the page promises."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from ckpt_convert.cli import cli
from ckpt_convert.families import Family, Key, Row
from ckpt_convert.models import FAMILIES
from tests.models.plugins import without_outside_families, write_distribution

PAGE = (Path(__file__).parent.parent / "docs" / "adding-a-family.md").read_text()
TABLE, TEST = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
MODULE = "starcoder2_tables"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the page as pip leaves it."""
    (toml,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    project = tomllib.loads(toml)
    assert project["tool"]["setuptools"]["py-modules"] == [MODULE]
    points = project["project"]["entry-points"]["ckpt_convert.families"]
    return write_distribution(tmp_path_factory.mktemp("site"), project["project"]["name"], {MODULE: TABLE}, points)


@pytest.fixture
def family(site: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    """The family of the page, installed for this process."""
    without_outside_families(monkeypatch)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return FAMILIES["starcoder2"]


def test_the_example_is_not_built_in() -> None:
    assert not any("starcoder2" in family.model_types for family in FAMILIES.built_in)


def test_the_page_uses_what_is_public_alone() -> None:
    imports = re.findall(r"(?:from|import) (ckpt_convert\S*)", TABLE + TEST)
    assert set(imports) == {"ckpt_convert.families", "ckpt_convert"}


@pytest.mark.slow
def test_the_test_of_the_page_passes(site: Path, tmp_path: Path) -> None:
    """Every direction, two ranks, formulas as judges, and a training run."""
    (tmp_path / "test_starcoder2.py").write_text(TEST)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))}
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    ran = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert re.search(r"^76 passed", ran.stdout, re.MULTILINE), ran.stdout + ran.stderr


def command(*words: object) -> str:
    """The output of a command of this process, for which the package is installed."""
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.usefixtures("family")
def test_the_commands_know_the_family(tmp_path: Path) -> None:
    space: dict[str, Any] = {}
    exec(compile(TEST, "adding-a-family.md", "exec"), space)
    space["make_model"](True, True).save_pretrained(tmp_path / "hf")
    page = command("formats", "--family", "starcoder2", "--keys")
    words = "meta layers.{layer}.attention.wk.weight rope interleaved; tp 0; copies beyond n_kv_heads"
    assert words in " ".join(page.split())
    command("hf-to-meta", tmp_path / "hf", tmp_path / "meta", "--model-parallel", "2")
    command("hf-to-torchtitan", tmp_path / "hf", tmp_path / "titan")
    command("hf-to-native", tmp_path / "hf", tmp_path / "native")
    for name in ("hf", "meta", "titan", "native"):
        report = json.loads(command("verify", tmp_path / name, "--json"))
        assert (report["family"], report["findings"]) == ("starcoder2", [])
        difference = json.loads(command("diff", tmp_path / "hf", tmp_path / name, "--json"))
        assert (difference["through"], difference["same"]) == ("mapping", True)


def test_it_has_every_key_of_transformers_model(family: Family) -> None:
    config = transformers.Starcoder2Config(hidden_size=72, num_attention_heads=12, num_hidden_layers=3, vocab_size=56)
    with torch.device("meta"):
        model = transformers.Starcoder2ForCausalLM(config)
    dims = family.config_dims({**config.to_dict(), "model_type": "starcoder2"})
    found = {e.key: e.shape("hf", dims) for e in family.stored_specs("hf", dims) if e.first.row.required}
    assert found == {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def test_its_defaults_are_those_of_transformers(family: Family) -> None:
    sizes = {"hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 12}
    found = family.dims({**sizes, "vocab_size": 56})
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
