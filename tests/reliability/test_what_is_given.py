"""What people give as PATH or have in their JSON, and is not quite what is expected: understood, or one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import ckpt_convert
from ckpt_convert import CheckpointNotFoundError, InputError, KeyMismatchError
from tests.command import run
from tests.helpers import GOLDEN, edit_json, sums

HF = GOLDEN / "llama" / "hf"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("expected") / "meta"
    ckpt_convert.convert_checkpoint(HF, place, to="meta")
    return sums(place)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HF, tmp_path / "source"))


def test_a_byte_order_mark(source: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    for name in ("config.json", INDEX):
        (source / name).write_bytes(b"\xef\xbb\xbf" + (source / name).read_bytes())
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="meta")
    assert sums(tmp_path / "out") == expected
    done = run("verify", source, "--quick")
    assert done.returncode == 1
    assert "config.json: starts with a byte order mark, which transformers does not read" in done.stdout


def test_an_index_that_names_its_directory(source: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    names = json.loads((source / INDEX).read_text())["weight_map"]
    edit_json(source / INDEX, weight_map={key: f"./{name}" for key, name in names.items()})
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="meta")
    assert sums(tmp_path / "out") == expected
    ckpt_convert.convert_checkpoint(source, tmp_path / "same", to="hf")
    assert sums(tmp_path / "same") == sums(source)
    assert run("verify", source).returncode == 0


def test_an_index_as_path(source: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    ckpt_convert.convert_checkpoint(source / INDEX, tmp_path / "out", to="meta")
    assert sums(tmp_path / "out") == expected
    assert run("verify", source / INDEX).returncode == 0
    shutil.copyfile(source / INDEX, source / "pytorch_model.bin.index.json")
    with pytest.raises(CheckpointNotFoundError, match=r"is an index, and not the one .* give the directory"):
        ckpt_convert.plan_conversion(source / "pytorch_model.bin.index.json", to="meta")


def test_a_part_as_path(source: Path, tmp_path: Path) -> None:
    """Of no use for a conversion; to be looked at, and checked for what can be checked of it."""
    shard = source / "model-00002-of-00004.safetensors"
    with pytest.raises(KeyMismatchError, match=f"is shard 2 of 4, and no whole model; give the directory, {source}$"):
        ckpt_convert.convert_checkpoint(shard, tmp_path / "out", to="meta")
    rank = GOLDEN / "llama" / "meta-mp2" / "consolidated.01.pth"
    with pytest.raises(InputError, match="is rank 1 of 2, and no whole model; give the directory"):
        ckpt_convert.convert_checkpoint(rank, tmp_path / "out", to="hf")
    for path, part in ((shard, "shard 2 of 4"), (rank, "rank 1 of 2")):
        done = run("verify", path)
        assert done.returncode == 0, done.stdout
        assert f"the file is {part}, and no whole model" in " ".join(done.stdout.split())
    with ckpt_convert.open_checkpoint(shard) as checkpoint:
        assert len(checkpoint) > 0


def test_a_folder_of_the_hubs_cache_as_path(tmp_path: Path, expected: dict[str, str]) -> None:
    folder = tmp_path / "models--org--name"
    shutil.copytree(HF, folder / "snapshots" / "0123abcd")
    shutil.copytree(HF, folder / "snapshots" / "older")
    with pytest.raises(
        CheckpointNotFoundError, match=r"does not say which snapshot is meant; give one of them .*older"
    ):
        ckpt_convert.plan_conversion(folder, to="meta")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")
    ckpt_convert.convert_checkpoint(folder, tmp_path / "out", to="meta")
    assert sums(tmp_path / "out") == expected
    assert "snapshots/0123abcd" in run("inspect", folder).stdout
    assert run("verify", folder, "--quick").returncode == 0
