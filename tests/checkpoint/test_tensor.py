"""``Checkpoint`` as a mapping, and its tensors: slices that read no more than their range."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import ckpt_convert
from ckpt_convert import InputError
from tests.helpers import GOLDEN, bits, read_safetensors

HF = GOLDEN / "llama" / "hf"
META = GOLDEN / "llama" / "meta-mp2"
WEIGHT = "layers.0.attention.wo.weight"  # ranks split its columns


def test_it_is_a_mapping() -> None:
    expected = read_safetensors(HF)
    with ckpt_convert.open_checkpoint(HF) as checkpoint:
        assert set(checkpoint) == set(checkpoint.keys()) == set(expected)
        assert len(checkpoint) == len(expected)
        assert "model.norm.weight" in checkpoint
        assert "no.such.key" not in checkpoint
        with pytest.raises(KeyError, match=r"no\.such\.key"):
            _ = checkpoint["no.such.key"]
        assert {key: bits(tensor.torch()) for key, tensor in checkpoint.items()} == {
            key: bits(tensor) for key, tensor in expected.items()
        }
        assert checkpoint == checkpoint
        assert checkpoint != expected


def test_its_repr_says_in_three_lines_what_it_is() -> None:
    with ckpt_convert.open_checkpoint(META) as checkpoint:
        path, what, size = repr(checkpoint).split("\n")
    assert path == f"Checkpoint('{META}')"
    assert re.fullmatch(r"  meta, llama, \d{3},\d{3} parameters, F32", what)
    assert re.fullmatch(r"  2 shards, \d+ kB", size)


@pytest.mark.parametrize("name", ["no config", "ranks without params.json"])
def test_a_repr_of_what_is_not_known_raises_nothing(name: str, tmp_path: Path) -> None:
    if name == "no config":
        safetensors.torch.save_file({"x": torch.ones(2, 3)}, tmp_path / "x.safetensors")
        path, expected = tmp_path / "x.safetensors", "6 parameters, F32\n  1 shard, 24 B"
    else:
        for file in META.glob("*.pth"):
            shutil.copy(file, tmp_path)
        path, expected = tmp_path, "tensors, F32\n  2 shards"
    with ckpt_convert.open_checkpoint(path) as checkpoint:
        assert expected in repr(checkpoint)


@pytest.mark.parametrize(
    "index",
    [
        3, -1, slice(0, 10), slice(-5, None), slice(7, 3), ..., (2, 5), (slice(10, 20), slice(30, 40)), (..., 4),
        (slice(None), -7), (1, ..., slice(3, 9)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [HF, META], ids=["hf", "ranks"])
def test_a_slice_is_that_of_torch(path: Path, index: Any) -> None:
    key = WEIGHT if path == META else "model.layers.0.self_attn.o_proj.weight"
    with ckpt_convert.open_checkpoint(path) as checkpoint:
        expected = checkpoint[key].torch()[index]
        found = checkpoint[key][index]
        assert (found.shape, found.nbytes) == (tuple(expected.shape), expected.numel() * 4)
        assert torch.equal(found.torch(), expected)
        assert np.array_equal(found.numpy(), expected.numpy())
        assert found.tobytes() == bits(expected)
        assert np.array_equal(np.asarray(found), expected.numpy())


def test_a_slice_of_a_slice() -> None:
    with ckpt_convert.open_checkpoint(META) as checkpoint:
        expected = checkpoint[WEIGHT].torch()[10:30, 5:70][3][:8]
        assert torch.equal(checkpoint[WEIGHT][10:30, 5:70][3][:8].torch(), expected)


@pytest.mark.parametrize("index", [999, -999, slice(0, 9, 2), (0, 0, 0), (..., 0, ...), 1.5, "x", None])
def test_what_is_no_index_is_an_error(index: Any) -> None:
    with ckpt_convert.open_checkpoint(META) as checkpoint, pytest.raises((IndexError, TypeError)):
        checkpoint[WEIGHT][index]


def test_every_dtype_that_torch_has(tmp_path: Path) -> None:
    names = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e8m0fnu complex64 int64 int8 uint8 bool"
    codes = torch.arange(64, dtype=torch.uint8).reshape(2, 32)
    tensors = {name: codes.clone().view(getattr(torch, name)) for name in names.split() if name != "bool"}
    tensors |= {"bool": codes % 2 == 1, "scalar": torch.tensor(2.5), "empty": torch.ones(0, 3)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with ckpt_convert.open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        for name, tensor in tensors.items():
            found = checkpoint[name].torch()
            assert (found.dtype, bits(found)) == (tensor.dtype, bits(tensor)), name
            array = checkpoint[name].numpy()
            assert (array.shape, array.tobytes()) == (tuple(tensor.shape), bits(tensor)), name
            assert array.dtype.name == str(tensor.dtype).removeprefix("torch."), name
        assert checkpoint["bfloat16"].numpy().dtype == ml_dtypes.bfloat16


def test_values_that_are_packed_are_read_as_bytes_only(tmp_path: Path) -> None:
    packed = torch.arange(32, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    safetensors.torch.save_file({"x": packed}, tmp_path / "x.safetensors")
    with ckpt_convert.open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        assert checkpoint["x"].tobytes() == bytes(range(32))
        for read in (checkpoint["x"].torch, checkpoint["x"].numpy):
            with pytest.raises(InputError, match=r"x is F4, which packs several values together; tobytes"):
                read()


@pytest.mark.parametrize(("index", "most"), [(slice(1000, 1010), 10 * 1024), (7, 1024), ((slice(0, 8), 3), 8 * 1024)])
def test_a_slice_reads_its_range_only(index: Any, most: int, tmp_path: Path) -> None:
    weight = torch.arange(4096 * 256, dtype=torch.float32).reshape(4096, 256)
    safetensors.torch.save_file({"w": weight}, tmp_path / "model.safetensors")
    with ckpt_convert.open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        _ = checkpoint["w"][0].torch()  # modules are imported
        before = bytes_read()
        found = checkpoint["w"][index].torch()
        assert bytes_read() - before < most + 500
    assert torch.equal(found, weight[index])


def bytes_read() -> int:
    """The bytes that this process has read from files, those of this look at it included (some 100)."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])
