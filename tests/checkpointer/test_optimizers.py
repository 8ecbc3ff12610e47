"""An optimizer goes on exactly as it did: every value, in its dtype, at the parameter of its name."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW

from ckpt_convert.checkpointer.state import optimizers
from ckpt_convert.checkpointer.state.serialize import deserialize, serialize
from ckpt_convert.errors import UsageError

Make = Callable[[list[Any]], Any]


class Model(torch.nn.Module):
    """Shapes all different; one parameter is never used, so it has no gradient and no state."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tok = torch.nn.Parameter(torch.randn(7, 5, dtype=dtype))
        self.proj = torch.nn.Linear(5, 3, dtype=dtype)
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=dtype))

    def forward(self) -> torch.Tensor:
        return self.proj(self.tok).float().square().sum()

    @property
    def names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.named_parameters()}


def train(model: Model, optimizer: Any, steps: int) -> list[torch.Tensor]:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    for _ in range(steps):
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def saved(optimizer: Any, model: Model) -> Any:
    """What a checkpoint would give back."""
    return copy.deepcopy(deserialize(serialize(optimizers.get_optimizer_state(optimizer, model.names))))


def equal(found: Any, expected: Any) -> bool:
    """Equal to the last bit, dtypes and types of containers, too."""
    if isinstance(expected, torch.Tensor):
        same = isinstance(found, torch.Tensor) and found.dtype == expected.dtype and found.device == expected.device
        return same and found.shape == expected.shape and torch.equal(found, expected)
    if isinstance(expected, Mapping):
        return list(found) == list(expected) and all(equal(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        same = type(found) is type(expected) and len(found) == len(expected)
        return same and all(equal(one, other) for one, other in zip(found, expected, strict=True))
    return type(found) is type(expected) and bool(found == expected)


OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda p: AdamW(p, lr=0.01),
    "AdamW amsgrad": lambda p: AdamW(p, lr=0.01, amsgrad=True, betas=(0.8, 0.99)),
    "AdamW foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "AdamW tensor lr": lambda p: AdamW(p, lr=torch.tensor(0.01)),
    "SGD": lambda p: SGD(p, lr=0.01),
    "SGD momentum": lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.001, centered=True, momentum=0.5),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.001),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    make = OPTIMIZERS[name]
    model = Model(dtype)
    optimizer = make(list(model.parameters()))
    train(model, optimizer, 3)
    state, weights, live = saved(optimizer, model), copy.deepcopy(model.state_dict()), optimizer.state_dict()
    other = Model(dtype)
    other.load_state_dict(weights)
    resumed = make(list(other.parameters()))
    assert optimizers.set_optimizer_state(resumed, state, other.names) == []
    assert equal(resumed.state_dict()["state"], live["state"])
    assert equal(resumed.state_dict()["param_groups"], live["param_groups"])
    for one, expected in zip(train(other, resumed, 3), train(model, optimizer, 3), strict=True):
        assert torch.equal(one, expected)


class FloatMoments(torch.optim.Optimizer):
    """Keeps float32 moments whatever the parameters are, as many do for bfloat16; and state of odd kinds."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for number, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["moment"] = torch.zeros_like(param, dtype=torch.float32)
                    state["wide"] = [torch.tensor(0.1, dtype=torch.float64), {"in": torch.tensor(1 / 3)}]
                    state["note"] = "text"
                    state["pair"] = (1, torch.tensor(1 / 7))
                    state["count"] = torch.tensor(number, dtype=torch.int64)
                state["moment"].mul_(0.9).add_(param.grad.float() / 3)
                param.add_((state["moment"] * -group["lr"]).to(param.dtype))


def test_moments_in_another_dtype_than_the_parameter_stay_exact() -> None:
    model = Model(torch.bfloat16)
    optimizer = FloatMoments(model.parameters())
    train(model, optimizer, 3)
    state = saved(optimizer, model)
    other = Model(torch.bfloat16)
    other.load_state_dict(model.state_dict())
    resumed = FloatMoments(other.parameters())
    assert optimizers.set_optimizer_state(resumed, state, other.names) == []
    held = resumed.state[other.tok]
    assert held["moment"].dtype == torch.float32
    assert held["wide"][0].dtype == torch.float64
    assert held["note"] == "text"
    assert held["count"].dtype == torch.int64
    assert equal(resumed.state_dict()["state"], optimizer.state_dict()["state"])
    for one, expected in zip(train(other, resumed, 3), train(model, optimizer, 3), strict=True):
        assert torch.equal(one, expected)


def test_parameters_of_another_dtype_get_state_in_theirs(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(torch.float32)
    optimizer = AdamW(model.parameters())
    train(model, optimizer, 1)
    other = Model(torch.bfloat16)
    resumed = AdamW(other.parameters())
    with caplog.at_level(logging.WARNING, "ckpt_convert"):
        assert optimizers.set_optimizer_state(resumed, saved(optimizer, model), other.names) == []
    assert resumed.state[other.tok]["exp_avg"].dtype == torch.bfloat16
    assert "3 parameters (tok first) have another dtype than in the checkpoint" in caplog.text


class EightBit(torch.optim.Optimizer):
    """As bitsandbytes': uint8 state with a float32 scale, and its own load_state_dict, which casts nothing."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.loads = 0

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = {
                    "state1": torch.arange(param.numel(), dtype=torch.uint8),
                    "absmax1": torch.full((3,), 1 / 3),
                    "step": 4,
                }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loads += 1
        params = [param for group in self.param_groups for param in group["params"]]
        for number, value in state_dict["state"].items():
            self.state[params[number]] = {key: copy.copy(item) for key, item in value.items()}


