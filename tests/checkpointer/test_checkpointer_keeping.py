"""Which checkpoints stay: the newest, the best, their training state; and what is never touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ckpt_convert import Checkpointer
from ckpt_convert.checkpointer.run import retention
from ckpt_convert.errors import UsageError
from tests.checkpointer.training import LLAMA, Trained, make_model
from tests.helpers import sums

MODEL = make_model()
BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def run(output_dir: Path, losses: Sequence[float | None], contents: str = "weights", **options: Any) -> list[int]:
    """Save every step, with a loss reported after it; goes on where a run before ended. The steps that stay."""
    chosen = {"save_every": 1, "contents": contents, **options}
    with Checkpointer(LLAMA, output_dir, **chosen) as checkpointer:
        checkpointer.resume(model=MODEL)
        for loss in losses:
            checkpointer.step()
            if loss is not None:
                checkpointer.report(val_loss=loss)
        checkpointer.wait()
        return [saved.step for saved in checkpointer.saved]


def directories(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir() if path.is_dir() and not path.is_symlink())


@BOTH
def test_keep_last(asynchronous: bool, tmp_path: Path) -> None:
    assert run(tmp_path, [None] * 5, keep_last=2, asynchronous=asynchronous) == [4, 5]
    assert directories(tmp_path) == ["step_4", "step_5"]


def test_keep_last_goes_on_after_a_restart(tmp_path: Path) -> None:
    run(tmp_path, [None] * 3, keep_last=3)
    assert run(tmp_path, [None], keep_last=3) == [2, 3, 4]


def test_one_is_only_removed_once_its_successor_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[list[int]] = []
    true = retention.apply_retention

    def apply(decision: retention.RetentionDecision, **options: Any) -> None:
        if decision.delete:
            there.append([saved.step for saved in Checkpointer(LLAMA, tmp_path).saved])
        true(decision, **options)

    monkeypatch.setattr(retention, "apply_retention", apply)
    run(tmp_path, [None] * 3, keep_last=1)
    assert there == [[1, 2], [2, 3]]


@BOTH
def test_the_best_and_the_latest_both_stay(asynchronous: bool, tmp_path: Path) -> None:
    kept = run(tmp_path, [3, 1, 2, 5, 4], keep_last=1, best="val_loss:min", asynchronous=asynchronous)
    assert kept == [2, 5]


def test_the_best_by_the_largest(tmp_path: Path) -> None:
    assert run(tmp_path, [3, 1, 5, 2, 4], keep_last=1, best="val_loss:max", keep_best=2) == [3, 5]


def test_zero_is_a_value(tmp_path: Path) -> None:
    assert run(tmp_path, [1, 0.0, 2, 3], keep_last=1, best="val_loss:min") == [2, 4]


def test_the_best_is_remembered_over_a_restart(tmp_path: Path) -> None:
    run(tmp_path, [1, 5], keep_last=1, best="val_loss:min")
    assert run(tmp_path, [4, 3], keep_last=1, best="val_loss:min") == [1, 4]


def test_steps_without_the_metric_are_no_candidates(tmp_path: Path) -> None:
    assert run(tmp_path, [None, 2, None, None], keep_last=1, best="val_loss:min") == [2, 4]


def test_the_best_so_far_can_be_asked_for(tmp_path: Path) -> None:
    with Checkpointer(LLAMA, tmp_path, save_every=1, contents="weights", best="val_loss:min") as checkpointer:
        checkpointer.resume(model=MODEL)
        assert checkpointer.best is None
        for loss in (2, 1, 3):
            checkpointer.step()
            checkpointer.report(val_loss=loss)
        assert checkpointer.best is not None
        assert checkpointer.best.step == 2


@BOTH
@pytest.mark.parametrize("directory", ["step_{step}", "e{epoch}-v{evals}-{step}"])
def test_a_metric_after_the_save_amends_the_manifest(directory: str, asynchronous: bool, tmp_path: Path) -> None:
    options = {"save_every": 1, "directory": directory, "asynchronous": asynchronous}
    with Checkpointer(LLAMA, tmp_path, contents="weights", **options) as checkpointer:  # type: ignore[arg-type]
        checkpointer.register(model=MODEL)
        checkpointer.step()
        checkpointer.end_epoch()
        checkpointer.report(val_loss=0.25)
        checkpointer.report(accuracy=1)
        checkpointer.wait()
        assert [(saved.metrics, saved.progress.evals) for saved in checkpointer.saved] == [
            ({"val_loss": 0.25, "accuracy": 1.0}, 2)
        ]
        checkpointer.step()
        checkpointer.wait()
        assert checkpointer.saved[-1].metrics == {}  # they were those of the step before


def test_the_training_state_is_thinned_on_its_own(tmp_path: Path) -> None:
    trained = Trained()
    options: dict[str, Any] = {"save_every": 1, "keep_last": 4, "keep_last_training_state": 2}
    with Checkpointer(LLAMA, tmp_path, **options) as checkpointer:
        checkpointer.register(**trained.parts)
        trained.go(checkpointer, 5)
        assert [(saved.step, saved.has_training_state) for saved in checkpointer.saved] == [
            (2, False), (3, False), (4, True), (5, True)]  # fmt: skip
    assert sorted(path.parent.name for path in tmp_path.glob("step_*/training_state")) == ["step_4", "step_5"]
    assert sums(tmp_path / "step_2").keys() == sums(LLAMA).keys()
    with Checkpointer(LLAMA, tmp_path / "other") as other:  # what is thin can still be loaded
        progress = other.resume(**Trained().parts, from_=tmp_path / "step_2", weights_only=True)
    assert progress is not None
    assert progress.step == 2


def test_only_directories_of_this_checkpointer_are_touched(tmp_path: Path) -> None:
    run(tmp_path, [None] * 3)
    shutil.copytree(tmp_path / "step_1", tmp_path / "step_1_best")
    shutil.copytree(tmp_path / "step_1", tmp_path / "my-step-5-notes")
    shutil.copytree(LLAMA, tmp_path / "step_0")
    for name in ("step_99", "step_x", "step_", "step_2.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("mine")
    (tmp_path / "step_7").write_text("a file")
    (tmp_path / "step_8").symlink_to("step_1_best")
    kept = {name: sums(tmp_path / name) for name in directories(tmp_path) if name not in ("step_1", "step_2", "step_3")}

    assert run(tmp_path, [None], keep_last=1) == [4]
    assert {name: sums(tmp_path / name) for name in directories(tmp_path) if name != "step_4"} == kept
    assert (tmp_path / "step_7").read_text() == "a file"
    assert (tmp_path / "step_8").readlink() == Path("step_1_best")


def test_a_user_s_copy_of_the_newest_is_not_resumed_from(tmp_path: Path) -> None:
    run(tmp_path, [None] * 2)
    shutil.copytree(tmp_path / "step_2", tmp_path / "step_30_best")
    with Checkpointer(LLAMA, tmp_path) as checkpointer:
        assert [saved.path.name for saved in checkpointer.saved] == ["step_1", "step_2"]
        progress = checkpointer.resume(model=MODEL)
    assert progress is not None
    assert progress.step == 2


# The pointer


def test_latest_is_a_relative_link(tmp_path: Path) -> None:
    run(tmp_path / "out", [None] * 2)
    assert os.readlink(tmp_path / "out" / "latest") == "step_2"
    (tmp_path / "out").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "latest" / "config.json").is_file()


def test_latest_by_another_name_or_not_at_all(tmp_path: Path) -> None:
    run(tmp_path / "a", [None], latest_name="newest")
    run(tmp_path / "b", [None], latest_name=None)
    assert os.readlink(tmp_path / "a" / "newest") == "step_1"
    assert [path.name for path in (tmp_path / "b").iterdir() if not path.name.startswith(".")] == ["step_1"]


def test_latest_never_leads_to_what_is_not_complete(tmp_path: Path) -> None:
    """The pointer is no source of truth: without it, or with a wrong one, the newest complete one is found."""
    run(tmp_path, [None] * 3)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("step_1")
    with Checkpointer(LLAMA, tmp_path) as checkpointer:
        progress = checkpointer.resume(model=MODEL)
    assert progress is not None
    assert progress.step == 3


# Several


def test_several_savers_side_by_side(tmp_path: Path) -> None:
    trained = Trained()
    with (
        Checkpointer(LLAMA, tmp_path / "full", save_every=4, keep_last=1) as full,
        Checkpointer(LLAMA, tmp_path / "weights", save_every=2, contents="weights", asynchronous=True) as weights,
    ):
        full.register(**trained.parts)
        weights.register(model=trained.model)
        for tokens in list(trained.dataloader)[:6]:
            trained.update(tokens)
            full.step()
            weights.step()
    assert [(saved.step, saved.contents) for saved in full.saved] == [(6, "full")]
    assert [(saved.step, saved.contents) for saved in weights.saved] == [(n, "weights") for n in (2, 4, 6)]
    weights_of = {name: one for name, one in sums(tmp_path / "full" / "step_6").items() if "training_state" not in name}
    assert weights_of == sums(tmp_path / "weights" / "step_6")


@pytest.mark.parametrize(
    "options", [{"keep_last": 0}, {"keep_best": 1}, {"best": "val_loss"}, {"best": "a:least"}, {"keep_last": -1}]
)
def test_what_cannot_be_kept(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Checkpointer(LLAMA, tmp_path, **options)
