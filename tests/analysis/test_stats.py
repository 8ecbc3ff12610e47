"""Statistics of whole checkpoints: read in blocks, ranks joined, against torch and xxhash over the dense tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash

from ckpt_convert.analysis.stats.stats import TensorStats, tensor_statistics
from ckpt_convert.analysis.stats.summary import Stats
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.errors import CorruptFileError
from ckpt_convert.tensors.lazy import BLOCK
from ckpt_convert.tensors.progress import TransferProgress
from tests.helpers import CASES, GOLDEN, Tensors, bits, read_meta, read_safetensors


def summed(path: Path, workers: int = 2) -> dict[str, TensorStats]:
    with open_identified(path) as checkpoint:
        keys = list(checkpoint.tensors)
        found = list(tensor_statistics(checkpoint, keys, workers=workers))
    assert [key for key, _ in found] == keys
    return dict(found)


def assert_of(found: dict[str, TensorStats], expected: Tensors) -> None:
    assert sorted(found) == sorted(expected)
    for key, tensor in expected.items():
        stats, numbers = found[key], tensor.double()
        assert stats.checksum == xxhash.xxh3_64_hexdigest(bits(tensor)), key
        assert stats.count == tensor.numel(), key
        assert (stats.nan, stats.inf) == (int(numbers.isnan().sum()), int(numbers.isinf().sum())), key
        assert stats.zeros == int((numbers == 0).sum()), key
        finite = numbers[numbers.isfinite()]
        if not len(finite):
            assert (stats.min, stats.max, stats.mean, stats.std) == (None, None, None, None)
            continue
        assert (stats.min, stats.max) == (finite.min(), finite.max()), key
        mean, std = float(finite.mean()), float(finite.std(correction=0))
        digits = 1e-6 if tensor.dtype == torch.bfloat16 else 1e-9
        assert stats.mean == pytest.approx(mean, rel=digits, abs=max(digits * std, 1e-15)), key
        assert stats.std == pytest.approx(std, rel=digits), key


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_of_a_checkpoint(case: str) -> None:
    assert_of(summed(GOLDEN / case / "hf"), read_safetensors(GOLDEN / case / "hf"))


@pytest.mark.parametrize("case", ["llama", "llama2", "llama_tied"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_are_joined_first(case: str, ranks: int) -> None:
    (whole,) = read_meta(GOLDEN / case / "meta-mp1")
    assert_of(summed(GOLDEN / case / f"meta-mp{ranks}"), whole)


def test_parts_of_which_nothing_says_how_to_join_them_come_one_after_another(tmp_path: Path) -> None:
    directory = tmp_path / "meta"
    directory.mkdir()
    for file in (GOLDEN / "llama" / "meta-mp2").glob("*.pth"):
        (directory / file.name).write_bytes(file.read_bytes())
    ranks = read_meta(directory)
    found = summed(directory)
    for key in ranks[0]:
        parts = [rank[key] for rank in ranks]
        assert found[key].checksum == xxhash.xxh3_64_hexdigest(b"".join(bits(part) for part in parts))
        assert found[key].count == sum(part.numel() for part in parts)
        assert found[key].max == max(float(part.max()) for part in parts)


def test_awkward_tensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "scalar": torch.tensor(-0.0),
        "empty": torch.empty(0, 7),
        "one": torch.tensor([torch.inf]),
        "nan": torch.tensor([torch.nan, 1.0, -0.0], dtype=torch.bfloat16),
        "int": torch.arange(-5, 5),
        "flags": torch.tensor([True, False, True]),
        "fp8": torch.randn(1000, generator=generator).to(torch.float8_e4m3fn),
        "subnormal": torch.full((9,), 1e-40),
        "block": torch.randn(BLOCK // 2, generator=generator).bfloat16(),
        "more": torch.randn(BLOCK // 2 + 1, generator=generator).bfloat16(),
        "less": torch.randn(3, BLOCK // 2 - 1, generator=generator).bfloat16(),
        "shifted": 1000 + 0.001 * torch.randn(300_000, generator=generator),
    }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    for workers in (1, 3):
        assert_of(summed(tmp_path / "model.safetensors", workers), tensors)


def test_strided_tensors_are_put_in_order(tmp_path: Path) -> None:
    base = torch.arange(6000, dtype=torch.float32).reshape(60, 100)
    torch.save({"turned": base.T, "every.other": base[:, ::2]}, tmp_path / "model.pth")
    expected = {"turned": base.T.contiguous(), "every.other": base[:, ::2].contiguous()}
    assert_of(summed(tmp_path / "model.pth"), expected)


def test_a_dtype_that_cannot_be_taken_apart_has_a_checksum(tmp_path: Path) -> None:
    data = bytes(range(24))
    header = json.dumps(
        {
            "six": {"dtype": "F6_E2M3", "shape": [4, 4], "data_offsets": [0, 12]},
            "four": {"dtype": "F4", "shape": [3, 8], "data_offsets": [12, 24]},
        }
    ).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    found = summed(path)
    assert found["six"] == TensorStats(checksum=xxhash.xxh3_64_hexdigest(data[:12]))
    assert found["four"].checksum == xxhash.xxh3_64_hexdigest(data[12:])
    assert (found["four"].count, found["four"].max) == (24, 6.0)


def test_the_order_is_that_of_the_keys_asked_for(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((1 if number % 7 else 300_000,), float(number)) for number in range(600)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    keys = [f"t{number}" for number in range(599, 0, -2)]
    seen: list[TransferProgress] = []
    with open_identified(tmp_path / "model.safetensors") as checkpoint:
        found = list(tensor_statistics(checkpoint, keys, workers=4, progress=seen.append))
        assert [key for key, _ in found] == keys
        assert all(stats.mean == float(key[1:]) for key, stats in found)
        with pytest.raises(KeyError):
            next(tensor_statistics(checkpoint, ["t600"], workers=1))
    total = sum(tensors[key].nbytes for key in keys)
    assert {progress.phase for progress in seen} == {"reading"}
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (0, total, total)


def test_a_file_that_was_cut_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(10), "b": torch.zeros(1 << 20)}, path)
    with open_identified(path) as checkpoint:
        os.truncate(path, path.stat().st_size - 5)
        results = tensor_statistics(checkpoint, ["a", "b", "a"], workers=2)
        assert next(results)[0] == "a"
        with pytest.raises(CorruptFileError, match=r"b: .*model\.safetensors: ends at byte"):
            next(results)


def test_stopping_early_ends_the_workers(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({f"t{number}": torch.zeros(1 << 20) for number in range(30)}, path)
    seen: list[TransferProgress] = []
    with open_identified(path) as checkpoint:
        results = tensor_statistics(checkpoint, list(checkpoint.tensors), workers=2, progress=seen.append)
        next(results)
        results.close()
        done = len(seen)
    assert len(seen) == done  # nothing goes on in the background
    assert seen[-1].done < seen[-1].total


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    nbytes = 1 << 28
    header = json.dumps({"large": {"dtype": "BF16", "shape": [nbytes // 2], "data_offsets": [0, nbytes]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + nbytes)
    tracemalloc.start()
    try:
        assert summed(path)["large"].zeros == nbytes // 2
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()


def test_torch_is_not_needed() -> None:
    code = (
        "import sys, ckpt_convert; from ckpt_convert.analysis.stats.stats import tensor_statistics\n"
        "from ckpt_convert.checkpoint.checkpoint import open_identified\n"
        "with open_identified(sys.argv[1]) as c: print(len(list(tensor_statistics(c, list(c.tensors), workers=2))))\n"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(GOLDEN / "llama" / "meta-mp2")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"


def test_the_numbers_have_plain_types() -> None:
    for stats in summed(GOLDEN / "llama" / "hf").values():
        assert {type(value) for value in (stats.count, stats.nan, stats.inf, stats.zeros)} == {int}
        assert {type(value) for value in (stats.min, stats.max, stats.mean, stats.std)} == {float}
        assert isinstance(stats, Stats)
        assert np.isfinite(stats.std or 0.0)
