"""A ``training_state/`` directory holds the state exactly, is one of torch's, and unpickles nothing when read."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.checkpointer.state import dcp_files, training_state
from ckpt_convert.checkpointer.state.serialize import SerializedState, serialize
from ckpt_convert.checkpointer.state.training_state import DESCRIPTION, StateReader
from ckpt_convert.errors import (
    CheckpointNotFoundError,
    CkptConvertError,
    ConfigError,
    CorruptFileError,
    InputError,
    NotEnoughSpaceError,
    UnwritableError,
    UsageError,
)
from ckpt_convert.storage.folder import Folder, StagedFile
from ckpt_convert.storage.place import as_place
from ckpt_convert.tensors.header import Box


def write(path: Path, state: Any) -> dict[str, dict[str, Any]]:
    path.mkdir(exist_ok=True)
    with Folder.at(path) as folder:
        return training_state.write_state(folder, state)


def read(path: Path, parts: Any = None) -> Any:
    return training_state.read_state(as_place(path), parts)


def open_state(path: Path) -> StateReader:
    return training_state.open_state(as_place(path))


def check(path: Path, files: Any, checksums: bool = True) -> list[str]:
    return training_state.check_state(as_place(path), files, checksums)


def optimizer() -> dict[str, Any]:
    return {
        "state": {
            "layers.0.attn.q_proj.weight": {
                "exp_avg": torch.arange(12.0).reshape(3, 4),
                "step": torch.tensor(7.0),
                "empty": torch.empty(0, 3),
            },
            "tok": {"exp_avg": torch.randn(5, 2).bfloat16(), "q": torch.arange(9).to(torch.uint8)},
        },
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": ["layers.0.attn.q_proj.weight", "tok"]}],
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    parts = {"optimizer": serialize(optimizer()), "a/b": serialize({0: torch.ones(2)}), "plain": serialize({"step": 3})}
    write(tmp_path / "state", parts)
    return tmp_path / "state"


def test_parts_come_back(saved: Path) -> None:
    torch.manual_seed(0)
    found = read(saved)
    assert list(found) == ["optimizer", "a/b", "plain"]
    assert found["plain"] == {"step": 3}
    assert found["a/b"].keys() == {0}
    assert found["optimizer"]["groups"] == optimizer()["groups"]
    first = found["optimizer"]["state"]["layers.0.attn.q_proj.weight"]
    assert torch.equal(first["exp_avg"], torch.arange(12.0).reshape(3, 4))
    assert first["step"].shape == ()
    assert first["empty"].shape == (0, 3)


@pytest.mark.parametrize("large", [0, 1 << 16, (1 << 16) + 1], ids=["small", "at the limit", "above it"])
def test_small_tensors_are_written_together(large: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save makes dozens of calls for each; one that is large is written as it is, between those around it."""
    written: list[int] = []
    true = StagedFile.write

    def counted(self: StagedFile, offset: int, data: memoryview) -> None:
        written.append(len(data))
        true(self, offset, data)

    monkeypatch.setattr(StagedFile, "write", counted)
    tree = {str(number): torch.tensor([number, large]) for number in range(100)}
    tree["50"] = torch.arange(large, dtype=torch.uint8)
    write(tmp_path / "s", serialize(tree))
    assert len(written) < 16
    assert (large in written) is (large > 0)
    found = read(tmp_path / "s")
    assert all(torch.equal(found[key], tensor) for key, tensor in tree.items())


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.arange(600, dtype=torch.float32).reshape(20, 30)
    tree = {
        "transposed": base.t(),
        "part of a storage": base[3:5],
        "column": base[:, 7],
        "expanded": base[0, :1].expand(4),
        "nan": torch.tensor([float("nan")]).view(torch.int32).add(5).view(torch.float32),
        "float8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "complex32": torch.arange(8, dtype=torch.uint8).view(torch.complex32),
        "bool": torch.tensor([True, False]),
        "uint64": torch.tensor([2**64 - 1], dtype=torch.uint64),
        "scalar": torch.tensor(True),
    }
    write(tmp_path / "s", serialize(tree))
    found = read(tmp_path / "s")
    assert list(found) == list(tree)
    for key, tensor in tree.items():
        assert found[key].dtype == tensor.dtype, key
        assert found[key].shape == tensor.shape, key
        same = [one.contiguous().reshape(-1).view(torch.uint8).tolist() for one in (found[key], tensor)]
        assert same[0] == same[1], key


