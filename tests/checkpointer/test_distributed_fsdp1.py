"""Models in FSDP1, ``FullyShardedDataParallel``: their files are those of one process, and any number goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from ckpt_convert import Checkpointer, UsageError
from recipes.native_llama import Layer
from tests.checkpointer.pool import Pool
from tests.checkpointer.test_distributed_saving import train_full
from tests.checkpointer.training import LLAMA, make_model, trainable
from tests.helpers import assert_same, sums


def wrapped(*, orig: bool, mesh: bool, strategy: str = "FULL_SHARD") -> nn.Module:
    sizes = {"device_mesh": init_device_mesh("cpu", (dist.get_world_size(),))} if mesh else {}
    return FullyShardedDataParallel(
        make_model(),
        auto_wrap_policy=ModuleWrapPolicy({Layer}),
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=orig,
        device_id=torch.device("cpu"),
        **sizes,
    )


def go_on(
    here: Path, source: Path, until: int, options: dict[str, Any], how: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Train until a step; returns what the optimizer has then, whole, by name."""
    model = wrapped(**how)
    train_full(here / "out", model, source, until, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with Checkpointer(source, here / "out", save_last=False) as checkpointer:
        progress = checkpointer.resume(model=model, optimizer=optimizer)
        assert progress is not None
        assert progress.step == until
    found = FullyShardedDataParallel.full_optim_state_dict(model, optimizer, rank0_only=False)
    return {f"{name}/{key}": one for name, state in found["state"].items() for key, one in state.items()}


@pytest.mark.parametrize(
    ("orig", "mesh", "asynchronous"),
    [
        (True, False, True),
        (False, False, False),
        pytest.param(True, True, False, marks=pytest.mark.slow),
        pytest.param(False, True, True, marks=pytest.mark.slow),
    ],
)
def test_every_world(pool: Pool, orig: bool, mesh: bool, asynchronous: bool, tmp_path: Path) -> None:
    source, options = trainable(tmp_path / "source"), {"asynchronous": asynchronous}
    expected = train_full(tmp_path / "alone", make_model(), source, 6, **options)
    how = {"orig": orig, "mesh": mesh}
    for number, world in enumerate((2, 4, 1), 1):
        found = pool.run(go_on, tmp_path, source, 2 * number, options, how, world=world)[0]
    assert_same(found, expected)
    for step in range(1, 7):
        kept = [
            {name: one for name, one in sums(tmp_path / run / f"step_{step}").items() if "training_state" not in name}
            for run in ("out", "alone")
        ]
        assert kept[0] == kept[1]


def test_other_strategies(pool: Pool, tmp_path: Path) -> None:
    source = trainable(tmp_path / "source")
    expected = train_full(tmp_path / "alone", make_model(), source, 4)
    for until, strategy in ((2, "SHARD_GRAD_OP"), (4, "NO_SHARD")):
        how = {"orig": True, "mesh": False, "strategy": strategy}
        found = pool.run(go_on, tmp_path, source, until, {}, how, world=3)[0]
    assert_same(found, expected)
    assert (
        sums(tmp_path / "out" / "step_4").items()
        >= {
            name: one for name, one in sums(tmp_path / "alone" / "step_4").items() if "training_state" not in name
        }.items()
    )


def alone(here: Path) -> str:
    with pytest.raises(UsageError) as raised:
        Checkpointer(LLAMA).load_model(wrapped(orig=True, mesh=True))
    return str(raised.value)


def test_one_of_several_processes_refuses_what_is_sharded(pool: Pool, tmp_path: Path) -> None:
    for said in pool.run(alone, tmp_path):
        assert "FullyShardedDataParallel shards its parameters over processes" in said
