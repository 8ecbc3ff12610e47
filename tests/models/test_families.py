"""Every family's table against tensors that other people's converters made (fixtures/golden), bit for bit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from ckpt_convert import convert_state_dict
from ckpt_convert.models import FAMILIES
from ckpt_convert.models.core.config import type_of
from tests.helpers import GOLDEN, Tensors, assert_same, read_safetensors

FORMS = sorted((path.parent.name, path.stem) for path in GOLDEN.glob("*/*.safetensors"))
"""(case, format) of every file that an outside converter made of a case's Hugging Face checkpoint."""

ALL = sorted(path.parent.name for path in GOLDEN.glob("*/hf"))


def config(case: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / case / "hf" / "config.json").read_text())
    return content


def with_buffers(form: str, tensors: Tensors) -> Tensors:
    """With what torchtitan's models hold besides what its adapters convert: a buffer of zeros beside each router."""
    routers = [key for key in tensors if key.endswith(".moe.router.gate.weight")] if form == "torchtitan" else []
    buffers = {key.replace("router.gate.weight", "expert_bias_E"): torch.zeros(len(tensors[key])) for key in routers}
    return buffers | tensors


@pytest.mark.parametrize(("case", "form"), FORMS)
def test_from_hf(case: str, form: str) -> None:
    found = convert_state_dict(read_safetensors(GOLDEN / case / "hf"), config(case), source="hf", target=form)
    assert isinstance(found, dict)
    assert_same(found, with_buffers(form, read_safetensors(GOLDEN / case / f"{form}.safetensors")))


@pytest.mark.parametrize(("case", "form"), FORMS)
def test_to_hf(case: str, form: str) -> None:
    found = convert_state_dict(
        read_safetensors(GOLDEN / case / f"{form}.safetensors"), config(case), source=form, target="hf"
    )
    assert isinstance(found, dict)
    assert_same(found, read_safetensors(GOLDEN / case / "hf"))


@pytest.mark.parametrize("case", ALL)
def test_every_case_is_of_a_family(case: str) -> None:
    model_type = type_of(config(case))
    assert any(model_type in family.model_types for family in FAMILIES.values())
