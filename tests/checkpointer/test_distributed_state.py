"""The training state of several ranks beside the optimizer: what is the same on all, and what each has of its own."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from ckpt_convert import Checkpointer
from ckpt_convert.checkpointer.state.training_state import DESCRIPTION, open_state
from ckpt_convert.storage.place import as_place
from tests.checkpointer.pool import Pool, split
from tests.checkpointer.test_distributed_saving import optimize
from tests.checkpointer.training import LLAMA, make_model


class Warned(logging.Handler):
    """What was warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def parts_of(model: nn.Module, rank: int) -> dict[str, Any]:
    """What a run is made of, where some of it depends on the rank."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    plateau = ReduceLROnPlateau(optimizer)
    plateau.step(10.0 + rank)
    average = {name: 3 * parameter.detach() for name, parameter in model.named_parameters()}
    extra = {
        "average": average,
        "seen": 100 + rank,
        "losses": torch.arange(7.0) + rank,
        "sums": torch.ones(5),
    }
    schedulers = {"decay": LambdaLR(optimizer, lambda step: 1 / (1 + step)), "plateau": plateau}
    return {"model": model, "optimizer": optimizer, "lr_scheduler": schedulers, "extra": extra}


def save(here: Path, how: str) -> None:
    parts = parts_of(split(make_model(), how), dist.get_rank())
    with Checkpointer(LLAMA, here / "out", save_every=1) as checkpointer:
        checkpointer.load_model(parts["model"])
        checkpointer.register(**parts)
        optimize(parts["model"], parts["optimizer"])
        checkpointer.step()


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def resume(here: Path, how: str) -> dict[str, Any]:
    """What comes back: of numbers and tensors, and what is warned of."""
    log, warned = logging.getLogger("ckpt_convert"), Warned()
    log.addHandler(warned)
    parts = parts_of(split(make_model(), how), 77)
    with Checkpointer(LLAMA, here / "out", save_last=False) as checkpointer:
        checkpointer.resume(**parts)
    log.removeHandler(warned)
    extra = parts["extra"]
    return {
        "seen": extra["seen"],
        "losses": extra["losses"].tolist(),
        "sums": extra["sums"].tolist(),
        "average": {name.removeprefix("module."): float(whole(one).sum()) for name, one in extra["average"].items()},
        "best": parts["lr_scheduler"]["plateau"].best,
        "warned": [text for text in warned.texts if "was not the same" in text],
    }


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_what_is_not_the_same_on_all_ranks_is_each_ones_own(pool: Pool, how: str, tmp_path: Path) -> None:
    pool.run(save, tmp_path, how, world=3)
    state = open_state(as_place(tmp_path / "out" / "step_1" / "training_state"))
    found = pool.run(resume, tmp_path, how, world=3)
    for rank, one in enumerate(found):
        assert one["seen"] == 100 + rank
        assert one["losses"] == [float(rank + number) for number in range(7)]
        assert one["best"] == 10.0 + rank
        assert one["average"] == found[0]["average"]
        assert one["warned"] == []
    own = [key for key in state.tensors if key.startswith("ranks/") and "/extra/" in key]
    assert sorted(own) == [f"ranks/{rank}/extra/values/losses" for rank in range(3)]  # the rest is there once
    first, second = pool.run(resume, tmp_path, how, world=2)
    assert (first["seen"], second["seen"]) == (100, 100)
    assert first["average"] == found[0]["average"]
    assert [text.partition(" ")[0] for text in first["warned"]] == ["extra:", "lr_scheduler:"]
    assert "on the 3 processes that saved it; all go on with that of the first one" in first["warned"][0]
    assert second["warned"] == []


def test_what_is_the_same_is_described_once(pool: Pool, tmp_path: Path) -> None:
    pool.run(save_alike, tmp_path, world=2)
    state = open_state(as_place(tmp_path / "out" / "step_1" / "training_state"))
    content = json.loads(state.tensor(DESCRIPTION).numpy().tobytes())
    assert {"lr_scheduler", "extra"} <= content["parts"].keys()
    assert [set(own) for own in content["ranks"]] == [{"rng"}] * 2


def save_alike(here: Path) -> None:
    parts = parts_of(split(make_model(), "ddp"), 0)
    with Checkpointer(LLAMA, here / "out", save_every=1) as checkpointer:
        checkpointer.load_model(parts["model"])
        checkpointer.register(**parts)
        checkpointer.step()


# Gradients of an update that is not complete


def accumulate(here: Path) -> float:
    """Save between two backward passes, of which the first was not reduced over the ranks."""
    model = split(make_model(), "ddp")
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with Checkpointer(LLAMA, here / "out") as checkpointer:
        checkpointer.load_model(model)
        checkpointer.register(model=model, optimizer=optimizer)
        checkpointer.step()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 + dist.get_rank())
    return gradient_of(model)


def gradient_of(model: nn.Module) -> float:
    return sum(float(one.grad.sum()) for one in model.parameters() if one.grad is not None)


def go_on(here: Path) -> tuple[float, list[str]]:
    log, warned = logging.getLogger("ckpt_convert"), Warned()
    log.addHandler(warned)
    model = split(make_model(), "ddp")
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with Checkpointer(LLAMA, here / "out", save_last=False) as checkpointer:
        checkpointer.resume(model=model, optimizer=optimizer)
    log.removeHandler(warned)
    return gradient_of(model), [text for text in warned.texts if "gradients" in text]


def test_gradients_that_were_not_reduced_are_each_ranks_own(pool: Pool, tmp_path: Path) -> None:
    expected = pool.run(accumulate, tmp_path, world=2)
    assert expected[1] == 2 * expected[0] != 0
    assert pool.run(go_on, tmp_path, world=2) == [(one, []) for one in expected]
    found, warned = pool.run(go_on, tmp_path, world=3)[0]
    assert found == 0
    assert warned == ["gradients: was not the same on the 2 processes that saved it; they are left out"]
