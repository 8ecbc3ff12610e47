"""Comparing checkpoints: every pair of golden forms is the same, and whatever is changed in one is found and named."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from ckpt_convert import errors
from ckpt_convert.analysis.diff.change import Change
from ckpt_convert.analysis.diff.compare import Diff, compare_checkpoints
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.tensors.progress import TransferProgress
from tests.helpers import CASES, GOLDEN, Tensors, edit_json, read_safetensors

FORMS = ("hf", "meta-mp1", "meta-mp2", "meta-mp4", "native.safetensors")
PAIRS = [
    pytest.param(case, one, other, id=f"{case}-{one}-{other}")
    for case in CASES
    for one, other in itertools.product(FORMS, FORMS)
    if (GOLDEN / case / one).exists() and (GOLDEN / case / other).exists()
]
Q = "model.layers.0.self_attn.q_proj.weight"


def diff(a: Path, b: Path, **options: Any) -> Diff:
    with open_identified(a) as left, open_identified(b) as right:
        return compare_checkpoints(left, right, **options)


def changed(found: Diff) -> dict[str, Change]:
    return {change.key: change for change in found.changes if change.status != "same"}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "llama" / "hf", tmp_path / "hf"))


def rewrite(directory: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a directory and write them back, every one into the file it came from."""
    for file in directory.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        change(tensors)
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(("case", "one", "other"), PAIRS)
def test_golden_forms_of_a_case_are_the_same(case: str, one: str, other: str) -> None:
    found = diff(GOLDEN / case / one, GOLDEN / case / other)
    assert found.same
    assert found.compared == sum(change.nbytes for change in found.changes)
    assert len(found.changes) >= len(read_safetensors(GOLDEN / case / "hf")) - 1
    if one != other:
        assert found.aligned_by == "mapping"


def test_a_family_without_a_table_is_compared_by_key(hf: Path) -> None:
    edit_json(hf / "config.json", model_type="of_another_kind")
    found = diff(hf, hf)
    assert found.same
    assert found.aligned_by == "keys"
    assert {change.key for change in found.changes} == set(read_safetensors(hf))


@pytest.mark.parametrize("other", FORMS)
def test_one_flipped_bit_is_found_and_named(hf: Path, other: str) -> None:
    before = read_safetensors(hf)[Q].clone()

    def flip(tensors: Tensors) -> None:
        if Q in tensors:
            tensors[Q].view(torch.int32)[1, 7] ^= 1

    rewrite(hf, flip)
    found = diff(hf, GOLDEN / "llama" / other)
    assert list(changed(found)) == [Q]
    delta = changed(found)[Q].delta
    assert delta is not None
    after = read_safetensors(hf)[Q]
    assert changed(found)[Q].status == "differs"
    assert (delta.differing, delta.max_ulp) == (1, 1)
    assert changed(found)[Q].where == changed(found)[Q].first == (1, 7)
    gap = (after.double() - before.double()).abs()
    assert delta.max_abs == gap.max().item()
    assert delta.mean_abs == pytest.approx(gap.mean().item(), rel=1e-12)
    assert delta.relative_norm == pytest.approx((gap.norm() / after.double().norm()).item(), rel=1e-6)


def test_the_place_is_that_in_a_whatever_the_row_order_of_b(hf: Path) -> None:
    meta = GOLDEN / "llama" / "meta-mp2"

    def flip(tensors: Tensors) -> None:
        if Q in tensors:
            tensors[Q].view(torch.int32)[1, 7] ^= 1

    rewrite(hf, flip)
    (change,) = changed(diff(meta, hf)).values()
    assert change.key == "layers.0.attention.wq.weight"
    rows = read_safetensors(GOLDEN / "llama" / "hf")[Q].shape[0]
    config = json.loads((hf / "config.json").read_text())
    head_dim = rows // config["num_attention_heads"]
    assert head_dim // 2 > 1
    assert change.where == (2, 7)  # row i of the first half of a head is row 2i where neighbours rotate


def test_swapped_norms_are_both_named(hf: Path) -> None:
    one, other = "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"
    values = read_safetensors(hf)

    def swap(tensors: Tensors) -> None:
        for key, source in ((one, other), (other, one)):
            if key in tensors:
                tensors[key] = values[source].clone()

    rewrite(hf, swap)
    meta = {one: "layers.0.ffn_norm.weight", other: "layers.0.attention_norm.weight"}
    found = changed(diff(GOLDEN / "llama" / "meta-mp1", hf))
    assert {change.b.key: change.note for change in found.values() if change.b} == {
        key: f"b has here what a has as {where}" for key, where in meta.items()
    }


