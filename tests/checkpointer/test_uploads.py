"""A run whose directory is in a store: written on a disk, uploaded behind the training, and gone on from anywhere."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch

from ckpt_convert import Checkpointer, CkptConvertError
from ckpt_convert.checkpointer.run import saved_steps
from ckpt_convert.checkpointer.save import step_upload, upload, uploaded_directory
from ckpt_convert.checkpointer.save.run_directory import RunDirectory
from ckpt_convert.errors import LockedError, UnwritableError, UsageError
from ckpt_convert.storage import pointer
from ckpt_convert.storage.place import Place, as_place
from tests.checkpointer.training import Trained
from tests.storage.failing import failing_run, store_of

MANIFEST = "ckpt_convert/manifest.json"


@pytest.fixture
def run() -> Place:
    return failing_run()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is tried again at once."""
    monkeypatch.setattr(upload, "_PAUSE", 0.001)


def train(source: Path, output: Place | Path, until: int, **options: Any) -> tuple[Trained, dict[int, float]]:
    trained = Trained(source)
    with Checkpointer(source, output, **{"save_every": 2, **options}) as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        losses = trained.go(checkpointer, until, evaluate=2)
    return trained, losses


def steps(output: Place | Path) -> list[str]:
    return [saved.place.name for saved in saved_steps.scan_steps(as_place(output))]


def step_files(output: Place | Path, step: str) -> dict[str, bytes]:
    """The files of a step but for its manifest, which says how long the run took."""
    place = (as_place(output) / step).without_listing()
    found = {file.relative_name(place): file.read(1 << 26) for file in place.entries()}
    return {name: data for name, data in found.items() if name != MANIFEST}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@contextlib.contextmanager
