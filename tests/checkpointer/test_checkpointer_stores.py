"""A run whose directory lies in a store that renames nothing: the same files, kept and pruned and gone on from."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch

from ckpt_convert import AdapterConfig, Checkpointer, CkptConvertError
from ckpt_convert.checkpoint.checkpoint import open_checkpoint
from ckpt_convert.checkpointer import choosing
from ckpt_convert.checkpointer.run import saved_steps
from ckpt_convert.errors import InputError, LockedError, OutputExistsError
from ckpt_convert.storage import pointer
from ckpt_convert.storage.place import Place, as_place
from recipes.native_llama import NativeLlama, add_lora
from tests.checkpointer.training import Trained
from tests.storage.failing import failing_run, store_of

JOURNAL = ".ckpt-convert-journal"
MANIFEST = "ckpt_convert/manifest.json"
LOCK = "runs/mine/.ckpt-convert-lock"


@pytest.fixture
def run() -> Place:
    return failing_run()


@pytest.fixture(params=["local", "memory"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return as_place(tmp_path / "mine") if request.param == "local" else failing_run()


def train(source: Path, output: Place | Path, until: int, **options: Any) -> tuple[Trained, dict[int, float]]:
    trained = Trained(source)
    with Checkpointer(source, output, save_every=2, upload="direct", **options) as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        losses = trained.go(checkpointer, until, evaluate=2)
    return trained, losses


def steps(output: Place) -> list[str]:
    return [saved.place.name for saved in saved_steps.scan_steps(output)]


def step_files(output: Place, step: str) -> dict[str, Any]:
    """The files of a step; of the manifest what it says, without the time that was trained."""
    place = (output / step).without_listing()
    found: dict[str, Any] = {file.relative_name(place): file.read(1 << 26) for file in place.entries()}
    manifest = json.loads(found[MANIFEST])
    del manifest["training"]["progress"]["seconds"], manifest["manifest_checksum"]
    return {**found, MANIFEST: manifest}


@pytest.mark.parametrize(
    "options",
    [
        {"keep_last": 1, "best": "val_loss:min"},
        {"keep_last_training_state": 1},
        {"asynchronous": True, "keep_last": 2},
        {"contents": "weights", "export_dtype": "bfloat16"},
        {"final": {"contents": "weights"}},
    ],
    ids=lambda options: ", ".join(options),
)
def test_every_step_is_as_on_a_disk(options: dict[str, Any], source: Path, run: Place, tmp_path: Path) -> None:
    _, there = train(source, run, 7, **options)
    _, here = train(source, tmp_path / "mine", 7, **options)
    assert there == here
    assert steps(run) == steps(as_place(tmp_path / "mine"))
    for step in steps(run):
        assert step_files(run, step) == step_files(as_place(tmp_path / "mine"), step)
    found = pointer.pointer_target(run, "latest")
    assert found is not None
    assert found.name == steps(run)[-1]
    others = [name for name in store_of(run).files if PurePosixPath(name).parts[2] not in steps(run)]
    assert others == [f"runs/mine/{pointer}" for pointer in (["best"] if "best" in options else []) + ["latest"]]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_goes_on_bit_for_bit(asynchronous: bool, source: Path, anywhere: Place, tmp_path: Path) -> None:
    whole, expected = train(source, tmp_path / "whole", 9)
    _, first = train(source, anywhere, 5, asynchronous=asynchronous, keep_last=1)
    again, then = train(source, anywhere, 9, asynchronous=asynchronous, keep_last=1)
    assert first | then == expected
    for (key, one), other in zip(again.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    assert steps(anywhere) == ["step_9"]


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter(merged: bool, source: Path, anywhere: Place) -> None:
    def model() -> NativeLlama:
        torch.manual_seed(1)
        return NativeLlama.from_config(source / "config.json")

    def opened(model: NativeLlama) -> Checkpointer:
        checkpointer = Checkpointer(
            source, anywhere, upload="direct", adapter=AdapterConfig(4, 8.0), save_every=1, merged=merged
        )
        checkpointer.load_model(model)
        add_lora(model, 4, 8.0, ("q_proj", "w1"))
        return checkpointer

    first, second = model(), model()
    with opened(first) as checkpointer:
        checkpointer.register(model=first)
        with torch.no_grad():
            for name, parameter in first.named_parameters():
                parameter.add_(1.5 if "lora" in name else 0.0)
        checkpointer.step()
    with opened(second) as checkpointer:
        progress = checkpointer.resume(model=second)
        assert progress is not None
        assert progress.step == 1
    for (key, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    names = {place.relative_name(anywhere / "step_1") for place in (anywhere / "step_1").without_listing().entries()}
    assert "adapter_model.safetensors" in names
    assert ("merged/config.json" in names) is merged


def test_a_fresh_start_takes_the_place_of_a_run(source: Path, run: Place) -> None:
    train(source, run, 5)
    trained = Trained(source)
    with pytest.raises(OutputExistsError, match=r"memory://runs/mine: holds 3 checkpoints, up to step 5"):
        Checkpointer(source, run, upload="direct").register(**trained.parts)
    with Checkpointer(source, run, upload="direct", save_every=2, overwrite=True) as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.register(**trained.parts)
        trained.go(checkpointer, 2)
    assert steps(run) == ["step_2"]


def test_a_step_is_the_source_of_another_run(source: Path, run: Place, tmp_path: Path) -> None:
    trained, _ = train(source, run, 2)
    again = Trained(source)
    with Checkpointer(run / "step_2", tmp_path / "next") as checkpointer:  # type: ignore[arg-type]
        checkpointer.load_model(again.model)
    for (key, one), other in zip(trained.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


def test_a_second_checkpointer_is_refused(source: Path, run: Place) -> None:
    trained = Trained(source)
    with Checkpointer(source, run, upload="direct") as checkpointer:
        checkpointer.register(**trained.parts)
        with pytest.raises(LockedError, match=r"(?s)another checkpointer is writing here.*if that has ended, delete"):
            Checkpointer(source, run, upload="direct").register(**trained.parts)
    assert LOCK not in store_of(run).files


def test_what_a_killed_run_left_is_cleared_away(source: Path, run: Place, caplog: pytest.LogCaptureFixture) -> None:
    train(source, run, 2)
    store = store_of(run)
    half = {name: data for name, data in store.files.items() if "/step_2/" in name and MANIFEST not in name}
    names = [name.removeprefix("runs/mine/step_2/") for name in half]
    for name, data in half.items():
        store.put(name.replace("step_2", "step_4"), data)
    journal = json.dumps({"first": "", "names": names, "whole": {}, "removing": False}).encode()
    store.put(f"runs/mine/step_4/{JOURNAL}", journal)
    store.put("runs/mine/step_4/notes.txt", b"mine")
    assert steps(run) == ["step_2"]
    with pytest.raises(InputError):
        open_checkpoint(run / "step_4")
    trained = Trained(source)
    with Checkpointer(source, run, upload="direct") as checkpointer:
        checkpointer.load_model(trained.model)
        progress = checkpointer.resume(**trained.parts)
        assert progress is not None
        assert progress.step == 2
    assert [name for name in store.files if "/step_4/" in name] == ["runs/mine/step_4/notes.txt"]
    assert "half-written memory://runs/mine/step_4 removed" in caplog.text


def test_requests(source: Path, run: Place) -> None:
    """What a save costs once a run is under way, with a step to be pruned."""
    trained, store = Trained(source), store_of(run)
    with Checkpointer(source, run, upload="direct", save_every=1, save_last=False, keep_last=1) as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, 2)
        store.requests.clear()
        trained.go(checkpointer, 3)
        requests = dict(store.requests)
    # The step: journal, 6 files from front to back, 5 small ones; the pointer; the journal of the step that is pruned.
    assert requests.pop("complete") == 6
    assert requests.pop("put") == 1 + 5 + 1 + 1
    assert requests.pop("part") < 40
    # The step's journal; and of the pruned one the manifest, what comes last, the rest, and the journal.
    assert requests.pop("delete") == 1 + 4
    assert requests == {"list": 9, "get": 6, "head": 1}


@pytest.mark.parametrize(
    ("times", "lost"),
    [pytest.param(1, False, marks=pytest.mark.slow), (1, True), (None, False)],
    ids=["once", "lost", "for good"],
)
def test_whatever_request_of_a_save_fails_a_sound_step_is_gone_on_from(
    times: int | None, lost: bool, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each request of a save with pruning fails; what is resumed then is one of the two steps, whole."""
    caplog.set_level(logging.CRITICAL)
    beside = {"runs/mine/notes/mine.txt": b"mine", "runs/other": b"x"}
    number = 0
    while True:
        run = failing_run(beside)
        store = store_of(run)
        model = NativeLlama.from_config(source / "config.json")
        checkpointer = Checkpointer(source, run, upload="direct", save_every=1, save_last=False, keep_last=1, workers=1)
        with contextlib.suppress(CkptConvertError), checkpointer:
            checkpointer.load_model(model)
            checkpointer.register(model=model)
            checkpointer.step()
            with torch.no_grad():
                model.norm.scale.fill_(2.0)
            store.arm(number, times, lost=lost)
            checkpointer.step()
        reached, _ = store.failed, store.arm(None)
        assert beside.items() <= store.files.items(), number
        store.delete([LOCK])  # what a person is told to remove where nobody else could
        assert choosing.newest_sound_step([run], verify=True, workers=1) is not None, number
        again = NativeLlama.from_config(source / "config.json")
        with Checkpointer(source, run, upload="direct", save_every=1, save_last=False, keep_last=1) as checkpointer:
            progress = checkpointer.resume(model=again)
            assert progress is not None, number
            assert bool((again.norm.scale == 2).all()) is (progress.step == 2), number
            checkpointer.step()
        assert steps(run) == [f"step_{progress.step + 1}"], number
        left = {PurePosixPath(name).parts[2] for name in store.files if name.startswith("runs/mine/")}
        assert left == {"latest", "notes", f"step_{progress.step + 1}"}, number
        if not reached:
            break
        number += 1
    assert number > (15 if lost else 60)
