"""What a format has no place for although it changes what a model computes: never lost without a word.

torch.distributed.checkpoint loads what torchtitan would, with every key that its models have.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import ckpt_convert
from ckpt_convert import Checkpointer
from tests.command import run
from tests.helpers import GOLDEN, Tensors, assert_same, bits, read_safetensors, sums

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

EXPERTS = ["deepseek_v3", "gpt_oss", "qwen3_moe", "qwen3_moe_dense"]
"""Golden mixtures of experts in torchtitan's layout: what its adapters make of Hugging Face's."""

BIAS = "layers.{}.moe.expert_bias_E"


def hf(case: str) -> Path:
    return GOLDEN / case / "hf"


def in_memory(case: str) -> Tensors:
    """Every tensor of torchtitan's model: those of its adapter, and the buffer beside each router (models/common/moe.py
    of torchtitan 0.3.0, persistent, float32, zeros)."""
    tensors = read_safetensors(GOLDEN / case / "torchtitan.safetensors")
    for key in [key for key in tensors if key.endswith(".moe.router.gate.weight")]:
        tensors.setdefault(key.replace("router.gate.weight", "expert_bias_E"), torch.zeros(len(tensors[key])))
    return tensors


def save(tensors: Tensors, directory: Path) -> Path:
    dcp.state_dict_saver.save(dict(tensors), checkpoint_id=directory, no_dist=True)
    return directory


def trained(case: str, directory: Path) -> tuple[Path, Tensors]:
    """A checkpoint of torchtitan's whose biases were trained."""
    tensors = in_memory(case)
    for key in [key for key in tensors if key.endswith("expert_bias_E")]:
        tensors[key] = torch.linspace(-1, 1, len(tensors[key]))
    return save(tensors, directory), tensors


@pytest.mark.parametrize("case", EXPERTS)
def test_torchtitan_finds_every_key_that_its_model_has(case: str, tmp_path: Path) -> None:
    """Its loader takes nothing partial: a missing key, or another dtype or shape, raises."""
    ckpt_convert.convert_checkpoint(hf(case), tmp_path / "titan", to="torchtitan", verify=True)
    wanted = in_memory(case)
    found = {key: torch.full_like(tensor, -1) for key, tensor in wanted.items()}
    dcp.state_dict_loader.load(found, checkpoint_id=tmp_path / "titan", no_dist=True)
    assert_same(found, wanted)
    assert dcp.FileSystemReader(tmp_path / "titan").read_metadata().state_dict_metadata.keys() == wanted.keys()
    report = ckpt_convert.convert_checkpoint(tmp_path / "titan", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(hf(case))
    assert not [text for text in report.notices if "tokenizer" not in text]


@pytest.mark.parametrize("case", ["gpt_oss", "qwen3_moe"])
def test_a_trained_bias_that_hf_has_no_place_for_is_refused(case: str, tmp_path: Path) -> None:
    source, tensors = trained(case, tmp_path / "titan")
    counts = {key: int(one.count_nonzero()) for key, one in tensors.items() if key.endswith("expert_bias_E")}
    words = ("torchtitan-to-hf", source, tmp_path / "hf", "--config", hf(case) / "config.json", "--verify")
    refused = run(*words)
    assert refused.returncode == 1
    for key, count in counts.items():
        assert f"{key} ({count})" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["titan"]
    accepted = run(*words, "--allow-loss", "--json")
    assert accepted.returncode == 0, accepted.stderr
    assert sorted(json.loads(accepted.stdout)["drops"]) == sorted(counts)
    assert "as accepted" in accepted.stderr
    assert_same(read_safetensors(tmp_path / "hf"), read_safetensors(hf(case)))
    # The record has it for the way back.
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "again", to="torchtitan", verify=True)
    found = {key: torch.full_like(tensor, -1) for key, tensor in tensors.items()}
    dcp.state_dict_loader.load(found, checkpoint_id=tmp_path / "again", no_dist=True)
    assert_same(found, tensors)


def test_a_bias_of_zeros_is_no_loss(tmp_path: Path) -> None:
    config = hf("qwen3_moe") / "config.json"
    report = ckpt_convert.convert_checkpoint(
        save(in_memory("qwen3_moe"), tmp_path / "titan"), tmp_path / "hf", to="hf", config=config, verify=True
    )
    assert not [text for text in report.notices if "tokenizer" not in text]
    assert_same(read_safetensors(tmp_path / "hf"), read_safetensors(hf("qwen3_moe")))
    same = run("diff", tmp_path / "titan", tmp_path / "hf")
    assert same.returncode == 0, same.stdout


def test_state_dicts_in_memory_too(tmp_path: Path) -> None:
    config = json.loads((hf("gpt_oss") / "config.json").read_text())
    tensors = in_memory("gpt_oss")
    made = ckpt_convert.convert_state_dict(read_safetensors(hf("gpt_oss")), config, source="hf", target="torchtitan")
    assert isinstance(made, dict)
    assert_same(made, tensors)
    assert_same(
        dict(ckpt_convert.convert_state_dict(tensors, config, source="torchtitan", target="hf")),  # type: ignore[arg-type]
        read_safetensors(hf("gpt_oss")),
    )
    tensors[BIAS.format(1)][2] = 0.5
    with pytest.raises(ckpt_convert.LossyConversionError) as caught:
        ckpt_convert.convert_state_dict(tensors, config, source="torchtitan", target="hf")
    assert caught.value.tensors == {BIAS.format(1): 1}
    ckpt_convert.convert_state_dict(tensors, config, source="torchtitan", target="hf", allow_loss=True)


