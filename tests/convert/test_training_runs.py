"""Directories that training leaves, to Hugging Face in one command: which step is taken, and what only others merge."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckpt_convert import InputError, KeyMismatchError, convert_checkpoint
from tests.command import run
from tests.helpers import GOLDEN, assert_same, read_safetensors, sums

HF = GOLDEN / "llama" / "hf"


@pytest.fixture
def titan(tmp_path: Path) -> Path:
    """A run of torchtitan: two whole steps, and a newer one that was not finished."""
    steps = tmp_path / "outputs" / "checkpoint"
    for step in (90, 100):
        convert_checkpoint(HF, steps / f"step-{step}", to="torchtitan")
        shutil.rmtree(steps / f"step-{step}" / "ckpt_convert")
    (steps / "step-110").mkdir()
    (steps / "step-110" / "__0_0.distcp").write_bytes(b"PK")
    return tmp_path / "outputs"


@pytest.mark.parametrize("given", ["", "checkpoint"])
def test_the_newest_step_of_torchtitan(titan: Path, tmp_path: Path, given: str) -> None:
    report = convert_checkpoint(titan / given, tmp_path / "out", to="hf", like=HF, verify=True)
    assert sums(tmp_path / "out") == sums(HF)
    said = f"took step-100, the newest step of {titan / 'checkpoint'}; skipped, as without complete weights: step-110"
    assert said in report.notices


def fsdp(folder: Path) -> Path:
    """A step of Trainer or accelerate with FSDP's sharded state dict."""
    dcp.save({"model": read_safetensors(HF)}, checkpoint_id=folder / "pytorch_model_fsdp_0")
    dcp.save({"optimizer": {"state": {"a": torch.ones(2)}}}, checkpoint_id=folder / "optimizer_0")
    torch.save({}, folder / "scheduler.pt")
    return folder


def test_a_sharded_step_of_accelerate(tmp_path: Path) -> None:
    step = fsdp(tmp_path / "run")
    report = convert_checkpoint(step, tmp_path / "out", to="hf", like=HF, verify=True)
    assert sums(tmp_path / "out") == sums(HF)
    assert f"took pytorch_model_fsdp_0, which holds the model of {step}" in report.notices


def test_the_newest_sharded_step_of_trainer_with_the_runs_config(tmp_path: Path) -> None:
    fsdp(tmp_path / "run" / "checkpoint-5")
    fsdp(tmp_path / "run" / "checkpoint-10")
    shutil.copy(HF / "config.json", tmp_path / "run" / "config.json")
    done = run("convert", tmp_path / "run", tmp_path / "out", "--to", "hf", "--verify", code=0)
    assert "took pytorch_model_fsdp_0" in done.stderr or "took checkpoint-10" in done.stderr
    assert_same(read_safetensors(tmp_path / "out"), read_safetensors(HF))


def test_weights_at_the_root_are_taken_before_any_step(tmp_path: Path) -> None:
    shutil.copytree(HF, tmp_path / "run")
    fsdp(tmp_path / "run" / "checkpoint-5")
    report = convert_checkpoint(tmp_path / "run", tmp_path / "out", to="native")
    assert not any("took" in text for text in report.notices)


def test_a_step_as_it_is_stored(titan: Path, tmp_path: Path) -> None:
    convert_checkpoint(titan, tmp_path / "out", container="safetensors", verify=True)
    found = read_safetensors(tmp_path / "out")
    assert "layers.0.attention.wq.weight" in found or "layers.0.attention.qkv_linear.wq.weight" in found


def test_the_partitions_of_zero_are_named_with_the_tool_that_merges_them(tmp_path: Path) -> None:
    step = tmp_path / "run" / "global_step10"
    step.mkdir(parents=True)
    for rank in range(2):
        torch.save({}, step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    for given in (step, step.parent):
        with pytest.raises(KeyMismatchError, match=rf"DeepSpeed's ZeRO.*zero_to_fp32\.py {step.parent} OUT"):
            convert_checkpoint(given, tmp_path / "out", to="hf")


def test_steps_without_weights(tmp_path: Path) -> None:
    (tmp_path / "run" / "step-1").mkdir(parents=True)
    with pytest.raises(InputError, match="has no weight files"):
        convert_checkpoint(tmp_path / "run", tmp_path / "out", to="hf")
