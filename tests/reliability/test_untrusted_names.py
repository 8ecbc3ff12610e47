"""No name that a file says is opened outside the checkpoint's directory, and nothing but regular files is."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import xxhash

import ckpt_convert
from ckpt_convert import Checkpointer, CkptConvertError
from tests.checkpointer.training import LLAMA, Trained, trainable
from tests.command import run
from tests.helpers import GOLDEN, edit_json, sums


@contextmanager
def at_most(seconds: int = 20) -> Iterator[None]:
    """A pipe that nobody writes to is waited for without end."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved step with training state, whose manifest names its files."""
    folder = tmp_path_factory.mktemp("run")
    trained = Trained(trainable(folder / "source"))
    with Checkpointer(folder / "source", folder / "out", save_every=1) as checkpointer:
        checkpointer.register(**trained.parts)
        trained.go(checkpointer, 1)
    return folder / "out" / "step_1"


@pytest.mark.parametrize("name", ["/etc/passwd", "../../outside", "link", "/dev/zero", "pipe"])
def test_the_files_that_a_manifest_names(step: Path, tmp_path: Path, name: str) -> None:
    """They have the size and checksum that it says, so whoever opens them finds nothing wrong."""
    copy = tmp_path / "a" / "step_1"
    shutil.copytree(step, copy)
    (tmp_path / "outside").write_text("a secret")
    (copy / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(copy / "pipe")
    place = copy / name
    data = place.read_bytes() if place.is_file() else b""
    entry = {"size": len(data), "checksum": xxhash.xxh3_64_hexdigest(data)}
    manifest = json.loads((copy / "ckpt_convert" / "manifest.json").read_text())
    manifest["training"]["extra_files"] = {name: entry}
    said = {name: value for name, value in manifest.items() if name != "manifest_checksum"}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))  # as the manifest's checksum is of
    manifest["manifest_checksum"] = xxhash.xxh3_64_hexdigest(text.encode())
    (copy / "ckpt_convert" / "manifest.json").write_text(json.dumps(manifest))
    with at_most(30):
        done = run("verify", copy, "--json", code=1)
    errors = [finding for finding in json.loads(done.stdout)["findings"] if finding["severity"] == "error"]
    assert any(finding["file"] == name for finding in errors), errors


def _pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def _device(path: Path, _: Path) -> None:
    path.symlink_to("/dev/zero")


def _leaving(path: Path, was: Path) -> None:
    path.symlink_to(was)


@pytest.mark.parametrize("replace", [_pipe, _device, _leaving], ids=["pipe", "device", "link"])
@pytest.mark.parametrize("format", ["hf", "meta", "torchtitan"])
def test_each_file_of_a_checkpoint(format: str, replace: Callable[[Path, Path], None], tmp_path: Path) -> None:
    """A pipe or a device in its place is never read, a link out of the directory never followed."""
    kept, source, outside = tmp_path / "kept", tmp_path / "source", tmp_path / "outside"
    if format == "hf":
        ckpt_convert.convert_checkpoint(LLAMA, tmp_path / "native", to="native")
        ckpt_convert.convert_checkpoint(tmp_path / "native", kept, to="hf")
    else:
        ckpt_convert.convert_checkpoint(LLAMA, kept, to=format)
    expected = "native" if format == "hf" else "hf"
    for name in [path.relative_to(kept).as_posix() for path in sorted(kept.rglob("*")) if path.is_file()]:
        if replace is not _leaving and name == "ckpt_convert/layouts/hf/index.json":
            continue  # where the index was is not needed on this way
        shutil.copytree(kept, source)
        outside.mkdir()
        shutil.move(source / name, outside / "file")
        with (outside / "file").open("ab") as file:
            file.write(b"\n\n")  # so that it is known again
        replace(source / name, outside / "file")
        said = ""
        with at_most():
            try:
                ckpt_convert.convert_checkpoint(source, tmp_path / "out", to=expected)
            except CkptConvertError as error:
                said = str(error)
        if said:
            assert Path(name).name in said or "config" in said or "weight files" in said, (name, said)
        else:  # it was left out, which is said, or not needed
            out = {path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
            assert (outside / "file").read_bytes() not in out or replace is not _leaving, name
        for folder in (source, outside, tmp_path / "out"):
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.model"])
def test_verify_says_what_is_no_file(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(LLAMA, source)
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    with at_most(30):
        done = run("verify", source, "--quick", code=1)
    assert f"{name}" in done.stdout
    assert "is not a regular file" in done.stdout


def test_the_config_of_like(tmp_path: Path) -> None:
    like = tmp_path / "like"
    shutil.copytree(LLAMA, like)
    (like / "config.json").unlink()
    os.mkfifo(like / "config.json")
    with at_most(), pytest.raises(CkptConvertError, match=r"config\.json"):
        ckpt_convert.convert_checkpoint(GOLDEN / "llama" / "meta-mp2", tmp_path / "out", to="hf", like=like)


def test_a_file_of_a_kind_is_of_its_size(tmp_path: Path) -> None:
    """A sparse file of a terabyte costs nobody anything to make, and memory to read."""
    source = tmp_path / "source"
    shutil.copytree(LLAMA, source)
    for name in ("config.json", "model.safetensors.index.json", "generation_config.json"):
        data = (source / name).read_bytes()
        os.truncate(source / name, 1 << 40)
        if name != "generation_config.json":
            with pytest.raises(CkptConvertError, match=f"{name}: has 1,099,511,627,776 bytes"):
                ckpt_convert.plan_conversion(source, to="meta")
        (source / name).write_bytes(data)


# What is legitimate


def test_names_below_the_directory_and_links_into_a_cache(tmp_path: Path) -> None:
    """The Hub's cache links every file into its ``blobs``; an index may say "./" and name files in folders."""
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(LLAMA.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    ckpt_convert.convert_checkpoint(snapshot, tmp_path / "cached", to="meta")
    folder = tmp_path / "folder"
    shutil.copytree(LLAMA, folder)
    (folder / "weights").mkdir()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for shard in folder.glob("*.safetensors"):
        shard.rename(folder / "weights" / shard.name)
    names = {key: f"./weights/{name}" for key, name in index["weight_map"].items()}
    edit_json(folder / "model.safetensors.index.json", weight_map=names)
    ckpt_convert.convert_checkpoint(folder, tmp_path / "folded", to="meta")
    ckpt_convert.convert_checkpoint(LLAMA, tmp_path / "plain", to="meta")
    plain = sums(tmp_path / "plain")
    assert sums(tmp_path / "cached") == sums(tmp_path / "folded") == plain
    assert run("verify", folder).returncode == 0
