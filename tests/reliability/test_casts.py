"""Casts lose nothing without a word: what becomes infinite is counted, and config.json names the dtype that is there.

torch casts, safetensors reads.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ckpt_convert
from ckpt_convert import Checkpointer
from tests.checkpointer.training import LLAMA, Trained, trainable
from tests.command import run
from tests.helpers import Tensors, assert_same, bits, edit_json, read_meta, read_safetensors

TOO_LARGE = "model.layers.1.mlp.up_proj.weight"
FP8 = torch.float8_e4m3fn


def change(directory: Path, made: Any) -> Tensors:
    """Rewrite every tensor of a checkpoint as ``made(key, tensor)``; returns all of them."""
    out: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors = {key: made(key, tensor) for key, tensor in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(tensors, file, {"format": "pt"})
        out |= tensors
    return out


def large(directory: Path, count: int = 3) -> Tensors:
    """A checkpoint of which so many values of one tensor are too large for float16, and one is infinite already."""
    trainable(directory)

    def some(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if key == TOO_LARGE:
            tensor[0, :count] = torch.tensor([65520.0, -7e4, 3e38])[:count]
            tensor[1, 0], tensor[1, 1], tensor[1, 2] = float("inf"), float("nan"), 65519.0
        return tensor

    return change(directory, some)


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_a_cast_that_makes_values_infinite_is_refused_with_names_and_counts(to: str, tmp_path: Path) -> None:
    """Also where the values are cut over ranks: each counts once."""
    tensors = large(tmp_path / "source")
    out, ranks = tmp_path / "out", {"model_parallel": 2} if to == "meta" else {}
    with pytest.raises(ckpt_convert.LossyConversionError) as caught:
        ckpt_convert.convert_checkpoint(tmp_path / "source", out, to=to, dtype="float16", verify=True, **ranks)  # type: ignore[arg-type]
    key = "layers.1.feed_forward.w3.weight" if to == "meta" else TOO_LARGE
    assert caught.value.tensors == {key: 3}
    assert f"{key} (3)" in str(caught.value)
    assert "`allow_overflow=True`" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    report = ckpt_convert.convert_checkpoint(
        tmp_path / "source", out, to=to, dtype="float16", allow_overflow=True, verify=True, **ranks
    )  # type: ignore[arg-type]
    assert report.overflows == {key: 3}
    if to == "hf":
        assert_same(read_safetensors(out), {name: tensor.half() for name, tensor in tensors.items()})
    else:
        whole = torch.cat([rank[key] for rank in read_meta(out)])
        assert bits(whole) == bits(tensors[TOO_LARGE].half())


def test_copies_on_ranks_count_once(tmp_path: Path) -> None:
    trainable(tmp_path / "source")

    def norm(key: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_fill(0, torch.tensor([0, 5]), 1e5) if key == "model.norm.weight" else tensor

    change(tmp_path / "source", norm)
    with pytest.raises(ckpt_convert.LossyConversionError) as caught:
        ckpt_convert.convert_checkpoint(
            tmp_path / "source", tmp_path / "out", to="meta", dtype="float16", model_parallel=4
        )
    assert caught.value.tensors == {"norm.weight": 2}


def test_the_command_says_so_and_how_to_accept_it(tmp_path: Path) -> None:
    large(tmp_path / "source", 1)
    words = ("convert", tmp_path / "source", tmp_path / "out", "--to", "hf", "--dtype", "float16", "--verify")
    refused = run(*words)
    assert refused.returncode == 1
    assert f"1 finite value becomes infinite, of {TOO_LARGE} (1)" in refused.stderr
    assert not (tmp_path / "out").exists()
    accepted = run(*words, "--allow-overflow", "--json")
    assert accepted.returncode == 0, accepted.stderr
    assert json.loads(accepted.stdout)["overflows"] == {TOO_LARGE: 1}
    against = run("verify", tmp_path / "out", "--against", tmp_path / "source", "--json")
    assert against.returncode == 1
    assert "1 of them NaN or infinite on one side only" in against.stdout


def test_values_that_fit_and_those_that_were_infinite_already_pass(tmp_path: Path) -> None:
    tensors = large(tmp_path / "source", 0)
    report = ckpt_convert.convert_checkpoint(
        tmp_path / "source", tmp_path / "out", to="hf", dtype="float16", verify=True
    )
    assert report.overflows == {}
    assert_same(read_safetensors(tmp_path / "out"), {key: tensor.half() for key, tensor in tensors.items()})
    large(tmp_path / "wide", 2)
    assert (
        ckpt_convert.convert_checkpoint(tmp_path / "wide", tmp_path / "bf16", to="hf", dtype="bfloat16").overflows == {}
    )


def test_what_was_written_before_an_interruption_is_counted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that is done is not read again on --resume: one that overflows is."""
    import os

    large(tmp_path / "source")
    rename = os.rename

    def interrupted(source: Any, target: Any, **rest: Any) -> None:
        if str(target).endswith("out"):
            raise KeyboardInterrupt
        rename(source, target, **rest)

    options: dict[str, Any] = {"to": "hf", "dtype": "float16"}
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "out", allow_overflow=True, **options)
    with pytest.raises(ckpt_convert.LossyConversionError) as caught:
        ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "out", resume=True, **options)
    assert caught.value.tensors == {TOO_LARGE: 3}


