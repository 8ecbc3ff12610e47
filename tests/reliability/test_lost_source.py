"""A run whose source is lost goes on without it, and its steps stay in the source's files, dtypes and config."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from ckpt_convert import AdapterConfig, Checkpointer, CheckpointNotFoundError, UsageError
from tests.checkpointer.training import LLAMA, Trained, bfloat16_source
from tests.helpers import GOLDEN, edit_json, read_safetensors, sums


def run(source: Path | None, output_dir: Path, until: int, how: Any = None, **options: Any) -> list[int]:
    """Train to a step, from where the run is; the steps that are there afterwards."""
    trained = Trained(LLAMA)
    with Checkpointer(source, output_dir, **{"save_every": 1, **options}) as checkpointer:
        if source is not None:
            checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts, **(how or {}))
        trained.go(checkpointer, until)
        return [saved.step for saved in checkpointer.saved]


def beside(step: Path) -> dict[str, str]:
    """The names of all files but those of the training state, and the checksums of those that hold no weights."""
    found = {name: digest for name, digest in sums(step).items() if not name.startswith("training_state")}
    return {name: "" if name.endswith((".safetensors", ".pth")) else digest for name, digest in found.items()}


def dtypes(step: Path) -> dict[str, Any]:
    return {key: tensor.dtype for key, tensor in read_safetensors(step).items()}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """What is left of the source: a config that does not even say the same of what training does not use."""
    path = tmp_path / "config.json"
    shutil.copy(LLAMA / "config.json", path)
    edit_json(path, dtype="float32", bos_token_id=3)
    return path


@pytest.mark.parametrize("keep", [None, 1], ids=["all kept", "one kept"])
def test_layout_dtypes_and_config_are_those_of_the_newest_step(
    keep: int | None, config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = bfloat16_source(tmp_path / "source")
    run(source, tmp_path / "out", 2)
    expected = beside(tmp_path / "out" / "step_2"), dtypes(tmp_path / "out" / "step_2")
    shutil.rmtree(source)
    there = run(None, tmp_path / "out", 4, config=config, keep_last=keep)
    assert there == ([2, 4] if keep else [1, 2, 3, 4])  # the step that stands in for the source stays meanwhile
    there = run(None, tmp_path / "out", 5, keep_last=keep)  # and the config need not be given
    assert there == ([4, 5] if keep else [1, 2, 3, 4, 5])
    for step in (4, 5):
        assert (beside(tmp_path / "out" / f"step_{step}"), dtypes(tmp_path / "out" / f"step_{step}")) == expected
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [line for line in said if "dataloader" not in line and "are written as bfloat16" not in line]


def test_a_metric_of_the_step_that_stands_in_changes_nothing(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "llama" / "meta-mp2", tmp_path / "source")
    run(tmp_path / "source", tmp_path / "out", 1)
    shutil.rmtree(tmp_path / "source")
    trained = Trained()
    with Checkpointer(None, tmp_path / "out", save_every=1) as checkpointer:
        with pytest.raises(UsageError, match="source=None: there are no weights to load"):
            checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        checkpointer.report(val_loss=1.0)
        trained.go(checkpointer, 2)
        assert checkpointer.saved[0].metrics == {"val_loss": 1.0}
    assert beside(tmp_path / "out" / "step_2").keys() == beside(tmp_path / "out" / "step_1").keys()
    assert len(list((tmp_path / "out" / "step_2").glob("consolidated.*.pth"))) == 2


def test_a_run_that_goes_back_replaces_the_steps_after_it(tmp_path: Path) -> None:
    source = shutil.copytree(LLAMA, tmp_path / "source")
    run(source, tmp_path / "out", 3)
    expected = beside(tmp_path / "out" / "step_3")
    shutil.rmtree(source)
    assert run(None, tmp_path / "out", 5, {"from_": 1}) == [1, 2, 3, 4, 5]
    assert beside(tmp_path / "out" / "step_5") == expected


def test_the_error_about_a_source_that_is_not_there_names_the_way(tmp_path: Path) -> None:
    source = shutil.copytree(LLAMA, tmp_path / "source")
    run(source, tmp_path / "out", 1)
    shutil.rmtree(source)
    with pytest.raises(CheckpointNotFoundError, match=r"if it is lost, pass source=None: .*step_1"):
        Checkpointer(source, tmp_path / "out")
    with pytest.raises(CheckpointNotFoundError) as caught:
        Checkpointer(source, tmp_path / "other")
    assert "source=None" not in str(caught.value)


def test_an_adapter_cannot_go_on_without_its_base(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="source=None"):
        Checkpointer(None, tmp_path / "out", adapter=AdapterConfig(rank=2, alpha=4))


def test_a_run_that_began_with_a_config_keeps_no_step_for_its_layout(tmp_path: Path) -> None:
    content = json.loads((LLAMA / "config.json").read_text())
    run(None, tmp_path / "out", 2, config=content, keep_last=1)
    assert run(None, tmp_path / "out", 4, config=content, keep_last=1) == [4]


def test_a_fresh_start_over_a_run_has_the_config_that_is_given(config: Path, tmp_path: Path) -> None:
    run(LLAMA, tmp_path / "out", 1)
    trained = Trained()
    with Checkpointer(None, tmp_path / "out", config=config, overwrite=True) as checkpointer:
        checkpointer.register(**trained.parts)
        trained.go(checkpointer, 1)
    assert json.loads((tmp_path / "out" / "step_1" / "config.json").read_text())["bos_token_id"] == 3
