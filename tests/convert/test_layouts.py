"""Which files come out: shards, names, containers, casts, and layouts taken from the source, the record or --like."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckpt_convert
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.convert import layout
from ckpt_convert.convert.writing import TargetTensor
from ckpt_convert.errors import TiedWeightsError, VerificationError
from ckpt_convert.models.llama.table import LLAMA
from ckpt_convert.tensors.lazy import from_source
from tests.helpers import GOLDEN, assert_same, bits, edit_json, read_meta, read_safetensors, sums

HF = GOLDEN / "llama" / "hf"
TIED = GOLDEN / "llama_tied"
DIMS = {"n_layers": 1, "attention_bias": 0, "mlp_bias": 0}


def weight_map(directory: Path) -> dict[str, str]:
    content: dict[str, str] = json.loads(next(directory.glob("*.index.json")).read_text())["weight_map"]
    return content


def check_index(directory: Path) -> None:
    """The index says exactly what the files hold, as transformers reads it."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    tensors = read_safetensors(directory)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for key, name in index["weight_map"].items():
        with safe_open(directory / name, "pt") as file:
            assert key in file.keys()  # noqa: SIM118
    assert sorted(index["weight_map"]) == sorted(tensors)


@pytest.mark.parametrize("target", ["hf", "native"])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 30])
def test_shards_are_as_many_as_asked_for_and_balanced(target: str, count: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = ckpt_convert.convert_checkpoint(HF, out, to=target, shards=count, verify=True)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert report.files == (names if count > 1 else ["model.safetensors"])
    sizes = [sum(t.nbytes for t in load_file(out / name).values()) for name in report.files]
    assert max(sizes) - min(sizes) <= 2 * 104 * 72 * 4 or count == 30
    if count > 1:
        check_index(out)
    else:
        assert not list(out.glob("*.index.json"))


def test_layers_stay_together_in_order(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="hf", shards=5)
    found = weight_map(tmp_path / "out")
    files = [found[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(3)]
    assert files == sorted(files)
    assert found["lm_head.weight"] == "model-00005-of-00005.safetensors"
    assert found["model.embed_tokens.weight"] == "model-00001-of-00005.safetensors"


def test_max_shard_size(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="hf", max_shard_size=60_000, verify=True)
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert sum(t.nbytes for t in load_file(file).values()) <= 60_000
    check_index(tmp_path / "out")
    ckpt_convert.convert_checkpoint(HF, tmp_path / "tiny", to="hf", max_shard_size=10_000)
    sizes = [len(load_file(file)) for file in (tmp_path / "tiny").glob("*.safetensors") if file.stat().st_size > 10_500]
    assert set(sizes) == {1}


def test_hf_to_native_keeps_names_assignment_and_order(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="native")
    for file in HF.glob("*.safetensors"):
        assert len(load_file(file)) == len(load_file(tmp_path / "out" / file.name))
    names = weight_map(HF)
    native = weight_map(tmp_path / "out")
    assert native["layers.1.attn.q_proj.weight"] == names["model.layers.1.self_attn.q_proj.weight"]
    assert native["norm.scale"] == names["model.norm.weight"]
    order = [row["offset"] for row in rows(tmp_path / "out" / "model-00002-of-00004.safetensors")]
    assert order == sorted(order)


def rows(path: Path) -> list[dict[str, Any]]:
    with open_identified(path) as checkpoint:
        return [{"key": t.key, "offset": t.parts[0].offset} for t in checkpoint.tensors.values()]


def test_odd_names_come_from_the_index(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(HF, source)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    for key, name in index["weight_map"].items():
        index["weight_map"][key] = name.replace("model-0000", "weights.part").replace("-of-00004", "")
    for file in source.glob("model-*.safetensors"):
        file.rename(source / file.name.replace("model-0000", "weights.part").replace("-of-00004", ""))
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native")
    assert (tmp_path / "native" / "weights.part2.safetensors").exists()
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "meta", to="meta")
    ckpt_convert.convert_checkpoint(tmp_path / "meta", tmp_path / "back", to="hf")
    assert sums(tmp_path / "back") == sums(source)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", ["hf", "meta", "native"])
def test_casts_are_torchs(dtype: str, target: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(HF, source)
    odd = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 1e-40, 3.4e38, 65519.0, 65520.0, 1.00390625]
    )
    file = source / "model-00001-of-00004.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][0, : len(odd)] = odd
    save_file(tensors, file, {"format": "pt"})
    plain = ckpt_convert.convert_state_dict(
        read_safetensors(source), source / "config.json", source="hf", target=target
    )
    wanted = {key: tensor.to(getattr(torch, dtype)) for key, tensor in plain.items()}  # type: ignore[union-attr]
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to=target, dtype=dtype, allow_overflow=True, verify=True)
    found = read_meta(tmp_path / "out")[0] if target == "meta" else read_safetensors(tmp_path / "out")
    assert_same(found, wanted)
    config = json.loads((tmp_path / "out" / "ckpt_convert" / "config.json").read_text())
    assert config["dtype"] == dtype


