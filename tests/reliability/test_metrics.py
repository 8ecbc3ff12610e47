"""Metrics and what follows a save: nothing of it ends a run or makes a complete step count as unsaved; none is lost."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_convert import Checkpointer, CkptConvertError
from tests.checkpointer.training import LLAMA, SYSTEM_CALLS, Trained, make_model

MODEL = make_model()


def metrics(step: Path) -> dict[str, Any]:
    training: dict[str, Any] = json.loads((step / "ckpt_convert" / "manifest.json").read_text())["training"]
    return training["metrics"] | {"evals": training["progress"]["evals"]}


def steps(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.glob("step_*"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@contextmanager
def failing(name: str, number: int, calls: range) -> Iterator[list[int]]:
    """Let these calls of a function of the system fail; those that did are listed."""
    true, counted, failed = getattr(os, name), [0], []

    def fails(*args: Any, **kwargs: Any) -> Any:
        counted[0] += 1
        if counted[0] in calls:
            failed.append(counted[0])
            raise OSError(number, os.strerror(number))
        return true(*args, **kwargs)

    setattr(os, name, fails)
    try:
        yield failed
    finally:
        setattr(os, name, true)


ALWAYS = range(1, 10**6)


# When they are taken


def test_a_metric_that_is_reported_while_the_step_is_written_is_in_its_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in an amendment of it: a kill between the two would lose the metric, and with it the best checkpoint."""
    reported, true = threading.Event(), os.fsync

    def waiting(fd: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert reported.wait(60)
        true(fd)

    with Checkpointer(LLAMA, tmp_path, save_every=1, asynchronous=True, latest_name=None) as checkpointer:
        checkpointer.resume(model=MODEL)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", waiting)
            checkpointer.step()
            checkpointer.report(val_loss=0.5)
            patch.setattr(os, "replace", lambda *args: pytest.fail("amended"))
            reported.set()
            checkpointer.wait()
        assert metrics(tmp_path / "step_1") == {"val_loss": 0.5, "evals": 1}


def run(output_dir: Path, losses: list[float | None], **options: Any) -> list[int]:
    with Checkpointer(LLAMA, output_dir, save_every=1, **options) as checkpointer:
        checkpointer.resume(model=MODEL)
        for loss in losses:
            checkpointer.step()
            if loss is not None:
                checkpointer.report(val_loss=loss)
        return [saved.step for saved in checkpointer.saved]


def test_resuming_says_that_the_step_lacks_the_metric_that_the_others_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, [1.0, 2.0, None])  # killed before the third report
    with (
        caplog.at_level(logging.WARNING, "ckpt_convert"),
        Checkpointer(LLAMA, tmp_path, best="val_loss:min", keep_last=1) as checkpointer,
    ):
        checkpointer.resume(model=MODEL)
        assert steps(tmp_path) == ["step_1", "step_3"]
        (said,) = warnings(caplog)
        assert "step_3: has no 'val_loss'" in said
        checkpointer.report(val_loss=0.5)  # as it advises
        assert warnings(caplog) == [said]
    assert steps(tmp_path) == ["step_3"]
    assert metrics(tmp_path / "step_3")["val_loss"] == 0.5


def test_resuming_where_some_steps_are_not_evaluated_warns_of_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"best": "val_loss:min", "keep_last": 3}
    run(tmp_path, [None, 1.0, None], **options)
    with caplog.at_level(logging.INFO, "ckpt_convert"):
        run(tmp_path, [], **options)
    assert warnings(caplog) == []
    assert any("step_3: has no 'val_loss'" in record.getMessage() for record in caplog.records)


# What is to be kept is decided at the start, too


def test_what_is_to_be_kept_is_decided_at_the_start_too(tmp_path: Path) -> None:
    run(tmp_path, [1.0, 2.0, 3.0, 4.0])
    with Checkpointer(LLAMA, tmp_path, keep_last=2, best="val_loss:min") as checkpointer:
        checkpointer.resume(model=MODEL)
        assert steps(tmp_path) == ["step_1", "step_3", "step_4"]


