"""What is said of a checkpoint that cannot be used as it is: one cause, the next command, never to remove weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.command import run
from tests.helpers import GOLDEN, edit_json, read_safetensors

INDEX = "model.safetensors.index.json"


def verdict(path: Path, *options: str) -> list[dict[str, str]]:
    """The findings, but for notes."""
    report = json.loads(run("verify", path, "--json", *options).stdout)
    return [finding for finding in report["findings"] if finding["severity"] != "note"]


def llama(into: Path, name: str = "llama") -> Path:
    shutil.copytree(GOLDEN / name / "hf", into)
    return into


# Sets of files


def resharded(into: Path) -> Path:
    """A whole set of three shards, and beside it the index of the four that lay there before."""
    source = llama(into)
    assert run("convert", source, into.with_name("three"), "--to", "hf", "--shards", "3", "-q").returncode == 0
    for file in source.glob("*.safetensors"):
        file.unlink()
    for file in into.with_name("three").glob("*.safetensors"):
        shutil.copy(file, source)
    return source


def test_the_only_weights_are_never_to_be_removed(tmp_path: Path) -> None:
    source = resharded(tmp_path / "source")
    (found,) = verdict(source)
    refused = [run("convert", source, tmp_path / "out", "--to", "hf"), run("inspect", source)]
    for said in (found["text"], *(" ".join(result.stderr.split()) for result in refused)):
        assert "model-00001-of-00003.safetensors to model-00003-of-00003.safetensors is a whole set" in said
        assert f"move what belongs to the other one aside (mkdir aside && mv {INDEX} aside/)" in said
        assert "remove it" not in said
    assert [result.returncode for result in refused] == [3, 3]
    (source / "aside").mkdir()
    (source / INDEX).rename(source / "aside" / INDEX)
    assert [finding["severity"] for finding in verdict(source)] == ["warning"]  # there is no index
    assert run("convert", source, tmp_path / "out", "--to", "hf", "-q").returncode == 0
    assert read_safetensors(tmp_path / "out").keys() == read_safetensors(GOLDEN / "llama" / "hf").keys()


def test_what_is_left_of_the_set_of_the_index_is_moved_with_it(tmp_path: Path) -> None:
    source = resharded(tmp_path / "source")
    left = "model-00002-of-00004.safetensors"
    shutil.copy(GOLDEN / "llama" / "hf" / left, source)
    (found,) = (finding for finding in verdict(source) if finding["check"] == "files")
    assert f"mv {INDEX} {left} aside/" in found["text"]
    assert "3 of the 4 files" in found["text"]


def test_a_set_of_another_kind_beside_an_index_without_files_is_a_choice(tmp_path: Path) -> None:
    source = llama(tmp_path / "source")
    assert (
        run("convert", source, tmp_path / "bin", "--to", "hf", "--container", "bin", "--shards", "2", "-q").returncode
        == 0
    )
    shutil.copy(source / INDEX, tmp_path / "bin" / INDEX)
    shutil.rmtree(tmp_path / "bin" / "ckpt_convert")
    (found,) = verdict(tmp_path / "bin")
    assert "pytorch_model-00001-of-00002.bin to pytorch_model-00002-of-00002.bin is a whole set" in found["text"]
    (tmp_path / "bin" / INDEX).unlink()
    assert verdict(tmp_path / "bin") == []


def test_a_missing_shard_beside_a_stray_one_is_said_and_the_stray_one_is_kept(tmp_path: Path) -> None:
    source = llama(tmp_path / "source")
    (source / "model-00002-of-00004.safetensors").rename(source / "model-00002-of-00003.safetensors")
    report = json.loads(run("verify", source, "--json").stdout)
    texts = [finding["text"] for finding in report["findings"]]
    assert any("model-00002-of-00004.safetensors is missing" in text for text in texts)
    assert any("keep what is here" in text for text in texts)
    assert not any("remove" in text for text in texts)
    # The nearest legitimate advice stays: all that the index names is there, and something else lies beside it.
    whole = llama(tmp_path / "whole")
    shutil.copy(whole / "model-00002-of-00004.safetensors", whole / "model-00002-of-00003.safetensors")
    (found,) = verdict(whole)
    assert "stale shard" in found["text"]


def test_two_sets_without_an_index_say_which_is_whole(tmp_path: Path) -> None:
    source = resharded(tmp_path / "source")
    (source / INDEX).unlink()
    shutil.copy(GOLDEN / "llama" / "hf" / "model-00001-of-00004.safetensors", source)
    (found,) = (finding for finding in verdict(source) if finding["check"] == "shards")
    assert "the set of 3 is whole" in found["text"]
    assert "remove" not in found["text"]


# One cause


def test_an_adapter_that_was_not_merged_is_one_finding(tmp_path: Path) -> None:
    source = llama(tmp_path / "source")
    tensors = read_safetensors(source)
    for file in (*source.glob("*.safetensors"), source / INDEX):
        file.unlink()
    for layer in range(3):
        module = f"model.layers.{layer}.self_attn.q_proj"
        tensors[f"{module}.base_layer.weight"] = tensors.pop(f"{module}.weight")
        tensors[f"{module}.lora_A.default.weight"] = torch.ones(2, 72)
        tensors[f"{module}.lora_B.default.weight"] = torch.zeros(72, 2)
    for prefix in ("", "base_model.model."):
        named = {prefix + key: tensor for key, tensor in tensors.items()}
        safetensors.torch.save_file(named, source / "model.safetensors")
        (found,) = verdict(source)
        assert found["check"] == "keys"
        refused = run(
            "inspect" if prefix else "convert", source, *(() if prefix else (tmp_path / "out", "--to", "native"))
        )
        for said in (found["text"], " ".join((refused.stdout + refused.stderr).split())):
            assert "model.merge_and_unload().save_pretrained(DIR)" in said
            assert f"{prefix}model.layers.0.self_attn.q_proj.base_layer.weight" in said
            assert "tie_word_embeddings" not in said
    # Of no known family it is what it is: its keys are taken as they are.
    edit_json(source / "config.json", model_type="strange", architectures=["StrangeForCausalLM"])
    assert run("convert", source, tmp_path / "out", "--to", "hf", "-q").returncode == 0


def test_one_ranks_slices_are_not_to_be_saved_as_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "model_world_size_2_rank_0.pt"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.save({"a.weight": distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)])}, path)
    finally:
        dist.destroy_process_group()
    (found,) = verdict(path)
    shown, refused = run("inspect", path), run("convert", path, tmp_path / "out", "--to", "native")
    assert refused.returncode == 3
    for said in (found["text"], " ".join(shown.stdout.split()), refused.stderr):
        assert "what one rank has of tensors that are distributed over several (DTensor)" in said
        assert "save a plain state dict" not in said
    assert "torch.distributed.checkpoint" in found["text"]


def test_a_directory_of_a_trainer_whose_weights_are_sharded_says_where_they_are(tmp_path: Path) -> None:
    source = llama(tmp_path / "source")
    tensors = read_safetensors(source)
    run_directory = tmp_path / "checkpoint-10"
    weights = run_directory / "pytorch_model_fsdp_0"
    dcp.save({"model": tensors}, checkpoint_id=weights, no_dist=True)
    dcp.save({"optimizer": {"a": torch.ones(2)}}, checkpoint_id=run_directory / "optimizer_0", no_dist=True)
    shutil.copy(source / "config.json", run_directory)
    torch.save({}, run_directory / "scheduler.pt")
    torch.save({"seed": 1}, run_directory / "rng_state_0.pth")
    config = run_directory / "config.json"
    for command in (("verify", run_directory), ("inspect", run_directory)):
        said = run(*command)
        assert said.returncode == 3
        assert f"there are some in {weights}: give that, with --config {config}" in " ".join(said.stderr.split())
    assert f"--config {config}" in run("verify", weights).stdout
    assert f"--config {config}" in run("convert", weights, tmp_path / "out", "--to", "native").stderr
    assert run("verify", weights, "--config", config, "-q").returncode == 0
    options = ("--to", "hf", "--container", "safetensors", "--config", config, "-q")
    assert run("convert", weights, tmp_path / "out", *options).returncode == 0
    assert read_safetensors(tmp_path / "out").keys() == tensors.keys()


def test_a_resized_vocabulary_has_a_way_out(tmp_path: Path) -> None:
    source = llama(tmp_path / "source")
    for file in source.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        for key in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
            tensors[key] = torch.cat([tensors[key], tensors[key][:8]])
        safetensors.torch.save_file(tensors, file, {"format": "pt"})
    (source / INDEX).write_text((source / INDEX).read_text().replace("total_", "stated_"))
    (found,) = verdict(source)
    assert "vocab_size is 56 in config.json" in found["text"]
    assert "set it to 64 if the vocabulary was resized" in found["text"]
    refused = run("convert", source, tmp_path / "out", "--to", "native")
    assert "give a corrected config with --config" in refused.stderr
    shutil.copy(source / "config.json", tmp_path / "config.json")
    edit_json(tmp_path / "config.json", vocab_size=64)
    done = run("convert", source, tmp_path / "out", "--to", "native", "--config", tmp_path / "config.json", "-q")
    assert done.returncode == 0, done.stderr
    # Half a resize cannot be put right by a config.
    output = source / json.loads((source / INDEX).read_text())["weight_map"]["lm_head.weight"]
    tensors = safetensors.torch.load_file(output)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:56].contiguous()
    safetensors.torch.save_file(tensors, output, {"format": "pt"})
    (found,) = verdict(source)
    assert "model.embed_tokens.weight has 64 rows, but lm_head.weight has 56" in found["text"]
    assert "model.resize_token_embeddings(N)" in found["text"]
