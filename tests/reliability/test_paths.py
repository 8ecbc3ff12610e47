"""Paths that people give: addresses of no store are refused by name, ``~`` is the home directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ckpt_convert
from ckpt_convert import AdapterConfig, Checkpointer, CkptConvertError, InputError, OutputExistsError, UsageError
from tests.checkpointer.training import make_model
from tests.command import run
from tests.helpers import GOLDEN, edit_json, sums

HF = GOLDEN / "llama" / "hf"
ADDRESSES = ("r2://bucket/x", "hdfs://host/x", "ftp://host/x", "file:///tmp/x")
MANGLED = (Path("s3://bucket/x"), Path("gs://bucket/x"), Path("hf://org/name"))

TAKES_A_PATH: dict[str, Callable[[Any], Any]] = {
    "DST": lambda path: ckpt_convert.convert_checkpoint(HF, path, to="native"),
    "SRC": lambda path: ckpt_convert.convert_checkpoint(path, "out", to="native"),
    "plan": lambda path: ckpt_convert.plan_conversion(path, to="native"),
    "like": lambda path: ckpt_convert.plan_conversion(HF, to="hf", like=path),
    "config": lambda path: ckpt_convert.plan_conversion(HF, to="hf", config=path),
    "open_checkpoint": lambda path: ckpt_convert.open_checkpoint(path),
    "convert_state_dict": lambda path: ckpt_convert.convert_state_dict({}, path, source="hf", target="native"),
    "source": lambda path: Checkpointer(path, "out"),
    "output_dir": lambda path: Checkpointer(HF, path),
    "a list of files": lambda path: Checkpointer([path], "out"),
    "config of a source": lambda path: Checkpointer(None, "out", config=path),
    "extra_files": lambda path: Checkpointer(HF, "out", extra_files=[path]),
    "adapter": lambda path: AdapterConfig.of(path),
}


@pytest.mark.parametrize("what", TAKES_A_PATH)
def test_addresses_are_refused_by_name_wherever_a_path_is_taken(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for address in (*ADDRESSES, *MANGLED):
        scheme = str(address).partition(":")[0]
        with pytest.raises(UsageError, match=f"{scheme}:// addresses are not supported; "):
            TAKES_A_PATH[what](address)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["DST", "output_dir"])
def test_a_web_server_is_a_source_and_nothing_else(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"^{what} https://host/x: nothing can be written to a web server; "):
        TAKES_A_PATH[what]("https://host/x")
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_no_destination_for_the_hub_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"DST hf://org/name: .*`hf upload`"):
        ckpt_convert.convert_checkpoint(HF, "hf://org/name", to="native")
    with pytest.raises(UsageError, match=r"output_dir hf://org/name: "):
        Checkpointer(HF, "hf://org/name")
    for words in (
        ("hf-to-native", HF, "hdfs://host/x"),
        ("hf-to-native", HF, "r2://bucket/x", "--dry-run"),
        ("verify", "hdfs://host/x"),
        ("inspect", HF, "--html", "s3://bucket/x.html"),
    ):
        refused = run(*words)
        assert refused.returncode == 2, words
        assert "addresses are not supported" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_names_that_only_look_like_addresses_are_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("s3", "gs:bucket", "step:3", "./s3:/x", "C:x"):
        ckpt_convert.convert_checkpoint(HF, name, to="native")
        assert (tmp_path / name / "model.safetensors.index.json").exists()


def test_a_tilde_is_the_home_directory_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(HF, tmp_path / "model")
    (tmp_path / "notes.txt").write_text("mine")
    ckpt_convert.convert_checkpoint("~/model", "~/out", to="native", config="~/model/config.json")
    ckpt_convert.convert_checkpoint(Path("~/out"), Path("~/back"), to="hf", like="~/model")
    with ckpt_convert.open_checkpoint("~/model") as opened:
        assert opened.path == tmp_path / "model"
    model = make_model()
    with Checkpointer("~/model", "~/runs", contents="weights", extra_files=["~/notes.txt"]) as saver:
        saver.load_model(model)
        saver.register(model=model)
        saver.step()
    with Checkpointer([f"~/model/{path.name}" for path in HF.glob("*.safetensors")], "~/other") as saver:
        progress = saver.resume(model=model, from_="~/runs/step_1", weights_only=True)
    assert progress is not None
    assert sums(tmp_path / "runs" / "step_1").keys() == {*sums(HF), "notes.txt"}
    done = run("inspect", "~/back", "--html", "~/page.html", "--config=~/model/config.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").exists()
    assert os.listdir() == []


def test_an_output_dir_inside_the_source_is_refused_at_once(tmp_path: Path) -> None:
    source = shutil.copytree(HF, tmp_path / "source")
    for place in (source, source / "runs"):
        with pytest.raises(OutputExistsError, match="is inside the source"):
            Checkpointer(source, place)
    Checkpointer(source, tmp_path / "runs").close()
    assert sums(source) == sums(HF)


def test_names_longer_than_any_file_system_takes_are_one_sentence(tmp_path: Path) -> None:
    name = "x" * 300
    for call in (
        lambda: ckpt_convert.convert_checkpoint(HF, tmp_path / name, to="native"),
        lambda: ckpt_convert.convert_checkpoint(HF, tmp_path / name / "out", to="native"),
        lambda: ckpt_convert.convert_checkpoint(tmp_path / name, tmp_path / "out", to="native"),
        lambda: Checkpointer(HF, tmp_path / name),
    ):
        with pytest.raises(CkptConvertError, match="has a name of more than the 255 bytes"):
            call()
    source = shutil.copytree(HF, tmp_path / "source")
    index = source / "model.safetensors.index.json"
    edit_json(index, weight_map={"lm_head.weight": f"{name}.safetensors"})
    with pytest.raises(InputError, match=r"index\.json: names a file 'xxx.*longer than the 255 bytes"):
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="native")
    found = run("verify", source)
    assert found.returncode == 1
    assert "longer than the 255 bytes" in found.stdout
    assert "Errno" not in found.stdout + found.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
