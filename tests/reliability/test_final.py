"""What ``final=`` asks for is there when a run has ended, also when it was killed just before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckpt_convert import Checkpointer
from tests.checkpointer.training import Trained, trainable
from tests.helpers import sums

FINAL = {"contents": "weights", "export_dtype": "bfloat16"}


class KilledError(Exception):
    """Stands for a kill: nothing that comes after it is done."""


def train(source: Path, out: Path, *, killed: bool = False, keep: int = 1) -> None:
    trained = Trained(source)
    with Checkpointer(source, out, save_every="1 step", keep_last=keep, final=FINAL) as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        for _ in checkpointer.epochs(1):
            for tokens in trained.dataloader:
                trained.update(tokens)
                checkpointer.step()
        if killed:
            raise KilledError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainable(tmp_path_factory.mktemp("final") / "source")


def training(step: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((step / "ckpt_convert" / "manifest.json").read_text())["training"]
    return found


def test_a_run_that_is_killed_before_its_final_save_has_it_after_the_next_start(source: Path, tmp_path: Path) -> None:
    train(source, tmp_path / "whole")
    with pytest.raises(KilledError):
        train(source, tmp_path / "killed", killed=True)
    assert training(tmp_path / "killed" / "step_7")["contents"] == "full"
    train(source, tmp_path / "killed")
    assert training(tmp_path / "killed" / "step_7")["contents"] == "weights"
    assert sums(tmp_path / "killed" / "step_7") == sums(tmp_path / "whole" / "step_7")
    before = (tmp_path / "killed" / "step_7").stat().st_ino
    train(source, tmp_path / "killed")  # once more: it is there already
    assert (tmp_path / "killed" / "step_7").stat().st_ino == before


def test_a_checkpoint_that_is_only_looked_at_keeps_its_training_state(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train(source, tmp_path / "run", killed=True)
    trained = Trained(source)
    with Checkpointer(source, tmp_path / "run", final=FINAL) as checkpointer:
        checkpointer.load_model(trained.model)
        assert checkpointer.resume(**trained.parts) is not None
    assert training(tmp_path / "run" / "step_7")["contents"] == "full"
    assert (tmp_path / "run" / "step_7" / "training_state").is_dir()


def test_a_second_run_of_one_checkpointer_is_not_over_because_the_first_was(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train(source, tmp_path / "run", killed=True, keep=2)
    trained = Trained(source)
    with Checkpointer(source, tmp_path / "run", final=FINAL) as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        assert list(checkpointer.epochs(1)) == []
        checkpointer.end_run()
        checkpointer.resume(from_=6, **trained.parts)
    assert training(tmp_path / "run" / "step_7")["contents"] == "weights"
    assert training(tmp_path / "run" / "step_6")["contents"] == "full"