def test_an_optimizer_that_loads_by_itself() -> None:
    model, other = Model(torch.bfloat16), Model(torch.bfloat16)
    optimizer, resumed = EightBit(model.parameters()), EightBit(other.parameters())
    optimizer.step()
    assert optimizers.set_optimizer_state(resumed, saved(optimizer, model), other.names) == []
    assert resumed.loads == 1
    assert equal(resumed.state_dict()["state"], optimizer.state_dict()["state"])


def test_state_is_by_name() -> None:
    model = Model()
    optimizer = AdamW([{"params": [model.tok]}, {"params": model.proj.parameters(), "lr": 0.5}])
    train(model, optimizer, 1)
    tree = optimizers.get_optimizer_state(optimizer, {**model.names, id(model.proj.bias): "b"})
    assert list(tree["state"]) == ["tok", "proj.weight", "b"]
    assert [group["params"] for group in tree["groups"]] == [["tok"], ["proj.weight", "b"]]
    assert "optimizer/state/tok/exp_avg" in {f"optimizer/{path}" for path in serialize(tree).tensors}
    assert list(optimizers.get_optimizer_state(optimizer, {})["state"]) == ["param_0_0", "param_1_0", "param_1_1"]


def test_captured_tensors_are_references() -> None:
    model = Model()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, 1)
    captured = serialize(optimizers.get_optimizer_state(optimizer, model.names)).tensors["state/tok/exp_avg"]
    assert captured.data_ptr() == optimizer.state[model.tok]["exp_avg"].data_ptr()


def test_the_order_of_parameters_does_not_matter() -> None:
    model, other = Model(), Model()
    optimizer = AdamW(model.named_parameters())
    train(model, optimizer, 2)
    resumed = AdamW(reversed(list(other.named_parameters())))
    assert optimizers.set_optimizer_state(resumed, saved(optimizer, model), other.names) == []
    for name, param in other.named_parameters():
        assert equal(resumed.state.get(param), optimizer.state.get(dict(model.named_parameters())[name]))
    assert resumed.param_groups[0]["param_names"] == ["proj.bias", "proj.weight", "unused", "tok"]


def test_options_of_groups_come_back_as_they_were() -> None:
    model, other = Model(), Model()
    optimizer = AdamW(
        [{"params": [model.tok], "lr": 0.3, "name": "embedding", "mine": (1, [2])}, {"params": [model.unused]}]
    )
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    resumed = AdamW([{"params": [other.tok]}, {"params": [other.unused]}], lr=7.0, betas=(0.1, 0.2))
    assert optimizers.set_optimizer_state(resumed, saved(optimizer, model), other.names) == []
    found, _ = resumed.param_groups
    assert (found["lr"], found["initial_lr"], found["betas"]) == (0.3, 0.3, (0.9, 0.999))
    assert (found["name"], found["mine"]) == ("embedding", (1, [2]))
    assert found["params"][0] is other.tok


def test_problems_are_reported_together_and_nothing_is_loaded() -> None:
    model, other = Model(), Model()
    optimizer = AdamW([{"params": [model.tok, model.unused]}, {"params": [model.proj.weight, model.proj.bias]}])
    train(model, optimizer, 1)
    extra = torch.nn.Parameter(torch.ones(1))
    other.tok = torch.nn.Parameter(torch.ones(7, 4))
    resumed = AdamW([{"params": [other.tok, other.proj.weight]}, {"params": [extra, other.proj.bias]}], lr=9.0)
    names = {**other.names, id(extra): "extra"}
    problems = optimizers.set_optimizer_state(resumed, saved(optimizer, model), names, "opt")
    assert problems == [
        "opt: tok is of shape [7, 4], but [7, 5] in the checkpoint",
        "opt: proj.weight is in parameter group 0, but in group 1 in the checkpoint",
        "opt: extra is not in the checkpoint",
        "opt: unused is in the checkpoint, but not in the optimizer",
    ]
    assert not resumed.state
    assert resumed.param_groups[0]["lr"] == 9.0
    assert optimizers.compare_optimizer_state(resumed, saved(optimizer, model), names, "opt") == problems


