"""Saving a model that is split over processes: the directory that one process would have written, file for file."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ckpt_convert import Checkpointer
from ckpt_convert.checkpoint.record import MANIFEST
from ckpt_convert.checkpointer.distributed import heartbeat, ranks
from tests.checkpointer.pool import Pool, split, tree_of
from tests.checkpointer.training import LLAMA, make_model, trainable
from tests.helpers import GOLDEN, assert_same, sums

WEIGHTS = {"contents": "weights", "save_every": 1}


def update(model: nn.Module) -> None:
    """What a step of training might do, in numbers that do not depend on how the model is split."""
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.add_(torch.sin(local) / 8)


def train(out: Path, model: nn.Module, source: Path, **options: Any) -> None:
    """Two steps, both saved."""
    config = None if source.is_dir() else LLAMA / "config.json"
    with Checkpointer(source, out, config=config, **{**WEIGHTS, **options}) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.register(model=model)
        for _ in range(2):
            checkpointer.step()
            update(model)


def train_split(here: Path, how: str, source: Path, options: dict[str, Any]) -> None:
    train(here / "out", split(make_model(), how), source, **options)


def check(here: Path, source: Path, **options: Any) -> None:
    """Hold all files against those of a run of one process."""
    train(here / "alone", make_model(), source, **options)
    for step in ("step_1", "step_2"):
        assert sums(here / "out" / step) == sums(here / "alone" / step)
        manifests = [json.loads((here / run / step / MANIFEST).read_text()) for run in ("out", "alone")]
        assert manifests[0]["files"] == manifests[1]["files"]
    assert (here / "out" / "latest").resolve().name == "step_2"
    assert not list((here / "out").glob(".*partial"))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_every_world(pool: Pool, how: str, world: int, tmp_path: Path) -> None:
    pool.run(train_split, tmp_path, how, LLAMA, {}, world=world)
    check(tmp_path, LLAMA)


@pytest.mark.parametrize("how", ["tp", "hsdp", "fsdp x tp"])
def test_every_mesh(pool: Pool, how: str, tmp_path: Path) -> None:
    pool.run(train_split, tmp_path, how, LLAMA, {}, world=4)
    check(tmp_path, LLAMA)


@pytest.mark.parametrize("name", ["meta-mp1", "meta-mp2", "meta-mp4", "native.safetensors", "torchtitan.safetensors"])
def test_every_format(pool: Pool, name: str, tmp_path: Path) -> None:
    """RoPE layouts change, and Meta's ranks cut what other processes hold."""
    source = LLAMA.parent / name
    pool.run(train_split, tmp_path, "fsdp", source, {}, world=3)
    check(tmp_path, source)


@pytest.mark.parametrize("output", ["meta", "native", "torchtitan"])
def test_another_format(pool: Pool, output: str, tmp_path: Path) -> None:
    options = {"output_format": output, "export_dtype": "bfloat16"}
    pool.run(train_split, tmp_path, "fsdp x tp", LLAMA, options, world=4)
    check(tmp_path, LLAMA, **options)