@pytest.mark.parametrize("row", ["q_proj", "k_proj"])
def test_a_row_order_that_was_not_converted_is_found(hf: Path, row: str) -> None:
    names = {"q_proj": "wq", "k_proj": "wk"}
    meta = torch.load(GOLDEN / "llama" / "meta-mp1" / "consolidated.00.pth", weights_only=True)
    key = f"model.layers.1.self_attn.{row}.weight"

    def keep_metas_order(tensors: Tensors) -> None:
        if key in tensors:
            tensors[key] = meta[f"layers.1.attention.{names[row]}.weight"].clone()

    rewrite(hf, keep_metas_order)
    for form in ("meta-mp4", "hf", "native.safetensors"):
        for sides in ((hf, GOLDEN / "llama" / form), (GOLDEN / "llama" / form, hf)):
            (change,) = changed(diff(*sides)).values()
            assert key in [half.key for half in (change.a, change.b) if half]
            assert "equal once the rows are put in the other RoPE order" in change.note


@pytest.mark.parametrize("rank", [0, 1])
def test_a_copy_that_differs_on_one_rank_is_found(tmp_path: Path, rank: int) -> None:
    meta = Path(shutil.copytree(GOLDEN / "llama" / "meta-mp2", tmp_path / "meta"))
    file = meta / f"consolidated.{rank:02d}.pth"
    tensors = torch.load(file, weights_only=True)
    tensors["layers.1.ffn_norm.weight"].view(torch.int32)[3] ^= 1
    torch.save(tensors, file)
    for found in (diff(GOLDEN / "llama" / "hf", meta), diff(meta, GOLDEN / "llama" / "hf")):
        (change,) = changed(found).values()
        assert change.status == "differs"
        assert "ffn_norm" in change.key or "post_attention_layernorm" in change.key
        assert "rank 1 (consolidated.01.pth) and rank 0 (consolidated.00.pth) differ" in change.note
    less = tmp_path / "less"
    less.mkdir()
    tensors = read_safetensors(GOLDEN / "llama" / "hf")
    del tensors["model.layers.1.post_attention_layernorm.weight"]
    safetensors.torch.save_file(tensors, less / "model.safetensors")
    shutil.copy(GOLDEN / "llama" / "hf" / "config.json", less)
    (change,) = changed(diff(meta, less)).values()
    assert change.status == "only_a"
    assert "differ" in change.note


def test_what_only_one_side_has(hf: Path) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    single = hf.parent / "less"
    single.mkdir()
    tensors = read_safetensors(hf)
    del tensors[key]
    safetensors.torch.save_file(tensors, single / "model.safetensors")
    shutil.copy(hf / "config.json", single)
    assert {c.key: c.status for c in changed(diff(hf, single)).values()} == {key: "only_a"}
    assert {c.key: c.status for c in changed(diff(single, hf)).values()} == {key: "only_b"}
    (change,) = changed(diff(GOLDEN / "llama" / "meta-mp2", single)).values()
    assert (change.status, change.key) == ("only_a", "layers.1.feed_forward.w3.weight")


def test_layers_that_one_config_does_not_have(hf: Path) -> None:
    less = hf.parent / "less"
    less.mkdir()
    tensors = {
        key: value for key, value in read_safetensors(hf).items() if ".layers." not in key or ".layers.0." in key
    }
    safetensors.torch.save_file(tensors, less / "model.safetensors")
    shutil.copy(hf / "config.json", less)
    layers = json.loads((hf / "config.json").read_text())["num_hidden_layers"]
    edit_json(less / "config.json", num_hidden_layers=1)
    found = diff(hf, less)
    assert found.counts["only_a"] == 9 * (layers - 1)
    assert all(".layers.1." in key or ".layers.2." in key for key in changed(found))
    assert ("n_layers", 3, 1) in found.config


