"""Long runs of several ranks: many saves in one, layouts that change between saves, and kills at random points."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ckpt_convert import Checkpointer, CkptConvertError
from tests.checkpointer.pool import Pool, quick_hearts, split
from tests.checkpointer.test_distributed_saving import optimize, train_full, update
from tests.checkpointer.training import KillAt, Trained, make_model, trainable
from tests.helpers import assert_same, sums


def weights_of(step: Path) -> dict[str, str]:
    """The checksums of what one process would write alike: all but the training state."""
    return {name: one for name, one in sums(step).items() if "training_state" not in name}


def check_steps(out: Path, alone: Path, steps: range) -> None:
    """Hold the files of steps against those of a run of one process."""
    for step in steps:
        assert weights_of(out / f"step_{step}") == weights_of(alone / f"step_{step}")


# Many saves, and layouts that change


def save_often(here: Path, how: str, source: Path, asynchronous: bool) -> dict[str, torch.Tensor]:
    return train_full(here / "out", split(make_model(), how), source, 5, asynchronous=asynchronous)


@pytest.mark.parametrize(("how", "asynchronous"), [("fsdp", True), ("tp", False), ("fsdp x tp", True)])
def test_five_saves_after_steps_of_the_optimizer(pool: Pool, how: str, asynchronous: bool, tmp_path: Path) -> None:
    source = trainable(tmp_path / "source")
    expected = train_full(tmp_path / "alone", make_model(), source, 5)
    for found in pool.run(save_often, tmp_path, how, source, asynchronous, world=4):
        assert_same(found, expected)
    check_steps(tmp_path / "out", tmp_path / "alone", range(1, 6))


def shard_later(here: Path, source: Path) -> None:
    """Save a model that every rank has, shard it, and save it twice more."""
    model = make_model()
    with Checkpointer(source, here / "out", contents="weights", save_every=1) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.register(model=model)
        for number in range(3):
            if dist.is_initialized() and number == 1:
                fully_shard(model)
            update(model)
            checkpointer.step()


def test_a_model_that_is_sharded_after_its_first_save(pool: Pool, tmp_path: Path) -> None:
    source = trainable(tmp_path / "source")
    shard_later(tmp_path / "one", source)
    pool.run(shard_later, tmp_path, source, world=3)
    check_steps(tmp_path / "out", tmp_path / "one" / "out", range(1, 4))


MESHES = ("ddp", "fsdp", "fsdp x tp", "tp", "hsdp")


def change_meshes(here: Path, source: Path) -> None:
    """Train with one checkpointer on one mesh after another, two steps on each."""
    with Checkpointer(source, here / "out", save_every=1, asynchronous=True) as checkpointer:
        for number, how in enumerate(MESHES, 1):
            model: nn.Module = split(make_model(), how) if dist.is_initialized() else make_model()
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
            if number == 1:
                checkpointer.load_model(model)
            checkpointer.resume(model=model, optimizer=optimizer)
            while checkpointer.progress.step < 2 * number:
                optimize(model, optimizer)
                checkpointer.step()
            checkpointer.end_run()


def test_one_checkpointer_on_one_mesh_after_another(pool: Pool, tmp_path: Path) -> None:
    source = trainable(tmp_path / "source")
    change_meshes(tmp_path / "one", source)
    pool.run(change_meshes, tmp_path, source, world=4)
    check_steps(tmp_path / "out", tmp_path / "one" / "out", range(1, 2 * len(MESHES) + 1))


# Kills

STEPS = 40


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as every rank can compare it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def state_of(trained: Trained) -> dict[str, Any]:
    """What a run came to: weights, optimizer, schedule and what is drawn next."""
    names = {parameter: name for name, parameter in trained.model.named_parameters()}
    return {
        **{name: whole(parameter) for parameter, name in names.items()},
        **{
            f"{names[one]}/{key}": whole(value)
            for one, state in trained.optimizer.state.items()
            for key, value in state.items()
        },
        "lr": torch.tensor(trained.lr_scheduler.get_last_lr()),
        "drawn": torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))]),
    }


def train_until_killed(
    here: Path, source: Path, asynchronous: bool, kill: tuple[int, int, int] | None
) -> dict[str, Any] | None:
    """Go on to the last step, as far as nothing happens; the end of the run, None where it was not reached.

    ``kill``: a rank, the call of the system before which it is killed, and how many steps it does at most. The loss of
    each step is kept in a file.
    """
    rank = dist.get_rank()
    trained = Trained(source, model=split(make_model(source), "fsdp"))
    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)
    killer = None
    options: dict[str, Any] = {"save_every": 3, "keep_last": 2, "asynchronous": asynchronous}
    try:
        with (
            quick_hearts(),
            (here / f"losses_{rank}").open("a", buffering=1) as log,
            Checkpointer(source, here / "out", **options) as checkpointer,
        ):
            checkpointer.load_model(trained.model)
            checkpointer.resume(**trained.parts)
            begun = checkpointer.progress.step

            def each(step: int, loss: float) -> None:
                log.write(f"{step} {loss.hex()}\n")
                if kill is not None and kill[0] == rank and step - begun >= kill[2]:
                    os.kill(os.getpid(), signal.SIGKILL)

            if kill is not None and kill[0] == rank:
                killer = KillAt(kill[1])
            trained.go(checkpointer, STEPS, each=each)
    except (CkptConvertError, RuntimeError):  # of the checkpointer, or of the training's own communication
        return None
    finally:
        if killer is not None:
            killer.left = 0
    return state_of(trained)


def losses(here: Path, rank: int) -> dict[str, set[str]]:
    """What the loss of each step was, each time that it was done."""
    found: dict[str, set[str]] = {}
    for line in (here / f"losses_{rank}").read_text().splitlines():
        step, loss = line.split()
        found.setdefault(step, set()).add(loss)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_run_whose_ranks_are_killed_at_random_ends_like_one_that_is_never_interrupted(
    pool: Pool, asynchronous: bool, tmp_path: Path
) -> None:
    """Bit for bit on every rank, with as many ranks: weights, optimizer, every loss, and what is drawn next."""
    world, source, chance = 3, trainable(tmp_path / "source"), random.Random(15)
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    quiet.mkdir()
    killed.mkdir()
    expected = pool.run(train_until_killed, quiet, source, asynchronous, None, world=world)
    kills = 0
    while None in (
        ended := pool.run(
            train_until_killed,
            killed,
            source,
            asynchronous,
            (chance.randrange(world), chance.randrange(20, 200), chance.randrange(5, 15)) if kills < 12 else None,
            world=world,
        )
    ):
        kills += 1
    assert kills >= 4
    for rank in range(world):
        assert losses(killed, rank) == losses(quiet, rank)
        assert len(losses(killed, rank)) == STEPS
        assert_same(ended[rank], expected[rank])
    assert weights_of(killed / "out" / f"step_{STEPS}") == weights_of(quiet / "out" / f"step_{STEPS}")
