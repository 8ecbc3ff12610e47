"""Resuming: exactly, from the newest sound checkpoint, or from the one that was asked for; wholly or in part."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ckpt_convert import Checkpointer
from ckpt_convert.errors import (
    CheckpointNotFoundError,
    CkptConvertError,
    CorruptFileError,
    KeyMismatchError,
    OutputExistsError,
    UsageError,
)
from tests.checkpointer.training import LLAMA, Trained, bfloat16_source, make_model, trainable
from tests.helpers import assert_same, bits, write_manifest


def trained_to(output_dir: Path, step: int, source: Path = LLAMA, **options: Any) -> tuple[Trained, dict[int, float]]:
    """A run that goes on where an earlier one in the directory ended, if there was one."""
    trained = Trained(source, options.pop("dtype", torch.float32))
    with Checkpointer(source, output_dir, **{"save_every": 2, **options}) as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        losses = trained.go(checkpointer, step)
    return trained, losses


def assert_same_training(found: Trained, expected: Trained) -> None:
    assert_same(found.model.state_dict(), expected.model.state_dict())
    ours, theirs = found.optimizer.state_dict(), expected.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        assert_same(ours["state"][number], state)
    assert found.lr_scheduler.state_dict() == expected.lr_scheduler.state_dict()


# Exact


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bfloat16_source(tmp_path_factory.mktemp("bfloat16") / "source")


@pytest.fixture(scope="module")
def uninterrupted(
    bfloat16: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[torch.dtype, bool], tuple[Trained, dict[int, float]]]:
    """Runs of twelve steps, and what their losses were."""

    @cache
    def run(dtype: torch.dtype, asynchronous: bool) -> tuple[Trained, dict[int, float]]:
        place = tmp_path_factory.mktemp("whole") / "out"
        return trained_to(place, 12, bfloat16, dtype=dtype, asynchronous=asynchronous)

    return run


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stop", [3, 7, 9], ids=["within an epoch", "at its end", "in the second"])
def test_from_a_bfloat16_source(
    dtype: torch.dtype,
    stop: int,
    asynchronous: bool,
    bfloat16: Path,
    uninterrupted: Callable[[torch.dtype, bool], tuple[Trained, dict[int, float]]],
    tmp_path: Path,
) -> None:
    source = bfloat16
    expected, curve = uninterrupted(dtype, asynchronous)
    _, first = trained_to(tmp_path / "parts", stop, source, dtype=dtype, asynchronous=asynchronous)
    found, second = trained_to(tmp_path / "parts", 12, source, dtype=dtype, asynchronous=asynchronous)
    assert second.keys() == set(range(stop + 1, 13))
    assert first | second == curve
    assert_same_training(found, expected)


def test_random_numbers_go_on_without_a_data_loader_too(tmp_path: Path) -> None:
    def drawn() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(())), float(torch.randn(()))]

    trained = Trained()
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        checkpointer.resume(model=trained.model, optimizer=trained.optimizer)
        drawn()
        checkpointer.step()
        checkpointer.save()
        expected = drawn()
    again = Trained()  # seeds anew
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        checkpointer.resume(model=again.model, optimizer=again.optimizer)
        assert drawn() == expected


def test_the_exact_tensors_are_kept_only_where_the_files_have_another_dtype(tmp_path: Path) -> None:
    source = bfloat16_source(tmp_path / "source")
    trained_to(tmp_path / "exact", 1, source, dtype=torch.float32)
    trained_to(tmp_path / "plain", 1, source, dtype=torch.bfloat16)
    size = {
        name: sum(f.stat().st_size for f in (tmp_path / name / "step_1" / "training_state").iterdir())
        for name in ("exact", "plain")
    }
    floats = sum(p.numel() for p in make_model().parameters())
    assert size["exact"] - size["plain"] > 4 * floats + 2 * 2 * floats - 1  # float32 weights; float32 moments


def test_the_cast_is_reported_once_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = bfloat16_source(tmp_path / "source")
    with caplog.at_level(logging.INFO, "ckpt_convert"):
        trained_to(tmp_path / "out", 6, source)
    said = [record.getMessage() for record in caplog.records if "are written as bfloat16" in record.getMessage()]
    assert said == [f"{len(make_model().state_dict())} float32 tensors of the model are written as bfloat16; "
                    "training_state keeps them exact"]  # fmt: skip


def test_several_optimizers_schedulers_and_loaders_as_dicts(tmp_path: Path) -> None:
    def parts() -> dict[str, Any]:
        model = make_model()
        halves = {"a": list(model.layers.parameters()), "b": list(model.output.parameters())}  # type: ignore[union-attr]
        optimizers = {name: torch.optim.AdamW(half, 1e-2) for name, half in halves.items()}
        schedulers = {n: torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for n, one in optimizers.items()}
        return {"model": model, "optimizer": optimizers, "lr_scheduler": schedulers}

    def update(all_: dict[str, Any]) -> None:
        all_["model"](torch.tensor([[1, 2, 3]])).square().mean().backward()
        for name in ("optimizer", "lr_scheduler"):
            for one in all_[name].values():
                one.step()

    one = parts()
    with Checkpointer(LLAMA, tmp_path / "out", save_every=1) as checkpointer:
        checkpointer.load_model(one["model"])
        checkpointer.resume(**one)
        update(one)
        checkpointer.step()
    other = parts()
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        assert checkpointer.resume(**other) is not None
    for name in ("a", "b"):
        for number, state in one["optimizer"][name].state_dict()["state"].items():
            assert_same(other["optimizer"][name].state_dict()["state"][number], state)
        assert other["lr_scheduler"][name].state_dict() == one["lr_scheduler"][name].state_dict()
    update(one)
    update(other)
    assert_same(other["model"].state_dict(), one["model"].state_dict())


class Counter:
    """User state: anything with state_dict and load_state_dict."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.seen)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = dict(state)


