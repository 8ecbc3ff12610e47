"""What a resumed run takes, and from where: said where it is less than the run had, refused where it is nothing."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_convert import (
    AdapterConfig,
    Checkpointer,
    CheckpointNotFoundError,
    KeyMismatchError,
    OutputExistsError,
    UsageError,
)
from tests.checkpointer.training import LLAMA, Trained, make_model
from tests.helpers import assert_same


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def trained_to(output_dir: Path, step: int, **options: Any) -> Trained:
    trained = Trained()
    with Checkpointer(LLAMA, output_dir, **{"save_every": 1, **options}) as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, step)
    return trained


def resumed(output_dir: Path, trained: Trained | None = None, options: dict[str, Any] | None = None, **how: Any) -> Any:
    """The progress of a run that is resumed, and goes no step further."""
    with Checkpointer(LLAMA, output_dir, **(options or {})) as checkpointer:
        return checkpointer.resume(**(trained or Trained()).parts, **how)


@pytest.fixture(scope="module")
def thinned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 to 3, of which the last alone has its training state."""
    output_dir = tmp_path_factory.mktemp("thinned") / "out"
    trained_to(output_dir, 3, keep_last_training_state=1)
    return output_dir


# A training state that is gone


def test_a_step_without_its_training_state_is_refused_with_the_ways_and_nothing_is_loaded(
    thinned: Path, tmp_path: Path
) -> None:
    trained, fresh = Trained(), Trained()
    with pytest.raises(KeyMismatchError) as caught:
        resumed(tmp_path, trained, from_=thinned / "step_2")
    for part in ("optimizer, lr_scheduler, dataloader, rng", "weights_only=True", "exclude=", "from_=3"):
        assert part in str(caught.value)
    assert_same(trained.model.state_dict(), fresh.model.state_dict())


