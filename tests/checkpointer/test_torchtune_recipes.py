"""Recipes of torchtune run with one changed line, ``_component_``, and train what they train without the change.

They run where ``tests/trainers.sh torchtune --install`` has put torchtune 0.6.1; ``test_torchtune`` needs none.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpointer.training import bfloat16_source
from tests.conftest import ROOT
from tests.helpers import sums, trainer_packages

THEIRS, OURS = "torchtune.training.FullModelHFCheckpointer", "ckpt_convert.TorchtuneCheckpointer"
FILES = [f"model-{at:05}-of-00004.safetensors" for at in range(1, 5)]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def packages() -> str:
    return trainer_packages("torchtune")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bfloat16_source(tmp_path_factory.mktemp("recipes") / "source")


def run(packages: str, source: Path, output: Path, component: str, **options: Any) -> Path:
    """Run a recipe, and return its output directory."""
    checkpointer = {
        "_component_": component,
        "checkpoint_dir": str(source),
        "checkpoint_files": options.pop("files", FILES),
        "model_type": "LLAMA3",
        "output_dir": str(output),
    }
    defaults = {"packages": packages, "recipe": "full", "dtype": "bf16", "resume": False, "epochs": 2}
    given = json.dumps({**defaults, **options, "checkpointer": checkpointer})
    command = [sys.executable, "-m", "tests.checkpointer.torchtune_recipe", given]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two safetensors files hold the same tensors, bit for bit."""
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_full_finetuning_gives_the_same_weights_in_the_files_of_the_source(
    packages: str, source: Path, tmp_path: Path
) -> None:
    theirs, ours = (run(packages, source, tmp_path / one, one) for one in (THEIRS, OURS))
    for epoch in ("epoch_0", "epoch_1"):
        assert all(same_tensors(ours / epoch / name, theirs / epoch / name) for name in FILES)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(packages: str, source: Path, tmp_path: Path) -> None:
    """It is in float32, and the files are in bfloat16."""
    whole = run(packages, source, tmp_path / "whole", OURS, dtype="fp32")
    run(packages, source, tmp_path / "stopped", OURS, dtype="fp32", stop=1)
    resumed = run(packages, source, tmp_path / "stopped", OURS, dtype="fp32", resume=True)
    assert sums(resumed / "epoch_1") == sums(whole / "epoch_1")


def test_a_run_that_torchtune_has_begun_goes_on_with_the_changed_line(
    packages: str, source: Path, tmp_path: Path
) -> None:
    whole = run(packages, source, tmp_path / "whole", THEIRS)
    run(packages, source, tmp_path / "begun", THEIRS, stop=1)
    files = [f"epoch_0/{name}" for name in FILES]
    begun = run(packages, source, tmp_path / "begun", OURS, resume=True, files=files)
    assert all(same_tensors(begun / "epoch_1" / name, whole / "epoch_1" / name) for name in FILES)


def test_an_adapter_goes_on_as_it_does_with_torchtunes_own(packages: str, source: Path, tmp_path: Path) -> None:
    """The recipe for adapters begins its schedule again when it goes on, so no run is as one that was not stopped."""
    options = {"recipe": "lora", "dtype": "fp32"}
    begun = run(packages, source, tmp_path / "theirs", THEIRS, stop=1, **options)
    changed = shutil.copytree(begun, tmp_path / "changed")
    ours = run(packages, source, tmp_path / "ours", OURS, stop=1, **options)
    run(packages, source, begun, THEIRS, resume=True, **options)
    for output in (changed, ours):
        run(packages, source, output, OURS, resume=True, **options)
        name = "adapter_model.safetensors"
        assert same_tensors(output / "epoch_1" / "adapter" / name, begun / "epoch_1" / name)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_in_the_files_that_torchtune_writes_for_peft(
    dora: bool, packages: str, source: Path, tmp_path: Path
) -> None:
    """But for DoRA's magnitudes of q and k, which torchtune leaves in the order of its own rows; B it reorders."""
    options = {"recipe": "lora", "dtype": "fp32", "dora": dora, "epochs": 1}
    theirs, ours = (run(packages, source, tmp_path / one, one, **options) / "epoch_0" for one in (THEIRS, OURS))
    one, other = (load_file(output / "adapter_model.safetensors") for output in (theirs, ours / "adapter"))
    differing = {key for key in one if not torch.equal(one[key], other[key])}
    assert one.keys() == other.keys()
    assert differing == {key for key in one if key.endswith("q_proj.lora_magnitude_vector")}
    assert json.loads((ours / "adapter" / "adapter_config.json").read_text())["use_dora"] == dora
    alone = run(packages, source, tmp_path / "alone", OURS, adapter_only=True, **options) / "epoch_0"
    assert (alone / "adapter_model.safetensors").read_bytes() == (
        ours / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert not list(alone.glob("model*"))
