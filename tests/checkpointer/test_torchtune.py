"""A recipe of torchtune saves through ``TorchtuneCheckpointer``: the source's files, and all that it needs to go on.

These give what recipes give; ``test_torchtune_recipes`` runs the recipes.
"""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ckpt_convert import (
    CheckpointNotFoundError,
    CorruptFileError,
    KeyMismatchError,
    TorchtuneCheckpointer,
    UsageError,
    open_checkpoint,
    verify_checkpoint,
)
from ckpt_convert.checkpointer.run import saved_steps
from ckpt_convert.storage.place import Place
from tests.checkpointer.training import bfloat16_source, make_model, trainable
from tests.helpers import GOLDEN, sums
from tests.storage.failing import FailingStore

STATE = {"seed": 7, "total_epochs": 3, "max_steps_per_epoch": None, "dataloader": {"_snapshot": {"at": 3}, "rng": None}}

# The parameters of torchtune 0.6.1's FullModelHFCheckpointer, of which the other two have all but safe_serialization.
PUBLISHED = (
    *("checkpoint_dir", "checkpoint_files", "model_type", "output_dir", "adapter_checkpoint", "recipe_checkpoint"),
    *("resume_from_checkpoint", "safe_serialization", "should_load_recipe_state"),
)
PUBLISHED_SAVE = ("state_dict", "epoch", "intermediate_checkpoint", "adapter_only")
ON_MAIN = ("keep_last_n_checkpoints", "enable_dcp")
ON_MAIN_SAVE = ("step", "max_shard_size", "dir_prefix")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bfloat16_source(tmp_path_factory.mktemp("torchtune") / "source")


def checkpointer(source: Path, output: Path, **options: Any) -> TorchtuneCheckpointer:
    files = sorted(path.name for path in source.iterdir() if path.suffix in (".safetensors", ".pth"))
    return TorchtuneCheckpointer(str(source), files, "LLAMA3", str(output), **options)


class Recipe:
    """What a recipe has, and gives at the end of an epoch."""

    def __init__(self, saver: TorchtuneCheckpointer, source: Path) -> None:
        loaded = saver.load_checkpoint()
        torch.manual_seed(3)
        self.saver, self.model, self.epochs = saver, make_model(source), loaded.get("epochs_run", 0)
        self.model.load_state_dict(loaded["model"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        if "optimizer" in loaded:
            self.optimizer.load_state_dict(loaded["optimizer"])

    def train(self, until: int, total: int = 3) -> dict[str, torch.Tensor]:
        for epoch in range(self.epochs, until):
            self.model(torch.tensor([[1, 5, 9 + epoch]])).float().square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            goes_on = epoch + 1 < total
            state = {**STATE, "epochs_run": epoch + 1, "optimizer": self.optimizer.state_dict()} if goes_on else {}
            self.saver.save_checkpoint({"model": self.model.state_dict(), **state}, epoch, goes_on)
        return dict(self.model.state_dict())


def adapter_of(model: nn.Module, *, dora: bool = False) -> dict[str, Any]:
    """What a recipe gives of an adapter, by torchtune's keys."""
    tensors = {}
    for name in ("layers.0.attn.q_proj", "layers.1.attn.output_proj", "layers.2.mlp.w2"):
        rows, columns = model.state_dict()[f"{name}.weight"].shape
        tensors |= {f"{name}.lora_a.weight": torch.randn(4, columns), f"{name}.lora_b.weight": torch.randn(rows, 4)}
        tensors |= {f"{name}.magnitude": torch.rand(rows)} if dora else {}
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "output_proj", "w2"], "peft_type": "LORA"}
    return {"adapter": tensors, "adapter_config": config}


