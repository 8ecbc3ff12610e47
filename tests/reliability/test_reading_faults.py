"""Whatever the system fails to give while a checkpoint is read ends in one error that names the file."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ckpt_convert
from ckpt_convert import Checkpointer, CkptConvertError, UnreadableError
from tests.checkpointer.training import LLAMA, Trained, trainable
from tests.helpers import assert_same, read_safetensors, sums

STEP = {"open": 11}
"""Of how many calls one fails, 41 by default: all of them take minutes, and have been tried."""
CALLS = ("open", "stat", "lstat", "fstat", "scandir", "listdir", "preadv")


@contextmanager
def failing(call: str, number: int, below: Path) -> Iterator[list[str]]:
    """The n-th call of a function of os on a file below a directory fails with EIO; gives the path it was."""
    failed: list[str] = []
    left = number
    names: dict[int, str] = {}
    real = {name: getattr(os, name) for name in CALLS}

    def patched(name: str) -> Callable[..., Any]:
        def called(place: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal left
            path = names.get(place, "") if isinstance(place, int) else os.fspath(place)
            if name == call and str(path).startswith(str(below)):
                left -= 1
                if left == 0:
                    failed.append(str(path))
                    raise OSError(errno.EIO, os.strerror(errno.EIO), *([] if isinstance(place, int) else [path]))
            result = real[name](place, *arguments, **options)
            if name == "open":
                names[result] = str(path)
            return result

        return called

    for name in CALLS:
        setattr(os, name, patched(name))
    try:
        yield failed
    finally:
        for name, function in real.items():
            setattr(os, name, function)


@pytest.mark.parametrize("format", ["hf", "meta", "native", "torchtitan"])
def test_every_call_of_a_conversion_that_fails_once(format: str, tmp_path: Path) -> None:
    """One error with the file, and never the advice to remove what could not be read: that may pass."""
    source, to = tmp_path / "source", "native" if format == "hf" else "hf"
    if format == "hf":
        ckpt_convert.convert_checkpoint(LLAMA, tmp_path / "first", to="meta")
        ckpt_convert.convert_checkpoint(tmp_path / "first", source, to="hf")
    else:
        ckpt_convert.convert_checkpoint(LLAMA, source, to=format)
    ckpt_convert.convert_checkpoint(source, tmp_path / "expected", to=to)
    failures = 0
    for call in CALLS:
        for number in range(1, 10**6, STEP.get(call, 41)):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            with failing(call, number, source) as failed:
                try:
                    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to=to, workers=1)
                except CkptConvertError as error:
                    said = str(error)
                else:
                    said = ""
            if not failed:
                break
            failures += 1
            if said:
                assert "Input/output error" in said, (call, number, failed, said)
                assert failed[0] in said, (call, number, said)
                assert "remove" not in said, (call, number, said)
                assert not (tmp_path / "out").exists()
            else:  # what it was about came to light in another way
                assert sums(tmp_path / "out") == sums(tmp_path / "expected"), (call, number, failed)
    assert failures > 6


def test_a_config_that_cannot_be_read_is_not_a_missing_one(tmp_path: Path) -> None:
    """With a family that has no table the config may be missing, and is copied: then a fault must not drop it."""
    source = tmp_path / "source"
    source.mkdir()
    safetensors.torch.save_file({"a": torch.ones(3)}, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "mystery"}')
    for number in range(1, 99):
        with failing("open", number, source / "config.json") as failed:
            said = ""
            try:
                ckpt_convert.convert_checkpoint(source, tmp_path / str(number), to="hf")
            except UnreadableError as error:
                said = str(error)
        if not failed:
            break
        assert f"{source / 'config.json'}: cannot be opened: Input/output error" in said
        assert not (tmp_path / str(number)).exists()
    assert number > 1


def command(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line, after ``code`` was run in its process."""
    run = f"import sys\n{code}\nfrom ckpt_convert.__main__ import main\nmain()"
    whole = [sys.executable, "-c", run, *map(str, arguments)]
    return subprocess.run(whole, capture_output=True, text=True, check=False)


def test_an_error_of_a_worker_says_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that cannot be sent from one process to another."""
    file = tmp_path / "large.safetensors"  # enough that processes are worth their start; nothing of it is on the disk
    entries = {
        f"t{at}": {"dtype": "F32", "shape": [1 << 24], "data_offsets": [at << 26, at + 1 << 26]} for at in range(17)
    }
    header = json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file, file.stat().st_size + (17 << 26))
    (tmp_path / "sitecustomize.py").write_text("""
import os
class Odd(RuntimeError):
    def __init__(self, first, second):
        super().__init__(f"{first} {second}")
def preadv(*arguments):
    if os.environ["FAULT"] == "error":
        raise Odd("the moon", "is full")
    os.kill(os.getpid(), 9)
