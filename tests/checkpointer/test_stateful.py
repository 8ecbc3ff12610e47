"""Schedulers, scalers and a user's own state come back as they were."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim import lr_scheduler as schedulers

from ckpt_convert.checkpointer.state import stateful
from ckpt_convert.checkpointer.state.serialize import deserialize, serialize
from ckpt_convert.errors import UsageError


class Ema:
    def __init__(self, value: float = 0.0, broken: bool = False) -> None:
        self.value = torch.tensor([value])
        self.broken = broken

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if self.broken:
            raise RuntimeError("size mismatch\n\tfor value")
        self.value = state["value"]


def saved(obj: Any) -> Any:
    return copy.deepcopy(deserialize(serialize(stateful.get_state(obj))))


class Falling:
    """A rule with a state of its own, as LambdaLR takes it."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, step: int) -> float:
        return self.rate**step


SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda o: schedulers.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 4, 4, 9], 0.3),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (step + 1)),
    "LambdaLR of objects": lambda o: schedulers.LambdaLR(o, Falling(0.9)),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.5, total_steps=30),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 0.5, 3),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.ExponentialLR(o, 0.9)], [4]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 3), schedulers.ExponentialLR(o, 0.9)]
    ),
}


def make(name: str) -> tuple[SGD, Any]:
    optimizer = SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    return optimizer, SCHEDULERS[name](optimizer)


def advance(optimizer: SGD, scheduler: Any, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_as_they_did(name: str) -> None:
    optimizer, scheduler = make(name)
    advance(optimizer, scheduler, 5)
    state, groups = saved(scheduler), copy.deepcopy(optimizer.state_dict())
    expected = advance(optimizer, scheduler, 10)
    optimizer, scheduler = make(name)
    optimizer.load_state_dict(groups)
    assert stateful.set_state(scheduler, state) == []
    assert advance(optimizer, scheduler, 10) == expected


def test_reduce_on_plateau() -> None:
    def run(scheduler: Any, losses: list[float]) -> list[float]:
        return [scheduler.step(loss) or scheduler.optimizer.param_groups[0]["lr"] for loss in losses]

    def plateau() -> Any:
        return schedulers.ReduceLROnPlateau(SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1), patience=1)

    scheduler = plateau()
    run(scheduler, [1.0, 2.0])
    state = saved(scheduler)
    expected = run(scheduler, [2.0, 2.0, 2.0])
    scheduler = plateau()
    assert stateful.set_state(scheduler, state) == []
    assert run(scheduler, [2.0, 2.0, 2.0]) == expected


def test_a_scaler(caplog: pytest.LogCaptureFixture) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=7)
    state = saved(scaler)
    other = torch.amp.GradScaler("cpu")
    assert stateful.set_state(other, state) == []
    assert other.state_dict() == scaler.state_dict()
    assert not caplog.records


def test_a_scaler_that_is_not_enabled(caplog: pytest.LogCaptureFixture) -> None:
    off = torch.amp.GradScaler("cpu", enabled=False)
    assert stateful.set_state(torch.amp.GradScaler("cpu", enabled=False), saved(off)) == []
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "ckpt_convert"):
        assert stateful.set_state(torch.amp.GradScaler("cpu"), saved(off), "grad_scaler") == []
    assert "grad_scaler: was not enabled when the checkpoint was saved" in caplog.text


def test_a_dict_is_updated_in_place() -> None:
    state = saved({"best": 0.5, "history": [1, 2], "note": None})
    live: dict[str, Any] = {"best": 9.0, "mine": 1}
    assert stateful.set_state(live, state) == []
    assert live == {"best": 0.5, "history": [1, 2], "note": None, "mine": 1}


def test_objects_and_values_may_be_mixed_and_nested() -> None:
    given = {"ema": Ema(2.0), "plain": {"a": 1}, "more": {"ema": Ema(3.0), "count": 4}, 5: Ema(5.0)}
    state = saved(given)
    live: dict[Any, Any] = {"ema": Ema(), "plain": {}, "more": {"ema": Ema(), "count": 0}, 5: Ema()}
    objects = live["ema"], live["more"]["ema"], live[5]
    assert stateful.set_state(live, state) == []
    assert [found.value.item() for found in objects] == [2.0, 3.0, 5.0]
    assert live["plain"] == {"a": 1}
    assert live["more"]["count"] == 4
    assert (live["ema"], live["more"]["ema"], live[5]) == objects


def test_a_module_has_state_too() -> None:
    module, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    assert stateful.set_state(other, saved(module)) == []
    assert torch.equal(other.weight, module.weight)


def test_missing_and_unexpected_objects_are_reported_together() -> None:
    state = saved({"a": Ema(1.0), "b": Ema(), "in": {"x": Ema()}, "n": 1})
    live = {"a": Ema(), "c": Ema(), "in": {"y": Ema()}}
    problems = stateful.set_state(live, state, "extra")
    assert problems == [
        "extra/c: is not in the checkpoint",
        "extra/b: is in the checkpoint, but was not given",
        "extra/in/y: is not in the checkpoint",
        "extra/in/x: is in the checkpoint, but was not given",
    ]
    assert live["a"].value.item() == 0.0
    assert "n" not in live
    assert stateful.compare_state(live, state, "extra") == problems
    assert stateful.set_state(live, state, "extra", strict=False) == problems
    assert live["a"].value.item() == 1.0
    assert live["n"] == 1


def test_one_object_where_there_were_several() -> None:
    assert stateful.set_state({"a": Ema()}, saved(Ema()), "lr_scheduler") == [
        "lr_scheduler: a dict was given, but the checkpoint has the state of a single object"
    ]


def test_what_an_object_refuses_is_a_problem() -> None:
    (problem,) = stateful.set_state({"ema": Ema(broken=True)}, saved({"ema": Ema()}), "extra")
    assert problem == "extra/ema: Ema.load_state_dict() refused the state: size mismatch for value"


def test_what_has_no_state_is_refused() -> None:
    with pytest.raises(UsageError, match=r"extra: a builtins\.list has no state.*give an object with state_dict"):
        stateful.get_state([1], "extra")
    with pytest.raises(UsageError, match=r"extra/f: is a builtins\.function"):
        serialize(stateful.get_state({"f": lambda: 1})["values"], "extra")
