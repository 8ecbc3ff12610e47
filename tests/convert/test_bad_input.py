"""Bad input is one clear error that names the file, the key, what was expected and found; nothing is written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckpt_convert
from ckpt_convert.errors import (
    AmbiguousFormatError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptFileError,
    InputError,
    KeyMismatchError,
    ShapeMismatchError,
    TiedWeightsError,
    UnsafeFileError,
    UnsupportedFamilyError,
    UsageError,
)
from tests.helpers import GOLDEN, edit_json, edit_manifest, write_manifest

Refused = Callable[..., str]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "llama" / "hf", tmp_path / "hf"))


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "llama" / "meta-mp2", tmp_path / "meta"))


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Convert, expect an error, and check that no output is left."""

    def check(source: Path, error: type[Exception], to: str = "meta", **options: Any) -> str:
        with pytest.raises(error) as caught:
            ckpt_convert.convert_checkpoint(source, tmp_path / "out", to=to, **options)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / ".out.partial").exists()
        return str(caught.value)

    return check


def edit_file(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_a_missing_shard(hf: Path, refused: Refused) -> None:
    (hf / "model-00002-of-00004.safetensors").unlink()
    message = refused(hf, CheckpointNotFoundError)
    assert "model-00002-of-00004.safetensors" in message
    assert "not there" in message


def test_a_stale_shard_is_not_used_and_is_named(hf: Path, tmp_path: Path) -> None:
    shutil.copy(hf / "model-00001-of-00004.safetensors", hf / "model-00001-of-00009.safetensors")
    report = ckpt_convert.convert_checkpoint(hf, tmp_path / "out", to="meta")
    assert any("not used: model-00001-of-00009.safetensors" in notice for notice in report.notices)
    assert report.tensors == 30


def test_index_and_files_that_contradict_each_other(hf: Path, refused: Refused) -> None:
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00004.safetensors"
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00004.safetensors"
    del index["weight_map"]["model.norm.weight"]
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(hf, KeyMismatchError)
    assert "lm_head.weight is in model-00004-of-00004.safetensors" in message
    assert "model.extra.weight is missing" in message
    assert (
        "model.norm.weight is in model-00004-of-00004.safetensors, but model.safetensors.index.json does not" in message
    )


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "C:x.bin", "a\nb"])
def test_an_index_that_leaves_the_directory(name: str, hf: Path, refused: Refused) -> None:
    shutil.copy(hf / "model-00001-of-00004.safetensors", hf.parent / "secret.safetensors")
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = name
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no plain name inside the directory" in refused(hf, UnsafeFileError)


def test_a_link_that_leaves_the_directory(hf: Path, refused: Refused) -> None:
    target = hf.parent / "elsewhere.safetensors"
    shutil.move(hf / "model-00001-of-00004.safetensors", target)
    (hf / "model-00001-of-00004.safetensors").symlink_to(target)
    assert "leaves the directory" in refused(hf, UnsafeFileError)


def test_a_side_file_that_links_out_is_not_copied(hf: Path, refused: Refused) -> None:
    (hf / "notes.txt").symlink_to("/etc/hostname" if Path("/etc/hostname").exists() else "/etc/passwd")
    assert "leaves the directory" in refused(hf, UnsafeFileError)


def test_missing_and_unexpected_keys_are_all_listed(hf: Path, refused: Refused) -> None:
    (hf / "model.safetensors.index.json").unlink()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_prj.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
        tensors["model.layers.7.self_attn.q_proj.weight"] = torch.zeros(72, 72)
        del tensors["model.embed_tokens.weight"]

    edit_file(hf / "model-00001-of-00004.safetensors", change)
    message = refused(hf, KeyMismatchError)
    assert "2 missing keys" in message
    assert "model.embed_tokens.weight [56, 72]" in message
    assert "2 unexpected keys" in message
    assert "nearest known key is model.layers.0.self_attn.q_proj.weight" in message
    assert "model.layers.7.self_attn.q_proj.weight [72, 72] in model-00001-of-00004.safetensors" in message
    assert "the config has no such layer" in message