def test_a_cast_checkpoint_keeps_names_and_assignment_on_the_way_back(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "meta", to="meta", dtype="bfloat16")
    ckpt_convert.convert_checkpoint(tmp_path / "meta", tmp_path / "back", to="hf")
    assert weight_map(tmp_path / "back") == weight_map(HF)
    check_index(tmp_path / "back")
    assert load_file(tmp_path / "back" / "model-00001-of-00004.safetensors").popitem()[1].dtype == torch.bfloat16


def every_dtype(directory: Path) -> None:
    """A Llama whose tensors are random bytes in every dtype that torch and safetensors share."""
    shutil.copytree(HF, directory)
    dtypes = [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
        torch.bool,
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    number = 0
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        for key in sorted(tensors):
            dtype = dtypes[number % len(dtypes)]
            number += 1
            shape = (*tensors[key].shape, dtype.itemsize)
            raw = torch.randint(0, 2 if dtype == torch.bool else 256, shape, dtype=torch.uint8, generator=generator)
            tensors[key] = raw.view(dtype).reshape(tensors[key].shape)
        save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_dtype_and_bit_pattern_survives(ranks: int, tmp_path: Path) -> None:
    every_dtype(tmp_path / "source")
    ckpt_convert.convert_checkpoint(
        tmp_path / "source", tmp_path / "meta", to="meta", model_parallel=ranks, verify=True
    )
    expected = ckpt_convert.convert_state_dict(
        read_safetensors(tmp_path / "source"), HF / "config.json", source="hf", target="meta", model_parallel=ranks
    )
    for mine, theirs in zip(
        read_meta(tmp_path / "meta"), expected if isinstance(expected, list) else [expected], strict=True
    ):
        assert_same(mine, theirs)
    ckpt_convert.convert_checkpoint(tmp_path / "meta", tmp_path / "native", to="native")
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf")
    assert sums(tmp_path / "back") == sums(tmp_path / "source")


def as_bin(directory: Path, *, shared: bool = False) -> Path:
    """The tied golden Llama as two .bin files, lm_head beside the embedding it is tied to."""
    shutil.copytree(TIED / "hf", directory)
    tensors = read_safetensors(directory)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding if shared else embedding.clone()
    keys = sorted(tensors)
    parts = [keys[: len(keys) // 2], keys[len(keys) // 2 :]] if not shared else [keys]
    names = [f"pytorch_model-{n:05d}-of-{len(parts):05d}.bin" for n in range(1, len(parts) + 1)]
    names = names if not shared else ["pytorch_model.bin"]
    for name, part in zip(names, parts, strict=True):
        torch.save({key: tensors[key] for key in part}, directory / name)
    if not shared:
        found = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": found}))
    return directory


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("steps", [("meta", "hf"), ("native", "hf"), ("native", "meta", "hf"), ("hf",)])
def test_bin_comes_back_file_for_file(shared: bool, steps: tuple[str, ...], tmp_path: Path) -> None:
    here = as_bin(tmp_path / "source", shared=shared)
    for number, step in enumerate(steps):
        ckpt_convert.convert_checkpoint(here, tmp_path / str(number), to=step, verify=True)
        here = tmp_path / str(number)
    assert sums(here) == sums(tmp_path / "source")


def test_bin_to_safetensors_and_back(tmp_path: Path) -> None:
    source = as_bin(tmp_path / "source")
    ckpt_convert.convert_checkpoint(source, tmp_path / "safe", to="hf", container="safetensors", verify=True)
    names = {file.name for file in (tmp_path / "safe").glob("*.safetensors")}
    assert names == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    check_index(tmp_path / "safe")
    ckpt_convert.convert_checkpoint(tmp_path / "safe", tmp_path / "bin", to="hf", container="bin", verify=True)
    assert set(weight_map(tmp_path / "bin")) == set(weight_map(source))
    loaded = torch.load(tmp_path / "bin" / "pytorch_model-00001-of-00002.bin", weights_only=True)
    assert_same(loaded, torch.load(source / "pytorch_model-00001-of-00002.bin", weights_only=True))


def test_transposed_and_shared_storages_as_llama_1_has_them(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama2" / "meta-mp2", source)
    for file in source.glob("*.pth"):
        tensors = torch.load(file, weights_only=True)
        norms = torch.cat([tensors["norm.weight"], tensors["layers.0.ffn_norm.weight"], torch.arange(5.0)])
        tensors["norm.weight"], tensors["layers.0.ffn_norm.weight"] = norms[:72], norms[72:144]
        key = "layers.1.attention.wq.weight"
        tensors[key] = tensors[key].t().contiguous().t()
        torch.save(tensors, file)
    ckpt_convert.convert_checkpoint(source, tmp_path / "hf", to="hf", verify=True)
    assert_same(read_safetensors(tmp_path / "hf"), read_safetensors(GOLDEN / "llama2" / "hf"))
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="meta", verify=True)
    assert sums(tmp_path / "back") == sums(source)


def test_legacy_torch_files_are_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama" / "meta-mp2", source)
    for file in source.glob("*.pth"):
        torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", verify=True)
    assert_same(read_safetensors(tmp_path / "out"), read_safetensors(HF))
    ckpt_convert.convert_checkpoint(tmp_path / "out", tmp_path / "back", to="meta")
    for mine, theirs in zip(read_meta(tmp_path / "back"), read_meta(source), strict=True):
        assert_same(mine, theirs)


def test_like_gives_names_assignment_config_and_tokenizer(tmp_path: Path) -> None:
    like = tmp_path / "like"
    shutil.copytree(HF, like)
    (like / "tokenizer.json").write_text('{"of": "like"}')
    edit_json(like / "config.json", max_position_embeddings=4321)
    ckpt_convert.convert_checkpoint(GOLDEN / "llama" / "meta-mp2", tmp_path / "out", to="hf", like=like, verify=True)
    found = sums(tmp_path / "out")
    assert found == sums(like)


def test_changed_weights_keep_the_layout(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "native", to="native")
    for file in (tmp_path / "native").glob("*.safetensors"):
        save_file({key: tensor + 1 for key, tensor in load_file(file).items()}, file)
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf", verify=True)
    before, after = read_safetensors(HF), read_safetensors(tmp_path / "back")
    assert weight_map(tmp_path / "back") == weight_map(HF)
    assert all(bits(after[key]) == bits(tensor + 1) for key, tensor in before.items())
    assert {f.name: f.stat().st_size for f in HF.iterdir()} == {
        f.name: f.stat().st_size for f in (tmp_path / "back").iterdir() if f.is_file()
    }


def test_changed_weights_in_a_zip_have_right_checksums(tmp_path: Path) -> None:
    import zipfile

    ckpt_convert.convert_checkpoint(GOLDEN / "llama" / "meta-mp2", tmp_path / "native", to="native")
    for file in (tmp_path / "native").glob("*.safetensors"):
        save_file({key: tensor * 2 for key, tensor in load_file(file).items()}, file)
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="meta", verify=True)
    for file in (tmp_path / "back").glob("*.pth"):
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None


def test_tied_if_equal_is_decided_by_the_bytes(tmp_path: Path) -> None:
    tied = ckpt_convert.convert_checkpoint(TIED / "meta-mp2", tmp_path / "tied", to="hf")
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in read_safetensors(tmp_path / "tied")
    assert any("stored once" in tie for tie in tied.ties)
    ckpt_convert.convert_checkpoint(GOLDEN / "llama" / "meta-mp2", tmp_path / "untied", to="hf")
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in read_safetensors(tmp_path / "untied")
    dry = ckpt_convert.plan_conversion(TIED / "meta-mp2", to="hf")
    assert any("tied if equal" in tie for tie in dry.ties)


def test_a_tied_head_that_is_stored_is_kept_within_hf_and_dropped_elsewhere(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(TIED / "hf", source)
    (source / "model.safetensors.index.json").unlink()
    file = source / "model-00004-of-00004.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = load_file(source / "model-00001-of-00004.safetensors")[
        "model.embed_tokens.weight"
    ].clone()
    save_file(tensors, file, {"format": "pt"})
    ckpt_convert.convert_checkpoint(source, tmp_path / "hf", to="hf", shards=2)
    assert "lm_head.weight" in read_safetensors(tmp_path / "hf")
    ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native")
    assert "output.weight" not in read_safetensors(tmp_path / "native")
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf")
    assert sums(tmp_path / "back") == sums(source)


def test_a_plan_reads_no_tensor_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    shutil.copytree(HF, source)
    with open_identified(source) as checkpoint:
        first = {f.name: min(t.offset for t in f.header.tensors) for f in checkpoint.files}
    for file in source.glob("*.safetensors"):
        size = file.stat().st_size
        with file.open("r+b") as handle:  # what is left is the header over a hole
            handle.truncate(first[file.name])
            handle.truncate(size)
    plan = ckpt_convert.plan_conversion(source, to="meta", model_parallel=2)
    assert [file.name for file in plan.files] == ["consolidated.00.pth", "consolidated.01.pth"]
    assert plan.tensor_bytes == 469728 + 7 * 72 * 4
    assert plan.disk > plan.tensor_bytes
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    seen: list[ckpt_convert.TransferProgress] = []
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta", verify=True, progress=seen.append)
    for phase in ("converting", "verifying"):
        steps = [p for p in seen if p.phase == phase]
        assert steps[-1].done == steps[-1].total == 469728
        assert steps[0].done == 0


@pytest.mark.parametrize("steps", [("meta", "hf"), ("native", "hf"), ("meta", "native", "meta", "hf")])
def test_tables_that_the_config_determines_are_carried(steps: tuple[str, ...], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(HF, source)
    (source / "model.safetensors.index.json").unlink()
    file = source / "model-00002-of-00004.safetensors"
    tables = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.rand(3) for n in range(3)}
    save_file({**load_file(file), **tables}, file, {"format": "pt"})
    here = source
    for number, step in enumerate(steps):
        report = ckpt_convert.convert_checkpoint(here, tmp_path / str(number), to=step, verify=True)
        here = tmp_path / str(number)
        if number == 0:
            assert report.drops == sorted(tables)
            assert not any("freq" in key for key in read_safetensors(here))
    assert sums(here) == sums(source)


def test_carried_tables_find_a_file_in_another_container(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(HF, source)
    (source / "model.safetensors.index.json").unlink()
    file = source / "model-00002-of-00004.safetensors"
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(file), key: torch.rand(3)}, file, {"format": "pt"})
    ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native")
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "bin", to="hf", container="bin", verify=True)
    loaded = [torch.load(path, weights_only=True) for path in (tmp_path / "bin").glob("*.bin")]
    assert sum(key in tensors for tensors in loaded) == 1
    assert sum(map(len, loaded)) == 31