def test_the_ways_that_it_names(thinned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rest = ["optimizer", "lr_scheduler", "dataloader", "rng"]
    expected = Trained()
    with Checkpointer(thinned / "step_2", tmp_path / "loaded") as checkpointer:
        checkpointer.load_model(expected.model)
    for number, way in enumerate(({"weights_only": True}, {"exclude": rest})):
        trained = Trained()
        progress = resumed(tmp_path / str(number), trained, from_=thinned / "step_2", **way)
        assert progress.step == 2
        assert_same(trained.model.state_dict(), expected.model.state_dict())
    assert warnings(caplog) == []
    assert resumed(thinned, from_=3).step == 3
    caplog.clear()
    assert resumed(tmp_path / "loose", from_=thinned / "step_2", strict=False).step == 2
    (said,) = warnings(caplog)
    assert "optimizer, lr_scheduler, dataloader, rng cannot be restored" in said


def test_a_step_that_was_saved_without_training_state_resumes_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = trained_to(tmp_path, 2, final={"contents": "weights"})
    found = Trained()
    assert resumed(tmp_path, found).step == 2
    assert_same(found.model.state_dict(), expected.model.state_dict())
    (said,) = warnings(caplog)
    assert "step_2: was saved with contents='weights'" in said
    assert "optimizer, lr_scheduler, dataloader, rng keep their initial state" in said
    assert "from_=1 is a step with a training state" in said


def test_a_saver_of_weights_alone_resumes_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        with Checkpointer(LLAMA, tmp_path, contents="weights") as checkpointer:
            checkpointer.resume(model=make_model())
            checkpointer.step()
    assert warnings(caplog) == []


def test_a_seed_is_a_fresh_start_with_its_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(3)
    seed, trained = make_model(), Trained()
    with Checkpointer(LLAMA, tmp_path) as checkpointer:
        checkpointer.create_seed_checkpoint(seed)
    assert resumed(tmp_path, trained).step == 0
    assert_same(trained.model.state_dict(), seed.state_dict())
    assert warnings(caplog) == []


# Progress that starts anew


def test_progress_can_start_anew_in_another_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = trained_to(tmp_path / "pre", 3)
    trained = Trained()
    with (
        caplog.at_level(logging.INFO, "ckpt_convert"),
        Checkpointer(LLAMA, tmp_path / "fine", save_every=1) as checkpointer,
    ):
        progress = checkpointer.resume(**trained.parts, from_=tmp_path / "pre", weights_only=True, exclude=["progress"])
        assert progress is not None
        assert (progress.step, progress.tokens, progress.epoch) == (0, 0, 0)
        assert_same(trained.model.state_dict(), first.model.state_dict())
        trained.go(checkpointer, 1)
    assert [saved.step for saved in checkpointer.saved] == [1]
    caplog.set_level(logging.INFO, "ckpt_convert")
    assert not any("exclude=['progress']" in record.getMessage() for record in caplog.records)
    resumed(tmp_path / "other", from_=tmp_path / "pre", weights_only=True)  # which offers it
    assert any("at step 3; exclude=['progress'] counts from 0" in record.getMessage() for record in caplog.records)
    assert warnings(caplog) == []


def test_progress_does_not_start_anew_over_the_steps_that_are_there(thinned: Path) -> None:
    with pytest.raises(UsageError, match=r"holds 3 checkpoints, up to step 3.*choose another output_dir"):
        resumed(thinned, exclude=["progress"])


# Globs


@pytest.mark.parametrize(
    "how",
    [
        {"exclude": ["data_loader"]},
        {"exclude": "data_loader"},
        {"include": ["model/layer.0.*"]},
        {"include": ["model/*", "optimiser"]},
        {"exclude": ["model/layers.9.*"]},
        {"include": []},
        {"include": ["optimizer"], "exclude": ["opt*"]},
        {"include": ["optimizer"], "weights_only": True},
        {"exclude": ["model"], "weights_only": True},
    ],
    ids=str,
)
def test_a_glob_that_names_nothing_is_an_error_on_a_fresh_start_and_on_a_resume(
    how: dict[str, Any], thinned: Path, tmp_path: Path
) -> None:
    for output_dir in (tmp_path / "fresh", thinned):
        trained, untouched = Trained(), Trained()
        with pytest.raises(UsageError, match=r"matches nothing|leave nothing to load") as caught:
            resumed(output_dir, trained, **how)
        if "matches nothing" in str(caught.value):
            for name in ("optimizer", "dataloader", "rng", "progress", "model/tok_embeddings.weight"):
                assert name in str(caught.value)
            assert "optimizer, optimizer" not in str(caught.value)
        assert_same(trained.model.state_dict(), untouched.model.state_dict())


@pytest.mark.parametrize(
    "how",
    [
        {"exclude": ["grad_scaler", "extra", "dataloader/*", "dataloader*"][:2]},
        {"exclude": "dataloader*"},
        {"include": ["model/layers.0.*", "progress"]},
        {"include": "model/layers.0.*"},
        {"include": ["model"], "exclude": ["model/output.weight"]},
        {"exclude": ["optimizer"], "weights_only": True},
        {"exclude": ["model", "optimizer", "lr_scheduler", "dataloader", "rng"]},
    ],
    ids=str,
)
def test_globs_that_name_something_pass_on_a_fresh_start_and_on_a_resume(
    how: dict[str, Any], thinned: Path, tmp_path: Path
) -> None:
    assert resumed(tmp_path / "fresh", **how) is None
    assert resumed(thinned, **how).step == 3


def test_a_part_of_the_checkpoint_that_was_not_given_can_be_excluded_by_its_name(tmp_path: Path) -> None:
    trained = Trained()
    with Checkpointer(LLAMA, tmp_path) as checkpointer:
        checkpointer.register(**(trained.parts | {"dataloader": {"train": trained.dataloader}}))
        trained.go(checkpointer, 1)
    assert resumed(tmp_path, exclude=["dataloader/train", "dataloader"]).step == 1


def test_an_adapter_is_loaded_whole_or_not_at_all(tmp_path: Path) -> None:
    config = AdapterConfig(rank=2, alpha=4, target_modules=["q_proj"])

    def model() -> Any:
        made = make_model()
        for layer in made.layers:
            projection = layer.attn.q_proj
            projection.weight.requires_grad_(False)
            rows, columns = projection.weight.shape
            projection.register_parameter("lora_a", torch.nn.Parameter(torch.randn(2, columns)))
            projection.register_parameter("lora_b", torch.nn.Parameter(torch.randn(rows, 2)))
        return made.requires_grad_(False)

    first = model()
    with Checkpointer(LLAMA, tmp_path, adapter=config) as checkpointer:
        checkpointer.load_model(first)
        checkpointer.register(model=first)
        checkpointer.step()
    for how, is_loaded in (({}, True), ({"include": ["model/*"]}, True), ({"exclude": ["model/*"]}, False)):
        again = model()
        with Checkpointer(LLAMA, tmp_path, adapter=config) as checkpointer:
            checkpointer.resume(model=again, **how)
        assert torch.equal(again.layers[0].attn.q_proj.lora_b, first.layers[0].attn.q_proj.lora_b) is is_loaded
    with (
        Checkpointer(LLAMA, tmp_path, adapter=config) as checkpointer,
        pytest.raises(UsageError, match="model/adapter"),
    ):
        checkpointer.resume(model=model(), include=["model/layers.0.*"])


# From where


def test_a_renamed_copy_is_taken_where_it_is_named_and_nowhere_else(thinned: Path, tmp_path: Path) -> None:
    shutil.copytree(thinned / "step_3", tmp_path / "out" / "the good one")
    assert resumed(tmp_path / "elsewhere", from_=tmp_path / "out" / "the good one").step == 3
    with Checkpointer(LLAMA, tmp_path / "out", keep_last=1) as checkpointer:
        trained = Trained()
        assert checkpointer.saved == []
        checkpointer.resume(**trained.parts, from_=tmp_path / "out" / "the good one")
        checkpointer.save()  # the copy is not this run's: its step is not saved yet
        trained.go(checkpointer, 4)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name[0] != ".") == [
        "latest", "step_4", "the good one"]  # fmt: skip


