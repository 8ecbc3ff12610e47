"""A directory in Hugging Face's format has names that its loaders find."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import ckpt_convert
from tests.command import run
from tests.helpers import GOLDEN, Tensors, assert_same, edit_json, read_safetensors, sums

HF = GOLDEN / "llama" / "hf"


def alone(tmp_path: Path, name: str) -> tuple[Path, Tensors]:
    """All weights in one file of this name, beside a config.json."""
    tensors = read_safetensors(HF)
    place = tmp_path / "run"
    place.mkdir()
    shutil.copy(HF / "config.json", place)
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(tensors, place / name, {"format": "pt", "step": "7"})
    else:
        torch.save(tensors, place / name)
    return place / name, tensors


def loads(directory: Path, tensors: Tensors) -> None:
    """transformers finds the files, and every weight in them."""
    model, said = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert_same(dict(model.state_dict()), tensors)


@pytest.mark.parametrize("name", ["run.ckpt", "weights.pt", "final.pth", "mine.bin", "mine.safetensors"])
def test_one_file_becomes_a_directory_that_transformers_loads(name: str, tmp_path: Path) -> None:
    source, tensors = alone(tmp_path, name)
    report = ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", verify=True)
    assert report.files == ["model.safetensors"]
    loads(tmp_path / "out", tensors)
    if name == "run.ckpt":
        assert run("verify", tmp_path / "out", "--strict").returncode == 0
    if name.endswith(".safetensors"):  # the same file, under the usual name
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_one_file_with_a_name_that_is_found_keeps_it(name: str, tmp_path: Path) -> None:
    source, _ = alone(tmp_path, name)
    assert ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf").files == [name]
    assert (tmp_path / "out" / name).read_bytes() == source.read_bytes()


def test_a_directory_keeps_its_names_and_verify_warns_of_those_that_are_not_found(tmp_path: Path) -> None:
    source, _ = alone(tmp_path, "mine.safetensors")
    ckpt_convert.convert_checkpoint(source.parent, tmp_path / "out", to="hf")
    assert sums(tmp_path / "out") == sums(source.parent)
    found = run("verify", tmp_path / "out", "--json")
    findings: list[dict[str, Any]] = json.loads(found.stdout)["findings"]
    (warning,) = [one for one in findings if one["severity"] == "warning"]
    assert (warning["check"], warning["file"]) == ("shards", "mine.safetensors")
    assert found.returncode == 0


def test_a_container_that_was_asked_for_is_kept(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "pt", to="hf", container="pt")
    assert ckpt_convert.convert_checkpoint(tmp_path / "pt", tmp_path / "again", to="hf").files == ["model.pt"]
    assert "model.pt is no name" in run("verify", tmp_path / "pt").stdout


def test_a_run_of_training_that_no_loader_finds_is_laid_out_anew(tmp_path: Path) -> None:
    """Also of a family that no table is of, and under a nest."""
    (tmp_path / "run").mkdir()
    shutil.copy(HF / "config.json", tmp_path / "run")
    edit_json(tmp_path / "run" / "config.json", model_type="other_model", architectures=["OtherModel"])
    tensors = {"a.weight": torch.ones(3, 4), "b.bias": torch.zeros(2, dtype=torch.float16)}
    torch.save(tensors, tmp_path / "run" / "last.ckpt")
    report = ckpt_convert.convert_checkpoint(
        tmp_path / "run" / "last.ckpt", tmp_path / "out", to="hf", from_format="hf"
    )
    assert report.files == ["model.safetensors"]
    assert_same(read_safetensors(tmp_path / "out"), tensors)
