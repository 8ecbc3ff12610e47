"""Loaded and saved without training: every file is the source's, bit for bit, whatever the format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from ckpt_convert import Checkpointer
from ckpt_convert.errors import CkptConvertError, UsageError
from tests.checkpointer.training import make_model
from tests.helpers import GOLDEN, assert_same, read_meta, read_safetensors, sums

BESIDE = {
    "tokenizer.json": b'{"version": "1.0"}\n',
    "tokenizer_config.json": b'{"model_max_length":  4096}',
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": "{{ messages }} – ".encode(),
    "README.md": b"# A model card\n",
    "LICENSE": b"none\n",
    "modeling_extra.py": b"# code that comes along\n",
}
"""Files beside the weights, with bytes that no JSON writer would give."""


def with_files_beside(source: Path) -> Path:
    for name, data in BESIDE.items():
        (source / name).write_bytes(data)
    return source


def load_and_save(source: Any, output_dir: Path, model: Any, **options: Any) -> dict[str, str]:
    """The sha256 of what is saved of a model that was loaded, by file."""
    with Checkpointer(source, output_dir, **{"save_every": 1, "keep_last": 1, **options}) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.register(model=model)
        checkpointer.step()
        checkpointer.wait()
        found = sums(output_dir / "step_1")
    return {name: one for name, one in found.items() if not name.startswith("training_state/")}


def native_of(case: str) -> dict[str, torch.Tensor]:
    """Empty tensors with the keys and shapes that torchtune gives this model."""
    tensors = read_safetensors(GOLDEN / case / "native.safetensors")
    return {key: torch.full_like(tensor, float("nan")) for key, tensor in tensors.items()}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("case", ["llama", "llama2", "llama_tied"])
def test_huggingface_safetensors(case: str, asynchronous: bool, tmp_path: Path) -> None:
    source = with_files_beside(shutil.copytree(GOLDEN / case / "hf", tmp_path / "source"))
    model = make_model(source)
    assert load_and_save(source, tmp_path / "out", model, asynchronous=asynchronous) == sums(source)


@pytest.mark.parametrize(
    "case",
    ["llama", "llama2", "llama_tied", "mistral", "gemma2", "phi3", "qwen2", "qwen3", "llama_reward", "mistral_reward"],
)
def test_a_state_dict_instead_of_a_module(case: str, tmp_path: Path) -> None:
    model = native_of(case)
    assert load_and_save(GOLDEN / case / "hf", tmp_path / "out", model) == sums(GOLDEN / case / "hf")
    assert_same(model, read_safetensors(GOLDEN / case / "native.safetensors"))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("case", ["llama", "llama_tied"])
def test_meta_tensor_parallel(case: str, degree: int, asynchronous: bool, tmp_path: Path) -> None:
    source = shutil.copytree(GOLDEN / case / f"meta-mp{degree}", tmp_path / "source")
    (source / "tokenizer.model").write_bytes(b"gnkg 0\n")
    model = native_of(case)
    assert load_and_save(source, tmp_path / "out", model, asynchronous=asynchronous) == sums(source)
    assert_same(model, read_safetensors(GOLDEN / case / "native.safetensors"))
    for found, expected in zip(read_meta(tmp_path / "out" / "step_1"), read_meta(source), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_native(asynchronous: bool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copyfile(GOLDEN / "llama" / "native.safetensors", source / "model.safetensors")
    config = GOLDEN / "llama" / "hf" / "config.json"
    found = load_and_save(
        source, tmp_path / "out", native_of("llama"), asynchronous=asynchronous, source_format="native", config=config
    )
    assert {name: found.get(name) for name in sums(source)} == sums(source)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_what_transformers_saves(tied: bool, sharded: bool, tmp_path: Path) -> None:
    source = with_files_beside(saved_by_transformers(tmp_path / "source", tied, "60KB" if sharded else "5GB"))
    assert (len(list(source.glob("*.safetensors"))) > 1) == sharded
    assert load_and_save(source, tmp_path / "out", make_model(source)) == sums(source)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_torch_files(sharded: bool, asynchronous: bool, tmp_path: Path) -> None:
    source = with_files_beside(as_bin(saved_by_transformers(tmp_path / "safe", False, "60KB"), tmp_path / "s", sharded))
    assert load_and_save(source, tmp_path / "out", make_model(source), asynchronous=asynchronous) == sums(source)
    for file in source.glob("*.bin"):
        assert_same(torch.load(tmp_path / "out" / "step_1" / file.name), torch.load(file))


def test_tied_weights_that_both_lie_in_the_source(tmp_path: Path) -> None:
    source = shutil.copytree(GOLDEN / "llama_tied" / "hf", tmp_path / "source")
    tensors = read_safetensors(source)
    (source / "model.safetensors.index.json").unlink()
    for file in source.glob("*.safetensors"):
        file.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert load_and_save(source, tmp_path / "out", make_model(source)) == sums(source)


def test_shards_whose_names_follow_no_standard(tmp_path: Path) -> None:
    source = shutil.copytree(GOLDEN / "llama" / "hf", tmp_path / "source")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    for number, file in enumerate(sorted(source.glob("*.safetensors"))):
        file.rename(source / f"weights.part-{number}.safetensors")
        index["weight_map"] = {
            key: f"weights.part-{number}.safetensors" if name == file.name else name
            for key, name in index["weight_map"].items()
        }
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_and_save(source, tmp_path / "out", make_model(source)) == sums(source)


def test_a_list_of_the_source_s_files_in_any_order(tmp_path: Path) -> None:
    source = GOLDEN / "llama" / "hf"
    files = sorted(source.glob("*.safetensors"))
    shuffled = [str(files[3]), files[0], files[2], files[1]]
    assert load_and_save(shuffled, tmp_path / "out", make_model(source)) == sums(source)

    with pytest.raises(UsageError, match=r"model-00002-of-00004.* belongs to the checkpoint, but is not"):
        Checkpointer([files[0], files[2], files[3]], tmp_path / "other")
    with pytest.raises(CkptConvertError, match=r"nothing\.safetensors: no such file"):
        Checkpointer([*files, source / "nothing.safetensors"], tmp_path / "other")


def test_a_stale_shard_beside_the_index_is_neither_loaded_nor_saved(tmp_path: Path) -> None:
    source = shutil.copytree(GOLDEN / "llama" / "hf", tmp_path / "source")
    stale = {"model.norm.weight": torch.zeros(72)}
    safetensors.torch.save_file(stale, source / "model-00009-of-00009.safetensors")
    found = load_and_save(source, tmp_path / "out", make_model(source))
    assert found == sums(GOLDEN / "llama" / "hf")


def test_norms_are_not_swapped(tmp_path: Path) -> None:
    """All norms of a layer have the same shape: only values tell them apart."""
    model = make_model()
    with Checkpointer(GOLDEN / "llama" / "hf", tmp_path / "out") as checkpointer:
        checkpointer.load_model(model)
    theirs = read_safetensors(GOLDEN / "llama" / "hf")
    for number, layer in enumerate(model.layers):
        assert torch.equal(layer.sa_norm.scale, theirs[f"model.layers.{number}.input_layernorm.weight"])
        assert torch.equal(layer.mlp_norm.scale, theirs[f"model.layers.{number}.post_attention_layernorm.weight"])


def test_the_source_is_never_written(tmp_path: Path) -> None:
    source = shutil.copytree(GOLDEN / "llama" / "hf", tmp_path / "source")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in source.rglob("*")}
    load_and_save(source, tmp_path / "out", make_model(source))
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in source.rglob("*")} == before


def test_a_saved_step_is_a_source_as_good_as_the_first(tmp_path: Path) -> None:
    source = with_files_beside(shutil.copytree(GOLDEN / "llama" / "hf", tmp_path / "source"))
    load_and_save(source, tmp_path / "first", make_model(source))
    again = load_and_save(tmp_path / "first" / "step_1", tmp_path / "second", make_model(source))
    assert again == sums(source)


def saved_by_transformers(into: Path, tied: bool, shard: str) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=56,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(into, max_shard_size=shard)
    return into


def as_bin(source: Path, into: Path, sharded: bool) -> Path:
    """The same checkpoint as ``torch.save`` writes it: pytorch_model*.bin, and an index where there are several."""
    into.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(source / name, into / name)
    if not sharded:
        torch.save(read_safetensors(source), into / "pytorch_model.bin")
        return into
    index = json.loads((source / "model.safetensors.index.json").read_text())
    for file in source.glob("*.safetensors"):
        torch.save(safetensors.torch.load_file(file), into / bin_name(file.name))
    index["weight_map"] = {key: bin_name(name) for key, name in index["weight_map"].items()}
    (into / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return into


def bin_name(name: str) -> str:
    return name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
