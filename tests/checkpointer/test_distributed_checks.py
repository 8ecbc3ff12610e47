"""Tensors that have to be equal, because a file has their bytes once, where each process has a part of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ckpt_convert import Checkpointer, CkptConvertError
from tests.checkpointer.pool import Pool
from tests.helpers import GOLDEN, sums


def shared(into: Path) -> Path:
    """A source whose file has the bytes of two norms once."""
    shutil.copytree(GOLDEN / "llama" / "meta-mp1", into)
    file = into / "consolidated.00.pth"
    tensors = torch.load(file, weights_only=True)
    tensors["layers.1.ffn_norm.weight"] = tensors["norm.weight"]
    torch.save(tensors, file)
    return into


def save(here: Path, source: Path, kind: str) -> str:
    """Save a model from slices: with equal norms, or with ones that differ in the last value."""
    mesh = init_device_mesh("cpu", (2,))
    whole = Checkpointer(source).load_state_dict("native")
    if kind == "different":
        whole["norm.scale"][-1] += 1
    model = {key: distribute_tensor(one, mesh, [Shard(0)], src_data_rank=None) for key, one in whole.items()}
    try:
        with Checkpointer(source, here / "out", contents="weights") as checkpointer:
            checkpointer.register(model=model)
            checkpointer.save()
    except CkptConvertError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_what_is_equal_is_written_once(pool: Pool, tmp_path: Path) -> None:
    source = shared(tmp_path / "source")
    assert pool.run(save, tmp_path, source, "equal") == ["", ""]
    assert sums(source).items() <= sums(tmp_path / "out" / "step_0").items()


def test_what_differs_on_one_rank_is_refused_on_all(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(save, tmp_path, shared(tmp_path / "source"), "different")
    assert first == second
    assert first.startswith("TiedWeightsError: ")
    assert "share their bytes in consolidated.00.pth, but their values differ now" in first
    assert not list((tmp_path / "out").glob("*step*"))