def test_a_key_in_two_files(hf: Path, refused: Refused) -> None:
    (hf / "model.safetensors.index.json").unlink()
    edit_file(hf / "model-00001-of-00004.safetensors", lambda t: t.update({"lm_head.weight": torch.zeros(56, 72)}))
    message = refused(hf, KeyMismatchError)
    assert "lm_head.weight is in model-00001-of-00004.safetensors and in model-00004-of-00004.safetensors" in message


def test_shapes_that_disagree_with_the_config(hf: Path, refused: Refused) -> None:
    edit_json(hf / "config.json", num_key_value_heads=6, vocab_size=57)
    message = refused(hf, ShapeMismatchError)
    assert "model.layers.0.self_attn.k_proj.weight: expected [36, 72], found [24, 72]" in message
    assert "lm_head.weight: expected [57, 72], found [56, 72] in model-00004-of-00004.safetensors" in message
    assert "8 shapes that disagree with the config" in message


def test_a_layer_count_that_disagrees(hf: Path, refused: Refused) -> None:
    edit_json(hf / "config.json", num_hidden_layers=2)
    message = refused(hf, KeyMismatchError)
    assert "9 unexpected keys" in message
    assert "the config has no such layer" in message


def test_unknown_model_type(hf: Path, refused: Refused, tmp_path: Path) -> None:
    edit_json(hf / "config.json", model_type="llamb")
    message = refused(hf, UnsupportedFamilyError)
    assert "model_type 'llamb'" in message
    assert "`ckpt-convert formats` lists them" in message
    assert "`family=`" in message
    assert ckpt_convert.convert_checkpoint(hf, tmp_path / "out", to="meta", family="llama").family == "llama"


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"model_type": "llama"}', "\xff", '{"model_type": "llama", "hidden_size": "72"}']
)
def test_unreadable_config(content: str, hf: Path, refused: Refused) -> None:
    (hf / "config.json").write_bytes(content.encode("latin-1"))
    assert "config.json" in refused(hf, ConfigError)


def test_unreadable_index(hf: Path, refused: Refused) -> None:
    (hf / "model.safetensors.index.json").write_text('{"metadata": {}}')
    assert "has no weight_map" in refused(hf, CorruptFileError)


def test_no_config(hf: Path, refused: Refused) -> None:
    (hf / "config.json").unlink()
    message = refused(hf, ConfigError, from_format="hf")
    assert "config.json" in message
    assert "`config=`" in message


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_a_truncated_file(keep: int, hf: Path, meta: Path, refused: Refused) -> None:
    for source, name in ((hf, "model-00002-of-00004.safetensors"), (meta, "consolidated.01.pth")):
        data = (source / name).read_bytes()
        (source / name).write_bytes(data[:keep])
        assert name in refused(source, CorruptFileError, to="native")


