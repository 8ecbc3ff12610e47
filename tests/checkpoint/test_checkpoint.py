"""Opening checkpoints: what they say of themselves, and reading tensors by key."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import ckpt_convert
from ckpt_convert.checkpoint.checkpoint import Checkpoint, open_identified
from ckpt_convert.errors import AmbiguousFormatError
from tests.helpers import CASES, GOLDEN, bits, read_meta, read_safetensors

HF = GOLDEN / "llama" / "hf"


@pytest.mark.parametrize("case", CASES)
def test_hf_from_its_headers(case: str) -> None:
    with open_identified(GOLDEN / case / "hf") as checkpoint:
        assert checkpoint.format == "hf"
        assert checkpoint.family == ("mistral" if case == "mistral" else "llama")
        assert checkpoint.config is not None
        assert checkpoint.config["hidden_size"] == 72
        expected = read_safetensors(GOLDEN / case / "hf")
        assert {key: info.shape for key, info in checkpoint.tensors.items()} == {
            key: tuple(tensor.shape) for key, tensor in expected.items()
        }
        for key, tensor in expected.items():
            info = checkpoint.tensors[key]
            assert (info.dtype, info.nbytes) == ("F32", tensor.nbytes)
            (part,) = info.parts
            data = (GOLDEN / case / "hf" / part.file).read_bytes()
            assert data[part.offset : part.offset + part.nbytes] == bits(tensor)
            assert bits(Checkpoint(checkpoint)[key].torch()) == bits(tensor)
            assert Checkpoint(checkpoint)[key].tobytes() == bits(tensor)


@pytest.mark.parametrize("case", ["llama", "llama2", "llama_tied"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_are_joined(case: str, ranks: int) -> None:
    directory = GOLDEN / case / f"meta-mp{ranks}"
    (whole,) = read_meta(GOLDEN / case / "meta-mp1")
    with open_identified(directory) as checkpoint:
        assert checkpoint.format == "meta"
        assert sorted(checkpoint.tensors) == sorted(whole)
        assert len(checkpoint.tensors) == len(whole)
        for key, tensor in whole.items():
            info = checkpoint.tensors[key]
            assert info.shape == tuple(tensor.shape), key
            assert [part.rank for part in info.parts] == list(range(ranks))
            assert info.nbytes == tensor.nbytes
            assert bits(Checkpoint(checkpoint)[key].torch()) == bits(tensor), key


def test_a_single_file_of_each_container(tmp_path: Path) -> None:
    native = GOLDEN / "llama" / "native.safetensors"
    with open_identified(native) as checkpoint:
        assert (checkpoint.format, checkpoint.family, checkpoint.config) == ("native", None, None)
        assert len(checkpoint.tensors) == 30
    with open_identified(GOLDEN / "llama" / "meta-mp1" / "consolidated.00.pth") as checkpoint:
        assert checkpoint.format == "meta"
        assert checkpoint.tensors["norm.weight"].shape == (72,)
    with ckpt_convert.open_checkpoint(native, config=HF / "config.json") as checkpoint:
        assert checkpoint.family == "llama"


def test_the_record_says_what_a_native_directory_is(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "native", to="native")
    with open_identified(tmp_path / "native") as checkpoint:
        assert checkpoint.format == "native"
        assert "manifest.json" in checkpoint.why
        assert checkpoint.model.dims["head_dim"] == 6


def test_hf_wins_over_consolidated_files_beside_it_unless_asked(tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(GOLDEN / "mistral" / "hf", both)
    for file in (GOLDEN / "mistral" / "meta-mp1").iterdir():
        shutil.copy(file, both)
    with ckpt_convert.open_checkpoint(both) as checkpoint:
        assert checkpoint.format == "hf"
        assert any("consolidated.00.pth" in notice for notice in checkpoint.notices)
    with open_identified(both, format="meta") as checkpoint:
        assert checkpoint.format == "meta"
        assert "output.weight" in checkpoint.tensors
    ckpt_convert.convert_checkpoint(both, tmp_path / "out", to="native", verify=True)
    assert not list((tmp_path / "out").glob("consolidated*"))


def test_safetensors_win_over_bin(tmp_path: Path) -> None:
    import torch

    both = tmp_path / "both"
    shutil.copytree(HF, both)
    torch.save({"model.norm.weight": torch.zeros(72)}, both / "pytorch_model.bin")
    with open_identified(both) as checkpoint:
        assert {file.name for file in checkpoint.files} == {file.name for file in HF.glob("*.safetensors")}


def test_a_single_file_wins_over_an_index_of_others_as_in_transformers(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    both = tmp_path / "both"
    shutil.copytree(HF, both)
    save_file(read_safetensors(HF), both / "model.safetensors", {"format": "pt"})
    with open_identified(both) as checkpoint:
        assert [file.name for file in checkpoint.files] == ["model.safetensors"]
        assert any("model-00001-of-00004.safetensors" in notice for notice in checkpoint.notices)
    ckpt_convert.convert_checkpoint(both, tmp_path / "out", to="native", verify=True)


def test_keys_that_fit_nothing_are_still_listed(tmp_path: Path) -> None:
    import torch

    torch.save({"step": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}, tmp_path / "train.pt")
    with open_identified(tmp_path / "train.pt") as checkpoint:
        assert checkpoint.format is None
        assert list(checkpoint.tensors) == ["optimizer.state.0.exp_avg"]
        assert any("step (int)" in notice for notice in checkpoint.notices)
        with pytest.raises(AmbiguousFormatError, match="`from_format=`"):
            _ = checkpoint.model


def test_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "bool": torch.tensor([True]),
    }
    save_file(tensors, tmp_path / "odd.safetensors")
    torch.save(tensors, tmp_path / "odd.pt")
    for name in ("odd.safetensors", "odd.pt"):
        with ckpt_convert.open_checkpoint(tmp_path / name) as checkpoint:
            for key, tensor in tensors.items():
                assert torch.equal(checkpoint[key].torch(), tensor)
                assert checkpoint[key].torch().dtype == tensor.dtype


def test_ranks_that_nothing_says_how_to_join_are_not_read_in_part(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "llama" / "meta-mp2", tmp_path / "meta")
    (tmp_path / "meta" / "params.json").unlink()
    with open_identified(tmp_path / "meta") as checkpoint:
        assert not checkpoint.tensors["norm.weight"].settled
        with pytest.raises(AmbiguousFormatError, match="nothing says how to join them"):
            Checkpoint(checkpoint)["layers.0.attention.wq.weight"].torch()
