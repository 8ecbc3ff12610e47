"""A run from a quantized source trains its numbers, and saves these in the source's files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ckpt_convert
from ckpt_convert import Checkpointer
from recipes.native_llama import NativeLlama
from tests.checkpoint.quantizing import fp8_llama
from tests.checkpointer.training import Trained, trainable
from tests.helpers import Tensors, assert_same, edit_json, read_safetensors, sums


@pytest.fixture
def source(tmp_path: Path) -> Path:
    fp8_llama(tmp_path / "source", source=trainable(tmp_path / "plain", dtype=torch.bfloat16))
    return tmp_path / "source"


def numbers(source: Path, into: Path) -> Tensors:
    ckpt_convert.convert_checkpoint(source, into, to="hf", dequantize="bfloat16")
    return read_safetensors(into)


def test_what_is_loaded_and_saved_are_the_numbers(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ckpt_convert")
    expected = numbers(source, tmp_path / "numbers")
    model = NativeLlama.from_config(source / "config.json").to(torch.bfloat16)
    with Checkpointer(source, tmp_path / "out", save_every=1) as checkpointer:
        loaded = checkpointer.load_model(model)
        assert dict(loaded.dtypes) == {("bfloat16", "bfloat16"): 30}
        assert "quantization_config" not in checkpointer.config
        checkpointer.register(model=model)
        checkpointer.step()
    assert_same(read_safetensors(tmp_path / "out" / "latest"), expected)
    plain = sums(tmp_path / "numbers")
    assert {name: digest for name, digest in sums(tmp_path / "out" / "latest").items() if name in plain} == plain
    said = [record.message for record in caplog.records if record.message.startswith("dequantized to bfloat16")]
    assert len(said) == 1
    config = json.loads((tmp_path / "out" / "latest" / "config.json").read_text())
    assert config == {k: v for k, v in json.loads((source / "config.json").read_text()).items() if "quant" not in k}


def test_a_run_goes_on_from_its_own_steps(source: Path, tmp_path: Path) -> None:
    model = NativeLlama.from_config(source / "config.json")
    trained = Trained(model=model)
    with Checkpointer(source, tmp_path / "out", save_every=2) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.register(**trained.parts)
        trained.go(checkpointer, 4)
    again = Trained(model=NativeLlama.from_config(source / "config.json"))
    with Checkpointer(source, tmp_path / "out", save_every=2) as checkpointer:
        assert checkpointer.resume(**again.parts) is not None
    assert_same(again.model.state_dict(), model.state_dict())
    models: Any = transformers.AutoModelForCausalLM
    _, info = models.from_pretrained(tmp_path / "out" / "latest", output_loading_info=True)
    assert not any(info.values()), info


def test_the_dtype_is_that_of_the_config(source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", dtype="float32")
    with Checkpointer(source) as checkpointer:
        loaded = checkpointer.load_model(NativeLlama.from_config(source / "config.json"))
    # What was not quantized is as it is.
    assert dict(loaded.dtypes) == {("float32", "float32"): 21, ("bfloat16", "float32"): 9}
