"""What files are that are not a model's weights alone: said by `inspect` and `verify`, and never counted as weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import transformers
from torch import nn

from ckpt_convert import AdapterConfig, Checkpointer
from recipes.native_llama import NativeLlama, add_lora
from tests.checkpointer.training import make_model, trainable
from tests.command import run
from tests.helpers import GOLDEN, read_safetensors

INDEX = "model.safetensors.index.json"


def trained() -> tuple[nn.Module, dict[str, Any]]:
    """A net of 178 parameters, and the state of an optimizer that has made a step."""
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return net, optimizer.state_dict()


def inspected(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("inspect", path, "--json").stdout)
    return found | {fact["label"]: fact["text"] for fact in found["facts"]}


def test_what_is_saved_beside_weights_is_no_parameter(tmp_path: Path) -> None:
    net, optimizer = trained()
    path = tmp_path / "train.pt"
    torch.save({"model": net.state_dict(), "optimizer": optimizer, "epoch": 3, "best": torch.tensor(0.5)}, path)
    found = inspected(path)
    assert found["parameters"] == 178
    assert found["kind"].startswith("training checkpoint")
    assert found["notices"] == ["train.pt: 17 entries are no tensors: optimizer (16 of its entries), epoch (int)"]
    assert "178 in 4 tensors; besides, 13 tensors that are no weights" in run("inspect", path).stdout

    torch.save(optimizer, tmp_path / "optimizer.pt")
    found = inspected(tmp_path / "optimizer.pt")
    assert (found["parameters"], found["kind"]) == (0, "optimizer state, without the weights that it is of")
    assert "optimizer state" in run("verify", tmp_path / "optimizer.pt").stdout

    lightning = {"pytorch-lightning_version": "2.1", "state_dict": net.state_dict(), "optimizer_states": [optimizer]}
    torch.save(lightning, tmp_path / "last.ckpt")
    found = inspected(tmp_path / "last.ckpt")
    assert found["parameters"] == 178
    assert found["kind"].startswith("Lightning checkpoint")

    # A weight is one, whatever it is called like.
    torch.save({"timestep.weight": torch.ones(3, 3), "scale": torch.ones(2), "step_embed.sum": torch.ones(4)}, path)
    assert inspected(path)["parameters"] == 15


def test_adapters_say_what_they_are(tmp_path: Path) -> None:
    names = {"lora_down.weight": torch.ones(4, 8), "lora_up.weight": torch.zeros(8, 4), "alpha": torch.tensor(4.0)}
    kohya = tmp_path / "kohya.safetensors"
    safetensors.torch.save_file({f"lora_unet_mid_block_attn.{name}": value for name, value in names.items()}, kohya)
    assert inspected(kohya)["kind"].startswith("LoRA of kohya's kind")
    assert run("verify", kohya, "--strict").returncode == 0

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    for name, adapter in (
        ("lora", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])),
        ("embedding", peft.LoraConfig(r=4, target_modules=["embed_tokens", "down_proj"])),
        ("oft", peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0)),
    ):
        peft.get_peft_model(transformers.LlamaForCausalLM(config), adapter).save_pretrained(tmp_path / name)
        fresh = run("verify", tmp_path / name, "--strict")
        assert fresh.returncode == 0, fresh.stdout
        assert "PEFT adapter" in fresh.stdout
    # What is zero from some point on, lora_A included, was not downloaded to its end.
    path = tmp_path / "lora" / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    assert "was not downloaded to its end" in " ".join(run("verify", tmp_path / "lora", "--strict").stdout.split())


def test_an_adapters_step_of_a_checkpointer_says_what_it_is_and_that_its_checksums_were_used(tmp_path: Path) -> None:
    source = trainable(tmp_path / "source")
    model: NativeLlama = make_model(source)
    with Checkpointer(source, tmp_path / "run", adapter=AdapterConfig(4, 8.0), save_every=1) as checkpointer:
        checkpointer.load_model(model)
        add_lora(model, 4, 8.0, ("q_proj", "v_proj"))
        optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
        checkpointer.resume(model=model, optimizer=optimizer)
        checkpointer.step()
    step = tmp_path / "run" / "step_1"
    said = run("verify", step)
    assert said.returncode == 0, said.stdout
    assert "PEFT adapter (LORA r=4" in said.stdout
    assert "unknown format" not in said.stdout
    assert "no checksums came with it" not in said.stdout
    weights = step / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    found = json.loads(run("verify", step, "--json").stdout)
    assert [finding["file"] for finding in found["findings"] if finding["severity"] == "error"] == [weights.name]


def test_a_pickled_module_is_one_finding_and_has_the_keys_of_its_state_dict(tmp_path: Path) -> None:
    net, _ = trained()
    path = tmp_path / "module.pt"
    torch.save(net, path)
    found = inspected(path)
    assert {tensor["key"] for tensor in found["tensors"]} == set(net.state_dict())
    assert found["kind"] == "a pickled object (torch.nn.modules.container.Sequential), not a state dict"
    (finding,) = json.loads(run("verify", path, "--json").stdout)["findings"]
    assert "asks for 'torch.nn.modules.container.Sequential' and 'torch.nn.modules.linear.Linear'" in finding["text"]


def test_a_number_beside_the_weights_is_passed_over(tmp_path: Path) -> None:
    tensors = read_safetensors(GOLDEN / "llama" / "hf")
    path = tmp_path / "best.safetensors"
    named = {f"state_dict.module.{key}": tensor for key, tensor in tensors.items()}
    safetensors.torch.save_file({**named, "best_val_loss": torch.tensor(0.25)}, path)
    config = ("--config", GOLDEN / "llama" / "hf" / "config.json")
    found = json.loads(run("inspect", path, "--json", *config).stdout)
    assert (found["format"], found["family"]) == ("hf", "llama")
    assert "skipped, as they are no weights: 1 tensor of best_val_loss" in found["notices"]
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    done = run("convert", path, tmp_path / "out", "--to", "native", "-q", *config)
    assert done.returncode == 0, done.stderr
    # A tensor that may be a weight is never passed over.
    safetensors.torch.save_file({**named, "best_val_loss": torch.ones(2)}, path)
    assert run("convert", path, tmp_path / "other", "--to", "native", "--from", "hf", *config).returncode == 3


def test_a_name_that_no_file_can_have_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "hf"
    path.mkdir()
    for file in (GOLDEN / "llama" / "hf").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "other.bin.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 200 + "é" * 40 + ".bin"}}))
    found = json.loads(run("verify", path, "--json").stdout)
    assert [(finding["check"], finding["file"]) for finding in found["findings"]] == [
        ("leftover", "other.bin.index.json")
    ]
    (path / "other.bin.index.json").unlink()
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "folder/" + "é" * 200 + ".safetensors"
    (path / INDEX).write_text(json.dumps(index))
    report = json.loads(run("verify", path, "--json").stdout)
    refused = [run("inspect", path).stderr, run("convert", path, tmp_path / "out", "--to", "native").stderr]
    for said in (report["findings"][0]["text"], *refused):
        assert "longer than the 255 bytes that file systems take" in " ".join(said.split())
        assert INDEX in said
    # The longest name that there can be is a name like any other.
    longest = "x" * (255 - len(".safetensors")) + ".safetensors"
    index["weight_map"] = dict.fromkeys(index["weight_map"], longest)
    safetensors.torch.save_file(read_safetensors(GOLDEN / "llama" / "hf"), tmp_path / "whole.safetensors")
    for file in path.glob("*.safetensors"):
        file.unlink()
    (tmp_path / "whole.safetensors").rename(path / longest)
    index["metadata"] = {}
    (path / INDEX).write_text(json.dumps(index))
    assert run("verify", path).returncode == 0
