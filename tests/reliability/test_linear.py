"""Reading costs what a file has, not its square: an untrusted one is small, and what it asks for is as small."""

from __future__ import annotations

import io
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

import ckpt_convert
from ckpt_convert import CkptConvertError

FLAGS = b"".join((b"X", struct.pack("<I", 5), b"flags"))


def archive(path: Path, data: bytes) -> Path:
    """torch's zip container around a pickle, with one storage of one number."""
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("model/data.pkl", data)
        out.writestr("model/byteorder", "little")
        out.writestr("model/data/0", struct.pack("<f", 1.0))
        out.writestr("model/version", "3\n")
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def tensor(metadata: bytes = b"") -> bytes:
    """A tensor of one number, rebuilt by torch's function."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\1tQ"
    function = b"ctorch._utils\n_rebuild_tensor_v2\n"
    return function + b"(" + storage + b"K\0K\1\x85K\1\x85\x89N" + metadata + b"tR"


def shared_flags(count: int) -> bytes:
    """Tensors that share a dict of as many flags."""
    flags = b"}q\1(" + b"".join(text(f"f{n}") + b"\x89" for n in range(count)) + b"u0"
    return b"\x80\2" + flags + b"}(" + b"".join(text(f"t{n}") + tensor(b"h\1") for n in range(count)) + b"u."


def shared_arguments(count: int) -> bytes:
    """Calls with one tuple of as many arguments."""
    arguments = b"(" + b"K\0" * count + b"}tq\1" + b"0ccollections\ndefaultdict\nq\2" + b"0"
    return b"\x80\2" + arguments + b"}(" + b"".join(text(f"t{n}") + b"h\2h\1R" for n in range(count)) + b"u."


def shared_state(count: int) -> bytes:
    """Objects of a foreign class that share a dict of as many attributes."""
    state = b"}q\1(" + b"".join(text(f"a{n}") + b"N" for n in range(count)) + b"u0" + b"cmodule\nThing\nq\2" + b"0"
    return b"\x80\2" + state + b"}(" + b"".join(text(f"t{n}") + b"h\2)\x81h\1b" for n in range(count)) + b"u."


def shared_name(count: int) -> bytes:
    """Globals under one name of as many letters."""
    name = text("m" * 8 * count) + b"q\1" + b"0"
    return b"\x80\2" + name + b"}(" + b"".join(text(f"t{n}") + b"h\1h\1\x93" for n in range(count)) + b"u."


def shared_list(count: int) -> bytes:
    """One list, as many times."""
    items = b"]q\1(" + b"K\0" * count + b"e0"
    return b"\x80\2" + items + b"}(" + b"".join(text(f"t{n}") + b"h\1" for n in range(count)) + b"u."


PICKLES = (shared_flags, shared_arguments, shared_state, shared_name, shared_list)


def staircase(count: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Pieces of a square of which each straight cut takes off one alone: a step along the top, then along the side."""
    boxes, at = [], 0
    while at < count:
        boxes.append(((at, at), (1, count - at)))
        if at + 1 < count:
            boxes.append(((at + 1, at), (count - at - 1, 1)))
        at += 1
    return boxes


def write_metadata(folder: Path, boxes: list[tuple[Any, Any]], shape: tuple[int, ...]) -> None:
    folder.mkdir()
    properties = dcp.TensorProperties(dtype=torch.float32)
    chunks = [dcp.ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in boxes]
    stored, offset = {}, 0
    for at, sizes in boxes:
        length = 4 * torch.Size(sizes).numel() + 1000
        stored[dcp.MetadataIndex("w", torch.Size(at))] = _StorageInfo("__0_0.distcp", offset, length)
        offset += length
    whole = dcp.TensorStorageMetadata(properties, torch.Size(shape), chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(dcp.Metadata({"w": whole}, {}, stored)))
    with (folder / "__0_0.distcp").open("wb") as file:
        file.truncate(offset)