def test_the_pointer_is_taken_as_a_link_and_as_a_text_file(thinned: Path, tmp_path: Path) -> None:
    assert resumed(tmp_path / "a", from_=thinned / "latest").step == 3
    copy = shutil.copytree(thinned, tmp_path / "copy", symlinks=True)
    (copy / "latest").unlink()
    (copy / "latest").write_text("step_3\n")
    assert resumed(tmp_path / "b", from_=copy / "latest").step == 3
    (copy / "latest").write_text("step_9\n")
    with pytest.raises(CheckpointNotFoundError, match="latest"):
        resumed(tmp_path / "c", from_=copy / "latest")


def test_a_directory_without_manifest_is_none_by_any_name(thinned: Path, tmp_path: Path) -> None:
    shutil.copytree(thinned / "step_3", tmp_path / "copy")
    os.remove(tmp_path / "copy" / "ckpt_convert" / "manifest.json")
    with pytest.raises(CheckpointNotFoundError):
        resumed(tmp_path / "out", from_=tmp_path / "copy")


def test_overwrite_is_no_option_of_a_resume(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"overwrite=True is for register\(\)"):
        resumed(tmp_path, options={"overwrite": True})
    trained = Trained()
    for _ in range(2):
        with Checkpointer(LLAMA, tmp_path, overwrite=True) as checkpointer:
            checkpointer.register(**trained.parts)
            checkpointer.step()


# What lies ahead


def test_what_is_in_the_way_of_later_steps_is_said_when_a_run_goes_back_and_is_what_saving_refuses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained_to(tmp_path, 4)
    for name in ("step_1", "step_3"):
        (tmp_path / name / "notes.txt").write_text("mine")
    (tmp_path / "step_5").mkdir()
    (tmp_path / "step_5" / "plot.png").touch()
    (tmp_path / "step_6").touch()
    trained = Trained()
    with Checkpointer(LLAMA, tmp_path, save_every=1) as checkpointer:
        checkpointer.resume(**trained.parts, from_=2)
        (said,) = warnings(caplog)
        for part in ("at step 2", "step_3: ", "notes.txt", "step_5: ", "plot.png", "step_6: "):
            assert part in said
        assert "step_1" not in said
        assert "step_4" not in said
        for step, name in ((3, "notes.txt"), (5, "plot.png"), (6, "step_6")):
            with pytest.raises(OutputExistsError, match=rf"step_{step}(.|\n)*{name}"):
                trained.go(checkpointer, step)
            shutil.move(tmp_path / f"step_{step}", tmp_path / f"mine_{step}")
    caplog.clear()
    with Checkpointer(LLAMA, tmp_path / "fresh" / "of" / "it", save_every=1) as checkpointer:
        checkpointer.resume(**Trained().parts)
    assert warnings(caplog) == []


def test_where_nothing_is_in_the_way_nothing_is_said(
    thinned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(thinned, tmp_path / "copy", symlinks=True)
    for name in ("step_1", "step_2"):
        (copy / name / "notes.txt").write_text("mine")
    for name in ("step_9_good", "step_09", "notes", ".step_8"):
        (copy / name).mkdir()
        (copy / name / "notes.txt").write_text("mine")
    (copy / "step_7").mkdir()
    assert resumed(copy).step == 3
    assert resumed(copy, from_=2, weights_only=True).step == 2
    assert warnings(caplog) == []


def test_a_run_that_begins_hears_of_what_is_in_its_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "step_500").mkdir()
    (tmp_path / "step_500" / "notes.txt").write_text("mine")
    assert resumed(tmp_path) is None
    with Checkpointer(LLAMA, tmp_path) as checkpointer:
        checkpointer.register(**Trained().parts)
    for said in (both := warnings(caplog)):
        assert "step_500" in said
        assert "notes.txt" in said
    assert len(both) == 2
