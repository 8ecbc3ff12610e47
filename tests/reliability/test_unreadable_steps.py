"""A newest step that the system does not give now is an error, never passed over; one that is damaged is."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_convert import Checkpointer, CkptConvertError, UnreadableError
from tests.checkpointer.training import LLAMA, Trained
from tests.helpers import assert_same

WEIGHTS, INDEX = "model-00002-of-00004.safetensors", "model.safetensors.index.json"
MANIFEST = "ckpt_convert/manifest.json"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    """Steps 1 and 2, and what was trained."""
    output_dir, trained = tmp_path_factory.mktemp("run") / "out", Trained()
    with Checkpointer(LLAMA, output_dir, save_every=1) as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.register(**trained.parts)
        trained.go(checkpointer, 2)
    return output_dir, trained


def resumed(output_dir: Path, trained: Trained | None = None, **how: Any) -> int:
    with Checkpointer(LLAMA, output_dir) as checkpointer:
        progress = checkpointer.resume(**(trained or Trained()).parts, **how)
    assert progress is not None
    return progress.step


class FailOnce:
    """Lets the n-th call on a file whose path contains a text fail, and no other; counts them all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, part: str, at: int, number: int = errno.EIO) -> None:
        self.calls, self.failed, self._part, self._at, self._number = 0, "", part, at, number
        monkeypatch.setattr(os, "open", self._failing(os.open, os.fspath))
        monkeypatch.setattr(os, "preadv", self._failing(os.preadv, lambda fd: os.readlink(f"/proc/self/fd/{fd}")))

    def _failing(self, call: Callable[..., Any], path_of: Callable[[Any], Any]) -> Callable[..., Any]:
        def called(what: Any, *args: Any, **kwargs: Any) -> Any:
            path = str(path_of(what))
            if self._part in path:
                self.calls += 1
                if self.calls == self._at:
                    self.failed = path
                    raise OSError(self._number, os.strerror(self._number))
            return call(what, *args, **kwargs)

        return called


@pytest.mark.parametrize("name", [WEIGHTS, INDEX, "training_state/", MANIFEST, "config.json"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES], ids=["EIO", "EACCES"])
def test_a_newest_step_that_cannot_be_read_is_an_error_and_taken_once_it_can(
    name: str, number: int, run: tuple[Path, Trained], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output_dir, trained = run
    untouched, again = Trained(), Trained()
    with monkeypatch.context() as patched:
        fault = FailOnce(patched, f"step_2/{name}", 1, number)
        with pytest.raises(UnreadableError, match=r"cannot be \w+.*: (Input/output error|Permission denied)") as caught:
            resumed(output_dir, again)
    assert fault.failed
    assert Path(fault.failed).name in str(caught.value)
    assert_same(again.model.state_dict(), untouched.model.state_dict())
    assert resumed(output_dir, again) == 2
    assert_same(again.model.state_dict(), trained.model.state_dict())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_whichever_call_fails_an_older_step_never_takes_its_place(
    run: tuple[Path, Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    output_dir, trained = run[0], Trained()
    with monkeypatch.context() as patched:
        count = FailOnce(patched, "step_2/", 0)
        resumed(output_dir, trained)
    assert count.calls > 30
    for at in range(1, count.calls + 1, count.calls // 15):  # a few of all, spread over the run
        with monkeypatch.context() as patched, contextlib.suppress(UnreadableError):
            FailOnce(patched, "step_2/", at)
            assert resumed(output_dir, trained) == 2


def test_the_ways_out_are_those_that_it_names(run: tuple[Path, Trained], monkeypatch: pytest.MonkeyPatch) -> None:
    output_dir, _ = run
    with monkeypatch.context() as patched:
        FailOnce(patched, f"step_2/{WEIGHTS}", 1)
        with pytest.raises(UnreadableError, match=r"run again, or resume from an older step \(from_=\)"):
            resumed(output_dir)
    with monkeypatch.context() as patched:
        FailOnce(patched, f"step_2/{WEIGHTS}", 1)
        assert resumed(output_dir, from_=1) == 1


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncated, flipped, os.unlink])
@pytest.mark.parametrize("name", [WEIGHTS, "training_state/*.distcp", MANIFEST])
def test_a_newest_step_that_is_damaged_is_passed_over_and_said(
    name: str,
    damage: Callable[[Path], None],
    run: tuple[Path, Trained],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output_dir = shutil.copytree(run[0], tmp_path / "out", symlinks=True)
    damage(next((output_dir / "step_2").glob(name)))
    assert resumed(output_dir) == 1
    assert any("step_2" in record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    if name != MANIFEST:
        with pytest.raises(CkptConvertError, match="cannot be resumed from"):
            resumed(output_dir, from_=2)
