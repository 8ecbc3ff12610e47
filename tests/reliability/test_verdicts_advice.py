"""What is said of a checkpoint that cannot be used as it is: one cause, the next command, never to remove weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.helpers import GOLDEN, read_safetensors
from tests.reliability.commands import run

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