def test_user_state_scaler_and_progress(tmp_path: Path) -> None:
    state = Counter()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trained = Trained()
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        checkpointer.load_model(trained.model)
        assert checkpointer.resume(**trained.parts, grad_scaler=scaler, extra=state) is None
        trained.go(checkpointer, 9)
        state.seen = {"names": ["a", "b"], "nothing": None, "pair": (1, 2.5), "mean": torch.tensor([0.25])}
        scaler.load_state_dict({**scaler.state_dict(), "scale": 512.0})
        checkpointer.report(val_loss=1)

    again, counted = Trained(), Counter()
    fresh = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        progress = checkpointer.resume(**again.parts, grad_scaler=fresh, extra=counted)
    assert progress is not None
    assert (progress.step, progress.epoch, progress.samples, progress.tokens) == (9, 1, 34, 204)
    assert progress.evals == 1
    assert progress.seconds > 0
    assert fresh.state_dict()["scale"] == 512.0
    assert torch.equal(counted.seen.pop("mean"), state.seen.pop("mean"))
    assert counted.seen == state.seen


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_training_state_is_a_directory_that_torch_loads(tmp_path: Path) -> None:
    """torch.distributed.checkpoint reads the tensors, without our code."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    trained, _ = trained_to(tmp_path / "out", 3)
    directory = tmp_path / "out" / "step_3" / "training_state"
    metadata = dcp.FileSystemReader(directory).read_metadata()
    state = {
        key: torch.empty(one.size, dtype=one.properties.dtype)
        for key, one in metadata.state_dict_metadata.items()
        if isinstance(one, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=directory, no_dist=True)
    moments = {bits(one["exp_avg"]) for one in trained.optimizer.state_dict()["state"].values()}
    assert moments <= {bits(tensor) for key, tensor in state.items() if "exp_avg" in key}


# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a truncated shard": lambda step: truncate(step / "model-00002-of-00004.safetensors"),
    "a flipped bit in the weights": lambda step: flip(step / "model-00003-of-00004.safetensors"),
    "a missing shard": lambda step: (step / "model-00001-of-00004.safetensors").unlink(),
    "a flipped bit in the training state": lambda step: flip(step / "training_state" / "__0_0.distcp"),
    "a truncated training state": lambda step: truncate(step / "training_state" / "__0_0.distcp"),
    "no metadata in the training state": lambda step: (step / "training_state" / ".metadata").unlink(),
    "no training state": lambda step: shutil.rmtree(step / "training_state"),
    "a manifest that is cut": lambda step: truncate(step / "ckpt_convert" / "manifest.json"),
    "an empty manifest": lambda step: (step / "ckpt_convert" / "manifest.json").write_bytes(b""),
    "a config that is missing": lambda step: (step / "config.json").unlink(),
    "a config that is cut": lambda step: truncate(step / "config.json"),
    "an index that is cut": lambda step: truncate(step / "model.safetensors.index.json"),
    "a file copied along that changed": lambda step: flip(step / "recipe.yaml"),
}


@pytest.fixture(scope="module")
def run_of_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    (place / "recipe.yaml").write_text("lr: 0.1\n")
    trained_to(place / "out", 6, trainable(place / "source"), extra_files=[place / "recipe.yaml"])
    return place / "out"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    damage: str, run_of_three: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output_dir = shutil.copytree(run_of_three, tmp_path / "out", symlinks=True)
    DAMAGE[damage](output_dir / "step_6")
    trained = Trained()
    with caplog.at_level(logging.WARNING, "ckpt_convert"), Checkpointer(LLAMA, output_dir) as checkpointer:
        progress = checkpointer.resume(**trained.parts)
    assert progress is not None
    assert progress.step == 4
    assert any("step_6" in record.getMessage() for record in caplog.records)


def test_a_directory_without_manifest_is_no_checkpoint(run_of_three: Path, tmp_path: Path) -> None:
    output_dir = shutil.copytree(run_of_three, tmp_path / "out", symlinks=True)
    (output_dir / "step_6" / "ckpt_convert" / "manifest.json").unlink()
    with Checkpointer(LLAMA, output_dir) as checkpointer:
        progress = checkpointer.resume(**Trained().parts)
        assert progress is not None
        assert progress.step == 4
        assert [saved.step for saved in checkpointer.saved] == [2, 4]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_s_place_is_taken_by_the_next_save_of_that_step(
    damage: str, run_of_three: Path, tmp_path: Path
) -> None:
    output_dir = shutil.copytree(run_of_three, tmp_path / "out", symlinks=True)
    DAMAGE[damage](output_dir / "step_6")
    trained = Trained()
    place = run_of_three.parent
    with Checkpointer(place / "source", output_dir, save_every=2, extra_files=[place / "recipe.yaml"]) as again:
        again.resume(**trained.parts)
        trained.go(again, 6)
    for file in sorted(run_of_three.joinpath("step_6").rglob("*")):
        if file.is_file() and file.name != "manifest.json":
            name = file.relative_to(run_of_three)
            assert (output_dir / name).read_bytes() == file.read_bytes(), name


def test_where_all_are_damaged_it_is_an_error_and_nothing_is_loaded(run_of_three: Path, tmp_path: Path) -> None:
    output_dir = shutil.copytree(run_of_three, tmp_path / "out", symlinks=True)
    for step in (2, 4, 6):
        flip(output_dir / f"step_{step}" / "model-00001-of-00004.safetensors")
    trained = Trained()
    before = {key: tensor.clone() for key, tensor in trained.model.state_dict().items()}
    with Checkpointer(LLAMA, output_dir) as checkpointer:
        with pytest.raises(CorruptFileError, match="holds 3 checkpoints, but none that is sound"):
            checkpointer.resume(**trained.parts)
        checkpointer.close()
    assert_same(trained.model.state_dict(), before)
    assert not trained.optimizer.state_dict()["state"]


def test_where_no_manifest_can_be_read_it_is_an_error_and_no_fresh_start(run_of_three: Path, tmp_path: Path) -> None:
    output_dir = shutil.copytree(run_of_three, tmp_path / "out", symlinks=True)
    for step, damage in ((2, truncate), (4, Path.unlink), (6, lambda path: path.write_bytes(b""))):
        damage(output_dir / f"step_{step}" / "ckpt_convert" / "manifest.json")
    with Checkpointer(LLAMA, output_dir) as checkpointer:
        with pytest.raises(CorruptFileError, match=r"none that is sound[\s\S]*step_2[\s\S]*step_4[\s\S]*step_6"):
            checkpointer.resume(**Trained().parts)
        checkpointer.close()


def test_one_that_was_asked_for_is_not_replaced_by_another(run_of_three: Path, tmp_path: Path) -> None:
    output_dir = shutil.copytree(run_of_three, tmp_path / "out", symlinks=True)
    flip(output_dir / "step_4" / "training_state" / "__0_0.distcp")
    with Checkpointer(LLAMA, output_dir) as checkpointer, pytest.raises(CorruptFileError, match="step_4"):
        checkpointer.resume(**Trained().parts, from_=4)


# Choosing


def test_from_a_step_the_run_goes_on_from_there(run_of_three: Path, tmp_path: Path) -> None:
    output_dir = shutil.copytree(run_of_three, tmp_path / "out", symlinks=True)
    trained = Trained()
    with Checkpointer(LLAMA, output_dir, save_every=1) as checkpointer:
        progress = checkpointer.resume(**trained.parts, from_=2)
        assert progress is not None
        assert progress.step == 2
        trained.go(checkpointer, 3)
    with Checkpointer(LLAMA, output_dir) as checkpointer:
        latest = checkpointer.resume(**Trained().parts)  # step 3 is the newest now, though 6 is a larger number
        assert latest is not None
        assert latest.step == 3
    assert (output_dir / "latest").readlink() == Path("step_3")


def test_from_a_path(run_of_three: Path, tmp_path: Path) -> None:
    for path, step in ((run_of_three / "step_4", 4), (run_of_three / "latest", 6), (run_of_three, 6)):
        with Checkpointer(LLAMA, tmp_path / f"from {path.name}") as checkpointer:
            progress = checkpointer.resume(**Trained().parts, from_=path)
        assert progress is not None
        assert progress.step == step


def test_from_the_best(tmp_path: Path) -> None:
    trained = Trained()
    with Checkpointer(LLAMA, tmp_path / "out", save_every=1, best="val_loss:min") as checkpointer:
        checkpointer.resume(**trained.parts)
        for value in (2.0, 0.0, 1.0):
            trained.go(checkpointer, checkpointer.progress.step + 1)
            checkpointer.report(val_loss=value)
    with Checkpointer(LLAMA, tmp_path / "out", best="val_loss:min") as checkpointer:
        progress = checkpointer.resume(**Trained().parts, from_="best")
    assert progress is not None
    assert progress.step == 2  # 0.0 is a value


def test_what_is_not_there(run_of_three: Path, tmp_path: Path) -> None:
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        for place, message in (
            (5, "no complete checkpoint of step 5; it has: none"),
            ("nowhere", "nowhere: is no com"),
        ):
            with pytest.raises(CheckpointNotFoundError, match=message):
                checkpointer.resume(**Trained().parts, from_=place)
        with pytest.raises(UsageError, match="best by what"):
            checkpointer.resume(**Trained().parts, from_="best")
        with pytest.raises(UsageError, match='expected "latest", "best", a step, or the path'):
            checkpointer.resume(**Trained().parts, from_=1.5)  # type: ignore[arg-type]


def test_nothing_there_is_a_fresh_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ckpt_convert"), Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        assert checkpointer.resume(**Trained().parts) is None
    assert any("fresh start" in record.getMessage() for record in caplog.records)


def test_a_fresh_start_where_checkpoints_are_is_refused(run_of_three: Path, tmp_path: Path) -> None:
    output_dir = shutil.copytree(run_of_three, tmp_path / "out", symlinks=True)
    with Checkpointer(LLAMA, output_dir) as checkpointer:
        with pytest.raises(OutputExistsError, match="holds 3 checkpoints, up to step 6; resume"):
            checkpointer.register(**Trained().parts)
        checkpointer.close()
    assert sorted(path.name for path in output_dir.glob("step_*")) == ["step_2", "step_4", "step_6"]


def test_overwriting_lets_the_old_run_go_once_the_new_one_has_a_checkpoint(run_of_three: Path, tmp_path: Path) -> None:
    output_dir = shutil.copytree(run_of_three, tmp_path / "out", symlinks=True)
    trained = Trained()
    with Checkpointer(LLAMA, output_dir, overwrite=True, save_every=2) as checkpointer:
        checkpointer.register(**trained.parts)
        trained.go(checkpointer, 1)
        assert [saved.step for saved in checkpointer.saved] == [2, 4, 6]
        trained.go(checkpointer, 2)
        assert [saved.step for saved in checkpointer.saved] == [2]
    assert_same(torch.load(_bin(output_dir / "step_2"), weights_only=True), dict(trained.model.state_dict()))


def _bin(step: Path) -> Path:
    """What a step holds, loaded into a new model, as a file of torch's."""
    with Checkpointer(step, step.parent.parent / "other") as checkpointer:
        torch.save(checkpointer.load_state_dict("native"), step.parent.parent / "loaded.pt")
    return step.parent.parent / "loaded.pt"


