"""Adapters through the whole checkpointer: what PEFT and transformers load is the model that was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from ckpt_convert import AdapterConfig, Checkpointer, CkptConvertError, CorruptFileError, UsageError, merge_adapter
from ckpt_convert.checkpoint.locate import locate_checkpoint
from recipes.native_llama import NativeLlama, add_lora
from tests.helpers import assert_same, bits, edit_json, sums
from tests.servers.hub import FakeHub

TARGETS = ("q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3")
TOKENS = torch.arange(24).reshape(2, 12) * 5 % 64


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=6,
        vocab_size=64,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    path = tmp_path_factory.mktemp("source")
    model.save_pretrained(path, max_shard_size="40KB")
    return path


def trained(source: Path, output: Path, *, dora: bool = False, steps: int = 3, **options: Any) -> NativeLlama:
    """Train an adapter for some steps and save each of them; returns the model as it then is."""
    torch.manual_seed(1)
    model = NativeLlama.from_config(source / "config.json")
    config = AdapterConfig(4, 8.0, use_dora=dora)
    with Checkpointer(source, output, adapter=config, save_every=1, **options) as checkpointer:
        checkpointer.load_model(model)
        add_lora(model, 4, 8.0, TARGETS, dora=dora)
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
        checkpointer.resume(model=model, optimizer=optimizer)
        while checkpointer.progress.step < steps:
            logits = model(TOKENS)
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            checkpointer.step()
    return model


def logits_of(model: Callable[..., Any]) -> torch.Tensor:
    with torch.no_grad():
        found = model(TOKENS)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_peft_loads_every_step_and_gives_the_logits_of_the_training_model(
    source: Path, tmp_path: Path, dora: bool, asynchronous: bool
) -> None:
    model = trained(source, tmp_path, dora=dora, asynchronous=asynchronous)
    base = transformers.LlamaForCausalLM.from_pretrained(source)
    before = logits_of(base)
    found = peft.PeftModel.from_pretrained(base, tmp_path / "step_3")
    torch.testing.assert_close(logits_of(found), logits_of(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, logits_of(model), atol=0.1)
    assert sorted(path.name for path in (tmp_path / "step_3").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "ckpt_convert",
        "training_state",
    ]


def test_transformers_loads_a_step_with_the_base_that_it_names(source: Path, tmp_path: Path) -> None:
    model = trained(source, tmp_path)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "latest")
    torch.testing.assert_close(logits_of(found), logits_of(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_merged_weights_lie_beside_the_adapter_in_the_sources_files(
    source: Path, tmp_path: Path, dora: bool, asynchronous: bool
) -> None:
    model = trained(source, tmp_path, dora=dora, merged=True, asynchronous=asynchronous)
    merged = tmp_path / "step_3" / "merged"
    found, info = transformers.LlamaForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits_of(found), logits_of(model), rtol=1e-4, atol=1e-5)
    assert sums(merged).keys() == sums(source).keys()


@pytest.mark.parametrize("dora", [False, True])
def test_the_adapters_files_merge_to_the_same_weights(source: Path, tmp_path: Path, dora: bool) -> None:
    trained(source, tmp_path, dora=dora, merged=True)
    merge_adapter(source, tmp_path / "step_3", tmp_path / "again", verify=True)
    assert sums(tmp_path / "again") == sums(tmp_path / "step_3" / "merged")


def test_the_base_is_not_changed_by_merging(source: Path, tmp_path: Path) -> None:
    model = trained(source, tmp_path, merged=True)
    expected = Checkpointer(source, tmp_path / "other").load_state_dict("native")
    state = {key: tensor for key, tensor in model.state_dict().items() if "lora" not in key}
    assert_same(state, expected)


def test_a_resumed_run_gives_the_same_adapter(source: Path, tmp_path: Path) -> None:
    whole = trained(source, tmp_path / "whole", steps=6, dora=True)
    trained(source, tmp_path / "stopped", steps=4, dora=True)
    resumed = trained(source, tmp_path / "stopped", steps=6, dora=True)
    assert_same(resumed.state_dict(), whole.state_dict())
    files = [tmp_path / run / "step_6" / "adapter_model.safetensors" for run in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_resume_loads_the_base_as_well_where_nobody_did(source: Path, tmp_path: Path) -> None:
    model = trained(source, tmp_path, dora=True)
    other = NativeLlama.from_config(source / "config.json")
    add_lora(other, 4, 8.0, TARGETS, dora=True)
    checkpointer = Checkpointer(source, tmp_path, adapter=AdapterConfig(4, 8.0, use_dora=True))
    checkpointer.resume(model=other, weights_only=True)
    assert_same(other.state_dict(), model.state_dict())


def test_an_adapter_can_be_left_out(source: Path, tmp_path: Path) -> None:
    trained(source, tmp_path)
    other = NativeLlama.from_config(source / "config.json")
    add_lora(other, 4, 8.0, TARGETS)
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    checkpointer = Checkpointer(source, tmp_path, adapter=AdapterConfig(4, 8.0))
    checkpointer.resume(model=other, exclude=["model", "optimizer"])
    assert_same(other.state_dict(), before)


def test_a_damaged_adapter_is_passed_over(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(source, tmp_path, steps=2)
    file = tmp_path / "step_2" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    checkpointer = Checkpointer(source, tmp_path, adapter=AdapterConfig(4, 8.0))
    assert checkpointer.newest().step == 1  # type: ignore[union-attr]
    assert "adapter_model.safetensors: was edited or damaged" in caplog.text
    with pytest.raises(CorruptFileError, match=r"adapter_model\.safetensors"):
        checkpointer.resume(model=NativeLlama.from_config(source / "config.json"), from_=2)


def test_the_adapter_alone(source: Path, tmp_path: Path) -> None:
    trained(source, tmp_path, contents="adapter")
    names = {path.name for path in (tmp_path / "step_3").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "ckpt_convert"}


def test_the_config_is_what_peft_writes(source: Path, tmp_path: Path) -> None:
    trained(source, tmp_path)
    said = json.loads((tmp_path / "step_1" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["use_dora"]) == (4, 8, False)
    assert said["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert said["base_model_name_or_path"] == str(source)


def test_the_base_is_named_as_it_was_given(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like PEFT: a path stays the one that was given, relative or not, and a name in the config is not taken."""
    copy = tmp_path / "base"
    shutil.copytree(source, copy)
    edit_json(copy / "config.json", _name_or_path="org/what-it-was-made-from")
    monkeypatch.chdir(tmp_path)
    for given in ("base", copy):
        output = tmp_path / f"run-{len(str(given))}"
        trained(Path(given), output, steps=1)
        said = json.loads((output / "step_1" / "adapter_config.json").read_text())
        assert said["base_model_name_or_path"] == str(given)