def test_llama_1s_tables_in_every_layer_are_carried(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama2" / "meta-mp2", source)
    for file in source.glob("*.pth"):
        tensors = torch.load(file, weights_only=True)
        freqs = tensors.pop("rope.freqs")
        tensors |= {f"layers.{n}.attention.inner_attention.rope.freqs": freqs for n in range(3)}
        torch.save(tensors, file)
    report = ckpt_convert.convert_checkpoint(source, tmp_path / "hf", to="hf")
    assert len(report.drops) == 3
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="meta")
    assert sums(tmp_path / "back") == sums(source)
    ckpt_convert.convert_checkpoint(source, tmp_path / "four", to="meta", model_parallel=4)
    assert all("layers.2.attention.inner_attention.rope.freqs" in rank for rank in read_meta(tmp_path / "four"))


def target(key: str, dtype: str, *shape: int) -> TargetTensor:
    return TargetTensor(next(LLAMA.instances(DIMS)), key, 0, dtype, from_source(0, shape))


def test_a_file_is_closed_where_its_middle_would_pass_the_border() -> None:
    targets = [target(str(size), "U8", size) for size in (4, 2, 10, 1)]
    dtypes = {target.key: target.dtype for target in targets}
    groups = layout.balanced_groups(targets, 2, dtypes)
    assert [[target.key for target in group] for group in groups] == [["4", "2"], ["10", "1"]]


