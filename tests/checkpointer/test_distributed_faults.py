"""Several ranks of which one fails: all raise one error, which names it, and nothing half-written is left."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ckpt_convert import Checkpointer, CkptConvertError, UsageError
from ckpt_convert.checkpointer.distributed import ranks
from tests.checkpointer.pool import Pool, split
from tests.checkpointer.training import LLAMA, make_model
from tests.helpers import sums


class Unsaved:
    """State that cannot be saved on one rank."""

    def state_dict(self) -> dict[str, Any]:
        return {"value": object() if dist.get_rank() == 1 else 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: it is never loaded."""


def fail_from_now_on(kind: str) -> None:
    """Let what rank 1 writes fail, or end it there."""

    def pwrite(*given: Any) -> int:
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if dist.get_rank() == 1:
        os.pwrite = pwrite


def fail(here: Path, kind: str, asynchronous: bool) -> str:
    """Save a step, and fail in the next; returns what was raised."""
    model = split(make_model(), "fsdp")
    extra = Unsaved() if kind == "unsaved" else None
    try:
        with Checkpointer(LLAMA, here / "out", save_every=1, asynchronous=asynchronous) as checkpointer:
            checkpointer.load_model(model)
            checkpointer.register(model=model, extra=extra)
            checkpointer.step()
            checkpointer.wait()
            if kind == "raised" and dist.get_rank() == 1:
                raise RuntimeError("the training failed")
            whole, former = os.pwrite, ranks.DEADLINE
            ranks.DEADLINE = 4.0
            fail_from_now_on(kind)
            try:
                checkpointer.step()
                checkpointer.wait()
            finally:
                os.pwrite, ranks.DEADLINE = whole, former
    except (CkptConvertError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_disk_that_is_full_on_one_rank(pool: Pool, asynchronous: bool, tmp_path: Path) -> None:
    raised = pool.run(fail, tmp_path, "full", asynchronous, world=3)
    assert len(set(raised)) == 1
    assert raised[0].startswith("NotEnoughSpaceError: rank 1 on ")
    assert "No space left on device" in raised[0]
    check_former(tmp_path)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_rank_that_is_killed_while_it_writes(pool: Pool, asynchronous: bool, tmp_path: Path) -> None:
    raised = pool.run(fail, tmp_path, "killed", asynchronous, world=3)
    assert raised[1] is None
    assert raised[0] == raised[2]
    assert "rank 1: took no part in the save of step_2 within 4 s" in raised[0]
    check_former(tmp_path)


def test_a_rank_that_raises_in_the_loop(pool: Pool, tmp_path: Path) -> None:
    raised = pool.run(fail, tmp_path, "raised", False, world=3)
    assert raised[1] == "RuntimeError: the training failed"
    assert raised[0] == raised[2]
    assert "rank 1: took no part in" in raised[0]
    assert "its checkpointer is closed" in raised[0]
    check_former(tmp_path)


def test_state_that_one_rank_cannot_save(pool: Pool, tmp_path: Path) -> None:
    raised = pool.run(fail, tmp_path, "unsaved", False, world=3)
    assert len(set(raised)) == 1
    assert raised[0].startswith("UsageError: rank 1 on ")
    assert "extra/value: is a builtins.object" in raised[0]
    assert not list((tmp_path / "out").glob("*step*"))


def check_former(here: Path) -> None:
    """The step before is as it was, and another number of processes goes on from it."""
    out = here / "out"
    assert sorted(path.name for path in out.glob("*step*")) == ["step_1"]
    assert (out / "latest").resolve().name == "step_1"
    weights = sums(LLAMA)
    assert weights.items() <= sums(out / "step_1").items()
    model = make_model()
    with Checkpointer(LLAMA, out) as checkpointer:
        progress = checkpointer.resume(model=model)
        assert progress is not None
        assert progress.step == 1


def alone(here: Path) -> str:
    """One rank of two makes a checkpointer for both."""
    if dist.get_rank() == 1:
        return ""
    model = make_model()
    former, ranks.DEADLINE = ranks.DEADLINE, 1.0
    with Checkpointer(LLAMA, here / "out") as checkpointer, pytest.raises(CkptConvertError) as raised:
        checkpointer.register(model=model)
    ranks.DEADLINE = former
    return str(raised.value)


def test_a_rank_that_makes_no_checkpointer(pool: Pool, tmp_path: Path) -> None:
    said = pool.run(alone, tmp_path)[0]
    assert "rank 1: took no part in opening" in said
    assert "every process makes the same calls" in said


def partial(here: Path) -> str:
    """A model with partial sums, on one rank alone."""
    from torch.distributed.tensor import DTensor, Partial

    model = dict(split(make_model(), "fsdp").state_dict())
    if dist.get_rank() == 1:
        key, tensor = next(iter(model.items()))
        model[key] = DTensor.from_local(torch.zeros(tensor.shape), tensor.device_mesh, [Partial()], run_check=False)
    with Checkpointer(LLAMA, here / "out", contents="weights") as checkpointer, pytest.raises(UsageError) as raised:
        checkpointer.register(model=model)
    return str(raised.value)


def test_placements_without_values_are_refused_on_all_ranks_before_the_first_step(pool: Pool, tmp_path: Path) -> None:
    raised = pool.run(partial, tmp_path)
    assert len(set(raised)) == 1
    assert "rank 1 on " in raised[0]
    assert "has the placement Partial" in raised[0]


def differ(here: Path) -> str:
    """Each rank saves as often as its number says."""
    model = split(make_model(), "ddp")
    every = 2 + dist.get_rank()
    with Checkpointer(LLAMA, here / "out", save_every=every) as checkpointer, pytest.raises(UsageError) as raised:
        checkpointer.register(model=model)
    return str(raised.value)


def test_options_that_differ_between_ranks(pool: Pool, tmp_path: Path) -> None:
    said = pool.run(differ, tmp_path)
    assert said[0] == said[1]
    assert "rank 1: save_every is every 3 steps, on rank 0 every 2 steps" in said[0]