def opened(path: Path) -> int:
    """How many functions are called, those of C too, while a checkpoint is opened; an error is an end as good."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        ckpt_convert.open_checkpoint(path).close()
    except CkptConvertError:
        pass
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("make", PICKLES, ids=lambda make: make.__name__)
def test_twice_the_pickle_takes_twice_the_calls(make: Callable[[int], bytes], tmp_path: Path) -> None:
    small, large = (opened(archive(tmp_path / f"{count}.pth", make(count))) for count in (400, 800))
    assert large < 2.2 * small + 200


def test_twice_the_pieces_take_twice_the_calls(tmp_path: Path) -> None:
    for count in (100, 200):
        write_metadata(tmp_path / str(count), staircase(count), (count, count))
    assert opened(tmp_path / "200") < 2.2 * opened(tmp_path / "100") + 200


def test_what_no_call_shows(tmp_path: Path) -> None:
    """Copies that are made within a call: of large files, in processor time that squares would use up many times."""
    files = [archive(tmp_path / f"{make.__name__}.pth", make(30_000)) for make in PICKLES]
    code = f"""
import resource, ckpt_convert
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))
for path in {[*map(str, files)]!r}:
    try:
        ckpt_convert.open_checkpoint(path)
    except ckpt_convert.CkptConvertError:
        pass
print("read")
"""
    assert resource.RLIMIT_CPU is not None
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "read\n", (done.returncode, done.stderr)


# Integers of thousands of digits

HUGE = 7 ** (10**4)  # of 8,451 digits, more than Python turns into text


@pytest.mark.parametrize("place", ["shape", "stride", "offset", "storage", "attribute"])
def test_huge_integers_of_a_pickle(place: str, tmp_path: Path) -> None:
    size = HUGE.bit_length() // 8 + 1
    huge = b"\x8b" + struct.pack("<i", size) + HUGE.to_bytes(size, "little")
    if place == "attribute":  # is nothing that anybody counts with
        data = b"\x80\2}" + text("step") + huge + b"s."
    else:
        one = tensor()
        before = {"shape": b"K\1\x85K\1\x85", "stride": b"K\1\x85\x89", "offset": b"K\0K\1\x85K", "storage": b"K\1tQ"}
        at = one.index(before[place])
        number = one.index(b"K", at) if place != "stride" else at
        data = b"\x80\2}" + text("t") + one[:number] + huge + one[number + 2 :] + b"s."
    path = archive(tmp_path / "model.pth", data)
    if place == "attribute":
        ckpt_convert.open_checkpoint(path).close()
        return
    with pytest.raises(CkptConvertError, match=r"model\.pth"):
        ckpt_convert.open_checkpoint(path)


@pytest.mark.parametrize("place", ["size", "chunk", "offset", "length", "name"])
def test_huge_integers_of_metadata(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    folder.mkdir()
    numbers = dict.fromkeys(("size", "chunk", "offset", "length"), 4) | {"offset": 0, "name": 0} | {place: HUGE}
    name = "9" * 6000 + ".distcp" if place == "name" else "__0_0.distcp"
    stored = {dcp.MetadataIndex("w", torch.Size([0])): _StorageInfo(name, numbers["offset"], numbers["length"])}
    chunk = dcp.ChunkStorageMetadata.__new__(dcp.ChunkStorageMetadata)
    vars(chunk).update(offsets=(0,), sizes=(numbers["chunk"],))
    whole = dcp.TensorStorageMetadata.__new__(dcp.TensorStorageMetadata)
    vars(whole).update(properties=dcp.TensorProperties(dtype=torch.float32), size=(numbers["size"],), chunks=[chunk])
    data = io.BytesIO()
    pickle.dump(dcp.Metadata({"w": whole}, {}, stored), data)
    (folder / ".metadata").write_bytes(data.getvalue())
    (folder / "__0_0.distcp").write_bytes(bytes(100))
    with pytest.raises(CkptConvertError, match="dcp"):
        ckpt_convert.open_checkpoint(folder)