@pytest.mark.parametrize("contents", ["full", "weights"])
def test_a_training_run_saves_the_step_says_it_and_keeps_the_exact_values(
    contents: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainable(tmp_path / "source")
    trained = Trained(tmp_path / "source")
    key = "layers.1.mlp.w3.weight"
    with (
        caplog.at_level(logging.WARNING, "ckpt_convert"),
        Checkpointer(tmp_path / "source", tmp_path / "run", export_dtype="float16", contents=contents) as checkpointer,
    ):
        checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        checkpointer.save()
        assert not any("infinite" in text for text in caplog.messages)
        trained.go(checkpointer, 1)
        with torch.no_grad():
            trained.model.get_parameter(key)[2, :2] = torch.tensor([1e5, -1e6])
        checkpointer.save()
    (said,) = [text for text in caplog.messages if "infinite" in text]
    assert f"2 finite values become infinite, of {TOO_LARGE} (2)" in said
    assert ("training_state keeps them exact" if contents == "full" else "nothing keeps them exact") in said
    step = max((tmp_path / "run").glob("step_*"))
    exact = trained.model.get_parameter(key).detach()
    assert bits(read_safetensors(step)[TOO_LARGE]) == bits(exact.half())
    if contents == "full":
        again = Trained(tmp_path / "source")
        with Checkpointer(tmp_path / "source", tmp_path / "run", export_dtype="float16") as checkpointer:
            checkpointer.resume(**again.parts)
        assert bits(again.model.get_parameter(key)) == bits(exact)


def test_a_model_that_is_loaded_in_too_narrow_a_dtype_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    large(tmp_path / "source", 2)
    trained = Trained(tmp_path / "source", torch.float16)
    with Checkpointer(tmp_path / "source", tmp_path / "run") as checkpointer:
        checkpointer.load_model(trained.model)
    (said,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "2 finite values become infinite, of layers.1.mlp.w3.weight (2)" in said


# Casts of what is not quantized, though it is narrow


def narrow(directory: Path) -> Tensors:
    """Most weights in fp8 without scales, as merges and casts by hand leave them; the config says so."""
    shutil.copytree(LLAMA, directory)
    edit_json(directory / "config.json", dtype="float8_e4m3fn", torch_dtype=None)
    return change(directory, lambda key, t: torch.sin(t).to(FP8 if key.endswith("_proj.weight") else torch.bfloat16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fp8_without_scales_is_cast_exactly(dtype: str, tmp_path: Path) -> None:
    tensors = narrow(tmp_path / "source")
    wanted = {key: tensor.to(getattr(torch, dtype)) for key, tensor in tensors.items()}
    ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "out", to="hf", dtype=dtype, verify=True)
    assert_same(read_safetensors(tmp_path / "out"), wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_a_cast_that_would_leave_most_weights_is_refused_with_the_count(tmp_path: Path) -> None:
    config = json.loads((LLAMA / "config.json").read_text()) | {"model_type": "unknown_model"}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    tensors = {"a": torch.zeros(40, dtype=torch.int8), "b": torch.zeros(30, dtype=torch.int16), "c": torch.ones(8)}
    safetensors.torch.save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    words = ("convert", tmp_path / "source", tmp_path / "out", "--to", "hf", "--dtype", "bfloat16")
    refused = run(*words)
    assert refused.returncode == 2
    assert "--dtype bfloat16: 2 of 3 tensors" in refused.stderr
    assert not (tmp_path / "out").exists()
    # Whole numbers beside the weights stay what they are.
    tensors["c"] = torch.ones(800)
    safetensors.torch.save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "out", to="hf", dtype="bfloat16")
    assert_same(read_safetensors(tmp_path / "out"), tensors | {"c": tensors["c"].bfloat16()})


def test_the_config_of_another_checkpoint_is_made_to_say_the_dtype_that_is_written(tmp_path: Path) -> None:
    """A run in float32 of a model whose config says bfloat16, by --config and by --like; its own config stays."""
    trainable(tmp_path / "model", dtype=torch.bfloat16)
    ckpt_convert.convert_checkpoint(tmp_path / "model", tmp_path / "titan", to="torchtitan", dtype="float32")
    shutil.rmtree(tmp_path / "titan" / "ckpt_convert")
    config = tmp_path / "model" / "config.json"
    ckpt_convert.convert_checkpoint(tmp_path / "titan", tmp_path / "by-config", to="hf", config=config)
    ckpt_convert.convert_checkpoint(
        tmp_path / "titan", tmp_path / "by-like", to="hf", config=config, like=tmp_path / "model"
    )
    for name in ("by-config", "by-like"):
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "float32"
        assert {tensor.dtype for tensor in read_safetensors(tmp_path / name).values()} == {torch.float32}
    # Where the weights are as the config says, it is taken byte for byte; so is a source's own, whatever it says.
    ckpt_convert.convert_checkpoint(tmp_path / "titan", tmp_path / "same", to="hf", config=config, dtype="bfloat16")
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == json.loads(config.read_text())
    edit_json(config, dtype="float32")
    ckpt_convert.convert_checkpoint(tmp_path / "model", tmp_path / "copy", to="hf", shards=2)
    assert (tmp_path / "copy" / "config.json").read_bytes() == config.read_bytes()