def test_another_shape_is_said_with_both(hf: Path) -> None:
    less = hf.parent / "less"
    less.mkdir()
    tensors = read_safetensors(hf)
    rows = tensors["lm_head.weight"].shape[0]
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[key] = tensors[key][:-1].clone()
    safetensors.torch.save_file(tensors, less / "model.safetensors")
    shutil.copy(hf / "config.json", less)
    edit_json(less / "config.json", vocab_size=rows - 1)
    for found in (diff(hf, less), diff(GOLDEN / "llama" / "meta-mp2", less)):
        assert [change.status for change in changed(found).values()] == ["shape", "shape"]
        for change in changed(found).values():
            assert change.a is not None
            assert change.b is not None
            assert (change.a.shape[0], change.b.shape[0]) == (rows, rows - 1)
            assert change.delta is None


def test_a_config_that_does_not_fit_does_not_hide_equal_tensors(hf: Path) -> None:
    edit_json(hf / "config.json", vocab_size=999)
    for sides in ((GOLDEN / "llama" / "hf", hf), (hf, GOLDEN / "llama" / "meta-mp2")):
        found = diff(*sides)
        assert found.same
        assert any("do not fit its config" in notice for notice in found.notices)
        assert [name for name, _, _ in found.config] == ["vocab_size"]


@pytest.mark.parametrize("form", ["hf", "meta-mp1"])
def test_tensors_of_no_table_are_compared_too(hf: Path, form: str) -> None:
    def grow(directory: Path, value: float) -> Path:
        tensors = {**read_safetensors(hf), "model.extra.weight": torch.full((3,), value)}
        directory.mkdir()
        safetensors.torch.save_file(tensors, directory / "model.safetensors")
        shutil.copy(hf / "config.json", directory)
        return directory

    one, other = grow(hf.parent / "one", 1.0), grow(hf.parent / "other", 2.0)
    bare = GOLDEN / "llama" / form
    assert diff(one, one).same
    for a, b, status in ((one, other, "differs"), (one, bare, "only_a"), (bare, one, "only_b")):
        assert {key: change.status for key, change in changed(diff(a, b)).items()} == {"model.extra.weight": status}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_is_compared_after_an_exact_upcast(hf: Path, dtype: torch.dtype) -> None:
    before = read_safetensors(hf)

    def cast(tensors: Tensors) -> None:
        for key in tensors:
            tensors[key] = tensors[key].to(dtype)

    rewrite(hf, cast)
    after = read_safetensors(hf)
    found = diff(GOLDEN / "llama" / "hf", hf)
    assert not found.same
    for change in found.changes:
        exact = torch.equal(before[change.key].double(), after[change.key].double())
        assert change.status == ("dtype" if exact else "differs")
        assert change.delta is not None
        gap = (before[change.key].double() - after[change.key].double()).abs()
        assert change.delta.max_abs == gap.max().item()
        assert change.delta.differing == int((gap != 0).sum())
    assert found.is_same(ignore_dtype=True) == (dtype == torch.float64)
    unread = diff(GOLDEN / "llama" / "hf", hf, values=False)
    assert not unread.is_same(ignore_dtype=True)  # nobody knows whether the values are equal


