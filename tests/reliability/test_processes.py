"""A run of several processes with one checkpointer, and with one too many."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ckpt_convert import Checkpointer, UsageError
from tests.checkpointer.training import loss_of, make_model, trainable
from tests.helpers import assert_same, read_safetensors
from tests.reliability.processes import COUNT, run

ALONE: dict[str, Any] = {"process_group": "rank0", "contents": "weights"}
TOKENS = torch.arange(28).reshape(4, 7) * 5 % 56


class Run:
    """A model that both processes train on data of their own."""

    def __init__(self, here: Path, rank: int) -> None:
        torch.manual_seed(0)
        self.inner = make_model(here / "source")
        self.model = DistributedDataParallel(self.inner)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01)
        self.tokens = TOKENS[rank::COUNT]

    def update(self) -> None:
        loss_of(self.model, self.tokens).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()


def on_each_process(here: Path, rank: int) -> None:
    training = Run(here, rank)
    with Checkpointer(here / "source", here / "out", save_every=2, process_group="rank0") as checkpointer:
        checkpointer.load_model(training.inner)
        checkpointer.resume(model=training.model, optimizer=training.optimizer)
        while True:
            training.update()
            checkpointer.step()


def test_a_checkpointer_on_each_process_is_refused_on_all_of_them_with_the_reason(tmp_path: Path) -> None:
    """Whoever comes second is refused at once; the first learns why, also where its connection is dead by then."""
    trainable(tmp_path / "source")
    for raised in run(on_each_process, tmp_path):
        last = raised.strip().splitlines()[-1]
        assert "UsageError" in last, raised
        assert "each made a checkpointer for this output_dir" in last
        assert "get_rank() == 0" in last
    assert not list((tmp_path / "out").glob("step_*"))


def on_one_process(here: Path, rank: int) -> None:
    training = Run(here, rank)
    with contextlib.ExitStack() as stack:
        loading = stack.enter_context(Checkpointer(here / "source"))  # without an output_dir: on every process
        loading.load_model(training.inner)
        checkpointers = [
            stack.enter_context(Checkpointer(here / "source", here / name, **ALONE, save_every=2))
            for name in (["out", "own_0"] if rank == 0 else ["own_1"])
        ]
        for one in checkpointers:
            one.resume(model=training.model, optimizer=training.optimizer)
        for _ in range(2):
            training.update()
            for one in checkpointers:
                one.step()
    dist.barrier()
    if rank == 1:  # the other one has closed its own
        with Checkpointer(here / "source", here / "out", process_group="rank0") as checkpointer:
            checkpointer.register(model=training.model, progress=checkpointer.saved[-1].progress)
            assert checkpointer.progress.step == 2


def test_one_process_saves_for_all_and_each_may_save_into_a_directory_of_its_own(tmp_path: Path) -> None:
    trainable(tmp_path / "source")
    assert run(on_one_process, tmp_path) == ["", ""]
    weights = [read_safetensors(tmp_path / name / "step_2") for name in ("out", "own_0", "own_1")]
    assert_same(weights[1], weights[0])
    assert_same(weights[2], weights[0])


def sharded(here: Path, rank: int) -> None:
    model = make_model(here / "source")
    with Checkpointer(here / "source") as loading:
        loading.load_model(model)
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (COUNT,)))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)

    def gathered() -> dict[str, torch.Tensor]:
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))  # type: ignore[return-value]

    once = gathered()
    if rank == 0:
        checkpointer = Checkpointer(here / "source", here / "out", **ALONE, save_last=False)
        with pytest.raises(UsageError, match="gather them anew for every save"):
            checkpointer.register(model=model)
        checkpointer.register(model=once, optimizer=optimizer)
    for _ in range(2):
        loss_of(model, TOKENS).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        whole = gathered()
        if rank == 0:
            checkpointer.step()
    if rank == 0:
        with pytest.raises(UsageError, match="these are copies"):
            checkpointer.save()
        checkpointer.register(model=whole, progress=checkpointer.progress)
        checkpointer.save()
        checkpointer.close()
        torch.save(whole, here / "whole.pt")
    dist.barrier()


def test_a_sharded_model_is_refused_with_a_way_that_keeps_what_is_trained(tmp_path: Path) -> None:
    """FSDP2: its parameters are refused, and so are tensors that were gathered once; gathered anew, they are saved."""
    source = trainable(tmp_path / "source")
    assert run(sharded, tmp_path) == ["", ""]
    again = make_model(source)
    with Checkpointer(tmp_path / "out" / "step_2") as checkpointer:
        checkpointer.load_model(again)
    assert_same(dict(again.state_dict()), torch.load(tmp_path / "whole.pt"))
