"""Optimizer states of pipeline stages put together, and what is left of them for one stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from ckpt_convert import UsageError
from ckpt_convert.checkpointer.state import stages
from ckpt_convert.checkpointer.state.optimizers import get_optimizer_state
from ckpt_convert.checkpointer.state.serialize import serialize

NAMES = ("first", "second", "third", "fourth")


def state_of(groups: Sequence[Sequence[str]], **options: float) -> Any:
    """The serialized state of an optimizer with these parameters, after a step."""
    parameters = {name: nn.Parameter(torch.ones(3)) for group in groups for name in group}
    optimizer = torch.optim.AdamW(
        [{"params": [(name, parameters[name]) for name in group]} for group in groups], **options
    )
    for parameter in parameters.values():
        parameter.grad = torch.ones(3)
    optimizer.step()
    names = {id(parameter): name for name, parameter in parameters.items()}
    return serialize(get_optimizer_state(optimizer, names)).skeleton


def test_stages_are_one_optimizer() -> None:
    merged = stages.merge([state_of([["first"], ["third"]]), state_of([["second"], ["fourth"]])])
    assert merged == state_of([["first", "second"], ["third", "fourth"]])


def test_a_stage_may_have_fewer_groups() -> None:
    merged = stages.merge([state_of([["first"]]), state_of([["second"], ["fourth"]])])
    assert merged == state_of([["first", "second"], ["fourth"]])


def test_a_dict_of_optimizers() -> None:
    one, other = ({"optimizers": {"a": state_of([[name]])}} for name in NAMES[:2])
    assert stages.merge([one, other]) == {"optimizers": {"a": state_of([NAMES[:2]])}}
    assert stages.without(stages.merge([one, other]), {"second"}) == one


def test_replicas_have_each_parameter_once() -> None:
    assert stages.merge([state_of([NAMES]), state_of([NAMES[:2]])]) == state_of([NAMES])


def test_what_is_left_for_one_stage() -> None:
    whole = state_of([NAMES[:2], NAMES[2:]])
    assert stages.without(whole, {"first", "third"}) == state_of([["second"], ["fourth"]])


def test_options_of_a_group_have_to_be_the_same() -> None:
    with pytest.raises(UsageError, match=r"lr of parameter group 0 is .* on one rank and 1"):
        stages.merge([state_of([["first"]]), state_of([["second"]], lr=1.0)])