def test_a_file_may_be_exactly_as_large_as_the_limit() -> None:
    targets = [target(str(size), "U8", size) for size in (4, 6, 11, 1, 9)]
    groups = layout.groups_up_to(targets, 10, {target.key: target.dtype for target in targets})
    assert [[target.key for target in group] for group in groups] == [["4", "6"], ["11"], ["1", "9"]]


def test_tensors_of_several_dtypes_are_aligned() -> None:
    targets = [target("a", "U8", 3), target("b", "F32", 2), target("c", "BF16", 1), target("d", "F64", 1)]
    built = layout.new_file_layout(
        layout.Assignment("m.safetensors", 0, "safetensors", tuple(targets), {}), {t.key: t.dtype for t in targets}
    )
    sizes = {"a": 1, "b": 4, "c": 2, "d": 8}
    assert all(tensor.offset % sizes[tensor.key] == 0 for tensor in built.header.tensors)


def test_keys_that_shared_their_bytes_and_differ_now_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama" / "meta-mp1", source)
    file = source / "consolidated.00.pth"
    tensors = torch.load(file, weights_only=True)
    tensors["layers.1.ffn_norm.weight"] = tensors["norm.weight"]
    torch.save(tensors, file)
    ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native", shards=1)
    edited = tmp_path / "native" / "model.safetensors"
    native = load_file(edited)
    native["norm.scale"] += 1
    save_file(native, edited)
    with pytest.raises(TiedWeightsError, match=r"norm.weight share their bytes in consolidated.00.pth, but"):
        ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="meta")
    assert not (tmp_path / "back").exists()