def test_an_empty_directory_and_a_missing_path(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no weight files" in refused(tmp_path / "empty", CheckpointNotFoundError)
    assert "no such file" in refused(tmp_path / "nothing", CheckpointNotFoundError)


def test_the_weights_lie_one_folder_deeper(tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(GOLDEN / "llama" / "meta-mp1", tmp_path / "repo" / "original")
    assert str(tmp_path / "repo" / "original") in refused(tmp_path / "repo", CheckpointNotFoundError, to="hf")


def test_a_missing_rank(meta: Path, refused: Refused) -> None:
    (meta / "consolidated.00.pth").rename(meta / "consolidated.02.pth")
    assert "missing: consolidated.00.pth" in refused(meta, CheckpointNotFoundError, to="hf")


def test_the_last_rank_is_missing(meta: Path, refused: Refused) -> None:
    (meta / "consolidated.01.pth").unlink()
    refused(meta, InputError, to="hf")


def test_ranks_that_disagree(meta: Path, refused: Refused) -> None:
    tensors = torch.load(meta / "consolidated.01.pth", weights_only=True)
    tensors["layers.1.ffn_norm.weight"][3] += 1
    torch.save(tensors, meta / "consolidated.01.pth")
    message = refused(meta, TiedWeightsError, to="hf")
    assert "layers.1.ffn_norm.weight: rank 1 (consolidated.01.pth) and rank 0 (consolidated.00.pth) differ" in message


def test_a_key_that_one_rank_lacks(meta: Path, refused: Refused) -> None:
    tensors = torch.load(meta / "consolidated.01.pth", weights_only=True)
    del tensors["layers.1.ffn_norm.weight"]
    torch.save(tensors, meta / "consolidated.01.pth")
    assert "layers.1.ffn_norm.weight (on other ranks, but not on rank 1)" in refused(meta, KeyMismatchError, to="hf")


def test_two_consolidated_checkpoints(meta: Path, refused: Refused) -> None:
    shutil.copy(meta / "consolidated.00.pth", meta / "consolidated.pth")
    assert "several consolidated checkpoints" in refused(meta, AmbiguousFormatError, to="hf")


def test_params_that_no_family_knows(meta: Path, refused: Refused) -> None:
    (meta / "params.json").write_text('{"dim": 72, "n_layers": 3}')
    message = refused(meta, UnsupportedFamilyError, to="hf")
    assert "params.json" in message
    assert "`family=`" in message


class Payload:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


def test_a_malicious_pickle_runs_nothing(meta: Path, tmp_path: Path, refused: Refused) -> None:
    sentinel = tmp_path / "sentinel"
    with zipfile.ZipFile(meta / "consolidated.01.pth", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"norm.weight": Payload(sentinel)}, protocol=2))
        file.writestr("archive/version", "3\n")
    message = refused(meta, UnsafeFileError, to="hf")
    assert "consolidated.01.pth" in message
    assert "system" in message
    assert not sentinel.exists()


def test_biases_have_no_place_in_meta_and_native(tmp_path: Path, refused: Refused) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=32, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "biased")
    for target in ("meta", "native"):
        message = refused(tmp_path / "biased", InputError, to=target)
        assert "bias" in message
    report = ckpt_convert.convert_checkpoint(tmp_path / "biased", tmp_path / "out", to="hf", shards=2, verify=True)
    assert report.tensors == 2 + 1 + 2 * (9 + 7)


def test_a_head_dim_that_meta_cannot_say(tmp_path: Path, refused: Refused) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=32, head_dim=10,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "odd")
    assert "head_dim" in refused(tmp_path / "odd", ConfigError)
    ckpt_convert.convert_checkpoint(tmp_path / "odd", tmp_path / "out", to="native", verify=True)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
    ],
)  # fmt: skip
def test_a_rope_scaling_that_meta_cannot_say(
    scaling: dict[str, Any], hf: Path, refused: Refused, tmp_path: Path
) -> None:
    edit_json(hf / "config.json", rope_parameters=None, rope_scaling=scaling, rope_theta=500000.0)
    assert "rope" in refused(hf, ConfigError)
    report = ckpt_convert.convert_checkpoint(hf, tmp_path / "out", to="meta", drop_rope_scaling=True)
    assert any("rope" in notice.lower() for notice in report.notices)


@pytest.mark.parametrize(
    ("to", "options", "words"),
    [
        ("meta", {"shards": 2}, "ranks; use `model_parallel=`"),
        ("meta", {"max_shard_size": 100}, "ranks; use `model_parallel=`"),
        ("hf", {"model_parallel": 2}, "only meta is split across ranks"),
        ("native", {"meta_style": "llama2"}, "`meta_style=` does not fit native"),
        ("hf", {"container": "pth"}, "expected safetensors or bin"),
        ("hf", {"shards": 2, "max_shard_size": 100}, "exclude each other"),
        ("hf", {"shards": 0}, "expected a whole number, 1 or more"),
        ("hf", {"shards": 2.5}, "expected a whole number, 1 or more"),
        ("hf", {"shards": 31}, "there are only 30 tensors"),
        ("meta", {"rope_factor": 8.0}, "its config states it already"),
        ("native", {"dtype": "int8"}, "expected one of"),
        ("gguf", {}, "no such format"),
        ("meta", {"workers": 0}, "`workers=0`"),
        ("meta", {"model_parallel": 2, "container": "safetensors"}, "one rank"),
    ],
)
def test_options_that_do_not_fit(to: str, options: dict[str, Any], words: str, hf: Path, refused: Refused) -> None:
    assert words in refused(hf, UsageError, to=to, **options)


