"""A mapping of copies instead of the model's tensors, whose saves would all hold the weights of the start."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckpt_convert import Checkpointer, UsageError
from tests.checkpointer.training import loss_of, make_model, trainable
from tests.helpers import assert_same, bits

TOKENS = torch.arange(28).reshape(4, 7) * 5 % 56
Given = Callable[[nn.Module], Mapping[str, torch.Tensor]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainable(tmp_path_factory.mktemp("source") / "model")


def cloned(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: one.clone() for key, one in model.state_dict().items()}


def train(
    source: Path, output: Path, given: Given, steps: int, *, lr: float = 0.01, optimizer: bool = True, **options: Any
) -> nn.Module:
    """Train a model of which the checkpointer gets what ``given`` makes."""
    torch.set_num_threads(1)
    model = make_model(source)
    with Checkpointer(source, output, save_every=steps, **options) as checkpointer:
        checkpointer.load_model(model)
        updating = torch.optim.SGD((one for one in model.parameters() if one.requires_grad), lr)
        checkpointer.register(model=given(model), optimizer=updating if optimizer else None)
        for _ in range(steps):
            loss_of(model, TOKENS).backward()  # type: ignore[no-untyped-call]
            updating.step()
            updating.zero_grad()
            checkpointer.step()
    return model


@pytest.mark.parametrize("contents", ["full", "weights"])
@pytest.mark.parametrize(
    "given", [cloned, lambda model: copy.deepcopy(model).state_dict()], ids=["clones", "of another module"]
)
def test_copies_are_refused_at_the_first_save(given: Given, contents: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)none of its 30 tensors has changed in 2 steps.*copies.*state_dict\(\)"):
        train(source, tmp_path, given, 2, contents=contents)
    assert not list(tmp_path.glob("step_*"))


def test_copies_are_refused_without_an_optimizer_too(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing else has their memory"):
        train(source, tmp_path, cloned, 2, optimizer=False)
    assert not list(tmp_path.glob("step_*"))


@pytest.mark.parametrize("lr", [0.01, 0.0], ids=["trained", "warm-up from 0"])
@pytest.mark.parametrize("optimizer", [True, False], ids=["optimizer", "no optimizer"])
@pytest.mark.parametrize(
    "given", [lambda model: model.state_dict(), lambda model: dict(model.named_parameters())], ids=["detached", "live"]
)
def test_tensors_that_are_trained_are_saved(
    given: Given, optimizer: bool, lr: float, source: Path, tmp_path: Path
) -> None:
    model = train(source, tmp_path, given, 2, lr=lr, optimizer=optimizer, contents="weights")
    again = make_model(source)
    with Checkpointer(tmp_path / "step_2") as checkpointer:
        checkpointer.load_model(again)
    assert_same(dict(again.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("given", [cloned, lambda model: model.state_dict()], ids=["copies", "its tensors"])
@pytest.mark.parametrize("beside", [True, False], ids=["something beside it is trained", "nothing is trained"])
def test_a_frozen_model_is_saved(given: Given, beside: bool, source: Path, tmp_path: Path) -> None:
    model = make_model(source).requires_grad_(False)
    temperature = nn.Parameter(torch.ones(72))
    optimizer = torch.optim.SGD([temperature] if beside else model.parameters(), 0.1)
    with Checkpointer(source, tmp_path, save_every=2) as checkpointer:
        checkpointer.register(model=given(model), optimizer=optimizer)
        for _ in range(2):
            if beside:
                temperature.grad = torch.ones(72)
            optimizer.step()
            checkpointer.step()
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_2"]


def test_copies_that_are_made_anew_for_each_save_are_saved(source: Path, tmp_path: Path) -> None:
    """What has to be gathered first, as the message says."""
    model = make_model(source)
    with Checkpointer(source, tmp_path, save_last=False) as checkpointer:
        for _ in range(2):
            with torch.no_grad():
                model.norm.scale.mul_(2)
            checkpointer.register(model=cloned(model), progress=checkpointer.progress)
            checkpointer.step()
            checkpointer.register(model=cloned(model), progress=checkpointer.progress)
            checkpointer.save()
        assert [saved.step for saved in checkpointer.saved] == [1, 2]
    again = make_model(source)
    with Checkpointer(tmp_path / "step_2") as checkpointer:
        checkpointer.load_model(again)
    assert bits(again.norm.scale) == bits(model.norm.scale)