@pytest.mark.parametrize("cached", [False, True])
def test_a_base_of_the_hub_is_named_by_its_repository(cached: bool, source: Path, hub: FakeHub, tmp_path: Path) -> None:
    """On the Hub or in its cache, whose path no other machine has."""
    hub.add("org/name", {file.name: file.read_bytes() for file in source.iterdir()})
    place = locate_checkpoint("org/name", cache=cached)
    assert place.is_local == cached
    model = NativeLlama.from_config(source / "config.json")
    with Checkpointer("org/name", tmp_path / "run", adapter=AdapterConfig(4, 8.0)) as checkpointer:
        checkpointer.load_model(model)
        add_lora(model, 4, 8.0, TARGETS)
        checkpointer.register(model=model)
        checkpointer.save()
    said = json.loads((tmp_path / "run" / "step_0" / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["revision"]) == ("org/name", None)


def test_a_model_that_peft_wraps_is_saved_as_peft_does(source: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(source), config)
    with Checkpointer(source, tmp_path / "ours", model_format="hf", adapter=config) as checkpointer:
        checkpointer.register(model=model)
        checkpointer.step()
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        safetensors.torch.load_file(tmp_path / at / "adapter_model.safetensors") for at in ("ours/step_1", "theirs")
    )
    assert_same(ours, theirs)


def test_pefts_adapter_comes_into_the_training_layout(source: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"], use_dora=True)
    theirs = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(source), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            nn.init.uniform_(parameter, 0.2, 0.9)
    theirs.save_pretrained(tmp_path / "theirs")
    model = NativeLlama.from_config(source / "config.json")
    checkpointer = Checkpointer(source, tmp_path / "run", adapter=config)
    checkpointer.load_model(model)
    add_lora(model, 4, 8.0, ("q_proj", "k_proj", "w2"), dora=True)
    assert checkpointer.load_adapter(tmp_path / "theirs", model) == 3 * 3 * 2
    torch.testing.assert_close(logits_of(model), logits_of(theirs), rtol=1e-4, atol=1e-5)


def test_base_weights_that_are_trained_are_refused(source: Path, tmp_path: Path) -> None:
    model = NativeLlama.from_config(source / "config.json")
    add_lora(model, 4, 8.0, TARGETS)
    model.norm.weight.requires_grad_(True) if hasattr(model.norm, "weight") else model.norm.scale.requires_grad_(True)
    checkpointer = Checkpointer(source, tmp_path, adapter=AdapterConfig(4, 8.0))
    with pytest.raises(UsageError, match=r"(?s)modules_to_save:.*norm\.scale"):
        checkpointer.register(model=model)


def test_another_rank_than_the_config_says_is_refused(source: Path, tmp_path: Path) -> None:
    model = NativeLlama.from_config(source / "config.json")
    add_lora(model, 4, 8.0, TARGETS)
    with pytest.raises(CkptConvertError, match="rank 5"):
        Checkpointer(source, tmp_path, adapter=AdapterConfig(5, 8.0)).register(model=model)


@pytest.mark.parametrize("options", [{"contents": "adapter"}, {"merged": True}])
def test_adapter_options_without_an_adapter_are_refused(source: Path, tmp_path: Path, options: Any) -> None:
    with pytest.raises(UsageError, match="there is no adapter"):
        Checkpointer(source, tmp_path, **options)


def test_saving_leaves_the_model_as_it_is(source: Path, tmp_path: Path) -> None:
    model = NativeLlama.from_config(source / "config.json")
    with Checkpointer(source, tmp_path, adapter=AdapterConfig(4, 8.0), merged=True) as checkpointer:
        checkpointer.load_model(model)
        add_lora(model, 4, 8.0, TARGETS)
        before = {key: (id(one), bits(one)) for key, one in model.state_dict(keep_vars=True).items()}
        checkpointer.register(model=model)
        checkpointer.step()
        checkpointer.save()
    assert {key: (id(one), bits(one)) for key, one in model.state_dict(keep_vars=True).items()} == before
