"""What several processes check together: tensors whose bytes a file has once, and the files of a step."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ckpt_convert import Checkpointer, CkptConvertError
from tests.checkpointer.pool import Pool, split
from tests.checkpointer.test_distributed_saving import optimize
from tests.checkpointer.training import LLAMA, make_model
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


# Steps that are checked before they are resumed


def save_steps(here: Path) -> None:
    model = split(make_model(), "fsdp")
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    with Checkpointer(LLAMA, here / "out", save_every=1) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.register(model=model, optimizer=optimizer)
        for _ in range(2):
            optimize(model, optimizer)
            checkpointer.step()


def resume(here: Path, from_: Any) -> str:
    """The step that was resumed, or what was said against it."""
    model = split(make_model(), "fsdp")
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    try:
        with Checkpointer(LLAMA, here / "out", save_last=False) as checkpointer:
            progress = checkpointer.resume(model=model, optimizer=optimizer, from_=from_)
            return str(progress and progress.step)
    except CkptConvertError as error:
        return f"{type(error).__name__}: {error}"


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def test_each_rank_reads_its_share_of_a_step(pool: Pool, tmp_path: Path) -> None:
    """All of them say the same of any file, whoever has read it."""
    pool.run(save_steps, tmp_path, world=3)
    assert pool.run(resume, tmp_path, "latest", world=3) == ["2"] * 3
    step = tmp_path / "out" / "step_2"
    files = [*step.glob("*.safetensors"), *(step / "training_state").glob("__*.distcp")]
    readers = set()
    for file in files:
        before = file.read_bytes()
        damage(file)
        said = pool.run(resume, tmp_path, 2, world=3)
        assert len(set(said)) == 1
        assert said[0].startswith("CorruptFileError: ")
        assert file.name in said[0]
        readers.add(re.findall(r"found by rank (\d)", said[0])[0])
        if file is files[0]:
            assert pool.run(resume, tmp_path, "latest", world=3) == ["1"] * 3
        file.write_bytes(before)
    assert readers == {"0", "1", "2"}
