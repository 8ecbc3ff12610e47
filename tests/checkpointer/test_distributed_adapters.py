"""Adapters of models that are split over processes: PEFT's files and merged weights are those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ckpt_convert import AdapterConfig, Checkpointer, UsageError
from ckpt_convert.checkpoint.record import MANIFEST
from recipes.native_llama import NativeLlama, add_lora
from tests.checkpointer.pool import Pool
from tests.checkpointer.test_distributed_saving import optimize
from tests.checkpointer.test_distributed_speaking import lines_of
from tests.checkpointer.training import make_model, trainable
from tests.helpers import assert_same, sums

TARGETS = ("q_proj", "k_proj", "output_proj", "w1", "w2")


def model_of(*, dora: bool) -> NativeLlama:
    """A model with an adapter in which no value is zero; the norm at its end is trained whole."""
    torch.manual_seed(1)
    model = make_model()
    add_lora(model, 3, 6.0, TARGETS, dora=dora)
    model.norm.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if "lora" in name or "magnitude" in name:
            nn.init.uniform_(parameter, 0.1, 0.9)
    return model


def split(model: NativeLlama, how: str) -> nn.Module:
    """The model over all processes; tensor parallelism splits rows, columns and nothing in turn."""
    world = dist.get_world_size()
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    names = {"fsdp": ("dp",), "fsdp by columns": ("dp",), "tp": ("tp",), "hsdp": ("replicas", "dp")}
    axes = names.get(how, ("dp", "tp"))
    mesh = init_device_mesh("cpu", (2, world // 2) if len(axes) > 1 else (world,), mesh_dim_names=axes)
    if "tp" in axes:
        for number, (key, parameter) in enumerate(list(model.named_parameters())):
            kinds = [Shard(dim) for dim in range(parameter.dim()) if parameter.shape[dim] > 1]
            kind = [*kinds, Replicate()][number % (len(kinds) + 1)]
            whole = distribute_tensor(parameter.detach(), mesh["tp"], [kind], src_data_rank=None)
            owner, _, last = key.rpartition(".")
            held = nn.Parameter(whole, requires_grad=parameter.requires_grad)
            model.get_submodule(owner).register_parameter(last, held)
    by_columns = (lambda one: Shard(-(one.shape[-1] % world == 0) % one.dim())) if how == "fsdp by columns" else None
    if how != "tp":
        fully_shard(model, mesh=mesh if how == "hsdp" else mesh["dp"], shard_placement_fn=by_columns)
    return model


def train(out: Path, model: nn.Module, source: Path, until: int, dora: bool, **options: Any) -> dict[str, Any]:
    """Go on until a step, all of them saved; returns the trained tensors, whole, by name."""
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), 1e-2)
    config = AdapterConfig(3, 6.0, use_dora=dora, modules_to_save=("norm",))
    with Checkpointer(source, out, adapter=config, save_every=1, **options) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.resume(model=model, optimizer=optimizer)
        while checkpointer.progress.step < until:
            optimize_trained(trained, optimizer)
            checkpointer.step()
    return {
        f"{name.removeprefix('module.')}/{key}": one.full_tensor() if isinstance(one, DTensor) else one.detach()
        for name, parameter in trained.items()
        for key, one in (*optimizer.state[parameter].items(), ("value", parameter.detach()))
    }


def optimize_trained(trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    holder = nn.ParameterDict({name.replace(".", "/"): one for name, one in trained.items()})
    optimize(holder, optimizer)


def train_split(here: Path, how: str, source: Path, until: int, dora: bool, options: dict[str, Any]) -> dict[str, Any]:
    return train(here / "out", split(model_of(dora=dora), how), source, until, dora, **options)


def files_of(step: Path) -> Any:
    """The sums of a step's files without the training state, and what the manifests say of them."""
    found = {name: one for name, one in sums(step).items() if not name.startswith("training_state/")}
    manifest = json.loads((step / MANIFEST).read_text())
    merged = step / "merged" / MANIFEST
    training = {name: manifest["training"].get(name) for name in ("base", "files", "contents")}
    return found, training, json.loads(merged.read_text())["files"] if merged.exists() else None


def check(here: Path, source: Path, steps: int, dora: bool, **options: Any) -> dict[str, Any]:
    expected = train(here / "alone", model_of(dora=dora), source, steps, dora, **options)
    for step in range(1, steps + 1):
        assert files_of(here / "out" / f"step_{step}") == files_of(here / "alone" / f"step_{step}")
    return expected


