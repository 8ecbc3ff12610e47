"""Opening what is no model of a known family: every readable file shows its keys, and nothing of it is converted."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckpt_convert
from ckpt_convert.checkpoint.checkpoint import Checkpoint, open_identified
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.errors import (
    AmbiguousFormatError,
    CheckpointNotFoundError,
    CkptConvertError,
    CorruptFileError,
    KeyMismatchError,
    UnsafeFileError,
)
from tests.helpers import GOLDEN, Tensors, bits, sums

HF = GOLDEN / "llama" / "hf"


def some(*names: str) -> Tensors:
    """Tensors of different sizes, every element of its own."""
    sizes = [torch.arange(n * 3.0).reshape(n, 3) + n for n in range(1, len(names) + 1)]
    return dict(zip(names, sizes, strict=True))


def assert_holds(checkpoint: Identified, expected: Tensors) -> None:
    assert {key: info.shape for key, info in checkpoint.tensors.items()} == {
        key: tuple(tensor.shape) for key, tensor in expected.items()
    }
    for key, tensor in expected.items():
        assert Checkpoint(checkpoint)[key].tobytes() == bits(tensor), key
        lazy, dtype = checkpoint.joined(key)
        assert (lazy.shape, checkpoint.tensors[key].dtype) == (tuple(tensor.shape), dtype)


def assert_unknown(path: Path, expected: Tensors) -> Identified:
    with open_identified(path) as checkpoint:
        assert (checkpoint.format, checkpoint.family) == (None, None)
        assert_holds(checkpoint, expected)
        return checkpoint


def refusal(source: Path, *, to: str = "hf", **options: Any) -> str:
    with pytest.raises(CkptConvertError) as caught:
        ckpt_convert.convert_checkpoint(source, source.parent / "out", to=to, **options)
    assert not (source.parent / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize("name", ["x.safetensors", "model.safetensors", "diffusion_pytorch_model.fp16.safetensors"])
def test_any_safetensors_file(tmp_path: Path, name: str) -> None:
    tensors = some("encoder.weight", "strange key / ☃", "")
    save_file(tensors, tmp_path / name)
    assert_unknown(tmp_path / name, tensors)
    assert_unknown(tmp_path, tensors)


def test_diffusers_shards_with_their_index(tmp_path: Path) -> None:
    parts = [some("down.0.weight", "down.1.weight"), some("up.0.weight")]
    names = [f"diffusion_pytorch_model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, tmp_path / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_unknown(tmp_path, parts[0] | parts[1])
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with open_identified(tmp_path) as checkpoint:
        assert checkpoint.family is None
        assert_holds(checkpoint, parts[0] | parts[1])
    assert "_class_name 'UNet2DConditionModel' is no known family" in refusal(tmp_path, to="native")
    copied = tmp_path.parent / f"{tmp_path.name}-copied"
    ckpt_convert.convert_checkpoint(tmp_path, copied, to="hf", verify=True)
    assert sums(copied) == sums(tmp_path)


def test_variants_of_one_file_are_not_mixed(tmp_path: Path) -> None:
    tensors = some("down.0.weight")
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"down.0.weight": tensors["down.0.weight"].half()}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with open_identified(tmp_path) as checkpoint:
        assert_holds(checkpoint, tensors)
        assert any("fp16" in notice for notice in checkpoint.notices)


def test_bin_shards_with_odd_names(tmp_path: Path) -> None:
    parts = [some("a.weight", "b.weight"), some("c.weight")]
    for name, part in zip(["pytorch_model.part1.bin", "weights_2.bin"], parts, strict=True):
        torch.save(part, tmp_path / name)
    assert_unknown(tmp_path, parts[0] | parts[1])


def test_one_file_in_two_containers_is_taken_once(tmp_path: Path) -> None:
    tensors = some("a.weight", "b.weight")
    for safe, other in (("model.safetensors", "pytorch_model.bin"), ("vae.safetensors", "vae.pt")):
        folder = tmp_path / safe
        folder.mkdir()
        save_file(tensors, folder / safe)
        torch.save(tensors, folder / other)
        checkpoint = assert_unknown(folder, tensors)
        assert any(other in notice for notice in checkpoint.notices)


def test_files_that_have_nothing_to_do_with_each_other(tmp_path: Path) -> None:
    """A key that several files have is called by its file, too; no shape or value of one is taken for another's."""
    one, two = some("weight", "only.one"), {"weight": torch.ones(7, dtype=torch.int8), "only.two": torch.zeros(1)}
    save_file(one, tmp_path / "a.safetensors")
    torch.save(two, tmp_path / "b.ckpt")
    expected = {
        "a.safetensors:weight": one["weight"],
        "b.ckpt:weight": two["weight"],
        "only.one": one["only.one"],
        "only.two": two["only.two"],
    }
    checkpoint = assert_unknown(tmp_path, expected)
    assert checkpoint.contradictions == []
    assert set(checkpoint.ranks[0]) == set(expected)
    assert [len(info.parts) for info in checkpoint.tensors.values()] == [1] * 4