def test_only_the_bytes_of_a_view_are_written(tmp_path: Path) -> None:
    big = torch.zeros(1_000_000)
    write(tmp_path / "s", serialize({"a": big[:10], "b": big[500:520].view(4, 5)}))
    assert sum(file.stat().st_size for file in (tmp_path / "s").iterdir()) < 20_000


def test_torch_loads_it(saved: Path) -> None:
    state = {
        "optimizer/state/layers.0.attn.q_proj.weight/exp_avg": torch.zeros(3, 4),
        "optimizer/state/tok/q": torch.zeros(9, dtype=torch.uint8),
        "a%2Fb/0": torch.zeros(2),
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(saved), no_dist=True)
    assert torch.equal(state["optimizer/state/layers.0.attn.q_proj.weight/exp_avg"], torch.arange(12.0).reshape(3, 4))
    assert torch.equal(state["optimizer/state/tok/q"], torch.arange(9).to(torch.uint8))
    assert torch.equal(state["a%2Fb/0"], torch.ones(2))


def test_inspect_shows_it(saved: Path) -> None:
    with open_identified(saved) as checkpoint:
        shapes = {key: tuple(info.shape) for key, info in checkpoint.tensors.items()}
    assert shapes["optimizer/state/tok/exp_avg"] == (5, 2)
    assert shapes["optimizer/state/layers.0.attn.q_proj.weight/step"] == ()


def test_some_parts_are_read_without_the_others(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = training_state.StateReader.tensor

    def recorded(self: Any, key: str, into: Any = None) -> torch.Tensor:
        asked.append(key)
        return original(self, key, into)

    monkeypatch.setattr(training_state.StateReader, "tensor", recorded)
    assert list(read(saved, ["a/b", "plain"])) == ["a/b", "plain"]
    assert asked == [DESCRIPTION, "a%2Fb/0"]
    with pytest.raises(UsageError, match="has no part scheduler; it has: optimizer, a/b, plain"):
        read(saved, ["scheduler"])


def test_one_tensor_can_be_read_into_another(saved: Path) -> None:
    state = open_state(saved)
    key = "optimizer/state/layers.0.attn.q_proj.weight/exp_avg"
    assert state.shape(key) == (3, 4)
    parameter = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.bfloat16))
    state.tensor(key, parameter)
    assert torch.equal(parameter, torch.arange(12.0).reshape(3, 4).bfloat16())
    with pytest.raises(UsageError, match=r"of shape \[3, 4\], which does not fit \[12\]"):
        state.tensor(key, torch.zeros(12))


def test_a_state_without_parts(tmp_path: Path) -> None:
    write(tmp_path / "s", serialize([1, torch.ones(1)]))
    assert read(tmp_path / "s")[0] == 1
    with pytest.raises(UsageError, match="has no parts"):
        read(tmp_path / "s", ["a"])


def test_the_same_state_gives_the_same_files(tmp_path: Path) -> None:
    one, other = (write(tmp_path / name, {"o": serialize({"a": torch.ones(3), "b": {1, "x"}})}) for name in "ab")
    assert one == other


