"""torchtitan's layout behind a training loop: as the model's keys, as the source's files, and as the output's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import ckpt_convert
from ckpt_convert import Checkpointer
from tests.checkpointer.test_checkpointer_identity import load_and_save
from tests.containers.test_dcp import written
from tests.convert.test_torchtitan import by_torch, halves
from tests.helpers import GOLDEN, Tensors, assert_same, read_safetensors, sums

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
HF = GOLDEN / "llama" / "hf"


def titan() -> Tensors:
    return read_safetensors(GOLDEN / "llama" / "torchtitan.safetensors")


def empty() -> Tensors:
    """Tensors with the keys and shapes that torchtitan gives the model, to be loaded into."""
    return {key: torch.full_like(tensor, float("nan")) for key, tensor in titan().items()}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_model_of_torchtitan_from_hf(asynchronous: bool, tmp_path: Path) -> None:
    model = empty()
    found = load_and_save(HF, tmp_path / "out", model, model_format="torchtitan", asynchronous=asynchronous)
    assert found == sums(HF)
    assert_same(model, titan())


def test_a_source_that_torchtitan_wrote(tmp_path: Path) -> None:
    dcp.state_dict_saver.save(titan(), checkpoint_id=tmp_path / "source", no_dist=True)
    model = empty()
    options = {"model_format": "torchtitan", "config": HF / "config.json"}
    assert load_and_save(tmp_path / "source", tmp_path / "out", model, **options) == sums(tmp_path / "source")
    assert_same(model, titan())
    assert_same(by_torch(tmp_path / "out" / "step_1", titan()), titan())


def test_a_source_that_two_ranks_wrote(tmp_path: Path) -> None:
    written(tmp_path / "source", {key: (tensor, halves(tensor)) for key, tensor in titan().items()})
    options = {"model_format": "torchtitan", "config": HF / "config.json"}
    assert load_and_save(tmp_path / "source", tmp_path / "out", empty(), **options) == sums(tmp_path / "source")


def test_changed_weights_are_those_that_torch_loads(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "source", to="torchtitan")
    model = empty()
    with Checkpointer(tmp_path / "source", tmp_path / "out", model_format="torchtitan", save_every=1) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.register(model=model)
        for tensor in model.values():
            tensor += 1
        checkpointer.step()
    expected = {key: tensor + 1 for key, tensor in titan().items()}
    assert_same(by_torch(tmp_path / "out" / "step_1", expected), expected)
    assert (tmp_path / "out" / "step_1" / "training_state" / ".metadata").is_file()


def test_another_format_than_the_source(tmp_path: Path) -> None:
    found = load_and_save(HF, tmp_path / "out", empty(), model_format="torchtitan", output_format="torchtitan")
    assert ".metadata" in found
    assert_same(by_torch(tmp_path / "out" / "step_1", titan()), titan())
