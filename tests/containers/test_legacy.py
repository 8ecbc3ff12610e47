"""torch's files from before 1.6, against torch."""

import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ckpt_convert import containers
from ckpt_convert.errors import CorruptFileError, InputError, UnsafeFileError
from ckpt_convert.storage.base import read_range
from ckpt_convert.storage.reader import LocalFile


def write(path: Path, value: object) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


BASE = torch.arange(20.0)
STATE = {
    "a": BASE.reshape(4, 5),
    "transposed": BASE.reshape(4, 5).T,
    "part": BASE[3:7],
    "expanded": BASE[1].expand(3),
    "scalar": torch.tensor(5),
    "empty": torch.zeros(0, 3),
    "flags": torch.tensor([True, False]),
    "bf16": torch.arange(6.0).to(torch.bfloat16),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


def test_reads_what_torch_wrote(tmp_path: Path) -> None:
    with LocalFile(write(tmp_path / "old.pth", STATE)) as file:
        reader, header = containers.parse_header(file)
    assert header.kind == "legacy"
    assert header.size == reader.size == sum(len(raw(value)) for value in STATE.values())
    assert {t.key: read_range(reader, t.offset, t.nbytes) for t in header.tensors} == {
        k: raw(v) for k, v in STATE.items()
    }
    assert [(t.key, t.shape) for t in header.tensors] == [(k, tuple(v.shape)) for k, v in STATE.items()]
    assert all(t.strides is None for t in header.tensors)
    assert read_range(reader, 0, reader.size) == b"".join(raw(value) for value in STATE.values())
    assert read_range(reader, 70, 30) == b"".join(raw(value) for value in STATE.values())[70:100]


def test_flattens_as_the_zip_reader_does(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    value = {"model": module.state_dict(), "epoch": 3, "size": torch.Size([2]), "list": [torch.ones(1), None]}
    with LocalFile(write(tmp_path / "old.pth", value)) as file:
        _, old = containers.parse_header(file)
    torch.save(value, tmp_path / "new.pth")
    with LocalFile(tmp_path / "new.pth") as file:
        _, new = containers.parse_header(file)
    assert [t.key for t in old.tensors] == [t.key for t in new.tensors]
    assert old.objects == new.objects == {"epoch": "int", "size": "Size", "list.1": "NoneType"}


def test_says_that_the_file_is_read_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "old.pth", {"a": torch.zeros(1_000_000)})
    with LocalFile(path) as file, caplog.at_level(logging.WARNING, "ckpt_convert"):
        containers.parse_header(file)
    assert "old.pth" in caplog.text
    assert "4.0 MB" in caplog.text


def test_has_no_layout_to_keep(tmp_path: Path) -> None:
    with LocalFile(write(tmp_path / "old.pth", STATE)) as file:
        assert containers.capture_layout(*containers.parse_header(file)) is None


class Runs:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def test_no_command_is_ever_run(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    path = write(tmp_path / "old.pth", {"a": torch.ones(1), "b": Runs(os.system, f"touch {sentinel}")})
    with LocalFile(path) as file, pytest.raises(UnsafeFileError, match=r"old\.pth.*system"):
        containers.parse_header(file)
    assert not sentinel.exists()
    torch.load(path, weights_only=False)
    assert sentinel.exists()  # the payload works


def test_a_pickle_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for protocol in (2, 4):
        (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}, protocol))
        with LocalFile(tmp_path / "plain.pkl") as file, pytest.raises(InputError, match=r"plain\.pkl"):
            containers.parse_header(file)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "old.pth", {"a": torch.arange(1000.0)}).read_bytes()
    for length in (10, 30, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with LocalFile(tmp_path / "cut.pth") as file, pytest.raises(InputError, match=r"cut\.pth"):
            containers.parse_header(file)
    with LocalFile(tmp_path / "cut.pth") as file, pytest.raises(CorruptFileError):
        containers.parse_header(file)


def test_a_sparse_tensor_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "old.pth", {"s": torch.eye(3).to_sparse()})
    with LocalFile(path) as file, pytest.raises(InputError, match=r"'s'.*dense"):
        containers.parse_header(file)


def test_a_remote_file_is_refused() -> None:
    class Remote:
        name = "s3://bucket/old.pth"
        size = 40

        def readinto(self, offset: int, buffer: memoryview) -> None:
            buffer[:] = (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(40))[offset : offset + len(buffer)]

    with pytest.raises(InputError, match="download it first"):
        containers.parse_header(Remote())