def test_ranks_that_do_not_divide(hf: Path, refused: Refused) -> None:
    message = refused(hf, ConfigError, model_parallel=3)
    assert "n_kv_heads = 4 is not divisible by 3" in message
    assert "`model_parallel=" in message


def test_mistral_is_not_cut_over_ranks(refused: Refused) -> None:
    assert "not split across ranks" in refused(GOLDEN / "mistral" / "hf", UsageError, model_parallel=2)


def test_a_like_of_another_model(refused: Refused) -> None:
    message = refused(GOLDEN / "llama" / "hf", ShapeMismatchError, like=GOLDEN / "llama2" / "meta-mp1")
    assert "n_kv_heads: expected 4, found 12" in message
    message = refused(GOLDEN / "llama" / "hf", UsageError, like=GOLDEN / "mistral" / "meta-mp1")
    assert "is a mistral" in message


def test_a_key_that_only_another_rank_has(meta: Path, refused: Refused) -> None:
    tensors = torch.load(meta / "consolidated.01.pth", weights_only=True)
    tensors["layers.1.extra.weight"] = torch.zeros(2)
    torch.save(tensors, meta / "consolidated.01.pth")
    assert "layers.1.extra.weight [2] in consolidated.01.pth" in refused(meta, KeyMismatchError, to="hf")


def test_ranks_of_several_dtypes(meta: Path, refused: Refused) -> None:
    tensors = torch.load(meta / "consolidated.01.pth", weights_only=True)
    tensors["output.weight"] = tensors["output.weight"].view(torch.int32)
    torch.save(tensors, meta / "consolidated.01.pth")
    message = refused(meta, ShapeMismatchError, to="hf")
    assert "output.weight on rank 1: expected F32 as on rank 0, found I32" in message


def test_a_recorded_layout_whose_index_leaves_the_directory(hf: Path, tmp_path: Path, refused: Refused) -> None:
    ckpt_convert.convert_checkpoint(hf, tmp_path / "meta", to="meta")
    edit_json(tmp_path / "meta" / "ckpt_convert" / "layouts" / "hf" / "layout.json", index="../../evil.json")
    assert "was edited or damaged" in refused(tmp_path / "meta", CorruptFileError, to="hf")
    edit_manifest(tmp_path / "meta", record=None)  # whoever means harm can do that, too
    message = refused(tmp_path / "meta", CorruptFileError, to="hf")
    assert "the recorded layout is damaged" in message
    assert "'../../evil.json'" in message


@pytest.mark.parametrize("name", ["a\\b.safetensors", "a\x7fb.safetensors"])
def test_an_index_with_names_that_systems_read_differently(name: str, hf: Path, refused: Refused) -> None:
    shutil.copy(hf / "model-00001-of-00004.safetensors", hf / name)
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = name
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no plain name inside the directory" in refused(hf, UnsafeFileError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "hf", "like": GOLDEN / "llama" / "hf", "shards": 2}, "`like=` determines the files"),
        ({"rope_theta": 1e6}, "`rope_theta=` does not fit a hf source"),
        ({"max_positions": 4096}, "`max_positions=` does not fit a hf source"),
    ],
)
def test_more_options_that_do_not_fit(options: dict[str, Any], words: str, hf: Path, refused: Refused) -> None:
    assert words in refused(hf, UsageError, **options)


def test_a_record_of_no_format(hf: Path, tmp_path: Path, refused: Refused) -> None:
    ckpt_convert.convert_checkpoint(hf, tmp_path / "meta", to="meta")
    edit_manifest(tmp_path / "meta", format="../hf")
    assert "names no format" in refused(tmp_path / "meta", ConfigError, to="hf")


def test_a_record_of_another_version(hf: Path, tmp_path: Path, refused: Refused) -> None:
    ckpt_convert.convert_checkpoint(hf, tmp_path / "meta", to="meta")
    for schema, words in ((3, "expected schema 2 at most, found 3"), ("2", "expected schema 1 or 2, found '2'")):
        edit_manifest(tmp_path / "meta", schema=schema)
        assert words in refused(tmp_path / "meta", ConfigError, to="hf")


