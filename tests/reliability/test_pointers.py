"""The pointer to the newest step is followed wherever a checkpoint is asked for, also where it is a text file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from ckpt_convert import Checkpointer, CkptConvertError, open_checkpoint
from tests.checkpointer.training import LLAMA, Trained, make_model
from tests.command import run
from tests.helpers import assert_same


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


@pytest.fixture(scope="module")
def pointer(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``latest`` of a run with two steps, as it is where there are no links."""
    output_dir = tmp_path_factory.mktemp("run") / "out"
    with Checkpointer(LLAMA, output_dir, save_every=1) as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.register(**trained.parts)
        trained.go(checkpointer, 2)
    (output_dir / "latest").unlink()
    (output_dir / "latest").write_text("step_2\n")
    return output_dir / "latest"


def test_every_command_follows_it(pointer: Path, tmp_path: Path) -> None:
    step = pointer.with_name("step_2")
    inspected = json.loads(run("inspect", pointer, "--json").stdout)
    assert (inspected["path"], inspected["format"]) == (str(step), "hf")
    verified = json.loads(run("verify", pointer, "--json").stdout)
    assert (verified["path"], verified["errors"]) == (str(step), 0)
    assert "training" in verified["checks"]
    assert run("diff", pointer, step).returncode == 0
    done = run("convert", pointer, tmp_path / "native", "--to", "native")
    assert done.returncode == 0, done.stderr
    assert run("diff", tmp_path / "native", step).returncode == 0


def test_a_change_is_accepted_through_it(pointer: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pointer.parent, tmp_path / "copy")
    (copy / "step_2" / "generation_config.json").write_text('{"do_sample": true}\n')
    assert run("verify", copy / "latest").returncode == 1
    done = run("verify", copy / "latest", "--accept", "generation_config.json")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_source_follows_it(pointer: Path, trained: Trained, tmp_path: Path) -> None:
    model = make_model()
    with Checkpointer(pointer, tmp_path / "out") as checkpointer:
        checkpointer.load_model(model)
    assert_same(model.state_dict(), trained.model.state_dict())


def test_it_leads_to_a_directory_beside_it_and_nowhere_else(pointer: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pointer.parent, tmp_path / "copy")
    shutil.copytree(copy / "step_2", tmp_path / "outside")
    os.symlink(tmp_path / "outside", copy / "step_3")
    (copy / "below").mkdir()
    shutil.move(copy / "step_1", copy / "below" / "step_1")
    for text in ("../outside", str(tmp_path / "outside"), "step_3", "step_9", ".", "..", "below/step_1", "", "latest"):
        (copy / "latest").write_text(text)
        with pytest.raises(CkptConvertError, match="latest"):
            open_checkpoint(copy / "latest")


def test_a_weight_file_is_no_pointer(pointer: Path) -> None:
    file = next(pointer.with_name("step_2").glob("*.safetensors"))
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.path == file