def test_diff_counts_what_one_side_computes_with_and_the_other_has_no_place_for(tmp_path: Path) -> None:
    source, tensors = trained("qwen3_moe", tmp_path / "titan")
    found = run("diff", source, hf("qwen3_moe"), "--json")
    assert found.returncode == 1
    document = json.loads(found.stdout)
    differing = {one["key_a"] for one in document["tensors"] if one["status"] != "same"}
    assert differing == {key for key in tensors if key.endswith("expert_bias_E")}
    assert not any("config determines" in text for text in document["notices"])


def test_diff_counts_optional_layers_that_are_on_one_side_only(tmp_path: Path) -> None:
    """The layers that predict further tokens: a checkpoint may lack them, but then it is not the same."""
    shutil.copytree(hf("deepseek_mtp"), tmp_path / "without")
    import safetensors.torch

    tensors = read_safetensors(hf("deepseek_mtp"))
    lost = {key for key in tensors if key.startswith(("model.layers.2.", "model.layers.3."))}
    for path in (tmp_path / "without").glob("model*"):
        path.unlink()
    kept = {key: tensor for key, tensor in tensors.items() if key not in lost}
    safetensors.torch.save_file(kept, tmp_path / "without" / "model.safetensors", {"format": "pt"})
    found = run("diff", hf("deepseek_mtp"), tmp_path / "without", "--json")
    assert found.returncode == 1
    assert {one["key_a"] for one in json.loads(found.stdout)["tensors"] if one["status"] == "only_a"} == lost


def test_a_checkpoint_without_the_buffer_comes_back_without_it(tmp_path: Path) -> None:
    source = save(read_safetensors(GOLDEN / "qwen3_moe" / "torchtitan.safetensors"), tmp_path / "titan")
    ckpt_convert.convert_checkpoint(source, tmp_path / "hf", to="hf", config=hf("qwen3_moe") / "config.json")
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="torchtitan", verify=True)
    assert sums(tmp_path / "back") == sums(source)


@pytest.mark.parametrize("contents", ["full", "weights"])
def test_a_training_run_saves_the_step_and_keeps_the_bias(
    contents: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = BIAS.format(0)
    model = in_memory("qwen3_moe")
    options = {"model_format": "torchtitan", "contents": contents}
    with (
        caplog.at_level(logging.WARNING, "ckpt_convert"),
        Checkpointer(hf("qwen3_moe"), tmp_path / "run", **options) as checkpointer,  # type: ignore[arg-type]
    ):
        model[key].fill_(7)
        checkpointer.load_model(model)
        assert not model[key].any()  # the checkpoint computes without it
        checkpointer.resume(model=model)
        checkpointer.save()
        assert not caplog.messages
        model[key] += torch.tensor([0.0, 1.0, 0.0, -1.0, 0.0, 0.25])
        checkpointer.step()
        checkpointer.save()
    (said,) = [text for text in caplog.messages if "no place" in text]
    assert f"3 values of {key} (3)" in said
    assert ("training_state keeps them exact" if contents == "full" else "nothing keeps them exact") in said
    step = max((tmp_path / "run").glob("step_*"))
    assert sums(step).keys() >= sums(hf("qwen3_moe")).keys()
    if contents == "full":
        again = in_memory("qwen3_moe")
        with Checkpointer(hf("qwen3_moe"), tmp_path / "run", **options) as checkpointer:  # type: ignore[arg-type]
            checkpointer.resume(model=again)
        assert bits(again[key]) == bits(model[key])


# Names that torchtitan had before 0.3

FORMER = {
    "attention.qkv_linear.": "attention.",
    "lm_head.weight": "output.weight",
    "moe.routed_experts.inner_experts.": "moe.experts.",
    "expert_bias_E": "expert_bias",
}


def former(tensors: Tensors) -> Tensors:
    """The tensors under the names of torchtitan 0.2 (its state-dict adapters)."""
    out = {}
    for key, tensor in tensors.items():
        for today, before in FORMER.items():
            key = key.replace(today, before)
        out[key.rpartition("_E")[0] if key.endswith(("_EFD", "_EDF", "_EGD", "_EG", "_ED")) else key] = tensor
    return out


@pytest.mark.parametrize("case", ["llama", "llama_tied", "qwen3", *EXPERTS])
def test_runs_of_torchtitan_before_its_renaming_are_read(case: str, tmp_path: Path) -> None:
    """A Llama's names were Meta's: in a directory of torch.distributed.checkpoint they are torchtitan's."""
    tensors = former(in_memory(case))
    assert any(".attention.wq" in key or "output.weight" in key for key in tensors)
    source = save(tensors, tmp_path / "titan")
    config = hf(case) / "config.json"
    report = ckpt_convert.convert_checkpoint(source, tmp_path / "hf", to="hf", config=config, verify=True)
    assert report.source_format == "torchtitan"
    assert any("those of an earlier release" in text for text in report.notices)
    assert_same(read_safetensors(tmp_path / "hf"), read_safetensors(hf(case)))
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="torchtitan", verify=True)
    found = {key: torch.full_like(tensor, -1) for key, tensor in in_memory(case).items()}
    dcp.state_dict_loader.load(found, checkpoint_id=tmp_path / "back", no_dist=True)
    assert_same(found, in_memory(case))


def test_a_name_that_may_be_two_is_not_guessed(tmp_path: Path) -> None:
    """Both names of one tensor, with different values, are an error that names them."""
    tensors = in_memory("llama")
    tensors["output.weight"] = tensors["lm_head.weight"] + 1
    source = save(tensors, tmp_path / "titan")
    with pytest.raises(ckpt_convert.KeyMismatchError, match="are both lm_head"):
        ckpt_convert.convert_checkpoint(
            source, tmp_path / "hf", to="hf", config=hf("llama") / "config.json", from_format="torchtitan"
        )