def test_a_recorded_layout_whose_bytes_lie_elsewhere(hf: Path, tmp_path: Path, refused: Refused) -> None:
    ckpt_convert.convert_checkpoint(hf, tmp_path / "meta", to="meta")
    folder = tmp_path / "meta" / "ckpt_convert" / "layouts" / "hf"
    content = json.loads((folder / "layout.json").read_text())
    shutil.move(folder / content["files"][0]["bytes"], tmp_path / "elsewhere.bytes")
    content["files"][0]["bytes"] = "../../../../elsewhere.bytes"
    (folder / "layout.json").write_text(json.dumps(content))
    edit_manifest(tmp_path / "meta", record=None)
    assert "no plain name inside the directory" in refused(tmp_path / "meta", CorruptFileError, to="hf")


def test_a_like_with_other_keys(refused: Refused) -> None:
    tied = GOLDEN / "llama_tied" / "hf"
    message = refused(GOLDEN / "llama" / "meta-mp1", ShapeMismatchError, to="hf", like=tied)
    assert "has other keys than this model, such as lm_head.weight" in message


def test_a_link_to_a_folder_called_blobs_outside_of_a_cache(tmp_path: Path, refused: Refused) -> None:
    source = tmp_path / "org" / "models" / "hf"
    shutil.copytree(GOLDEN / "llama" / "hf", source)
    (tmp_path / "org" / "blobs").mkdir()
    shutil.move(source / "model-00001-of-00004.safetensors", tmp_path / "org" / "blobs" / "one")
    (source / "model-00001-of-00004.safetensors").symlink_to("../../blobs/one")
    assert "leaves the directory" in refused(source, UnsafeFileError)


@pytest.mark.parametrize(
    "name", ["model-00002-of-00004.safetensors", "config.json", ".ckpt-convert-journal", "a/", "."]
)
def test_a_record_that_gives_a_file_the_name_of_another(name: str, hf: Path, tmp_path: Path, refused: Refused) -> None:
    ckpt_convert.convert_checkpoint(hf, tmp_path / "meta", to="meta")
    folder = tmp_path / "meta" / "ckpt_convert"
    content = json.loads((folder / "layouts" / "hf" / "layout.json").read_text())
    content["files"][0]["name"] = name
    (folder / "layouts" / "hf" / "layout.json").write_text(json.dumps(content))
    edit_manifest(tmp_path / "meta", record=None)
    refused(tmp_path / "meta", CorruptFileError, to="hf")


def test_a_side_file_of_the_record_that_is_called_like_weights(hf: Path, tmp_path: Path, refused: Refused) -> None:
    ckpt_convert.convert_checkpoint(hf, tmp_path / "meta", to="meta")
    (tmp_path / "meta" / "ckpt_convert" / "side" / "model-00001-of-00004.safetensors").write_text("evil")
    assert "two files of the output would be called" in refused(tmp_path / "meta", CorruptFileError, to="hf")


@pytest.mark.parametrize("place", ["side/passwd.txt", "layouts/hf/extra", "config.json"])
def test_links_in_the_record_do_not_leave_the_directory(place: str, hf: Path, tmp_path: Path, refused: Refused) -> None:
    ckpt_convert.convert_checkpoint(hf, tmp_path / "meta", to="meta")
    ckpt_convert.convert_checkpoint(tmp_path / "meta", tmp_path / "native", to="native")
    (tmp_path / "secret").write_text("{}")
    for source in ("meta", "native"):
        link = tmp_path / source / "ckpt_convert" / place
        link.unlink(missing_ok=True)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(tmp_path / "secret")
    target = "native" if place == "layouts/hf/extra" else "hf"
    for source in ("native", "meta") if place == "config.json" else ("meta",):
        assert "leaves the directory" in refused(tmp_path / source, UnsafeFileError, to=target)


@pytest.mark.parametrize(
    "change", [{"side_files": None}, {"side_files": ["x"]}, {"side_files": [{}]}, {"side_files": 3}, {"dims": [1]}]
)
def test_a_damaged_manifest(change: dict[str, Any], hf: Path, tmp_path: Path, refused: Refused) -> None:
    ckpt_convert.convert_checkpoint(hf, tmp_path / "meta", to="meta")
    path = tmp_path / "meta" / "ckpt_convert" / "manifest.json"
    write_manifest(path, {**json.loads(path.read_text()), **change})
    assert "move the folder ckpt_convert out of" in refused(tmp_path / "meta", ConfigError, to="hf")