def same(one: Any, other: Any) -> bool:
    """Whether two nested states are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_the_interface_is_the_published_one() -> None:
    made, saved = (
        inspect.signature(function).parameters
        for function in (TorchtuneCheckpointer, TorchtuneCheckpointer.save_checkpoint)
    )
    assert tuple(made)[: len(PUBLISHED)] == PUBLISHED
    assert tuple(saved)[1 : len(PUBLISHED_SAVE) + 1] == PUBLISHED_SAVE
    assert {*ON_MAIN} < {*made}
    assert {*ON_MAIN_SAVE} < {*saved}
    assert "weights_only" in inspect.signature(TorchtuneCheckpointer.load_checkpoint).parameters


@pytest.mark.parametrize("layout", ["hf", "meta-mp2"])
def test_what_is_saved_has_the_files_of_the_source(layout: str, tmp_path: Path) -> None:
    source = trainable(tmp_path / "source", GOLDEN / "llama" / layout)
    saver = checkpointer(source, tmp_path / "run")
    saver.save_checkpoint(saver.load_checkpoint(), epoch=0)
    weights = {path.name for path in source.iterdir() if path.suffix in (".safetensors", ".pth", ".json")}
    assert len(weights) > 2
    saved = sums(tmp_path / "run" / "epoch_0")
    assert {name: saved.get(name) for name in weights} == {name: sums(source)[name] for name in weights}


def test_a_run_goes_on_with_all_that_its_recipe_had(source: Path, tmp_path: Path) -> None:
    whole = Recipe(checkpointer(source, tmp_path / "whole"), source).train(3)
    first = Recipe(checkpointer(source, tmp_path / "run"), source)
    first.train(2)
    loaded = checkpointer(source, tmp_path / "run", should_load_recipe_state=True).load_checkpoint()
    assert same(loaded["optimizer"], first.optimizer.state_dict())
    assert {name: loaded[name] for name in STATE} == STATE
    assert loaded["epochs_run"] == 2
    del first
    resumed = Recipe(checkpointer(source, tmp_path / "run", resume_from_checkpoint=True), source).train(3)
    assert same(resumed, whole)  # in float32, of which the files have bfloat16
    assert (tmp_path / "run" / "latest").resolve().name == "epoch_2"
    assert not (tmp_path / "run" / "epoch_2" / "training_state").exists()


def test_more_epochs_go_on_from_the_last_step_with_a_state(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Recipe(checkpointer(source, tmp_path / "run"), source).train(3)
    with caplog.at_level(logging.WARNING):
        saver = checkpointer(source, tmp_path / "run", should_load_recipe_state=True)
    assert "epoch_2: cannot be gone on from: it has no state of a recipe" in caplog.text
    assert saver.load_checkpoint()["epochs_run"] == 2


def test_a_step_that_is_named_is_gone_on_from(source: Path, tmp_path: Path) -> None:
    Recipe(checkpointer(source, tmp_path / "run"), source).train(2)
    first = tmp_path / "run" / "epoch_0"
    assert checkpointer(first, tmp_path / "on", should_load_recipe_state=True).load_checkpoint()["epochs_run"] == 1


def test_what_is_saved_into_a_store_has_arrived_and_is_gone_on_from(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run: Any = Place(FailingStore(), PurePosixPath("runs/mine"))
    expected = Recipe(checkpointer(source, tmp_path / "disk"), source).train(3)
    for until in (1, 3):
        saver = TorchtuneCheckpointer(str(source), output_dir=run, should_load_recipe_state=until > 1)
        found = Recipe(saver, source).train(until)
        assert not [path for path in tmp_path.iterdir() if path.name != "disk"]
        assert not (run / ".ckpt-convert-lock").is_present()
    assert same(found, expected)
    assert [saved.place.name for saved in saved_steps.scan_steps(run)] == ["epoch_0", "epoch_1", "epoch_2"]


def test_steps_are_named_and_pruned_as_asked(source: Path, tmp_path: Path) -> None:
    saver = checkpointer(source, tmp_path / "run", keep_last_n_checkpoints=1)
    loaded = saver.load_checkpoint()
    for step in (10, 20):
        saver.save_checkpoint({**loaded, "epochs_run": 0}, 0, True, step=step, dir_prefix="step")
    assert [path.name for path in (tmp_path / "run").glob("step_*")] == ["step_20"]


def test_another_dtype_is_written_where_it_is_asked_for(source: Path, tmp_path: Path) -> None:
    Recipe(checkpointer(source, tmp_path / "run", export_dtype="float32"), source).train(1)
    with open_checkpoint(tmp_path / "run" / "epoch_0") as saved:
        assert {saved[key].dtype for key in saved} == {"F32"}


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_in_pefts_files_below_the_merged_weights(source: Path, dora: bool, tmp_path: Path) -> None:
    saver = checkpointer(source, tmp_path / "run")
    loaded, adapter = saver.load_checkpoint(), adapter_of(make_model(source), dora=dora)
    saver.save_checkpoint({**loaded, **adapter, "epochs_run": 1}, 0, True)
    folder = tmp_path / "run" / "epoch_0"
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 8, dora)
    with open_checkpoint(folder / "adapter" / "adapter_model.safetensors") as written:
        keys = {key.removeprefix("base_model.model.") for key in written}
    assert "model.layers.2.mlp.down_proj.lora_A.weight" in keys
    assert len(keys) == 3 * (3 if dora else 2)
    assert (folder / "model-00004-of-00004.safetensors").exists()
    again = checkpointer(source, tmp_path / "run", should_load_recipe_state=True).load_checkpoint()
    assert same(again["adapter"], adapter["adapter"])
    assert same(again["model"], loaded["model"])


def test_an_adapter_alone_is_saved_without_weights(source: Path, tmp_path: Path) -> None:
    saver = checkpointer(source, tmp_path / "run")
    adapter = adapter_of(make_model(source))
    saver.save_checkpoint({**adapter, **STATE, "epochs_run": 1}, 0, True, adapter_only=True)
    saver.save_checkpoint(adapter, 1, adapter_only=True)
    for name in ("epoch_0", "epoch_1"):
        assert {path.name for path in (tmp_path / "run" / name).glob("*.*")} == {
            *("adapter_config.json", "adapter_model.safetensors")
        }
    again = checkpointer(source, tmp_path / "run", should_load_recipe_state=True).load_checkpoint()
    assert same(again["adapter"], adapter["adapter"])
    assert again["seed"] == 7


def test_the_repository_that_tune_has_downloaded_is_named_as_the_base(source: Path, tmp_path: Path) -> None:
    copy = bfloat16_source(tmp_path / "source")
    (copy / "original_repo_id.json").write_text('{"repo_id": "meta-llama/Llama-3.2-1B"}')
    checkpointer(copy, tmp_path / "run").save_checkpoint(adapter_of(make_model(copy)), 0, adapter_only=True)
    config = json.loads((tmp_path / "run" / "epoch_0" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "meta-llama/Llama-3.2-1B"


def torchtunes(
    source: Path, output: Path, layout: str, adapter: dict[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """What torchtune's own checkpointer leaves after two epochs, and what it has in it."""
    recipe = Recipe(checkpointer(source, output.parent / "other"), source)
    weights = recipe.train(2)
    state = {**STATE, "epochs_run": 2, "optimizer": recipe.optimizer.state_dict()}
    for epoch in ("epoch_0", "epoch_1"):
        bfloat16_source(output / epoch)
    last = output / "epoch_1"
    (output / "recipe_state").mkdir()
    torch.save(state, output / "recipe_state" / "recipe_state.pt" if layout == "0.6.1" else last / "recipe_state.pt")
    if adapter is not None:
        torch.save(adapter, last / "adapter_model.pt")
    return {**state, "model": weights}


