"""Loading a model that is split over processes: each has its slices, and reads no more than that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ckpt_convert import Checkpointer
from recipes.native_llama import NativeLlama
from tests.checkpointer.pool import Pool
from tests.checkpointer.training import LLAMA, make_model


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


def split(model: NativeLlama, how: str) -> NativeLlama:
    """The model over all processes: "ddp", "fsdp", "hsdp", "tp" or "fsdp x tp"."""
    world = dist.get_world_size()
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)  # type: ignore[return-value]
    sizes = {"fsdp": (world,), "tp": (world,)}.get(how, (2, world // 2))
    names = {"fsdp": ("dp",), "tp": ("tp",), "hsdp": ("replicas", "dp")}.get(how, ("dp", "tp"))
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    if "tp" in names:
        for layer in model.layers:
            plan = {"attn.q_proj": ColwiseParallel(), "attn.output_proj": RowwiseParallel()}
            plan |= {"mlp.w1": ColwiseParallel(), "mlp.w3": ColwiseParallel(), "mlp.w2": RowwiseParallel()}
            parallelize_module(layer, mesh["tp"], plan)
    if how != "tp":
        sharded = mesh if how == "hsdp" else mesh["dp"]
        for layer in model.layers:
            fully_shard(layer, mesh=sharded)
        fully_shard(model, mesh=sharded)
    return model


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