def test_several_threads_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of many chunks, the last of them not full, between others."""
    monkeypatch.setattr(dcp_files, "_CHUNK", 1 << 12)
    state = serialize({"small": torch.ones(3), "large": torch.arange(40_001.0), "last": torch.zeros(5)})
    for name, workers in (("one", 1), ("three", 3)):
        with Folder.at(_made(tmp_path / name)) as folder:
            files = training_state.write_state(folder, state, workers)
        assert check(tmp_path / name, files) == []
    assert (tmp_path / "one/__0_0.distcp").read_bytes() == (tmp_path / "three/__0_0.distcp").read_bytes()
    assert torch.equal(read(tmp_path / "three")["large"], torch.arange(40_001.0))


def test_tensors_in_pieces_are_put_together(tmp_path: Path) -> None:
    """As several ranks will write them: here one file holds two halves under one key."""
    write(tmp_path / "s", serialize({"a": torch.arange(12.0).reshape(4, 3)}))
    state = open_state(tmp_path / "s")
    reader, stored = state.tensors["a"][0]
    halves = [stored._replace(shape=(2, 3), box=Box((4, 3), (row, 0))) for row in (0, 2)]

    class Half:
        def __init__(self, skip: int) -> None:
            self.name, self.size, self.skip = reader.name, reader.size, skip

        def readinto(self, offset: int, buffer: memoryview) -> None:
            reader.readinto(offset + self.skip, buffer)

    joined = training_state.StateReader(
        state.place, None, {"a": tuple(zip((Half(0), Half(24)), halves, strict=True))}, {"$": "tensor", "at": "a"}
    )
    assert torch.equal(joined.read(), torch.arange(12.0).reshape(4, 3))


def test_written_once(saved: Path) -> None:
    with pytest.raises(UnwritableError, match="cannot be made: File exists"):
        write(saved, serialize({}))


def test_the_name_of_the_description_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="call yours something else"):
        write(tmp_path / "s", serialize({DESCRIPTION: torch.ones(1)}))


def test_check_finds_what_is_wrong(tmp_path: Path) -> None:
    files = write(tmp_path / "s", serialize({"a": torch.ones(1000)}))
    assert sorted(files) == [".metadata", "__0_0.distcp"]
    assert check(tmp_path / "s", files) == []
    data = tmp_path / "s" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    (problem,) = check(tmp_path / "s", files)
    assert "__0_0.distcp: was edited or damaged" in problem
    assert check(tmp_path / "s", files, checksums=False) == []
    os.truncate(data, 100)
    (problem,) = check(tmp_path / "s", files, checksums=False)
    assert "bytes, but has 100" in problem
    (tmp_path / "s" / ".metadata").unlink()
    assert check(tmp_path / "s", files)[0].startswith(".metadata: is missing")


def test_every_error_says_what_to_do(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="resume from another checkpoint"):
        read(tmp_path / "nothing")
    data = saved / "__0_0.distcp"
    os.truncate(data, data.stat().st_size - 3000)
    with pytest.raises(CorruptFileError, match="copy it again"):
        read(saved)
    data.unlink()
    with pytest.raises(InputError):
        read(saved)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_damage_anywhere_is_an_error_of_ours_or_changes_a_value(saved: Path, tmp_path: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    for start in range(0, len(content), max(len(content) // 60, 1)):
        damaged = tmp_path / "damaged"
        shutil.copytree(saved, damaged)
        (damaged / name).write_bytes(content[:start] + bytes([content[start] ^ 0xFF]) + content[start + 1 :])
        with contextlib.suppress(CkptConvertError):
            read(damaged)
        shutil.rmtree(damaged)


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    _with_description(tmp_path / "s", {"version": 3, "tree": None})
    with pytest.raises(ConfigError, match="of version 3, and this ckpt-convert knows versions up to 2; update it"):
        read(tmp_path / "s")


@pytest.mark.parametrize("content", [[], {}, {"version": "x"}, {"version": 1}, {"version": 1, "parts": []}])
def test_a_foreign_description_is_refused(tmp_path: Path, content: object) -> None:
    _with_description(tmp_path / "s", content)
    with pytest.raises(CorruptFileError, match="resume from another one"):
        read(tmp_path / "s")


def test_a_directory_of_someone_else_is_refused(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(3)}, storage_writer=dcp.FileSystemWriter(tmp_path / "s"), no_dist=True)
    with pytest.raises(InputError, match="was not written by a Checkpointer"):
        read(tmp_path / "s")


def test_nothing_is_unpickled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refused)
    assert read(saved)["plain"] == {"step": 3}


def test_writing_warns_of_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    write(tmp_path / "s", {"a": serialize({"b": torch.ones(1), "c": torch.empty(0)}), "e": SerializedState({}, {})})
    assert list(recwarn) == []
    assert read(tmp_path / "s")["e"] == {}


def test_a_full_disk_leaves_no_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NotEnoughSpaceError, match=r"__0_0.distcp: cannot be written: No space left"):
        write(tmp_path / "s", serialize({"a": torch.ones(10)}))
    assert not (tmp_path / "s" / ".metadata").exists()


def _with_description(directory: Path, content: object) -> None:
    text = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
    with Folder.at(_made(directory)) as folder:
        training_state.DcpWriter(folder, 1).save({DESCRIPTION: text})


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory
