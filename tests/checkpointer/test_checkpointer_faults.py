"""What goes wrong while saving: it is told, nothing half-written is left, nothing earlier is lost, training goes on."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ckpt_convert import Checkpointer
from ckpt_convert.checkpointer.state import training_state
from ckpt_convert.errors import CkptConvertError, LockedError, NotEnoughSpaceError, OutputExistsError
from tests.checkpointer.training import LLAMA, Trained
from tests.helpers import assert_same, bits

BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@contextmanager
def failing(place: Any, name: str, number: int, after: int = 0, of: str = "") -> Iterator[list[int]]:
    """Let a function of the system fail from its call ``after`` on; how often it did is the length of what is given.

    ``of``: only calls with the descriptor of a file that has this in its path.
    """
    calls, failed = 0, []
    true = getattr(place, name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if of and of not in os.readlink(f"/proc/self/fd/{args[0]}"):
            return true(*args, **kwargs)
        calls += 1
        if calls > after:
            failed.append(calls)
            raise OSError(number, os.strerror(number))
        return true(*args, **kwargs)

    setattr(place, name, fails)
    try:
        yield failed
    finally:
        setattr(place, name, true)


def step(checkpointer: Checkpointer) -> None:
    checkpointer.step()
    checkpointer.wait()


def save(checkpointer: Checkpointer) -> None:
    checkpointer.save()
    checkpointer.wait()


def left_over(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir() if path.name.startswith(".step"))


def advance(trained: Trained, checkpointer: Checkpointer) -> None:
    """One step, whose save is over afterwards."""
    trained.go(checkpointer, checkpointer.progress.step + 1)
    checkpointer.wait()


@pytest.fixture
def trained() -> Trained:
    return Trained()


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def checkpointer(request: pytest.FixtureRequest, trained: Trained, tmp_path: Path) -> Iterator[Checkpointer]:
    """A run with step 1 saved, that saves every step and keeps one."""
    options = {"save_every": 1, "keep_last": 1, "asynchronous": request.param}
    with Checkpointer(LLAMA, tmp_path / "out", **options) as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        advance(trained, checkpointer)
        yield checkpointer


FAULTS: dict[str, tuple[Any, str, int, str]] = {
    "disk full while writing weights": (os, "pwrite", 0, ""),
    "disk full in the middle of the weights": (os, "pwrite", 3, ""),
    "disk full while writing the training state": (os, "pwrite", 0, "training_state"),
    "disk full in the middle of the training state": (os, "pwrite", 5, "training_state"),
    "disk full when flushing": (os, "fsync", 2, ""),
    "disk full when making files": (os, "ftruncate", 4, ""),
    "disk full when renaming": (os, "rename", 0, ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_disk(fault: str, checkpointer: Checkpointer, trained: Trained, tmp_path: Path) -> None:
    place, name, after, of = FAULTS[fault]
    full = failing(place, name, errno.ENOSPC, after, of)
    with full as failed, pytest.raises(NotEnoughSpaceError, match="earlier ones"):
        advance(trained, checkpointer)
    assert failed
    assert [saved.step for saved in checkpointer.saved] == [1]  # the last good one is not gone for the one that failed
    assert left_over(tmp_path / "out") == []
    assert os.readlink(tmp_path / "out" / "latest") == "step_1"

    advance(trained, checkpointer)
    assert checkpointer.progress.step == 3
    assert [saved.step for saved in checkpointer.saved] == [3]
    again = Trained()
    with Checkpointer(LLAMA, tmp_path / "other") as other:
        other.resume(**again.parts, from_=tmp_path / "out")
    assert_same(again.model.state_dict(), trained.model.state_dict())


def test_permission_denied(checkpointer: Checkpointer, trained: Trained, tmp_path: Path) -> None:
    with failing(os, "mkdir", errno.EACCES), pytest.raises(CkptConvertError, match=r"Permission denied.*not saved"):
        advance(trained, checkpointer)
    assert [saved.step for saved in checkpointer.saved] == [1]
    advance(trained, checkpointer)
    assert [saved.step for saved in checkpointer.saved] == [3]


def test_the_training_state_cannot_be_written(
    checkpointer: Checkpointer, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("no training state today")

    with monkeypatch.context() as patch:
        patch.setattr(training_state, "write_state", fails)
        with pytest.raises(RuntimeError, match="no training state today"):
            advance(trained, checkpointer)
    assert [saved.step for saved in checkpointer.saved] == [1]
    assert left_over(tmp_path / "out") == []


def test_the_output_directory_is_removed_meanwhile(
    checkpointer: Checkpointer, trained: Trained, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "out")
    advance(trained, checkpointer)
    assert [saved.step for saved in checkpointer.saved] == [2]


def test_too_little_space_is_known_before_anything_is_written(
    checkpointer: Checkpointer, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
        with pytest.raises(NotEnoughSpaceError, match="but the disk has 1,000 free"):
            advance(trained, checkpointer)
    assert left_over(tmp_path / "out") == []
    assert [saved.step for saved in checkpointer.saved] == [1]


# Errors behind the training


def test_an_error_behind_is_raised_at_the_next_call_and_the_step_is_counted(tmp_path: Path) -> None:
    trained = Trained()
    with Checkpointer(LLAMA, tmp_path / "out", save_every=[1, 4], asynchronous=True) as checkpointer:
        checkpointer.resume(**trained.parts)
        with failing(os, "pwrite", errno.ENOSPC):
            trained.go(checkpointer, 1)  # no error yet: the save goes on behind
            checkpointer._saver.background._running[0].exception()  # until it failed
        with pytest.raises(NotEnoughSpaceError):
            trained.go(checkpointer, 2)
        assert checkpointer.progress.step == 2  # the optimizer did it, so it counts
        checkpointer.wait()
        assert [saved.step for saved in checkpointer.saved] == [2]  # and what was due is saved


def test_an_error_behind_is_raised_by_close(tmp_path: Path) -> None:
    trained = Trained()
    checkpointer = Checkpointer(LLAMA, tmp_path / "out", save_every=1, asynchronous=True)
    checkpointer.resume(**trained.parts)
    with failing(os, "pwrite", errno.ENOSPC):
        trained.go(checkpointer, 1)
        with pytest.raises(NotEnoughSpaceError):
            checkpointer.close()
    checkpointer.close()  # the second time there is nothing to say
    with Checkpointer(LLAMA, tmp_path / "out") as other:  # and the lock is free
        assert other.resume(**Trained().parts) is None


def test_an_error_behind_is_told_at_the_end_of_a_program_that_does_not_close(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = Trained()
    with Checkpointer(LLAMA, tmp_path / "out", save_every=1, asynchronous=True) as checkpointer:
        checkpointer.resume(**trained.parts)
        with failing(os, "pwrite", errno.ENOSPC):
            trained.go(checkpointer, 1)
            checkpointer._saver.background._running[0].exception()
        at_end = checkpointer._saver._unclosed
        assert at_end is not None
        at_end._warn()
        assert f"{tmp_path / 'out'}: the program ends at step 1 without close()" in caplog.text
        caplog.clear()
        with pytest.raises(NotEnoughSpaceError):
            checkpointer.wait()
        checkpointer.save()
        checkpointer.wait()
        at_end._warn()
        assert not caplog.text


def test_close_tries_again_what_failed_and_tells_of_it_all_the_same(tmp_path: Path) -> None:
    trained = Trained()
    checkpointer = Checkpointer(LLAMA, tmp_path / "out", save_every=1, asynchronous=True)
    checkpointer.resume(**trained.parts)
    with failing(os, "pwrite", errno.ENOSPC):
        trained.go(checkpointer, 1)
        checkpointer._saver.background._running[0].exception()
    with pytest.raises(NotEnoughSpaceError):
        checkpointer.close()
    assert [saved.step for saved in checkpointer.saved] == [1]


@BOTH
def test_a_save_that_failed_can_be_tried_again(asynchronous: bool, tmp_path: Path) -> None:
    trained = Trained()
    with Checkpointer(LLAMA, tmp_path / "out", asynchronous=asynchronous) as checkpointer:
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, 1)
        with failing(os, "pwrite", errno.ENOSPC), pytest.raises(NotEnoughSpaceError):
            save(checkpointer)
        save(checkpointer)
        assert [saved.step for saved in checkpointer.saved] == [1]


@BOTH
def test_an_exception_in_the_loop_leaves_complete_checkpoints_only(asynchronous: bool, tmp_path: Path) -> None:
    trained = Trained()
    with (  # noqa: PT012
        pytest.raises(ZeroDivisionError),
        Checkpointer(LLAMA, tmp_path / "out", save_every=2, asynchronous=asynchronous) as checkpointer,
    ):
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, 4)
        trained.go(checkpointer, 5)
        raise ZeroDivisionError
    assert sorted(path.name for path in (tmp_path / "out").glob("*step*")) == ["step_2", "step_4"]
    with Checkpointer(LLAMA, tmp_path / "out") as other:
        progress = other.resume(**Trained().parts)
    assert progress is not None
    assert progress.step == 4  # the step that failed is not saved


def test_an_error_behind_does_not_hide_the_exception_in_the_loop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = Trained()
    with (  # noqa: PT012
        failing(os, "pwrite", errno.ENOSPC),
        pytest.raises(ZeroDivisionError),
        caplog.at_level(logging.ERROR, "ckpt_convert"),
        Checkpointer(LLAMA, tmp_path / "out", save_every=1, asynchronous=True) as checkpointer,
    ):
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, 1)
        raise ZeroDivisionError
    assert any("could not be saved" in record.getMessage() for record in caplog.records)


# Two of them


def test_two_on_one_directory(tmp_path: Path) -> None:
    one, other = Checkpointer(LLAMA, tmp_path / "out"), Checkpointer(LLAMA, tmp_path / "out")
    one.resume(**Trained().parts)
    with pytest.raises(LockedError, match="another checkpointer is writing here"):
        other.resume(**Trained().parts)
    one.close()
    other.resume(**Trained().parts)
    other.close()


def _refused(output_dir: Path, answer: Any) -> None:
    try:
        Checkpointer(LLAMA, output_dir).resume(**Trained().parts)
    except LockedError as error:
        answer.send(str(error))
    else:
        answer.send("not refused")


def test_another_process_is_refused_as_well(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.checkpointer.training"])
    receiver, sender = processes.Pipe(duplex=False)
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        checkpointer.resume(**Trained().parts)
        child = processes.Process(target=_refused, args=(tmp_path / "out", sender))
        child.start()
        assert "another checkpointer is writing here" in receiver.recv()
        child.join()


# Metrics


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "low", None])
def test_a_metric_that_is_no_number_is_left_out_and_nothing_is_lost(value: Any, tmp_path: Path) -> None:
    trained = Trained()
    with Checkpointer(LLAMA, tmp_path / "out", save_every="1 eval", best="val_loss:min") as checkpointer:
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, 1)
        checkpointer.report(val_loss=0.5)
        trained.go(checkpointer, 2)
        checkpointer.report(accuracy=1.0, val_loss=value)
        assert checkpointer.progress.evals == 2
    expected = [(1, {"val_loss": 0.5}), (2, {"accuracy": 1.0})]
    assert [(saved.step, saved.metrics) for saved in checkpointer.saved] == expected


# What others left there


def test_something_else_with_the_name_of_a_step_is_left_alone(
    checkpointer: Checkpointer, trained: Trained, tmp_path: Path
) -> None:
    shutil.copytree(LLAMA, tmp_path / "out" / "step_2")
    with pytest.raises(OutputExistsError, match="step_2: is there already and is no checkpoint of this checkpointer"):
        advance(trained, checkpointer)
    assert bits_of(tmp_path / "out" / "step_2") == bits_of(LLAMA)
    advance(trained, checkpointer)
    assert [saved.step for saved in checkpointer.saved] == [3]


def test_half_written_directories_of_a_run_that_was_killed_are_cleared_away(tmp_path: Path) -> None:
    half = tmp_path / "out" / ".step_9.partial"
    half.mkdir(parents=True)
    (half / ".ckpt-convert-journal").touch()
    (half / "model-00001-of-00004.safetensors").write_bytes(b"half")
    theirs = tmp_path / "out" / ".theirs.partial"
    theirs.mkdir()
    (theirs / "notes").write_text("mine")
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        assert checkpointer.resume(**Trained().parts) is None
    assert not half.exists()
    assert (theirs / "notes").read_text() == "mine"


def bits_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_model_is_as_before_where_a_save_failed(checkpointer: Checkpointer, trained: Trained) -> None:
    tokens = next(iter(trained.dataloader))
    trained.update(tokens)
    before = {key: bits(tensor) for key, tensor in trained.model.state_dict().items()}
    with failing(os, "pwrite", errno.EIO), pytest.raises(CkptConvertError, match="Input/output error"):
        step(checkpointer)
    assert {key: bits(tensor) for key, tensor in trained.model.state_dict().items()} == before