def test_a_carried_table_of_another_size_is_left_out(tmp_path: Path) -> None:
    source = GOLDEN / "llama2" / "meta-mp1"
    ckpt_convert.convert_checkpoint(source, tmp_path / "hf", to="hf")
    carried = tmp_path / "hf" / "ckpt_convert" / "layouts" / "meta" / "carried.safetensors"
    save_file({"rope.freqs": torch.ones(5)}, carried)
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="meta")
    (found,) = read_meta(tmp_path / "back")
    assert "rope.freqs" not in found


@pytest.mark.parametrize(("style", "cut"), [("llama2", (56, 36)), ("llama3", (28, 72))])
def test_meta_style_overrules_the_record_and_how_the_source_is_cut(
    style: str, cut: tuple[int, int], tmp_path: Path
) -> None:
    report = ckpt_convert.convert_checkpoint(
        GOLDEN / "llama2" / "meta-mp2", tmp_path / "out", to="meta", model_parallel=2, meta_style=style, verify=True
    )
    assert {tuple(rank["tok_embeddings.weight"].shape) for rank in read_meta(tmp_path / "out")} == {cut}
    assert report.side_files["params.json"] == "generated"


def test_the_manifest_says_whether_weights_are_tied(tmp_path: Path) -> None:
    for case, tied in (("llama", False), ("llama_tied", True)):
        ckpt_convert.convert_checkpoint(GOLDEN / case / "hf", tmp_path / case, to="meta")
        manifest = json.loads((tmp_path / case / "ckpt_convert" / "manifest.json").read_text())
        assert manifest["tied"] is tied