def test_nan_on_one_side_is_counted_and_poisons_nothing(hf: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        if Q in tensors:
            tensors[Q][0, 0] = float("nan")
            tensors[Q][1, 1] = float("inf")
            tensors[Q][2, 2] += 1

    rewrite(hf, spoil)
    (change,) = changed(diff(GOLDEN / "llama" / "hf", hf)).values()
    assert change.delta is not None
    assert change.delta.nan_mismatch == 2
    assert change.delta.differing == 3
    assert (change.first, change.where) == ((0, 0), (2, 2))
    assert np.isfinite([change.delta.max_abs, change.delta.mean_abs, change.delta.relative_norm]).all()


def test_the_place_in_a_tensor_of_many_blocks(tmp_path: Path) -> None:
    tensor = torch.zeros(5, 1 << 20, dtype=torch.uint8)
    safetensors.torch.save_file({"x": tensor}, tmp_path / "a.safetensors")
    tensor[2, 7], tensor[3, 9] = 1, 3
    safetensors.torch.save_file({"x": tensor}, tmp_path / "b.safetensors")
    seen: list[TransferProgress] = []
    (change,) = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", progress=seen.append).changes
    assert (change.first, change.where) == ((2, 7), (3, 9))
    assert change.delta is not None
    assert (change.delta.count, change.delta.differing) == (tensor.numel(), 2)
    assert seen[-1].done == seen[-1].total == tensor.nbytes


def test_progress_counts_the_copies_of_ranks_too() -> None:
    seen: list[TransferProgress] = []
    assert diff(GOLDEN / "llama" / "meta-mp4", GOLDEN / "llama" / "hf", progress=seen.append).same
    copies = sum(value.nbytes for value in read_safetensors(GOLDEN / "llama" / "hf").values() if value.ndim == 1)
    tensors = sum(value.nbytes for value in read_safetensors(GOLDEN / "llama" / "hf").values())
    assert seen[-1].done == seen[-1].total == tensors + 3 * copies


def test_complex_numbers_are_not_compared_with_real_ones(tmp_path: Path) -> None:
    for name, dtype in (("a", torch.complex64), ("b", torch.float32)):
        safetensors.torch.save_file({"x": torch.ones(3, dtype=dtype)}, tmp_path / f"{name}.safetensors")
    (change,) = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").changes
    assert (change.status, change.delta) == ("dtype", None)


def test_structure_alone_reads_no_tensor(hf: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        for tensor in tensors.values():
            tensor.zero_()

    rewrite(hf, spoil)
    found = diff(GOLDEN / "llama" / "meta-mp2", hf, values=False)
    assert found.same
    assert found.compared == 0
    assert all(change.delta is None for change in found.changes)


def test_only_the_keys_asked_for_are_compared(hf: Path) -> None:
    found = diff(hf, GOLDEN / "llama" / "meta-mp2", is_wanted=lambda *keys: any("wq" in key for key in keys))
    assert [change.key for change in found.changes] == [Q.replace(".0.", f".{layer}.") for layer in range(3)]


def test_tables_that_the_config_determines_are_no_difference() -> None:
    found = diff(GOLDEN / "llama2" / "hf", GOLDEN / "llama2" / "meta-mp2")
    assert found.same
    meta = torch.load(GOLDEN / "llama2" / "meta-mp2" / "consolidated.00.pth", weights_only=True)
    derived = [key for key in meta if "rope.freqs" in key]
    assert derived
    assert all(any(key in notice and "only in b" in notice for notice in found.notices) for key in derived)


def test_settings_that_differ_are_said_and_do_not_count(hf: Path) -> None:
    scaling = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    for factor in (8.0, 32.0):
        shutil.copytree(hf, hf.parent / str(factor))
        edit_json(
            hf.parent / str(factor) / "config.json", rms_norm_eps=factor, rope_scaling=scaling | {"factor": factor}
        )
    found = diff(hf.parent / "8.0", hf.parent / "32.0")
    assert found.same
    assert [name for name, _, _ in found.config] == ["rope_scaling", "rms_norm_eps"]
    assert [(ours["factor"], theirs["factor"]) for _, ours, theirs in found.config[:1]] == [(8.0, 32.0)]


def test_a_setting_that_one_config_does_not_state_is_no_difference(hf: Path) -> None:
    content = json.loads((hf / "config.json").read_text())
    for value in (None, 8):
        (hf / "config.json").write_text(json.dumps({**content, "sliding_window": value}))
        assert diff(GOLDEN / "llama" / "hf", hf).config == []
        assert diff(hf, GOLDEN / "llama" / "hf").config == []
    other = Path(shutil.copytree(hf, hf.parent / "other"))
    (other / "config.json").write_text(json.dumps({**content, "sliding_window": None}))
    assert diff(hf, other).config == diff(other, hf).config == []


def test_old_torch_files_are_compared_as_others_are(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        tensor = torch.full((3,), value)
        torch.save({"x": tensor}, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=False)
    found = diff(tmp_path / "a.pt", tmp_path / "b.pt")
    assert found.same
    assert found.notices == []
    assert not diff(tmp_path / "a.pt", tmp_path / "c.pt").same


def test_a_tied_output_is_compared_with_the_embedding(tmp_path: Path) -> None:
    meta = Path(shutil.copytree(GOLDEN / "llama_tied" / "meta-mp2", tmp_path / "meta"))
    for file in sorted(meta.glob("*.pth")):
        tensors = torch.load(file, weights_only=True)
        tensors["output.weight"] = tensors["output.weight"].clone()
        tensors["output.weight"][0, 0] += 1
        torch.save(tensors, file)
    (change,) = changed(diff(GOLDEN / "llama_tied" / "hf", meta)).values()
    assert change.status == "differs"
    assert change.b is not None
    assert (change.key, change.b.key) == ("model.embed_tokens.weight", "output.weight")


def test_formats_that_no_table_connects_are_refused() -> None:
    with pytest.raises(errors.UnsupportedFamilyError, match="qwen2"):
        diff(GOLDEN / "qwen2" / "hf", GOLDEN / "llama" / "meta-mp2")


def test_another_family_of_the_same_format_is_compared_by_key() -> None:
    found = diff(GOLDEN / "llama" / "hf", GOLDEN / "mistral" / "hf")
    assert (found.aligned_by, found.same) == ("keys", False)


def test_a_file_of_no_known_format_is_compared_with_one_that_shares_its_keys(tmp_path: Path) -> None:
    native = GOLDEN / "llama" / "native.safetensors"
    tensors = read_safetensors(native) | {"extra.scale": torch.ones(2)}
    safetensors.torch.save_file(tensors, tmp_path / "more.safetensors")
    found = diff(native, tmp_path / "more.safetensors")
    assert found.aligned_by == "keys"
    assert {key: change.status for key, change in changed(found).items()} == {"extra.scale": "only_b"}
    safetensors.torch.save_file({"extra.scale": torch.ones(2)}, tmp_path / "other.safetensors")
    for sides in ((native, tmp_path / "other.safetensors"), (tmp_path / "other.safetensors", native)):
        with pytest.raises(errors.AmbiguousFormatError, match="`format_a=`, `format_b=`"):
            diff(*sides)


def test_two_files_without_any_config(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        safetensors.torch.save_file(
            {"x": torch.full((3,), value), "y": torch.ones(2)}, tmp_path / f"{name}.safetensors"
        )
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert found.aligned_by == "keys"
    (change,) = changed(found).values()
    assert change.key == "x"
    assert change.delta is not None
    assert (change.delta.max_abs, change.delta.relative_norm) == (1.0, 1.0)


def test_a_file_that_ends_early_is_an_error_that_names_it(hf: Path) -> None:
    file = max(hf.glob("*.safetensors"))
    with open_identified(GOLDEN / "llama" / "meta-mp2") as a, open_identified(hf) as b:
        with file.open("rb+") as opened:
            opened.truncate(file.stat().st_size - 1000)
        with pytest.raises(errors.CorruptFileError, match=file.name):
            compare_checkpoints(a, b)


def test_the_document_says_all_of_it(hf: Path) -> None:
    def flip(tensors: Tensors) -> None:
        if Q in tensors:
            tensors[Q].view(torch.int32)[1, 7] ^= 1

    rewrite(hf, flip)
    document = diff(GOLDEN / "llama" / "meta-mp2", hf).as_dict()
    assert json.loads(json.dumps(document)) == document
    assert document["same"] is False
    assert document["counts"] == {"same": 29, "differs": 1, "shape": 0, "dtype": 0, "only_a": 0, "only_b": 0}
    assert document["a"]["model_parallel"] == 2
    assert document["b"]["model_parallel"] is None
    assert document["a"]["parameters"] == sum(tensor.numel() for tensor in read_safetensors(hf).values())
    (entry,) = [entry for entry in document["tensors"] if entry["status"] == "differs"]
    assert (entry["key_a"], entry["key_b"]) == ("layers.0.attention.wq.weight", Q)
    assert entry["delta"]["where"] == [2, 7]


def test_the_document_says_what_each_side_has(hf: Path) -> None:
    def change(tensors: Tensors) -> None:
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
            tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()

    rewrite(hf, change)
    document = diff(GOLDEN / "llama" / "hf", hf).as_dict()
    entries = {entry["key_a"]: entry for entry in document["tensors"]}
    norm, output = entries["model.norm.weight"], entries["lm_head.weight"]
    assert (norm["status"], norm["dtype_a"], norm["dtype_b"]) == ("dtype", "F32", "F64")
    assert (output["status"], output["shape_a"], output["shape_b"]) == ("shape", [56, 72], [55, 72])


def test_the_document_has_the_notes(hf: Path) -> None:
    values = {key: value for key, value in read_safetensors(hf).items() if ".0.input_" in key or ".0.post_" in key}
    one, other = values

    def swap(tensors: Tensors) -> None:
        tensors.update({key: values[{one: other, other: one}[key]].clone() for key in values if key in tensors})

    rewrite(hf, swap)
    notes = {entry["key_b"]: entry["note"] for entry in diff(GOLDEN / "llama" / "hf", hf).as_dict()["tensors"]}
    assert {key: note for key, note in notes.items() if note} == {
        one: f"b has here what a has as {other}",
        other: f"b has here what a has as {one}",
    }
