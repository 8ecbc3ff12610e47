"""A Llama of which only a part of each head rotates: no layout that orders the rows of whole heads takes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import ckpt_convert
from ckpt_convert import Checkpointer
from tests.checkpointer.training import Trained
from tests.command import run
from tests.helpers import GOLDEN, edit_json, sums

SPELLINGS: list[dict[str, Any]] = [
    {"partial_rotary_factor": 0.5},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
]


@pytest.fixture(params=SPELLINGS, ids=["top", "rope_parameters"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "llama" / "hf", tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", **request.param)
    return tmp_path / "source"


@pytest.mark.parametrize("to", ["native", "torchtitan", "meta"])
def test_it_is_refused_where_rows_are_reordered(source: Path, to: str, tmp_path: Path) -> None:
    with pytest.raises(ckpt_convert.ConfigError, match="partial_rotary_factor"):
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_so_it_is_in_memory_and_behind_training(source: Path, tmp_path: Path) -> None:
    import json

    config = json.loads((source / "config.json").read_text())
    with pytest.raises(ckpt_convert.ConfigError, match="partial_rotary_factor"):
        ckpt_convert.convert_state_dict(Trained().model.state_dict(), config, source="native", target="hf")
    with (
        pytest.raises(ckpt_convert.ConfigError, match="partial_rotary_factor"),
        Checkpointer(source, tmp_path / "run") as checkpointer,
    ):
        checkpointer.load_model(Trained().model)


def test_within_its_own_format_it_goes_on(source: Path, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", verify=True)
    assert sums(tmp_path / "out") == sums(source)


def test_a_factor_of_one_is_no_part(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "llama" / "hf", tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", partial_rotary_factor=1.0)
    ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "out", to="native", verify=True)
    assert run("diff", tmp_path / "source", tmp_path / "out").returncode == 0