def test_the_checkpoint_that_is_resumed_stays_whatever_is_to_be_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The newest is damaged: were the one before it removed for it, nothing would be left."""
    run(tmp_path, [1.0, 2.0, 3.0])
    shard = tmp_path / "step_3" / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with Checkpointer(LLAMA, tmp_path, keep_last=1) as checkpointer:
        progress = checkpointer.resume(model=MODEL)
        assert progress is not None
        assert progress.step == 2
        assert steps(tmp_path) == ["step_2", "step_3"]
    assert any("step_3 is damaged" in line for line in warnings(caplog))


# Values


@pytest.mark.parametrize(
    "value", [math.nan, -math.inf, "low", None, 10**400, torch.ones(2)], ids=lambda value: str(value)[:9]
)
def test_a_value_that_cannot_be_compared_ends_nothing_and_is_never_best(
    value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING, "ckpt_convert"),
        Checkpointer(LLAMA, tmp_path, save_every=1, best="val_loss:min", keep_last=2) as checkpointer,
    ):
        checkpointer.resume(model=MODEL)
        for loss in (0.5, value, value):
            checkpointer.step()
            checkpointer.report(accuracy=1, val_loss=loss)
        assert checkpointer.best is not None
        assert checkpointer.best.step == 1
        assert checkpointer.progress.evals == 3
    assert metrics(tmp_path / "step_3") == {"accuracy": 1.0, "evals": 3}
    (said,) = warnings(caplog)
    assert "step 2: the metric 'val_loss'" in said


def test_numbers_of_any_kind_are_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Checkpointer(LLAMA, tmp_path) as checkpointer:
        checkpointer.resume(model=MODEL)
        checkpointer.step()
        checkpointer.report(a=0, b=torch.tensor([0.25]), c=True, d=-0.0)
        checkpointer.report(a=0.0)  # the same again
    assert metrics(tmp_path / "step_1") == {"a": 0.0, "b": 0.25, "c": 1.0, "d": 0.0, "evals": 2}
    assert warnings(caplog) == []


def test_two_values_of_one_metric_for_one_step_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, [])
    with Checkpointer(LLAMA, tmp_path, save_every=1) as checkpointer:
        checkpointer.register(model=MODEL)
        checkpointer.step()
        checkpointer.report(val_loss=0.5)
        checkpointer.report(val_loss=0.25)
    (said,) = warnings(caplog)
    assert "'val_loss' was 0.5 and is 0.25 now" in said
    assert metrics(tmp_path / "step_1") == {"val_loss": 0.25, "evals": 2}


def test_a_report_before_the_first_step_is_said_unless_that_step_is_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(LLAMA, tmp_path / "a") as checkpointer:
        checkpointer.register(model=MODEL)
        checkpointer.report(val_loss=0.5)
        checkpointer.report(val_loss=0.5)
    (said,) = warnings(caplog)
    assert "before the first step()" in said
    caplog.clear()
    with Checkpointer(LLAMA, tmp_path / "b") as checkpointer:
        checkpointer.create_seed_checkpoint(MODEL)
        checkpointer.report(val_loss=0.5)
    with Checkpointer(LLAMA, tmp_path / "c", save_every="1 eval") as checkpointer:
        checkpointer.register(model=MODEL)
        checkpointer.report(val_loss=0.5)
    assert metrics(tmp_path / "b" / "step_0") == metrics(tmp_path / "c" / "step_0") == {"val_loss": 0.5, "evals": 1}
    assert warnings(caplog) == []


# What fails after a step is complete


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_metric_that_cannot_be_written_is_a_warning_and_written_later(
    asynchronous: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"keep_last": 1, "best": "val_loss:min", "asynchronous": asynchronous}
    with Checkpointer(LLAMA, tmp_path, save_every=1, latest_name=None, **options) as checkpointer:
        checkpointer.register(model=MODEL)
        checkpointer.step()
        checkpointer.wait()
        with failing("replace", errno.EIO, ALWAYS) as failed:
            checkpointer.report(val_loss=0.5)
            checkpointer.wait()
        assert failed
        (said,) = warnings(caplog)
        assert "step_1 is saved, but its metrics cannot be written now" in said
        assert "Input/output error" in said
        for _ in range(2):
            checkpointer.step()
            checkpointer.report(val_loss=1)
        checkpointer.wait()
        assert steps(tmp_path) == ["step_1", "step_3"]  # the best is not removed for want of its metric
    assert metrics(tmp_path / "step_1") == {"val_loss": 0.5, "evals": 1}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("call", "number"), [("symlink", errno.EIO), ("replace", errno.EIO), ("replace", errno.ENOSPC)]
)
def test_a_pointer_that_cannot_be_moved_is_a_warning_and_the_step_is_saved(
    call: str, number: int, asynchronous: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(LLAMA, tmp_path, save_every=1, asynchronous=asynchronous) as checkpointer:
        checkpointer.register(model=MODEL)
        with failing(call, number, ALWAYS):
            checkpointer.step()
            checkpointer.wait()
        (said,) = warnings(caplog)
        assert "step_1 is saved, but latest cannot be made to lead to it" in said
        assert os.strerror(number) in said
        assert not os.path.lexists(tmp_path / "latest")
        checkpointer.save()  # it is: nothing is done again
        checkpointer.step()
    assert os.readlink(tmp_path / "latest") == "step_2"
    assert warnings(caplog) == [said]


@pytest.mark.parametrize("steps", [1, 2], ids=["missing", "stale"])
@pytest.mark.parametrize("call", ["symlink", "replace"])
def test_a_pointer_that_the_last_save_could_not_move_is_moved_by_the_next_start(
    call: str, steps: int, tmp_path: Path
) -> None:
    with Checkpointer(LLAMA, tmp_path, save_every=1) as checkpointer:
        checkpointer.register(model=MODEL)
        for step in range(1, steps + 1):
            with failing(call, errno.EIO, ALWAYS) if step == steps else nullcontext():
                checkpointer.step()
    latest = tmp_path / "latest"
    assert (os.readlink(latest) if steps > 1 else os.path.lexists(latest)) == ("step_1" if steps > 1 else False)
    with Checkpointer(LLAMA, tmp_path) as checkpointer:
        checkpointer.resume(model=MODEL)
    assert os.readlink(latest) == f"step_{steps}"


def test_where_there_are_no_links_the_pointer_is_a_text_file_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with failing("symlink", errno.EPERM, ALWAYS):
        run(tmp_path, [None])
    assert (tmp_path / "latest").read_text() == "step_1\n"
    assert warnings(caplog) == []


# Whatever call of the system fails


def error_of(checkpointer: Checkpointer) -> str:
    """What the next step and its metric end with, "" where all is well."""
    try:
        checkpointer.step()
        checkpointer.report(val_loss=1.0)
    except CkptConvertError as error:
        return str(error)
    return ""


def test_a_fault_of_the_disk_is_one_error_that_names_a_file_or_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each call of a save, of the weights, the training state, the pointer and a metric, fails once."""
    trained = Trained()
    raised = 0
    with Checkpointer(LLAMA, tmp_path, save_every=1, keep_last=1) as checkpointer:
        checkpointer.register(**trained.parts)
        checkpointer.step()
        for call in SYSTEM_CALLS:
            for at in (*range(1, 8), 11, 15, 40, 300):
                caplog.clear()
                before = checkpointer.saved[-1].step
                with failing(call, errno.EIO, range(at, at + 1)) as failed:
                    said = error_of(checkpointer)
                    if said:
                        raised += 1
                        assert str(tmp_path) in said or str(LLAMA) in said, (call, at)
                        assert "Input/output error" in said, (call, at)
                        newest = checkpointer.progress.step if "is complete, but" in said else before
                        assert checkpointer.saved[-1].step == newest, (call, at)
                    else:
                        assert checkpointer.saved[-1].step == checkpointer.progress.step, (call, at)
                if not failed:
                    break
    assert raised > 25


def test_a_fault_of_the_disk_while_a_run_begins_is_one_error_that_names_a_file(tmp_path: Path) -> None:
    """Above all it is no fresh start: a directory that cannot be looked at is not one without checkpoints."""
    run(tmp_path, [1.0, 2.0])
    raised = 0
    for call, most in {"stat": 10, "scandir": 6, "listdir": 3, "open": 10, "mkdir": 1}.items():
        for at in range(1, most + 1):
            with Checkpointer(LLAMA, tmp_path) as checkpointer, failing(call, errno.EIO, range(at, at + 1)):
                try:
                    progress = checkpointer.resume(model=MODEL, verify=False)
                except CkptConvertError as error:
                    raised += 1
                    named = str(tmp_path) in str(error) or str(LLAMA) in str(error)
                    assert named, (call, at, str(error))  # noqa: PT017
                else:
                    assert progress is not None, (call, at)
    assert raised > 10