def test_without_strict_all_that_fits_is_loaded() -> None:
    model, other = Model(), Model()
    optimizer = AdamW([{"params": [model.tok, model.proj.weight, model.proj.bias]}], lr=0.3)
    train(model, optimizer, 1)
    other.tok = torch.nn.Parameter(torch.ones(7, 5))
    fresh = torch.nn.Parameter(torch.ones(1))
    resumed = AdamW([{"params": [other.proj.weight, fresh]}, {"params": [other.proj.bias], "lr": 5.0}])
    fresh.grad = torch.ones(1)
    resumed.step()
    kept = copy.deepcopy(resumed.state[fresh])
    problems = optimizers.set_optimizer_state(resumed, saved(optimizer, model), other.names, strict=False)
    assert problems[0] == "optimizer: has 2 parameter groups, but 1 in the checkpoint"
    assert equal(resumed.state[other.proj.weight], optimizer.state[model.proj.weight])
    assert equal(resumed.state[other.proj.bias], optimizer.state[model.proj.bias])
    assert equal(resumed.state[fresh], kept)
    assert [group["lr"] for group in resumed.param_groups] == [0.3, 5.0]


def test_several_optimizers() -> None:
    model, other = Model(), Model()

    def pair(of: Model) -> dict[str, Any]:
        return {"tok": AdamW([of.tok]), "rest": SGD(of.proj.parameters(), lr=0.1, momentum=0.9)}

    given, resumed = pair(model), pair(other)
    for one in given.values():
        train(model, one, 2)
    state = saved(given, model)
    assert optimizers.set_optimizer_state(resumed, state, other.names) == []
    for key, one in given.items():
        assert equal(resumed[key].state_dict(), one.state_dict())
    del state["optimizers"]["rest"]
    assert optimizers.set_optimizer_state(resumed, state, other.names) == ["optimizer/rest: is not in the checkpoint"]
    assert optimizers.set_optimizer_state({}, state, other.names) == [
        "optimizer/tok: is in the checkpoint, but was not given"
    ]
    assert "a dict of them" in optimizers.set_optimizer_state(resumed["tok"], state, other.names)[0]
    assert (
        "a dict of them was given"
        in optimizers.set_optimizer_state(resumed, saved(given["tok"], model), other.names)[0]
    )


def test_accelerate_wraps() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, other = Model(), Model()
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = accelerator.prepare(AdamW(model.parameters()))
    train(model, optimizer, 2)
    resumed = accelerator.prepare(AdamW(other.parameters()))
    assert optimizers.set_optimizer_state(resumed, saved(optimizer, model), other.names) == []
    assert equal(resumed.state_dict(), optimizer.state_dict())
    plain = AdamW(other.parameters())
    assert optimizers.set_optimizer_state(plain, saved(optimizer, model), other.names) == []


class Lookahead:
    """A wrapper whose state is of its own make."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.slow = torch.ones(2)

    def state_dict(self) -> dict[str, Any]:
        return {"slow": self.slow, "inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.slow = state["slow"]
        self.inner.load_state_dict(state["inner"])


def test_a_state_of_another_make_goes_through_untouched() -> None:
    model, other = Model(), Model()
    optimizer, resumed = Lookahead(AdamW(model.parameters())), Lookahead(AdamW(other.parameters()))
    train(model, optimizer.inner, 2)
    optimizer.slow += 1
    state = saved(optimizer, model)
    assert optimizers.set_optimizer_state(resumed, state, other.names) == []
    assert torch.equal(resumed.slow, optimizer.slow)
    assert equal(resumed.inner.state_dict(), optimizer.inner.state_dict())
    (problem,) = optimizers.set_optimizer_state(resumed.inner, state, other.names)
    assert "another kind of optimizer" in problem


def test_two_parameters_of_one_name_are_refused() -> None:
    model = Model()
    names = dict.fromkeys(model.names, "same")
    with pytest.raises(UsageError, match="several parameters are called same"):
        optimizers.get_optimizer_state(AdamW(model.parameters()), names)


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(UsageError, match=r"opt: a int has no state_dict\(\)"):
        optimizers.get_optimizer_state(3, {}, "opt")