if os.getppid() != int(os.environ["TESTING"]):
    os.preadv = preadv
""")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("TESTING", str(os.getpid()))
    monkeypatch.setenv("FAULT", "error")
    done = command("", "inspect", file, "--stats", "--workers", 2)
    assert done.returncode == 1
    assert "Odd: the moon is full" in done.stderr
    assert "memory" not in done.stderr
    done = command("", "--debug", "inspect", file, "--stats", "--workers", 2)
    assert "in preadv" in done.stderr  # the traceback of the worker
    monkeypatch.setenv("FAULT", "kill")
    done = command("", "inspect", file, "--stats", "--workers", 2)
    assert done.returncode == 1
    assert "a worker process was killed, perhaps for lack of memory" in done.stderr


def test_without_torch(tmp_path: Path) -> None:
    """What needs it says so before anything is read; all else works, and writes the same bytes."""
    block = "sys.modules['torch'] = None"
    done = command(block, "verify", LLAMA, "--logits")
    assert done.returncode == 1
    assert "needs the package torch" in done.stderr
    assert "pip install 'ckpt-convert[train]'" in done.stderr
    conversions = [("hf-to-meta",), ("hf-to-torchtitan",), ("hf-to-native", "--dtype", "bfloat16")]
    for direction, *options in conversions:
        assert command(block, direction, LLAMA, tmp_path / direction, *options).returncode == 0
    ckpt_convert.convert_checkpoint(LLAMA, tmp_path / "expected", to="native", dtype="bfloat16")
    assert sums(tmp_path / "hf-to-native") == sums(tmp_path / "expected")


# Files that others write


def test_torchtunes_list_of_files_with_its_recipe_state_beside_them(tmp_path: Path) -> None:
    source = trainable(tmp_path / "epoch_0")
    for shard in source.glob("*.safetensors"):
        torch.save(safetensors.torch.load_file(shard), shard.with_suffix(".bin"))
        shard.unlink()
    index = source / "model.safetensors.index.json"
    index.unlink()
    for number, shard in enumerate(sorted(source.glob("*.bin")), 1):
        shard.rename(source / f"pytorch_model-{number:05d}-of-00004.bin")
    for name in ("recipe_state.pt", "rng_state.pth", "training_args.bin", "scaler.pt", "optimizer.bin"):
        torch.save({"epochs_run": 1, "moments": torch.ones(4)}, source / name)
    weights = sorted(source.glob("pytorch_model*.bin"))
    with Checkpointer(weights, tmp_path / "run") as checkpointer:
        checkpointer.load_model(Trained(LLAMA).model)
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="native", container="safetensors")
    ckpt_convert.convert_checkpoint(trainable(tmp_path / "same"), tmp_path / "expected", to="native")
    assert_same(read_safetensors(tmp_path / "out"), read_safetensors(tmp_path / "expected"))
    epoch = tmp_path / "epoch_1"
    epoch.mkdir()
    torch.save(read_safetensors(tmp_path / "expected"), epoch / "torchtune_model_0.pt")
    torch.save({"epochs_run": 1, "moments": torch.ones(4)}, epoch / "recipe_state.pt")
    listed, config = [epoch / "torchtune_model_0.pt"], LLAMA / "config.json"
    Checkpointer(listed, tmp_path / "other", source_format="native", config=config).close()
    ckpt_convert.convert_checkpoint(epoch, tmp_path / "back", to="hf", config=config)
    assert_same(read_safetensors(tmp_path / "back"), read_safetensors(tmp_path / "same"))


class _Numbered(pickle.Pickler):
    """Calls storages by whole numbers, as litgpt's incremental_save does."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[Any] = []

    def persistent_id(self, value: object) -> object:
        if not isinstance(value, torch.storage.TypedStorage):
            return None
        self.storages.append(value)
        return "storage", torch.FloatStorage, len(self.storages) - 1, "cpu", value.size()


def test_storages_that_are_called_by_whole_numbers(tmp_path: Path) -> None:
    tensors = read_safetensors(LLAMA)
    data = io.BytesIO()
    pickler = _Numbered(data)
    pickler.dump(tensors)
    with zipfile.ZipFile(tmp_path / "lit_model.pth", "w") as archive:
        archive.writestr("lit_model/data.pkl", data.getvalue())
        archive.writestr("lit_model/byteorder", "little")
        for number, storage in enumerate(pickler.storages):
            archive.writestr(f"lit_model/data/{number}", bytes(storage.untyped()))
        archive.writestr("lit_model/version", "3\n")
    assert_same(torch.load(tmp_path / "lit_model.pth"), tensors)  # torch reads it
    with ckpt_convert.open_checkpoint(tmp_path / "lit_model.pth") as checkpoint:
        assert_same({key: checkpoint[key].torch() for key in checkpoint}, tensors)
