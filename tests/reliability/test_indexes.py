"""An index goes with its shards and with nothing else, whatever it is called: also that of a variant.

transformers writes the variants and loads them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

import ckpt_convert
from tests.command import run
from tests.helpers import GOLDEN, assert_same, read_safetensors, sums

HF = GOLDEN / "llama" / "hf"
INDEX = "model.safetensors.index.fp16.json"


@pytest.fixture
def variant(tmp_path: Path) -> Path:
    """Shards of a variant and their index, and nothing else, as transformers saves them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(HF)
    model.save_pretrained(tmp_path / "source", variant="fp16", max_shard_size="200KB")
    assert (tmp_path / "source" / INDEX).is_file()
    assert not (tmp_path / "source" / "model.safetensors.index.json").exists()
    return tmp_path / "source"


def test_a_variant_is_read_by_its_index_and_comes_back(variant: Path, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(variant, tmp_path / "native", to="native", verify=True)
    assert not list((tmp_path / "native").glob("*fp16.json"))
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(variant)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", variant="fp16")
    assert_same(dict(again.state_dict()), read_safetensors(HF))


def test_laid_out_anew_no_index_is_left_of_shards_that_are_not_there(variant: Path, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(variant, tmp_path / "out", to="hf", shards=2)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {path.name for path in (tmp_path / "out").glob("*.index*")} == {"model.safetensors.index.json"}
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert run("verify", tmp_path / "out", "--strict").returncode == 0


def test_beside_the_usual_shards_it_is_not_copied(variant: Path, tmp_path: Path) -> None:
    for path in HF.iterdir():
        (variant / path.name).write_bytes(path.read_bytes())
    ckpt_convert.convert_checkpoint(variant, tmp_path / "out", to="hf")
    assert sums(tmp_path / "out") == sums(HF) | {
        name: value for name, value in sums(variant).items() if "fp16" not in name and "safetensors" not in name
    }


def test_a_missing_index_of_a_variant_is_asked_for_under_its_name(variant: Path) -> None:
    assert run("verify", variant, "--strict").returncode == 0
    (variant / INDEX).unlink()
    found = run("verify", variant, "--json")
    (warning,) = [one for one in json.loads(found.stdout)["findings"] if one["check"] == "index"]
    assert warning["file"] == INDEX