def save_slices(here: Path, source: Path, model_format: Any, writers: Any = "auto") -> None:
    """Save a state dict whose tensors are split in all ways that a mesh of 2 x 2 has, one after another."""
    mesh = init_device_mesh("cpu", (2, 2))
    whole = Checkpointer(source).load_state_dict(model_format)
    model = {}
    for number, (key, tensor) in enumerate(whole.items()):
        dims = [dim for dim in range(tensor.dim()) if tensor.shape[dim] > 1]
        kinds = [Replicate(), *map(Shard, dims)]
        placements = [kinds[number % len(kinds)], kinds[number // len(kinds) % len(kinds)]]
        model[key] = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    options: dict[str, Any] = {"model_format": model_format, "contents": "weights", "writers": writers}
    with Checkpointer(source, here / "out", **options) as checkpointer:
        checkpointer.register(model=model)
        checkpointer.save()


@pytest.mark.parametrize(
    ("family", "model_format"),
    [
        ("mixtral", "meta"),
        ("mixtral", "hf"),
        ("qwen3_moe", "torchtitan"),
        ("gpt_oss", "torchtitan"),
        ("deepseek_v3", "torchtitan"),
        ("phi3", "native"),
        ("llama4", "native"),
        ("gemma2", "native"),
        ("llama_tied", "native"),
    ],
)
def test_every_family_and_way_of_splitting(pool: Pool, family: str, model_format: str, tmp_path: Path) -> None:
    """Experts are stacked or apart, projections fused, tensors transposed: the files are the source's."""
    source = GOLDEN / family / "hf"
    pool.run(save_slices, tmp_path, source, model_format, world=4)
    assert sums(source).items() <= sums(tmp_path / "out" / "step_0").items()


# Training state


def optimize(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """An optimizer step with gradients that do not depend on how the model is split."""
    for parameter in model.parameters():
        parameter.grad = torch.sin(parameter.detach())
    optimizer.step()
    optimizer.zero_grad()


def train_full(out: Path, model: nn.Module, source: Path, until: int, **options: Any) -> dict[str, torch.Tensor]:
    """Go on from what is there until a step, all of them saved; what the optimizer has then, whole, by name."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with Checkpointer(source, out, save_every=1, **options) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.resume(model=model, optimizer=optimizer)
        while checkpointer.progress.step < until:
            optimize(model, optimizer)
            checkpointer.step()
    return whole_state(model, optimizer)


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What an optimizer has, whole, by the names of the parameters."""
    return {
        f"{name.removeprefix('module.')}/{key}": one.full_tensor() if isinstance(one, DTensor) else one
        for name, parameter in model.named_parameters()
        for key, one in optimizer.state[parameter].items()
    }


def train_full_split(
    here: Path, how: str, source: Path, until: int, options: dict[str, Any]
) -> dict[str, torch.Tensor]:
    return train_full(here / "out", split(make_model(), how), source, until, **options)


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sync", "async"])
@pytest.mark.parametrize("worlds", [(2, 3, 4), (4, 2, 1)], ids=str)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_resumed_by_other_worlds(
    pool: Pool, how: str, worlds: tuple[int, ...], asynchronous: bool, tmp_path: Path
) -> None:
    """Weights, optimizer and step go on exactly, as in a run of one process that is never interrupted."""
    source = trainable(tmp_path / "source")
    options = {"asynchronous": asynchronous}
    expected = train_full(tmp_path / "alone", make_model(), source, 2 * len(worlds))
    for number, world in enumerate(worlds, 1):
        for state in pool.run(train_full_split, tmp_path, how, source, 2 * number, options, world=world):
            found = state
    assert_same(found, expected)
    for step in range(1, 2 * len(worlds) + 1):
        kept = [
            {name: one for name, one in sums(tmp_path / run / f"step_{step}").items() if "training_state" not in name}
            for run in ("out", "alone")
        ]
        assert kept[0] == kept[1]


def test_torch_reads_the_state_of_several_ranks(pool: Pool, tmp_path: Path) -> None:
    source = trainable(tmp_path / "source")
    expected = pool.run(train_full_split, tmp_path, "fsdp", source, 1, {}, world=3)[0]
    state = {f"optimizer/state/{key}": torch.zeros_like(tensor) for key, tensor in expected.items()}
    dcp.load(state, checkpoint_id=tmp_path / "out" / "step_1" / "training_state", no_dist=True)  # type: ignore[attr-defined]
    assert_same({key.removeprefix("optimizer/state/"): tensor for key, tensor in state.items()}, expected)


# Pipeline stages


def save_stage(here: Path) -> None:
    """Each rank has some of the layers, and nothing of the others."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = Checkpointer(LLAMA).load_state_dict("native")
    keys = sorted(whole)
    stage = {key: whole[key] for key in keys[rank * len(keys) // world : (rank + 1) * len(keys) // world]}
    with Checkpointer(LLAMA, here / "out", contents="weights") as checkpointer:
        checkpointer.register(model=stage)
        checkpointer.save()


def test_pipeline_stages(pool: Pool, tmp_path: Path) -> None:
    pool.run(save_stage, tmp_path, world=3)
    assert sums(LLAMA).items() <= sums(tmp_path / "out" / "step_0").items()


def train_stage(here: Path, source: Path, until: int) -> dict[str, torch.Tensor]:
    """Go on with some of the layers; what the optimizer has for these."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    whole = Checkpointer(source).load_state_dict("native")
    keys = sorted(whole)[rank::world]
    model = tree_of({key: whole[key] for key in keys})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with Checkpointer(source, here / "out", save_every=1) as checkpointer:
        checkpointer.resume(model=model, optimizer=optimizer)
        while checkpointer.progress.step < until:
            optimize(model, optimizer)
            checkpointer.step()
    parameters = dict(model.named_parameters())
    return {f"{key}/{name}": one for key in keys for name, one in optimizer.state[parameters[key]].items()}


def test_optimizers_of_pipeline_stages(pool: Pool, tmp_path: Path) -> None:
    """Each rank has the optimizer of its layers; others go on with others, and one process with all."""
    source = trainable(tmp_path / "source")
    expected = train_full(tmp_path / "alone", make_model(), source, 6)
    pool.run(train_stage, tmp_path, source, 2, world=3)
    stages = pool.run(train_stage, tmp_path, source, 4, world=2)
    assert not stages[0].keys() & stages[1].keys()
    assert_same(train_stage(tmp_path, source, 6), expected)
    for step in range(1, 7):
        kept = [
            {name: one for name, one in sums(tmp_path / run / f"step_{step}").items() if "training_state" not in name}
            for run in ("out", "alone")
        ]
        assert kept[0] == kept[1]


# What is asked of the store


class CountingStore:
    """A store that counts what is asked of it."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.asked = 0

    def clone(self) -> CountingStore:
        """A connection of its own, counted with this one."""
        return self

    def __getattr__(self, name: str) -> Any:
        self.asked += 1
        return getattr(self._store, name)


def count_calls(here: Path, options: dict[str, Any]) -> list[int]:
    """What ten steps ask of which none is saved, and the one that is; what a thread asks each few seconds left out."""
    counting = CountingStore(ranks.store_of_group())
    with mock.patch.object(ranks, "store_of_group", return_value=counting), mock.patch.object(heartbeat, "BEAT", 1e6):
        model = split(make_model(), "ddp")
        with Checkpointer(LLAMA, here / "out", contents="weights", save_last=False, **options) as checkpointer:
            checkpointer.register(model=model)
            before = counting.asked
            for _ in range(10):
                checkpointer.step()
            between = counting.asked
            checkpointer.step()
            return [between - before, counting.asked - between]


@pytest.mark.parametrize(
    "options", [{"save_every": 11}, {"save_every": [11, "2 h"]}, {"save_every": 11, "save_on_signal": True}], ids=str
)
def test_steps_that_are_not_saved_ask_nobody(pool: Pool, options: dict[str, Any], tmp_path: Path) -> None:
    for idle, saved in pool.run(count_calls, tmp_path, options):
        assert idle == 0
        assert saved > 0


# Steps that one rank asks for


def stop(here: Path, reached: tuple[int, ...]) -> int:
    """A signal reaches some ranks, somewhere in their third step; returns the step after which the loop was left."""
    model = split(make_model(), "ddp")
    with (
        mock.patch.object(heartbeat, "BEAT", 0.05),
        Checkpointer(LLAMA, here / "out", contents="weights", save_on_signal=True) as checkpointer,
    ):
        checkpointer.register(model=model)
        while not checkpointer.should_stop:
            dist.barrier()  # as a step of training has ranks wait for each other
            if dist.get_rank() in reached and checkpointer.progress.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            checkpointer.step()
        return checkpointer.progress.step


def test_a_signal_to_one_rank_stops_all_at_one_step(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(stop, tmp_path, (1,))
    assert first == second >= 5
    assert [path.name for path in (tmp_path / "out").glob("step_*")] == [f"step_{first}"]


def test_a_signal_to_all_ranks_stops_them_two_steps_later(pool: Pool, tmp_path: Path) -> None:
    """Nobody has to be told by a thread."""
    assert pool.run(stop, tmp_path, (0, 1)) == [5, 5]
    assert [path.name for path in (tmp_path / "out").glob("step_*")] == ["step_5"]


def clocked(here: Path) -> list[int]:
    """Ranks of which one is slower to start its clock; returns what was saved."""
    model = split(make_model(), "ddp")
    with (
        mock.patch.object(heartbeat, "BEAT", 0.02),
        Checkpointer(LLAMA, here / "out", contents="weights", save_every="0.3 s", save_last=False) as checkpointer,
    ):
        checkpointer.register(model=model)
        while not checkpointer.saved:
            time.sleep(0.1 if dist.get_rank() == 0 else 0.01)
            dist.barrier()
            checkpointer.step()
        return [saved.step for saved in checkpointer.saved]


def test_the_clock_of_the_first_rank_counts(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(clocked, tmp_path)
    assert first == second
    assert first
    assert min(first) > 3
