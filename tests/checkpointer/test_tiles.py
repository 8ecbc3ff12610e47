"""Llama 3.2 Vision in training: what its grids of tiles cannot hold of a table comes back unless they are trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ckpt_convert import Checkpointer
from tests.helpers import GOLDEN, Tensors, bits, read_safetensors, sums

TABLE = "vision_model.pre_tile_positional_embedding.embedding.weight"
GRID = "encoder.clip.pre_tile_pos_embed.embedding"
OTHER = "vision_model.post_tile_positional_embedding.embedding.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The golden case with tables in which every number is another one."""
    path = shutil.copytree(GOLDEN / "mllama" / "hf", tmp_path / "source")
    for file in path.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        for key in {TABLE, OTHER} & tensors.keys():
            tensors[key] = torch.arange(tensors[key].numel(), dtype=torch.float32).reshape(tensors[key].shape)
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return path


def native() -> Tensors:
    tensors = read_safetensors(GOLDEN / "mllama" / "native.safetensors")
    return {key: torch.full_like(tensor, float("nan")) for key, tensor in tensors.items()}


def weights(directory: Path) -> dict[str, str]:
    return {name: one for name, one in sums(directory).items() if not name.startswith("training_state/")}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_every_save_decides_anew(source: Path, tmp_path: Path, asynchronous: bool) -> None:
    model = native()
    options: dict[str, Any] = {"save_every": 1, "keep_last": 3, "asynchronous": asynchronous}
    with Checkpointer(source, tmp_path / "out", **options) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.register(model=model)
        checkpointer.step()
        checkpointer.wait()
        model[GRID][0, 1, 0, 3] += 1
        checkpointer.step()
        checkpointer.wait()
        model[GRID][0, 1, 0, 3] -= 1
        checkpointer.step()
        checkpointer.wait()
    assert weights(tmp_path / "out" / "step_1") == sums(source)
    assert weights(tmp_path / "out" / "step_3") == sums(source)
    before, after = read_safetensors(source), read_safetensors(tmp_path / "out" / "step_2")
    assert bits(after[OTHER]) == bits(before[OTHER])
    expected = torch.zeros(9, 4, 32)
    ratios = [(h, w) for h in range(1, 5) for w in range(1, 5) if h * w <= 4]
    grid = model[GRID].clone()
    grid[0, 1, 0, 3] += 1
    for number, (height, width) in enumerate(ratios, start=1):
        expected[number, : height * width] = grid[:height, :width].reshape(-1, 32)
    assert bits(after[TABLE]) == bits(expected.flatten(1))


def test_a_native_source_keeps_the_cells_that_no_image_has(tmp_path: Path) -> None:
    """A run of Hugging Face's model, whose tables have no room for them, saved as its source lies."""
    source = tmp_path / "source"
    source.mkdir()
    tensors = read_safetensors(GOLDEN / "mllama" / "native.safetensors")
    tensors[GRID] = torch.arange(tensors[GRID].numel(), dtype=torch.float32).reshape(tensors[GRID].shape) + 1
    safetensors.torch.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = {key: torch.full_like(one, float("nan")) for key, one in read_safetensors(GOLDEN / "mllama" / "hf").items()}
    shutil.copy(GOLDEN / "mllama" / "hf" / "config.json", tmp_path / "config.json")
    options: dict[str, Any] = {"save_every": 1, "keep_last": 3, "config": tmp_path / "config.json"}
    with Checkpointer(source, tmp_path / "out", model_format="hf", **options) as checkpointer:
        checkpointer.load_model(model)
        assert int((model[TABLE] == 0).sum()) > 0
        checkpointer.register(model=model)
        checkpointer.step()
        checkpointer.wait()
        model[TABLE][-1, 0] = -1.0  # the shape of four tiles above each other
        checkpointer.step()
        checkpointer.wait()
    assert sums(tmp_path / "out" / "step_1")["model.safetensors"] == sums(source)["model.safetensors"]
    found = read_safetensors(tmp_path / "out" / "step_2")[GRID]
    assert found[0, 0, 0, 0] == -1.0
    assert not found[1, 2:].any()
    assert torch.equal(found[0, 1:], tensors[GRID][0, 1:])