def test_other_keys_than_recorded_are_a_notice(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(TIED / "hf", tmp_path / "native", to="native")
    edit_json(tmp_path / "native" / "ckpt_convert" / "config.json", tie_word_embeddings=False)
    file = tmp_path / "native" / "model-00004-of-00004.safetensors"
    (tmp_path / "native" / "model.safetensors.index.json").unlink()
    save_file({**load_file(file), "output.weight": torch.ones(56, 72)}, file)
    report = ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf", verify=True)
    assert any("the recorded hf layout has other keys (lm_head.weight)" in notice for notice in report.notices)
    assert torch.equal(read_safetensors(tmp_path / "back")["lm_head.weight"], torch.ones(56, 72))


def test_another_number_of_ranks_than_recorded_is_no_notice(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(GOLDEN / "llama" / "meta-mp2", tmp_path / "hf", to="hf")
    report = ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "four", to="meta", model_parallel=4)
    assert [text for text in report.notices if "tokenizer" not in text] == []


def test_untied_weights_that_happen_to_be_equal_stay_untied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(HF, source)
    file = source / "model-00004-of-00004.safetensors"
    embedding = read_safetensors(source)["model.embed_tokens.weight"]
    save_file({**load_file(file), "lm_head.weight": embedding}, file, {"format": "pt"})
    ckpt_convert.convert_checkpoint(source, tmp_path / "meta", to="meta")
    edit_json(tmp_path / "meta" / "params.json", norm_eps=1e-3)  # so the recorded config does not count
    ckpt_convert.convert_checkpoint(tmp_path / "meta", tmp_path / "back", to="hf")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["rms_norm_eps"]) == (False, 1e-3)
    assert "lm_head.weight" in read_safetensors(tmp_path / "back")


def test_a_transposed_view_of_a_storage_is_no_other_value(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama" / "meta-mp1", source)
    file = source / "consolidated.00.pth"
    tensors = torch.load(file, weights_only=True)
    tensors["layers.1.attention.wo.weight"] = tensors["layers.0.attention.wo.weight"].t()
    torch.save(tensors, file)
    ckpt_convert.convert_checkpoint(source, tmp_path / "hf", to="hf")
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="meta", verify=True)
    assert sums(tmp_path / "back") == sums(source)


def test_the_number_of_ranks_of_a_release_is_told(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    sizes |= {"intermediate_size": 28672, "vocab_size": 128256}
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192}
    from benchmarks import checkpoints

    checkpoints.write(tmp_path / "70b", {**config, **sizes, "head_dim": 128}, 30, sparse=True)
    plan = ckpt_convert.plan_conversion(tmp_path / "70b", to="meta")
    assert any("Llama 3 70B was released in 8: pass `model_parallel=8`" in notice for notice in plan.notices)
    plan = ckpt_convert.plan_conversion(tmp_path / "70b", to="meta", model_parallel=8)
    assert not any("released in" in notice for notice in plan.notices)
    assert len(plan.files) == 8


def test_verify_compares_what_is_carried_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = ckpt_convert.convert_checkpoint(GOLDEN / "llama2" / "meta-mp2", tmp_path / "good", to="hf", verify=True)
    assert report.verified == 31
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        return real(fd, bytes(12) if len(data) == 12 else data, offset)  # rope.freqs has three numbers

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(VerificationError, match=r"rope.freqs: differs from rope.freqs at byte"):
        ckpt_convert.convert_checkpoint(GOLDEN / "llama2" / "meta-mp2", tmp_path / "bad", to="hf", verify=True)
    assert not (tmp_path / "bad").exists()


def test_a_plan_that_is_undecided_has_room_for_both(tmp_path: Path) -> None:
    plan = ckpt_convert.plan_conversion(GOLDEN / "llama" / "meta-mp1", to="hf")
    assert plan.tensors == 30
    assert plan.tensor_bytes == 469728


def test_torch_files_of_any_name_are_a_native_source(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = read_safetensors(GOLDEN / "llama" / "native.safetensors")
    keys = sorted(tensors)
    torch.save({key: tensors[key] for key in keys[:9]}, source / "model-1.pt")
    torch.save({key: tensors[key] for key in keys[9:]}, source / "model-2.pt")
    config = HF / "config.json"
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="native", config=config, dtype="bfloat16", verify=True)
    assert weight_map(tmp_path / "out")["norm.scale"] == "model-2.pt"
    ckpt_convert.convert_checkpoint(source, tmp_path / "hf", to="hf", config=config, verify=True)
    assert_same(read_safetensors(tmp_path / "hf"), read_safetensors(HF))