def test_a_key_twice_in_shards_of_a_known_format_is_a_contradiction(tmp_path: Path) -> None:
    both = tmp_path / "hf"
    shutil.copytree(HF, both)
    (both / "model.safetensors.index.json").unlink()
    files = sorted(both.glob("*.safetensors"))
    again = next(iter(load_file(files[0])))
    save_file({**load_file(files[1]), again: load_file(files[0])[again]}, files[1])
    with ckpt_convert.open_checkpoint(both) as checkpoint:
        with pytest.raises(KeyMismatchError, match=again):
            checkpoint[again].torch()
        assert checkpoint["model.norm.weight"].torch().shape == (72,)


# --- PEFT adapters --------------------------------------------------------------------------------------------------

ADAPTER = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"],
    "base_model_name_or_path": "meta-llama/Llama-3.2-1B",
}  # fmt: skip


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = some("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "b")
    (save_file if name.endswith("safetensors") else torch.save)(tensors, folder / name)
    torch.save({"state": {}}, folder / "optimizer.pt")
    torch.save({"cpu": torch.zeros(3)}, folder / "rng_state.pth")
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    for path in (folder, folder / name):
        checkpoint = assert_unknown(path, tensors)
        assert checkpoint.why == "PEFT adapter (LORA r=8, alpha=16) for meta-llama/Llama-3.2-1B"
        assert dict(checkpoint.facts) == {"adapter": checkpoint.why, "targets": "q_proj, v_proj"}
        message = refusal(path)
        assert "merge_and_unload" in message
        assert "PEFT adapter" in message


def test_an_adapter_without_a_config_that_can_be_read(tmp_path: Path) -> None:
    tensors = some("lora_A.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    for config in (None, "{", "[]", json.dumps({"r": "8\x1b", "base_model_name_or_path": 3})):
        if config is not None:
            (tmp_path / "adapter_config.json").write_text(config)
        assert_unknown(tmp_path, tensors)


def test_an_adapter_beside_a_model_does_not_hide_it(tmp_path: Path) -> None:
    both = tmp_path / "hf"
    shutil.copytree(HF, both)
    save_file(some("lora_A.weight"), both / "adapter_model.safetensors")
    (both / "adapter_config.json").write_text(json.dumps(ADAPTER))
    with ckpt_convert.open_checkpoint(both) as checkpoint:
        assert (checkpoint.format, checkpoint.family) == ("hf", "llama")


# --- training states ------------------------------------------------------------------------------------------------


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    module = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return module, optimizer


def test_what_a_trainer_leaves_beside_its_weights(tmp_path: Path) -> None:
    _, optimizer = trained()
    generator = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict(), tmp_path / "scheduler.pt")
    torch.save(generator, tmp_path / "rng_state.pth")
    states = optimizer.state_dict()["state"]
    expected = {f"state.{n}.{key}": value for n, state in states.items() for key, value in state.items()}
    checkpoint = assert_unknown(tmp_path, {**expected, "cpu": generator["cpu"]})
    assert {file.name for file in checkpoint.files} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert any("scheduler.pt" in notice and "step_size (int)" in notice for notice in checkpoint.notices)
    assert_unknown(tmp_path / "optimizer.pt", expected)


def test_recipe_states_and_lightning_checkpoints(tmp_path: Path) -> None:
    module, optimizer = trained()
    recipe = {"optimizer": optimizer.state_dict(), "seed": 1, "epochs_run": 2, "max_steps_per_epoch": None}
    torch.save(recipe, tmp_path / "recipe_state.pt")
    with open_identified(tmp_path / "recipe_state.pt") as checkpoint:
        assert "optimizer.state.1.exp_avg" in checkpoint.tensors
        assert checkpoint.files[0].header.objects["epochs_run"] == "int"
    lightning = {
        "pytorch-lightning_version": "2.4.0", "epoch": 1, "state_dict": module.state_dict(), "loops": {"fit_loop": {}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"dirpath": Path("x"), "best": torch.tensor(1.0)}},
        "optimizer_states": [optimizer.state_dict()], "hparams_name": "kwargs",
    }  # fmt: skip
    torch.save(lightning, tmp_path / "last.ckpt")
    with open_identified(tmp_path / "last.ckpt") as checkpoint:
        assert bits(Checkpoint(checkpoint)["state_dict.weight"].torch()) == bits(module.weight)
        assert checkpoint.tensors["optimizer_states.0.state.0.exp_avg"].shape == (3, 4)
        assert not any("nothing was executed" in notice for notice in checkpoint.notices)


def test_objects_of_other_classes_are_named_and_the_file_is_not_converted(tmp_path: Path) -> None:
    meta = tmp_path / "meta"
    shutil.copytree(GOLDEN / "llama" / "meta-mp1", meta)
    state = torch.load(meta / "consolidated.00.pth", weights_only=True)
    torch.save({**state, "module": torch.nn.Linear(2, 2)}, meta / "consolidated.00.pth")
    with open_identified(meta) as checkpoint:
        assert checkpoint.files[0].header.foreign == ("torch.nn.modules.linear.Linear",)
        assert bits(Checkpoint(checkpoint)["norm.weight"].torch()) == bits(state["norm.weight"])
        assert checkpoint.tensors["module.weight"].shape == (2, 2)
        (notice,) = [notice for notice in checkpoint.notices if "asks for objects" in notice]
        assert "torch.nn.modules.linear.Linear" in notice
    with pytest.raises(UnsafeFileError, match=r"consolidated\.00\.pth.*torch\.nn\.modules\.linear\.Linear"):
        ckpt_convert.convert_checkpoint(meta, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


# --- what is nothing ------------------------------------------------------------------------------------------------


def test_the_way_to_files_that_lie_deeper(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "step-10"
    folder.mkdir(parents=True)
    with pytest.raises(CheckpointNotFoundError, match="has no weight files"):
        ckpt_convert.open_checkpoint(tmp_path / "run")
    (folder / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointNotFoundError, match="step-10"):
        ckpt_convert.open_checkpoint(tmp_path / "run")


def test_keys_that_say_too_little(tmp_path: Path) -> None:
    for name, tensors, said in (
        ("both", some("tok_embeddings.weight"), "more than one format"),
        ("none", {}, "no format"),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        assert said in assert_unknown(tmp_path / f"{name}.safetensors", tensors).why


def test_hidden_files_are_no_part_of_it(tmp_path: Path) -> None:
    save_file(some("a", "b"), tmp_path / "x.ckpt.safetensors")
    save_file(some("c"), tmp_path / ".x.safetensors")
    assert_unknown(tmp_path, some("a", "b"))


def test_an_adapter_that_is_said_to_be_something_else(tmp_path: Path) -> None:
    shutil.copy(HF / "config.json", tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file(some("a"), tmp_path / "adapter_model.safetensors")
    with ckpt_convert.open_checkpoint(tmp_path / "adapter_model.safetensors", format="hf") as checkpoint:
        assert checkpoint.format == "hf"


def test_a_damaged_file_among_others_is_an_error_that_names_it(tmp_path: Path) -> None:
    save_file(some("a"), tmp_path / "a.safetensors")
    (tmp_path / "b.pt").write_bytes(b"PK\3\4 and then nothing")
    with pytest.raises(CorruptFileError, match=r"b\.pt"):
        ckpt_convert.open_checkpoint(tmp_path)


def test_a_file_of_unknown_format_is_not_converted(tmp_path: Path) -> None:
    save_file(some("a"), tmp_path / "a.safetensors")
    with pytest.raises(AmbiguousFormatError, match="`from_format=`"):
        ckpt_convert.convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "out", to="hf")
