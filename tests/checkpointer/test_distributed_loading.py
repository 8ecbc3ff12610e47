"""Loading a model that is split over processes: each has its slices, and reads no more than that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from ckpt_convert import Checkpointer
from tests.checkpointer.pool import Pool, split
from tests.checkpointer.training import LLAMA, make_model


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
