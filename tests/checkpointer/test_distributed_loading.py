"""Loading a model that is split over processes: each has its slices, and reads no more than that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ckpt_convert import Checkpointer, KeyMismatchError
from tests.checkpointer.pool import Pool, split, tree_of
from tests.checkpointer.training import LLAMA, make_model, trainable
from tests.helpers import assert_same


def load(here: Path, how: str, source: Path, meta: bool) -> int:
    """Load, and hold each tensor against that of a model of one process; returns the bytes that were read."""
    whole = make_model()
    with torch.device("meta" if meta else "cpu"):
        model = split(make_model(), how)
    if meta:
        model.to_empty(device="cpu")
    config = None if source.is_dir() else LLAMA / "config.json"
    with Checkpointer(source, config=config) as checkpointer:
        checkpointer.load_model(whole)
        loaded = checkpointer.load_model(model)
    expected = whole.state_dict()
    for key, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(full, expected[key.removeprefix("module.")]), key
    return loaded.bytes


@pytest.mark.parametrize("how", ["ddp", "fsdp", "tp", "hsdp", "fsdp x tp"])
def test_each_process_has_its_slices(pool: Pool, how: str, tmp_path: Path) -> None:
    pool.run(load, tmp_path, how, LLAMA, how != "ddp", world=4)


@pytest.mark.parametrize("name", ["meta-mp1", "meta-mp2", "native.safetensors", "torchtitan.safetensors"])
def test_from_every_format_on_three_processes(pool: Pool, name: str, tmp_path: Path) -> None:
    pool.run(load, tmp_path, "fsdp", LLAMA.parent / name, True, world=3)


# Pipeline stages: each rank has some of the layers, and nothing of the others


def stage_of(source: Path) -> nn.Module:
    """A model with every other key of the source's, and other values."""
    whole = Checkpointer(source).load_state_dict("native")
    keys = sorted(whole)[dist.get_rank() :: dist.get_world_size()]
    return tree_of({key: torch.full_like(whole[key], 7) for key in keys})


def assert_loaded(model: nn.Module, source: Path) -> None:
    whole = Checkpointer(source).load_state_dict("native")
    assert_same(model.state_dict(), {key: whole[key] for key in model.state_dict()})


def load_stage(here: Path, alone: bool) -> tuple[str, ...]:
    model = stage_of(LLAMA)
    with Checkpointer(
        LLAMA, None if alone else here / "out", process_group=dist.group.WORLD if alone else None, save_last=False
    ) as checkpointer:
        report = checkpointer.load_model(model)
    assert_loaded(model, LLAMA)
    return report.unexpected


@pytest.mark.parametrize("alone", [True, False], ids=["load only", "and save"])
def test_a_stage_is_all_that_is_expected_of_it(pool: Pool, alone: bool, tmp_path: Path) -> None:
    assert pool.run(load_stage, tmp_path, alone, world=3) == [(), (), ()]


def load_incomplete(here: Path) -> str:
    """Stages that have not all layers together."""
    model = stage_of(LLAMA)
    if hasattr(model, "norm"):
        del model.norm
    with pytest.raises(KeyMismatchError) as raised, Checkpointer(LLAMA, here / "out", save_last=False) as checkpointer:
        checkpointer.load_model(model)
    return str(raised.value)


def test_what_no_stage_has_is_refused_on_all(pool: Pool, tmp_path: Path) -> None:
    said = pool.run(load_incomplete, tmp_path, world=3)
    assert len(set(said)) == 1
    assert "norm.scale: the checkpoint has it, the model has not" in said[0]


def train_stage(here: Path, source: Path) -> None:
    """Two steps, of which the first is the best; then its weights alone, twice."""
    model = stage_of(source)
    checkpointer = Checkpointer(source, here / "out", save_every=1, best="loss:min")
    with checkpointer:
        checkpointer.load_model(model)
        checkpointer.register(model=model)
        for loss in (1, 2):
            checkpointer.step()
            checkpointer.report(loss=loss)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1)
        found = checkpointer.load_best(model)
        assert found is not None
        assert found.step == 1
        assert_loaded(model, source)
    other = stage_of(source)
    with Checkpointer(source, here / "out", save_last=False) as checkpointer:
        checkpointer.resume(model=other, weights_only=True, from_=1)
        assert_loaded(other, source)


def test_the_best_weights_of_stages(pool: Pool, tmp_path: Path) -> None:
    pool.run(train_stage, tmp_path, trainable(tmp_path / "source"), world=3)