def held_uploads(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Uploads wait until the event is set."""
    gate = threading.Event()
    true = step_upload.take_turns

    def waits(*given: Any) -> None:
        gate.wait()
        true(*given)

    monkeypatch.setattr(uploaded_directory, "take_turns", waits)
    try:
        yield gate
    finally:
        gate.set()


@pytest.mark.parametrize(
    "options",
    [
        {"keep_last": 1, "best": "val_loss:min"},
        {"asynchronous": True, "keep_last": 2},
        {"contents": "weights", "export_dtype": "bfloat16"},
        {"keep_local": 0, "final": {"contents": "weights"}},
    ],
    ids=lambda options: ", ".join(options),
)
def test_every_step_is_as_on_a_disk(options: dict[str, Any], source: Path, run: Place, tmp_path: Path) -> None:
    _, there = train(source, run, 7, local_dir=tmp_path / "staged", **options)
    options.pop("keep_local", None)
    _, here = train(source, tmp_path / "mine", 7, **options)
    assert there == here
    assert steps(run) == steps(tmp_path / "mine")
    for step in steps(run):
        assert step_files(run, step) == step_files(tmp_path / "mine", step)
    for name in ("latest", "best"):
        found, expected = (pointer.pointer_target(place, name) for place in (run, as_place(tmp_path / "mine")))
        assert (found and found.name) == (expected and expected.name)
    others = {PurePosixPath(name).parts[2] for name in store_of(run).files} - {*steps(run)}
    assert others == {"latest", "best"} if "best" in options else {"latest"}


@pytest.mark.parametrize("keep_local", [0, 1, 2])
def test_what_stays_on_the_disk(
    keep_local: int, source: Path, run: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile there are one that is uploaded and one that is written, or waits, as well."""
    true, there = step_upload._copy, []

    def counts(*given: Any) -> None:
        there.append(sum("step_" in path.name for path in (tmp_path / "staged").iterdir()))
        true(*given)

    monkeypatch.setattr(step_upload, "_copy", counts)
    train(source, run, 7, local_dir=tmp_path / "staged", keep_local=keep_local)
    assert max(there) <= keep_local + 2
    assert steps(run) == ["step_2", "step_4", "step_6", "step_7"]
    assert steps(tmp_path / "staged") == steps(run)[4 - keep_local :]


def test_an_upload_on_its_way_is_told_at_the_end_of_a_program_that_does_not_close(
    source: Path, run: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trained = Trained(source)
    with Checkpointer(source, run, save_every=2) as checkpointer, held_uploads(monkeypatch) as gate:
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, 2)
        at_end = checkpointer._saver._unclosed
        assert at_end is not None
        at_end._warn()
        assert f"{run}: the program ends at step 2 without close()" in caplog.text
        caplog.clear()
        gate.set()
        checkpointer.wait()
        at_end._warn()
        assert not caplog.text


def test_a_temporary_directory_is_gone_at_the_end(
    source: Path, run: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    train(source, run, 2)
    assert steps(run) == ["step_2"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["behind", "direct"])
def test_a_seed_checkpoint_is_named_by_its_url(mode: Any, source: Path, run: Place) -> None:
    model = Trained(source).model
    with Checkpointer(None, run, config=source / "config.json", upload=mode) as checkpointer:
        assert checkpointer.create_seed_checkpoint(model) == str(run / "step_0")
    assert steps(run) == ["step_0"]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("machine", ["the same", "another"])
def test_a_run_goes_on_bit_for_bit(asynchronous: bool, machine: str, source: Path, run: Place, tmp_path: Path) -> None:
    whole, expected = train(source, tmp_path / "whole", 9)
    options: dict[str, Any] = {"asynchronous": asynchronous, "keep_last": 1}
    _, first = train(source, run, 5, local_dir=tmp_path / "one", **options)
    local = tmp_path / ("one" if machine == "the same" else "two")
    again, then = train(source, run, 9, local_dir=local, **options)
    assert first | then == expected
    assert equal(weights(again.model), weights(whole.model))
    assert steps(run) == ["step_9"]


def test_what_had_not_arrived_when_the_run_was_killed_is_uploaded_by_the_next(
    source: Path, run: Place, tmp_path: Path
) -> None:
    train(source, run, 2, local_dir=tmp_path / "staged")
    train(source, tmp_path / "alone", 4)
    shutil.copytree(tmp_path / "alone" / "step_4", tmp_path / "staged" / "step_4")
    trained = Trained(source)
    with Checkpointer(source, run, local_dir=tmp_path / "staged") as checkpointer:
        progress = checkpointer.resume(**trained.parts)
        assert progress is not None
        assert progress.step == 4
        checkpointer.wait()
        assert steps(run) == ["step_2", "step_4"]
    found = pointer.pointer_target(run, "latest")
    assert found is not None
    assert found.name == "step_4"


def test_a_step_on_the_disk_that_others_have_overtaken_is_left_there(
    source: Path, run: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(source, tmp_path / "staged", 2)
    train(source, run, 5, local_dir=tmp_path / "other")
    shutil.move(tmp_path / "staged" / "step_2", tmp_path / "staged" / "step_3")
    shutil.rmtree(tmp_path / "staged")
    train(source, tmp_path / "staged", 1, save_every=1)
    trained = Trained(source)
    with Checkpointer(source, run, local_dir=tmp_path / "staged") as checkpointer:
        progress = checkpointer.resume(**trained.parts)
        assert progress is not None
        assert progress.step == 5
    assert "step_1" in steps(tmp_path / "staged")
    assert "step_1: is not in memory://runs/mine, whose steps are newer; it is left there" in caplog.text


# Waiting and skipping


def test_a_save_waits_while_two_steps_are_on_their_way(
    source: Path, run: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trained = Trained(source)
    with (
        held_uploads(monkeypatch) as gate,
        Checkpointer(source, run, local_dir=tmp_path / "staged", save_every=1) as checkpointer,
    ):
        checkpointer.register(**trained.parts)
        checkpointer.step()
        checkpointer.step()
        assert steps(tmp_path / "staged") == ["step_1", "step_2"]
        assert steps(run) == []
        third = threading.Thread(target=checkpointer.step)
        third.start()
        for _ in range(3000):
            if "step 3 waits until a step before it is uploaded" in caplog.text:
                break
            third.join(0.01)
        assert "step_3" not in steps(tmp_path / "staged")
        gate.set()
        third.join()
    assert steps(run) == ["step_1", "step_2", "step_3"]


def test_or_is_left_out_where_that_was_asked_for(
    source: Path, run: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trained = Trained(source)
    with (
        held_uploads(monkeypatch) as gate,
        Checkpointer(source, run, local_dir=tmp_path / "staged", save_every=1, when_behind="skip") as checkpointer,
    ):
        checkpointer.register(**trained.parts)
        for _ in range(4):
            checkpointer.step()
        assert steps(tmp_path / "staged") == ["step_1", "step_2"]
        gate.set()
    assert "step 3 is not saved: 2 steps before it are still being uploaded" in caplog.text
    assert steps(run) == ["step_1", "step_2", "step_4"]  # the last step of a run is never left out


# Faults


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("lost", [False, True], ids=["refused", "unanswered"])
def test_whatever_request_fails_once_nobody_notices(
    lost: bool, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    number = 0
    while True:
        run, local = failing_run(), tmp_path / "staged"
        shutil.rmtree(local, ignore_errors=True)
        trained = Trained(source)
        options: dict[str, Any] = {"contents": "weights", "keep_last": 1, "save_every": 1, "local_dir": local}
        with Checkpointer(source, run, **options) as checkpointer:
            checkpointer.register(**trained.parts)
            store_of(run).arm(number, 1, lost=lost)
            checkpointer.step()
            checkpointer.step()
        reached, _ = store_of(run).failed, store_of(run).arm(None)
        assert steps(run) == ["step_2"], number
        left = {PurePosixPath(name).parts[2] for name in store_of(run).files}
        assert left == {"latest", "step_2"}, number
        if not reached:
            break
        number += 1
    assert number > (10 if lost else 25)


@pytest.mark.usefixtures("soon")
def test_a_lost_network_is_told_after_the_deadline_and_no_step_is_lost(
    source: Path, run: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained, store = Trained(source), store_of(run)
    options: dict[str, Any] = {"local_dir": tmp_path / "staged", "upload_deadline": 0.05, "save_last": False}
    checkpointer = Checkpointer(source, run, **options)
    checkpointer.register(**trained.parts)
    store.arm(0, None)
    checkpointer.step()
    checkpointer.save()
    with pytest.raises(CkptConvertError, match=r"uploading memory://runs/mine/step_1 has failed for .* connection was"):
        checkpointer.wait()
    assert steps(tmp_path / "staged") == ["step_1"]
    store.arm(None)
    checkpointer.wait()
    assert "uploading memory://runs/mine/step_1: succeeded after" in caplog.text
    checkpointer.close()
    assert steps(run) == ["step_1"]


@pytest.mark.usefixtures("soon")
def test_a_temporary_directory_with_what_did_not_arrive_stays(
    source: Path, run: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trained = Trained(source)
    checkpointer = Checkpointer(source, run, upload_deadline=0.05, save_every=1)
    checkpointer.register(**trained.parts)
    store_of(run).arm(0, None)
    with pytest.raises(CkptConvertError, match="has failed for"), checkpointer:
        checkpointer.step()
    (local,) = tmp_path.iterdir()
    assert steps(local) == ["step_1"]
    assert f"step_1 has not arrived in memory://runs/mine, and stays in {local}" in caplog.text
    store_of(run).arm(None)
    store_of(run).delete(["runs/mine/.ckpt-convert-lock"])
    with Checkpointer(source, run, local_dir=local) as checkpointer:
        checkpointer.resume(**Trained(source).parts)
    assert steps(run) == ["step_1"]


class Sending:
    """Notes the files that are uploaded, in turns of a file each, and fails at those of the numbers ``fails``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *fails: int) -> None:
        self.names: list[str] = []
        self._true, self.fails = step_upload._copy, fails
        monkeypatch.setattr(step_upload, "_copy", self)
        monkeypatch.setattr(step_upload, "TURN", 1)

    def __call__(self, opened: Any, file: Any) -> None:
        self.names.append(file.name)
        if len(self.names) in self.fails:
            raise UnwritableError(f"{file.name}: cannot be written")
        self._true(opened, file)


@pytest.mark.usefixtures("soon")
def test_an_upload_that_has_failed_goes_on_where_it_was(
    source: Path, run: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sending = Sending(monkeypatch, 3, 5)
    train(source, run, 2, local_dir=tmp_path / "staged")
    assert len(sending.names) > 5
    assert sending.names[2] == sending.names[3]
    assert len(sending.names) == len({*sending.names}) + 2
    assert steps(run) == ["step_2"]


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("machine", ["the same", "another"])
def test_an_upload_that_was_cut_off_goes_on_where_the_step_still_is(
    machine: str, source: Path, run: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, what is half there is removed."""
    options: dict[str, Any] = {"save_every": 1, "upload_deadline": 0.05}
    sending, trained = Sending(monkeypatch, *range(4, 99)), Trained(source)
    checkpointer = Checkpointer(source, run, local_dir=tmp_path / "the same", **options)
    checkpointer.register(**trained.parts)
    with pytest.raises(UnwritableError, match="has failed for"), checkpointer:
        checkpointer.step()
    arrived = {*sending.names[:3]}
    assert steps(run) == []
    assert {f"runs/mine/step_1/{name}" for name in arrived} <= store_of(run).files.keys()
    store_of(run).delete(["runs/mine/.ckpt-convert-lock"])

    sending.names, sending.fails = [], ()
    trained = Trained(source)
    with Checkpointer(source, run, local_dir=tmp_path / machine, **options) as checkpointer:
        checkpointer.load_model(trained.model)
        progress = checkpointer.resume(**trained.parts)
        if progress is None:
            assert not [name for name in store_of(run).files if "step_1" in name]
            checkpointer.step()
    assert steps(run) == ["step_1"]
    assert arrived.isdisjoint(sending.names) if machine == "the same" else arrived <= {*sending.names}


@pytest.mark.usefixtures("soon")
def test_a_step_is_not_uploaded_again_because_an_older_one_cannot_be_removed(
    source: Path, run: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sending = Sending(monkeypatch)
    true, number = RunDirectory.published, iter(range(99))

    def fails(self: RunDirectory, destination: Place) -> None:
        if next(number) < 3:
            raise UnwritableError(f"{destination}: cannot be written")
        true(self, destination)

    monkeypatch.setattr(RunDirectory, "published", fails)
    train(source, run, 4, local_dir=tmp_path / "staged", keep_last=1)
    assert steps(run) == ["step_4"]
    assert len(sending.names) == 2 * len({*sending.names})  # each file of two steps


def test_a_run_whose_lock_was_taken_over_uploads_no_more(source: Path, run: Place, tmp_path: Path) -> None:
    trained = Trained(source)
    checkpointer = Checkpointer(source, run, local_dir=tmp_path / "staged", save_every=1, save_last=False)
    checkpointer.register(**trained.parts)
    directory = checkpointer._saver.directory
    assert isinstance(directory, uploaded_directory.UploadedDirectory)
    store_of(run).put("runs/mine/.ckpt-convert-lock", b'{"token": "of another"}')
    lock: Any = directory.remote._lock
    lock._renew()
    checkpointer.step()
    with pytest.raises(LockedError, match="was taken over by another process"):
        checkpointer.wait()
    assert steps(run) == []
    assert steps(tmp_path / "staged") == ["step_1"]
    checkpointer.close()


def test_a_second_run_is_refused(source: Path, run: Place, tmp_path: Path) -> None:
    one, other = Trained(source), Trained(source)
    with Checkpointer(source, run, local_dir=tmp_path / "one") as checkpointer:
        checkpointer.register(**one.parts)
        with pytest.raises(LockedError, match="another checkpointer is writing here"):
            Checkpointer(source, run, local_dir=tmp_path / "two").register(**other.parts)


def test_metrics_that_come_after_a_step_has_arrived(source: Path, run: Place, tmp_path: Path) -> None:
    trained = Trained(source)
    with Checkpointer(source, run, local_dir=tmp_path / "staged", save_every=1, best="loss:min") as checkpointer:
        checkpointer.register(**trained.parts)
        checkpointer.step()
        checkpointer.wait()
        checkpointer.report(loss=2.0)
        checkpointer.wait()
        (saved,) = saved_steps.scan_steps(run)
        assert saved.metrics == {"loss": 2.0}
        found = pointer.pointer_target(run, "best")
        assert found is not None
        assert found.name == "step_1"


def test_loading_from_the_store_alone(source: Path, run: Place, tmp_path: Path) -> None:
    trained, _ = train(source, run, 6, local_dir=tmp_path / "one", best="val_loss:min")
    for from_ in ("latest", "best", 4, run / "step_4"):
        again = Trained(source)
        with Checkpointer(source, run, local_dir=tmp_path / str(os.urandom(4).hex()), best="val_loss:min") as saver:
            progress = saver.resume(**again.parts, from_=from_)
            assert progress is not None
            assert from_ in ("latest", "best") or progress.step == 4
    with Checkpointer(run / "step_6") as reader:  # type: ignore[arg-type]
        reader.load_model(again.model)
    assert equal(weights(again.model), weights(trained.model))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep_local": -1}, "keep_local=-1"),
        ({"upload_deadline": 0}, "upload_deadline=0"),
        ({"when_behind": "stop"}, "when_behind='stop': expected one of wait, skip"),
        ({"upload": "later"}, "upload='later': expected one of behind, direct"),
        ({"upload": "direct", "keep_local": 2}, 'upload="direct": writes into the store'),
        ({"output_dir": "somewhere", "keep_local": 0}, "keep_local, .*: do nothing without an output_dir in an object"),
        ({"output_dir": None, "local_dir": "/tmp"}, "local_dir, .*: do nothing without an output_dir in an object"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], text: str, source: Path, run: Place) -> None:
    with pytest.raises(UsageError, match=text):
        Checkpointer(source, **{"output_dir": run, **options})


def test_making_a_checkpointer_makes_no_directory(
    source: Path, run: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Checkpointer(source, run) as checkpointer:
        assert checkpointer.saved == []
        assert list(tmp_path.iterdir()) == []
        checkpointer.register(**(trained := Trained(source)).parts)
        (local,) = tmp_path.iterdir()
        assert local.stat().st_mode & 0o777 == 0o700
        del trained


# What a run meets again


def test_a_run_that_was_ended_starts_another_one_which_is_uploaded_too(
    source: Path, run: Place, tmp_path: Path
) -> None:
    trained = Trained(source)
    checkpointer = Checkpointer(source, run, local_dir=tmp_path / "staged", save_every=1)
    checkpointer.register(**trained.parts)
    checkpointer.step()
    checkpointer.end_run()
    checkpointer.register(**trained.parts, progress=checkpointer.progress)
    checkpointer.step()
    checkpointer.close()
    assert steps(run) == ["step_1", "step_2"]


def test_a_step_that_is_saved_again_while_it_is_uploaded_arrives_whole(
    source: Path, run: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of each save in one step would have the sizes of either."""
    trained, local = Trained(source), tmp_path / "staged"
    true, seen = step_upload._copy, threading.Event()

    def replaces(*given: Any) -> None:
        if not seen.is_set():
            seen.set()
            shutil.rmtree(local / "step_1")
            shutil.copytree(tmp_path / "again" / "step_1", local / "step_1")
        true(*given)

    with Checkpointer(source, tmp_path / "again", save_every=1) as other:
        other.register(**(model := Trained(source)).parts)
        other.save()
        with torch.no_grad():
            model.model.norm.scale.fill_(7)
        other.step()
    assert steps(tmp_path / "again") == ["step_0", "step_1"]  # the sequence numbers of the two step_1 differ
    monkeypatch.setattr(step_upload, "_copy", replaces)
    checkpointer = Checkpointer(source, run, local_dir=local, save_every=1, save_last=False)
    checkpointer.register(**trained.parts)
    checkpointer.step()
    checkpointer.wait()
    assert seen.is_set()
    assert steps(run) == []  # what was on its way is none any more
    checkpointer.close()
    with Checkpointer(source, run, local_dir=local) as checkpointer:
        assert checkpointer.resume(**Trained(source).parts, strict=False) is not None
    assert step_files(run, "step_1") == step_files(tmp_path / "again", "step_1")


def test_a_run_without_a_source_keeps_the_step_that_stands_for_it(source: Path, run: Place, tmp_path: Path) -> None:
    train(source, run, 2, local_dir=tmp_path / "one")
    trained = Trained(source)
    with Checkpointer(None, run, local_dir=tmp_path / "two", save_every=2, keep_last=1, keep_local=0) as checkpointer:
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, 6)
    assert steps(run) == ["step_2", "step_6"]


def test_a_fresh_start_also_replaces_what_had_not_arrived(source: Path, run: Place, tmp_path: Path) -> None:
    train(source, run, 2, local_dir=tmp_path / "staged")
    train(source, tmp_path / "alone", 4)
    shutil.copytree(tmp_path / "alone" / "step_4", tmp_path / "staged" / "step_4")
    trained = Trained(source)
    with Checkpointer(source, run, local_dir=tmp_path / "staged", save_every=1, overwrite=True) as checkpointer:
        checkpointer.register(**trained.parts)
        trained.go(checkpointer, 1)
    assert steps(run) == steps(tmp_path / "staged") == ["step_1"]


def test_what_is_in_the_way_of_later_steps_in_the_store_is_told_at_the_start(
    source: Path, run: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store_of(run).put("runs/mine/step_4/notes.txt", b"mine")
    trained = Trained(source)
    with Checkpointer(source, run, local_dir=tmp_path / "staged") as checkpointer:
        checkpointer.register(**trained.parts)
    assert "memory://runs/mine/step_4: is there already and is no checkpoint" in caplog.text


@pytest.mark.parametrize("change", ["removed", "amended"])
def test_a_step_that_another_thread_changes_while_steps_are_looked_at(
    change: str, source: Path, run: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(source, run, 4, local_dir=tmp_path / "staged")
    true, seen = saved_steps.read_manifest, threading.Event()

    def changes(place: Place) -> Any:
        if place.name == "step_2" and not seen.is_set():
            seen.set()
            manifest = str(place.path / MANIFEST)
            data = store_of(run).files[manifest]
            store_of(run).delete([manifest])
            if change == "amended":
                store_of(run).put(manifest, data)
        return true(place)

    monkeypatch.setattr(saved_steps, "read_manifest", changes)
    assert steps(run) == (["step_4"] if change == "removed" else ["step_2", "step_4"])
    assert seen.is_set()
