"""torchtitan's directories, and other formats in torch.distributed.checkpoint's container, with torch as the judge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

import ckpt_convert
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.checkpoint.record import load_record
from ckpt_convert.errors import ConfigError, KeyMismatchError, UsageError
from ckpt_convert.storage.place import as_place
from tests.containers.test_dcp import Box, written
from tests.helpers import GOLDEN, Tensors, assert_same, edit_json, read_safetensors, sums

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def hf(case: str = "llama") -> Path:
    return GOLDEN / case / "hf"


def golden(case: str = "llama") -> Tensors:
    return read_safetensors(GOLDEN / case / "torchtitan.safetensors")


def save(state: dict[str, Any], directory: Path) -> None:
    dcp.state_dict_saver.save(state, checkpoint_id=directory, no_dist=True)


def by_torch(directory: Path, like: Tensors) -> Tensors:
    """What torch itself loads of these keys."""
    state = {key: torch.full_like(tensor, -1) for key, tensor in like.items()}
    dcp.state_dict_loader.load(state, checkpoint_id=directory, no_dist=True)
    return state


def halves(tensor: torch.Tensor) -> list[tuple[int, Box]]:
    """The boxes of two ranks, the first of which has more."""
    if not tensor.dim() or tensor.shape[0] < 2:
        return [(0, ((0,) * tensor.dim(), tuple(tensor.shape)))]
    rest = tuple(tensor.shape[1:])
    first = tensor.shape[0] // 2 + 1
    zeros = (0,) * len(rest)
    return [(0, ((0, *zeros), (first, *rest))), (1, ((first, *zeros), (tensor.shape[0] - first, *rest)))]


@pytest.mark.parametrize("case", ["llama", "llama2", "llama_tied"])
def test_from_hf_and_back(case: str, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(hf(case), tmp_path / "titan", to="torchtitan", verify=True)
    assert_same(by_torch(tmp_path / "titan", golden(case)), golden(case))
    saved = dcp.filesystem.FileSystemReader(tmp_path / "titan").read_metadata().state_dict_metadata
    assert saved.keys() == golden(case).keys()
    assert not (tmp_path / "titan" / "config.json").exists()
    ckpt_convert.convert_checkpoint(tmp_path / "titan", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(hf(case))


def test_numbers_of_half_a_byte(tmp_path: Path) -> None:
    """safetensors counts numbers, torch pairs of them."""
    key, ours = "model.layers.1.mlp.down_proj.weight", "layers.1.feed_forward.w2.weight"
    tensors = read_safetensors(hf())
    rows, columns = tensors[key].shape
    tensors[key] = torch.arange(rows * columns // 2).to(torch.uint8).view(torch.float4_e2m1fn_x2).reshape(rows, -1)
    source = tmp_path / "source"
    source.mkdir()
    shutil.copyfile(hf() / "config.json", source / "config.json")
    safetensors.torch.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    ckpt_convert.convert_checkpoint(source, tmp_path / "titan", to="torchtitan", verify=True)
    found = {ours: torch.empty_like(tensors[key])}
    dcp.state_dict_loader.load(found, checkpoint_id=tmp_path / "titan", no_dist=True)
    assert torch.equal(found[ours].view(torch.uint8), tensors[key].view(torch.uint8))
    ckpt_convert.convert_checkpoint(tmp_path / "titan", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(source)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_from_meta_and_back(ranks: int, tmp_path: Path) -> None:
    source = GOLDEN / "llama" / f"meta-mp{ranks}"
    ckpt_convert.convert_checkpoint(source, tmp_path / "titan", to="torchtitan")
    assert_same(by_torch(tmp_path / "titan", golden()), golden())
    ckpt_convert.convert_checkpoint(tmp_path / "titan", tmp_path / "native", to="native")
    assert_same(read_safetensors(tmp_path / "native"), read_safetensors(GOLDEN / "llama" / "native.safetensors"))
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="meta")
    assert sums(tmp_path / "back") == sums(source)


def test_what_torch_wrote_comes_back_byte_for_byte(tmp_path: Path) -> None:
    save(golden(), tmp_path / "titan")
    config = hf() / "config.json"
    report = ckpt_convert.convert_checkpoint(tmp_path / "titan", tmp_path / "hf", to="hf", config=config)
    assert report.family == "llama"
    assert_same(read_safetensors(tmp_path / "hf"), read_safetensors(hf()))
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="torchtitan", verify=True)
    assert sums(tmp_path / "back") == sums(tmp_path / "titan")
    assert_same(by_torch(tmp_path / "back", golden()), golden())


def test_pieces_of_two_ranks_are_joined_and_cut_again(tmp_path: Path) -> None:
    written(tmp_path / "titan", {key: (tensor, halves(tensor)) for key, tensor in golden().items()})
    ckpt_convert.convert_checkpoint(
        tmp_path / "titan", tmp_path / "hf", to="hf", config=hf() / "config.json", verify=True
    )
    assert_same(read_safetensors(tmp_path / "hf"), read_safetensors(hf()))
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="torchtitan")
    assert sums(tmp_path / "back") == sums(tmp_path / "titan")


@pytest.mark.parametrize("cut", [False, True])
def test_metadata_of_each_rank_is_written_as_one(cut: bool, tmp_path: Path) -> None:
    whole = {key: [(0, ((0,) * tensor.dim(), tuple(tensor.shape)))] for key, tensor in golden().items()}
    written(tmp_path / "titan", {k: (t, halves(t) if cut else whole[k]) for k, t in golden().items()})
    (tmp_path / "titan" / ".metadata").rename(tmp_path / "titan" / "__0.metadata")
    ckpt_convert.convert_checkpoint(tmp_path / "titan", tmp_path / "hf", to="hf", config=hf() / "config.json")
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="torchtitan", verify=True)
    assert_same(by_torch(tmp_path / "back", golden()), golden())


def test_pieces_that_cannot_be_cut_as_they_were_are_written_whole(tmp_path: Path) -> None:
    written(tmp_path / "titan", {key: (tensor, halves(tensor)) for key, tensor in golden().items()})
    ckpt_convert.convert_checkpoint(tmp_path / "titan", tmp_path / "hf", to="hf", config=hf() / "config.json")
    report = ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="torchtitan", dtype="bfloat16")
    assert any("the recorded torchtitan layout splits tensors into pieces" in text for text in report.notices)
    expected = {key: tensor.bfloat16() for key, tensor in golden().items()}
    assert_same(by_torch(tmp_path / "back", expected), expected)


def test_a_checkpoint_of_a_training_run_is_read_for_its_weights(tmp_path: Path) -> None:
    weights = golden()
    first = next(iter(weights))
    state: dict[str, Any] = {
        **weights,
        "optimizer": {f"state.{first}.exp_avg": torch.zeros_like(weights[first]), "param_groups.lr": 1e-3},
        "lr_scheduler": {"last_epoch": 3},
        "train_state": {"step": torch.tensor(3), "ntokens_seen": torch.tensor(7)},
        "dataloader": {"dp_rank_0": b"state"},
    }
    save(state, tmp_path / "step-3")
    report = ckpt_convert.convert_checkpoint(tmp_path / "step-3", tmp_path / "hf", to="hf", config=hf() / "config.json")
    assert_same(read_safetensors(tmp_path / "hf"), read_safetensors(hf()))
    assert "skipped, as they are no weights: 3 tensors of optimizer, train_state" in report.notices
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="torchtitan")
    assert_same(by_torch(tmp_path / "back", weights), weights)


@pytest.mark.parametrize("format", ["hf", "native", "torchtitan"])
@pytest.mark.parametrize("container", ["dcp", "pt"])
def test_any_format_in_either_container(format: str, container: str, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(hf(), tmp_path / "out", to=format, container=container, verify=True)
    expected = (
        read_safetensors(hf()) if format == "hf" else read_safetensors(GOLDEN / "llama" / f"{format}.safetensors")
    )
    if container == "pt":
        assert_same(torch.load(tmp_path / "out" / "model.pt", weights_only=True), expected)
    else:
        assert_same(by_torch(tmp_path / "out", expected), expected)
    with ckpt_convert.open_checkpoint(tmp_path / "out") as opened:
        assert opened.format == format
    other = "dcp" if container == "pt" else "pt"
    ckpt_convert.convert_checkpoint(tmp_path / "out", tmp_path / "other", to=format, container=other, verify=True)
    ckpt_convert.convert_checkpoint(tmp_path / "other", tmp_path / "back", to="hf", container="safetensors", shards=2)
    assert_same(read_safetensors(tmp_path / "back"), read_safetensors(hf()))


@pytest.mark.parametrize("form", ["native", "torchtitan"])
def test_without_a_record_keys_tell_the_format(form: str, tmp_path: Path) -> None:
    expected = read_safetensors(GOLDEN / "llama" / f"{form}.safetensors")
    save(expected, tmp_path / "dcp")
    torch.save(expected, tmp_path / "one.pt")
    for path in (tmp_path / "dcp", tmp_path / "dcp" / ".metadata", tmp_path / "one.pt"):
        with open_identified(path) as opened:
            assert (opened.format, opened.why) == (form, "its keys")
    with pytest.raises(ConfigError, match="so the model's sizes are not known; pass `config="):
        ckpt_convert.convert_checkpoint(tmp_path / "dcp", tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()


def test_shards_become_files_of_one_rank(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(hf(), tmp_path / "titan", to="torchtitan", shards=3)
    assert {path.name for path in (tmp_path / "titan").glob("*.distcp")} == {f"__0_{n}.distcp" for n in range(3)}
    assert_same(by_torch(tmp_path / "titan", golden()), golden())
    record = load_record(as_place(tmp_path / "titan"))
    assert record is not None
    assert record.manifest["format"] == "torchtitan"


def test_an_edited_file_is_found(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from ckpt_convert.cli import cli

    ckpt_convert.convert_checkpoint(hf(), tmp_path / "titan", to="torchtitan")
    assert CliRunner().invoke(cli, ["verify", str(tmp_path / "titan")], standalone_mode=False).return_value == 0
    manifest = json.loads((tmp_path / "titan/ckpt_convert/manifest.json").read_text())
    name, place = next(
        (name, piece[1])
        for name, file in manifest["files"].items()
        for piece in file["pieces"]
        if piece[0] == "norm.weight"
    )
    with (tmp_path / "titan" / name).open("r+b") as handle:
        handle.seek(place + 5)
        byte = handle.read(1)
        handle.seek(place + 5)
        handle.write(bytes([byte[0] ^ 1]))
    result = CliRunner().invoke(cli, ["verify", str(tmp_path / "titan")], standalone_mode=False)
    assert result.return_value == 1
    assert "norm.weight" in result.output


def test_a_family_without_the_column(tmp_path: Path) -> None:
    with pytest.raises(ckpt_convert.UnsupportedFamilyError, match="the mistral table has no torchtitan column"):
        ckpt_convert.convert_checkpoint(hf("mistral"), tmp_path / "out", to="torchtitan")


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`container='safetensors'` does not fit torchtitan; expected dcp or pt"):
        ckpt_convert.convert_checkpoint(hf(), tmp_path / "out", to="torchtitan", container="safetensors")
    with pytest.raises(UsageError, match="`model_parallel=` does not fit torchtitan"):
        ckpt_convert.convert_checkpoint(hf(), tmp_path / "out", to="torchtitan", model_parallel=2)


def test_missing_keys_are_named(tmp_path: Path) -> None:
    weights = golden()
    del weights["layers.1.attention.qkv_linear.wk.weight"]
    save(weights, tmp_path / "dcp")
    with pytest.raises(KeyMismatchError, match=r"layers\.1\.attention\.qkv_linear\.wk\.weight \[24, 72\]"):
        ckpt_convert.convert_checkpoint(tmp_path / "dcp", tmp_path / "out", to="hf", config=hf() / "config.json")


def test_a_config_beside_a_directory_does_not_make_it_hf(tmp_path: Path) -> None:
    save(golden(), tmp_path / "dcp")
    shutil.copy(hf() / "config.json", tmp_path / "dcp")
    edit_json(tmp_path / "dcp" / "config.json", transformers_version="5")
    with ckpt_convert.open_checkpoint(tmp_path / "dcp") as opened:
        assert opened.format == "torchtitan"