# Parts


def test_globs_choose_what_is_loaded(run_of_three: Path, tmp_path: Path) -> None:
    trained = Trained()
    fresh = {key: tensor.clone() for key, tensor in trained.model.state_dict().items()}
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        checkpointer.resume(**trained.parts, from_=run_of_three, include=["model/layers.0.*", "optimizer"])
    state = trained.model.state_dict()
    changed = {key for key in state if not torch.equal(state[key], fresh[key])}
    assert changed == {key for key in state if key.startswith("layers.0.")}
    assert trained.optimizer.state_dict()["state"]
    assert trained.lr_scheduler.last_epoch == 0

    trained = Trained()
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        checkpointer.resume(**trained.parts, from_=run_of_three, exclude=["optimizer", "rng", "model/output*"])
    state = trained.model.state_dict()
    assert [key for key in state if torch.equal(state[key], fresh[key])] == ["output.weight"]
    assert not trained.optimizer.state_dict()["state"]
    assert trained.lr_scheduler.last_epoch == 6


def test_weights_only(run_of_three: Path, tmp_path: Path) -> None:
    trained = Trained()
    drawn = torch.get_rng_state()
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        progress = checkpointer.resume(**trained.parts, from_=run_of_three, weights_only=True)
    assert progress is not None
    assert_same(torch.load(_bin(run_of_three / "step_6"), weights_only=True), dict(trained.model.state_dict()))
    assert not trained.optimizer.state_dict()["state"]
    assert torch.equal(torch.get_rng_state(), drawn)