def test_sizes_are_not_believed(hf: Path, meta: Path, refused: Refused) -> None:
    edit_json(hf / "config.json", num_hidden_layers=2**30)
    assert "n_layers is 1073741824, but the files hold only 30 tensors" in refused(hf, ConfigError)
    edit_json(meta / "params.json", n_layers=10**6)
    refused(meta, ConfigError, to="hf")
    (meta / "consolidated.9999999999.pth").touch()
    assert "missing: consolidated.02.pth" in refused(meta, CheckpointNotFoundError, to="hf")
    assert "`model_parallel=` may be 1, 2, 4" in refused(GOLDEN / "llama" / "hf", ConfigError, model_parallel=10**9)


def test_files_that_are_no_regular_files(hf: Path, refused: Refused, tmp_path: Path) -> None:
    os.mkfifo(hf / "side.txt")
    report = ckpt_convert.convert_checkpoint(hf, tmp_path / "fine", to="native")
    assert "not copied: side.txt" in report.notices
    (hf / "model-00002-of-00004.safetensors").unlink()
    os.mkfifo(hf / "model-00002-of-00004.safetensors")
    assert "is not a regular file" in refused(hf, UnsafeFileError)


@pytest.mark.parametrize(
    ("case", "to", "options", "words"),
    [
        ("llama/meta-mp1", "hf", {"rope_theta": 7.0}, "contradicts"),
        ("mistral/meta-mp1", "hf", {"rope_factor": 8.0}, "`rope_factor=` does not fit mistral"),
        ("mistral/hf", "meta", {"meta_style": "llama2"}, "`meta_style=` does not fit mistral"),
        ("llama/hf", "native", {"drop_rope_scaling": True}, "`drop_rope_scaling=` does not fit hf to native"),
        ("llama/hf", "meta", {"meta_style": "llama9"}, "must be llama2 or llama3"),
        ("llama/hf", "meta", {"from_format": "x"}, "no such format"),
        ("llama/hf", "meta", {"like": GOLDEN / "llama" / "meta-mp1", "container": "safetensors"}, "contradicts"),
        ("llama/hf", "meta", {"like": GOLDEN / "llama" / "meta-mp1", "meta_style": "llama2"}, "does not go with it"),
    ],
)
def test_no_option_is_ignored(case: str, to: str, options: dict[str, Any], words: str, refused: Refused) -> None:
    assert words in refused(GOLDEN / case, UsageError, to=to, **options)


def test_an_option_that_is_none_is_a_type_error(tmp_path: Path) -> None:
    options: dict[str, Any] = {"modelparallel": 2}
    with pytest.raises(TypeError, match="modelparallel"):
        ckpt_convert.convert_checkpoint(GOLDEN / "llama" / "hf", tmp_path / "out", to="meta", **options)


def test_tied_weights_that_differ_are_refused_towards_meta_too(tmp_path: Path, refused: Refused) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama_tied" / "hf", source)
    (source / "model.safetensors.index.json").unlink()
    edit_file(source / "model-00004-of-00004.safetensors", lambda t: t.update({"lm_head.weight": torch.ones(56, 72)}))
    for target in ("meta", "native"):
        assert "the config ties them" in refused(source, TiedWeightsError, to=target)


def test_a_checklist_that_is_none_or_lists_what_is_not_there(meta: Path, refused: Refused) -> None:
    (meta / "checklist.chk").write_text("abc\n")
    assert str(meta) in refused(meta, CorruptFileError, to="hf")
    (meta / "checklist.chk").write_text("0" * 32 + "  consolidated.07.pth\n")
    assert "lists consolidated.07.pth, which is not there" in refused(meta, CorruptFileError, to="hf")


@pytest.mark.parametrize("name", ["", "x" * 250])
def test_names_that_cannot_be(name: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        ckpt_convert.convert_checkpoint(hf, name, to="meta", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
