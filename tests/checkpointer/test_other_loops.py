"""TorchTNT's and Composer's loops, with the callbacks in ``recipes/``, go on from a saved step as if never stopped.

They run where ``tests/trainers.sh NAME --install`` has put them: torchtnt 0.2.4, composer 0.32.1.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpointer.training import bfloat16_source
from tests.conftest import ROOT
from tests.helpers import sums, trainer_packages

BATCHES = 7

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bfloat16_source(tmp_path_factory.mktemp("loops") / "source")


def run(trainer: str, source: Path, output: Path, stop: int | None = None) -> Path:
    options = {"trainer": trainer, "packages": trainer_packages(trainer), "source": str(source), "output": str(output)}
    command = [sys.executable, "-m", "tests.checkpointer.other_loops", json.dumps({**options, "stop": stop})]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def training(step: Path) -> Any:
    return json.loads((step / "ckpt_convert" / "manifest.json").read_text())["training"]


@pytest.mark.parametrize("trainer", ["torchtnt", "composer"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(trainer: str, source: Path, tmp_path: Path) -> None:
    """In the middle of an epoch, and after its last batch, before its end is counted."""
    whole = run(trainer, source, tmp_path / "whole")
    last = whole / f"step_{2 * BATCHES}"
    assert training(last)["progress"]["epoch"] == 1  # the end of the second is counted after its last step is saved
    assert training(whole / f"step_{BATCHES}")["metrics"] == {"val_loss": 1.0}
    for stop in (3, BATCHES):
        output = tmp_path / f"stopped_{stop}"
        run(trainer, source, output, stop)
        assert (output / "latest").resolve().name == f"step_{stop}"
        run(trainer, source, output)
        assert sorted(path.name for path in output.glob("step_*")) == sorted(path.name for path in whole.glob("step_*"))
        for name, digest in sums(last).items():
            assert name.startswith("training_state") or sums(output / last.name)[name] == digest


@pytest.mark.parametrize("trainer", ["torchtnt", "composer"])
def test_the_callback_fits_on_a_screen(trainer: str) -> None:
    assert len((ROOT.parent / "recipes" / f"{trainer}_callback.py").read_text().splitlines()) <= 80