class Wider(nn.Module):
    """The model of the run with one tensor more and one less."""

    def __init__(self) -> None:
        super().__init__()
        inner = make_model()
        self.tok_embeddings, self.layers = inner.tok_embeddings, inner.layers
        self.output = inner.output
        self.head = nn.Linear(72, 3, bias=False)


def test_everything_that_does_not_fit_is_one_report(run_of_three: Path, tmp_path: Path) -> None:
    model = Wider()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        with pytest.raises(KeyMismatchError) as caught:
            checkpointer.resume(model=model, extra=Counter(), from_=run_of_three)
        assert_same(model.state_dict(), before)  # nothing was loaded
    said = str(caught.value)
    for line in ("head.weight", "norm.scale", "optimizer: is in the checkpoint, but was not given", "lr_scheduler: is",
                 "dataloader: is in", "extra: is not in the checkpoint", "strict=False"):  # fmt: skip
        assert line in said, said


def test_what_fits_is_loaded_where_strictness_is_given_up(run_of_three: Path, tmp_path: Path) -> None:
    """Weights alone: a model that does not fit could not be saved, and that is said as well."""
    model = make_model()
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        checkpointer.resume(model=model, from_=run_of_three, strict=False)
    assert_same(torch.load(_bin(run_of_three / "step_6"), weights_only=True), dict(model.state_dict()))


def test_step_before_resume_is_an_error_that_says_so(tmp_path: Path) -> None:
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        for call in (checkpointer.step, checkpointer.report, checkpointer.end_epoch, checkpointer.save):
            with pytest.raises(UsageError, match=r"call resume\(model=\.\.\., \.\.\.\) or register"):
                call()
        checkpointer.close()
    with pytest.raises(UsageError, match="is closed"):
        checkpointer.step()
    assert not (tmp_path / "out").exists()


def test_a_manifest_of_a_newer_version_is_neither_used_nor_passed_over(run_of_three: Path, tmp_path: Path) -> None:
    output_dir = shutil.copytree(run_of_three, tmp_path / "out", symlinks=True)
    manifest = output_dir / "step_6" / "ckpt_convert" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["training"]["version"] = 99
    write_manifest(manifest, content)
    checkpointer = Checkpointer(LLAMA, output_dir)
    with pytest.raises(CkptConvertError, match="newer"):
        checkpointer.resume(**Trained().parts)
    checkpointer.close()