@pytest.mark.parametrize("layout", ["0.6.1", "main"])
def test_a_run_of_torchtunes_own_checkpointer_goes_on(source: Path, layout: str, tmp_path: Path) -> None:
    state = torchtunes(source, tmp_path / "run", layout)
    names = [f"epoch_1/model-0000{at}-of-00004.safetensors" for at in range(1, 5)]
    for files in (names, {"filename_format": "epoch_1/model-{}-of-{}.safetensors", "max_filename": "00004"}, None):
        saver = TorchtuneCheckpointer(
            str(source), files, "LLAMA3", str(tmp_path / "run"), should_load_recipe_state=True
        )
        loaded = saver.load_checkpoint()
        assert same(loaded["optimizer"], state["optimizer"])
        assert loaded["epochs_run"] == 2
        assert same(loaded["model"], checkpointer(source, tmp_path).load_checkpoint()["model"])
    saver.save_checkpoint(loaded, 2, True)
    assert checkpointer(source, tmp_path / "run", should_load_recipe_state=True).load_checkpoint()["seed"] == 7


def test_merged_weights_are_loaded_without_the_adapter_and_pruned_with_it(source: Path, tmp_path: Path) -> None:
    saver = checkpointer(source, tmp_path / "run", keep_last_n_checkpoints=1)
    loaded, adapter = saver.load_checkpoint(), adapter_of(make_model(source))
    for epoch in range(2):
        saver.save_checkpoint({**loaded, **adapter}, epoch)
    assert [path.name for path in (tmp_path / "run").glob("epoch_*")] == ["epoch_1"]
    assert verify_checkpoint(tmp_path / "run" / "epoch_1").ok
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "epoch_1")
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert same(dict(model.state_dict()), dict(expected))