@pytest.mark.parametrize(
    ("how", "world", "dora", "asynchronous"),
    [
        ("ddp", 3, False, True),
        ("ddp", 4, True, False),
        ("fsdp", 3, True, True),
        ("fsdp", 2, False, False),
        ("fsdp by columns", 4, False, False),
        ("fsdp by columns", 2, True, True),
        ("hsdp", 4, True, False),
        ("tp", 3, False, True),
        ("tp", 4, True, False),
        ("fsdp x tp", 4, False, False),
    ],
)
def test_merged_weights_beside_the_adapter(
    pool: Pool, how: str, world: int, dora: bool, asynchronous: bool, tmp_path: Path
) -> None:
    source = trainable(tmp_path / "source")
    options: dict[str, Any] = {"merged": True, "asynchronous": asynchronous}
    options |= {"writers": "auto" if how == "ddp" else "direct"}  # else columns would be exchanged for rows
    found = pool.run(train_split, tmp_path, how, source, 2, dora, options, world=world)[0]
    expected = check(tmp_path, source, 2, dora, **options)
    assert_same(found, expected)
    assert (tmp_path / "out" / "step_2" / "merged" / "model.safetensors.index.json").exists()


def save_too_large(here: Path, out: str, how: str | None, writers: Any = "auto") -> list[str]:
    """Save weights of float16 that an adapter makes infinite; the warnings that are logged."""
    model = split(model_of(dora=False).half(), how) if how else model_of(dora=False).half()
    config = AdapterConfig(3, 1e6, modules_to_save=("norm",))
    with Checkpointer(here / "source", here / out, adapter=config, merged=True, writers=writers) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.register(model=model)
        lines = lines_of(checkpointer.save)
    return [line.replace(str(here / out), "OUT") for line in lines if line.startswith("WARNING")]


@pytest.mark.parametrize(("how", "writers"), [("fsdp", "direct"), ("fsdp x tp", "direct"), ("tp", "exchange")])
def test_values_that_merging_makes_infinite_are_told_once(pool: Pool, how: str, writers: str, tmp_path: Path) -> None:
    trainable(tmp_path / "source", dtype=torch.float16)
    expected = save_too_large(tmp_path, "alone", None)
    assert len(expected) == 1
    assert "finite values become infinite" in expected[0]
    first, *others = pool.run(save_too_large, tmp_path, "out", how, writers, world=4)
    assert first == expected
    assert others == [[]] * 3


@pytest.mark.parametrize("contents", ["full", "adapter", "weights"])
@pytest.mark.parametrize(("how", "world"), [("ddp", 2), ("fsdp x tp", 4)])
def test_the_adapter_alone(pool: Pool, how: str, world: int, contents: str, tmp_path: Path) -> None:
    source = trainable(tmp_path / "source")
    pool.run(train_split, tmp_path, how, source, 2, False, {"contents": contents}, world=world)
    check(tmp_path, source, 2, False, contents=contents)


def test_resumed_by_other_worlds(pool: Pool, tmp_path: Path) -> None:
    source = trainable(tmp_path / "source")
    for number, (how, world) in enumerate([("fsdp", 3), ("tp", 4), ("ddp", 2)], 1):
        pool.run(train_split, tmp_path, how, source, 2 * number, True, {}, world=world)
    found = train(tmp_path / "out", model_of(dora=True), source, 8, True)
    assert_same(found, check(tmp_path, source, 8, True))


def columns_of_columns(here: Path, source: Path) -> str:
    """DoRA on weights whose columns tensor parallelism has split, and FSDP2 splits once more."""
    model = model_of(dora=True)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layer = model.layers[0].mlp.w2
    whole = distribute_tensor(layer.weight.detach(), mesh["tp"], [Shard(1)], src_data_rank=None)
    layer.weight = nn.Parameter(whole, requires_grad=False)
    fully_shard(model, mesh=mesh["dp"], shard_placement_fn=lambda one: Shard(int(one is layer.weight)))
    config = AdapterConfig(3, 6.0, use_dora=True, modules_to_save=("norm",))
    checkpointer = Checkpointer(source, here / "out", adapter=config, merged=True)
    with pytest.raises(UsageError) as raised:
        checkpointer.register(model=model)
    return str(raised.value)


def test_rows_that_cannot_be_had_are_refused_on_all_ranks(pool: Pool, tmp_path: Path) -> None:
    source = trainable(tmp_path / "source")
    said = pool.run(columns_of_columns, tmp_path, source, world=4)
    assert len(set(said)) == 1
    assert "layers.0.mlp.w2.weight: has the placements" in said[0]
    assert "merged=False" in said[0]
