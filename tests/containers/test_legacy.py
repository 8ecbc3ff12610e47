"""torch's files from before 1.6, which our own interpreter reads, against torch."""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ckpt_convert import containers
from ckpt_convert.errors import CorruptFileError, InputError, UnsafeFileError
from ckpt_convert.storage.base import read_range
from ckpt_convert.storage.place import as_place
from ckpt_convert.storage.reader import LocalFile
from ckpt_convert.tensors.gather import StridedReader
from ckpt_convert.tensors.header import WeightFile
from ckpt_convert.tensors.lazy import from_source


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
    """Where they lie in the file: views of one storage are strided, and share its bytes."""
    with LocalFile(write(tmp_path / "old.pth", STATE)) as file:
        reader, header = containers.parse_header(file)
        assert reader is file
        weights = WeightFile("old.pth", 0, as_place(tmp_path / "old.pth"), reader, header)
        strided = StridedReader([(weights, tensor) for tensor in header.tensors])
        found = {
            t.key: strided.read(from_source(number, t.shape, t.strides), t.dtype)
            for number, t in enumerate(header.tensors)
        }
    assert header.kind == "legacy"
    assert header.size == (tmp_path / "old.pth").stat().st_size
    assert found == {key: raw(value) for key, value in STATE.items()}
    assert [(t.key, t.shape) for t in header.tensors] == [(k, tuple(v.shape)) for k, v in STATE.items()]
    offsets = {tensor.key: tensor.offset for tensor in header.tensors}
    assert offsets["a"] == offsets["transposed"] == offsets["part"] - 12


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_every_protocol(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"a": BASE}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    with LocalFile(path) as file:
        _, header = containers.parse_header(file)
        assert [(t.key, read_range(file, t.offset, t.nbytes)) for t in header.tensors] == [("a", raw(BASE))]


def test_reads_strings_as_python_2_wrote_them(tmp_path: Path) -> None:
    """There, a str is SHORT_BINSTRING; torch reads it, so the file is one."""
    path = write(tmp_path / "old.pth", {"weights": BASE})
    data = path.read_bytes()
    modern = b"X\x07\x00\x00\x00weights"
    assert data.count(modern) == 1
    path.write_bytes(data.replace(modern, b"U\x07weights"))
    assert list(torch.load(path, weights_only=True)) == ["weights"]
    with LocalFile(path) as file:
        _, header = containers.parse_header(file)
        assert [(t.key, read_range(file, t.offset, t.nbytes)) for t in header.tensors] == [("weights", raw(BASE))]


def test_reads_pickles_that_are_longer_than_what_is_read_of_a_file_at_first(tmp_path: Path) -> None:
    value = {"a": torch.arange(3), "text": "x" * (5 << 20), "b": torch.arange(4)}
    with LocalFile(write(tmp_path / "old.pth", value)) as file:
        _, header = containers.parse_header(file)
        assert [t.key for t in header.tensors] == ["a", "b"]
        assert [read_range(file, t.offset, t.nbytes) for t in header.tensors] == [
            raw(torch.arange(3)),
            raw(torch.arange(4)),
        ]


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


def test_reads_no_tensor(tmp_path: Path) -> None:
    """Only the pickles and how many elements each storage has; in a store as on a disk."""

    class Counting:
        name = "s3://bucket/old.pth"

        def __init__(self, data: bytes) -> None:
            self.data, self.size, self.asked = data, len(data), 0

        def readinto(self, offset: int, buffer: memoryview) -> None:
            self.asked += len(buffer)
            buffer[:] = self.data[offset : offset + len(buffer)]

    reader = Counting(write(tmp_path / "old.pth", {"a": torch.zeros(1_000_000), "b": BASE}).read_bytes())
    _, header = containers.parse_header(reader)
    assert len(header.tensors) == 2
    assert reader.asked < reader.size  # a window of 1 MiB twice, of 4 MB


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
    with LocalFile(path) as file, pytest.raises(UnsafeFileError, match="_rebuild_sparse_tensor"):
        containers.parse_header(file)


def test_what_is_on_no_list_is_named_where_one_only_looks(tmp_path: Path) -> None:
    path = write(tmp_path / "old.pth", {"a": torch.ones(1), "b": Runs(os.system, "true")})
    with LocalFile(path) as file:
        _, header = containers.parse_header(file, foreign=True)
    assert [tensor.key for tensor in header.tensors] == ["a"]
    assert any("system" in name for name in header.foreign)


@pytest.mark.parametrize("lie", ["count", "keys", "order"])
def test_storages_that_contradict_the_pickle_are_refused(lie: str, tmp_path: Path) -> None:
    path = write(tmp_path / "old.pth", {"a": torch.arange(1000.0)})
    data = path.read_bytes()
    count = (1000).to_bytes(8, "little")
    assert data.count(count) == 1
    key = re.findall(rb"X..\x00\x00(\d+)", data)[-1]
    changed = {
        "count": data.replace(count, (999).to_bytes(8, "little")),
        "keys": data[::-1].replace(key[::-1], b"7" * len(key), 1)[::-1],
        "order": data.replace(b"little_endian\x94\x88", b"little_endian\x94\x89").replace(
            b"little_endianq\x02\x88", b"little_endianq\x02\x89"
        ),
    }[lie]
    assert changed != data
    path.write_bytes(changed)
    with LocalFile(path) as file, pytest.raises(CorruptFileError, match=r"old\.pth"):
        containers.parse_header(file)