@pytest.mark.parametrize("named", [False, True])
def test_an_adapter_of_torchtunes_own_checkpointer_goes_on(source: Path, named: bool, tmp_path: Path) -> None:
    adapter = adapter_of(make_model(source))["adapter"]
    torchtunes(source, tmp_path / "run", "0.6.1", adapter)
    options = {"adapter_checkpoint": "epoch_1/adapter_model.pt", "recipe_checkpoint": "recipe_state/recipe_state.pt"}
    saver = checkpointer(source, tmp_path / "run", should_load_recipe_state=True, **(options if named else {}))
    loaded = saver.load_checkpoint()
    assert same(loaded["adapter"], adapter)


def test_a_pickle_that_rebuilds_more_than_values_is_refused(source: Path, tmp_path: Path) -> None:
    torchtunes(source, tmp_path / "run", "0.6.1")
    torch.save({"epochs_run": Path("/")}, tmp_path / "run" / "recipe_state" / "recipe_state.pt")
    with pytest.raises(CorruptFileError, match=r"recipe_state\.pt: is none of the files that torchtune saves"):
        checkpointer(source, tmp_path / "run", should_load_recipe_state=True).load_checkpoint()


def test_a_damaged_step_is_passed_over(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Recipe(checkpointer(source, tmp_path / "run"), source).train(2)
    damaged = tmp_path / "run" / "epoch_1" / "model-00001-of-00004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert checkpointer(source, tmp_path / "run", should_load_recipe_state=True).load_checkpoint()["epochs_run"] == 1
    (tmp_path / "run" / "epoch_0" / "config.json").unlink()
    with pytest.raises(CorruptFileError, match="has no step that is sound"):
        checkpointer(source, tmp_path / "run", should_load_recipe_state=True)


def test_what_says_nothing_to_save_or_to_load_is_refused(source: Path, tmp_path: Path) -> None:
    saver = checkpointer(source, tmp_path / "run")
    weights = saver.load_checkpoint()
    for given, options, message in (
        ({}, {}, "has no 'model'"),
        (weights, {"adapter_only": True}, "has no 'adapter' and no 'adapter_config'"),
        (weights, {"dir_prefix": "step"}, "and a step="),
    ):
        with pytest.raises(UsageError, match=message):
            saver.save_checkpoint(given, 0, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no output_dir"):
        TorchtuneCheckpointer(str(source)).save_checkpoint(weights, 0)
    with pytest.raises(UsageError, match="expected a list of names, or filename_format"):
        TorchtuneCheckpointer(str(source), {"max_filename": "3"})
    with pytest.raises(CheckpointNotFoundError, match="has nothing to go on from"):
        checkpointer(source, tmp_path / "nothing", should_load_recipe_state=True)
    with pytest.raises(KeyMismatchError):
        saver.save_checkpoint({"model": {"tok_embeddings.weight": weights["model"]["tok_embeddings.weight"]}}, 0)
