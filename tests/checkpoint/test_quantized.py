"""Quantized weights as numbers: against torch's float8, its own readers, and transformers, bit for bit."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import ckpt_convert
from ckpt_convert.checkpoint.checkpoint import Checkpoint, open_identified
from ckpt_convert.checkpoint.dequantize import dequantized
from ckpt_convert.checkpoint.quantized import fp8, mxfp4, row_reader, schemes
from ckpt_convert.checkpoint.quantized.computed_file import ComputedFile
from ckpt_convert.checkpoint.quantized.detect import Quantized
from ckpt_convert.checkpoint.quantized.row_reader import MatrixBytes, bfloat16
from ckpt_convert.checkpoint.quantized.view import _described
from ckpt_convert.storage.place import as_place
from ckpt_convert.storage.reader import LocalFile
from ckpt_convert.tensors import lazy
from ckpt_convert.tensors.gather import StridedReader
from ckpt_convert.tensors.header import FileTensor, WeightFile
from ckpt_convert.tensors.lazy import LazyTensor
from tests.checkpoint.quantizing import (
    compressed_llama,
    edit,
    fp8_llama,
    from_fp8,
    gpt_oss,
    is_linear,
    mxfp4_codes,
)
from tests.helpers import Tensors, assert_same, bits, edit_json, read_meta, read_safetensors, sums

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NAMES = {"bfloat16": "BF16", "float32": "F32"}


def cast(numbers: Tensors, dtype: str) -> Tensors:
    """What was quantized in this dtype, the rest as it is."""
    return {key: one.to(DTYPES[dtype]) if is_linear(key, one) else one for key, one in numbers.items()}


def stored(path: Path, tensors: Tensors) -> dict[str, FileTensor]:
    safetensors.torch.save_file(tensors, path)
    from ckpt_convert import containers

    reader, header = containers.parse_header(LocalFile(path))
    file = WeightFile(path.name, 0, as_place(path), reader, header)
    return {tensor.key: FileTensor(file, tensor) for tensor in header.tensors}


class Computing:
    """One computed tensor behind two others, and what reads it."""

    def __init__(self, one: Quantized, dtype: str) -> None:
        numbers: Any = mxfp4.mxfp4_values(one) if one.rule is schemes.MXFP4 else fp8.fp8_values(one)
        assert one.shape is not None
        self.dtype = NAMES[dtype]
        rows = MatrixBytes(numbers, self.dtype)
        beside = one.scale.tensor
        self.file = ComputedFile(
            one.codes.file.reader,
            [(beside, None), (_described(one, one.shape, self.dtype), lambda: rows), (beside, None)],
        )
        file = one.codes.file
        everything = [(WeightFile(file.name, 0, file.place, self.file, file.header), t) for t in self.file.tensors]
        self.gatherer = StridedReader(everything)
        self.tensor = lazy.from_source(1, one.shape, self.file.tensors[1].strides)

    def read(self, tensor: LazyTensor) -> bytes:
        return self.gatherer.read(tensor, self.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(16, 24), (8, 128), (1, 40), (128, 128)], ids=str)
def test_fp8_in_any_order_and_any_part(block: tuple[int, int], dtype: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (90, 104), dtype=torch.uint8, generator=generator)
    codes[(codes & 0x7F) == 0x7F] = 1  # no NaN: their bits are nobody's promise
    weight = codes.view(torch.float8_e4m3fn)
    scales = torch.rand(-(-90 // block[0]), -(-104 // block[1]), generator=generator) * 10 - 5
    expected = from_fp8(weight, scales, block).to(DTYPES[dtype])
    found = stored(tmp_path / "x.safetensors", {"w": weight, "s": scales})
    check_parts(Computing(Quantized("w", schemes.FP8, found["w"], found["s"], (), (90, 104), block), dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_in_any_order_and_any_part(dtype: str, tmp_path: Path) -> None:
    blocks, scales = mxfp4_codes((3, 10, 4, 16))
    expected = convert_moe_packed_tensors(blocks, scales, dtype=DTYPES[dtype])
    found = stored(tmp_path / "x.safetensors", {"b": blocks, "s": scales})
    check_parts(Computing(Quantized("b", schemes.MXFP4, found["b"], found["s"], (), (3, 128, 10)), dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [(3, 2, 2), (3, 20, 1), (3, 1, 1), (3, 1, 16), (3, 20), (1,), ()], ids=str)
def test_fp8_of_several_matrices(grid: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    """Experts in one tensor: scales for the blocks, channels (or inputs) of each, for each, and for all together."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 20, 16, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(grid, generator=generator) * 10 - 5
    block = schemes.block_of((3, 20, 16), grid, ((16, 12),))
    assert block is not None
    grown = scales.reshape(3, 20, 1) if grid == (3, 20) else scales
    if grid == (3, 2, 2):
        grown = scales.repeat_interleave(16, 1).repeat_interleave(12, 2)[:, :20, :16]
    found = stored(tmp_path / "x.safetensors", {"w": weight, "s": scales})
    one = Quantized("w", schemes.FP8, found["w"], found["s"], (), (3, 20, 16), block)
    computing = Computing(one, dtype)
    expected = (weight.float() * grown).to(DTYPES[dtype])
    for order in itertools.permutations(range(3)):
        assert computing.read(computing.tensor.permute(order)) == bits(expected.permute(order)), order
    for expert in range(3):
        assert computing.read(computing.tensor.narrow(0, expert, 1)) == bits(expected[expert])


def check_parts(computing: Computing, expected: torch.Tensor) -> None:
    """Read the tensor whole, permuted, cut and reordered, and byte ranges of it; each compared with torch's."""
    assert computing.read(computing.tensor) == bits(expected)
    axes = range(expected.dim())
    for order in itertools.permutations(axes):
        assert computing.read(computing.tensor.permute(order)) == bits(expected.permute(order)), order
    rng = random.Random(3)
    for _ in range(150):
        tensor, wanted = computing.tensor, expected
        shuffled = rng.sample(list(axes), len(axes))
        tensor, wanted = tensor.permute(shuffled), wanted.permute(shuffled)
        for axis in axes:
            size = rng.randint(1, wanted.shape[axis])
            start = rng.randint(0, wanted.shape[axis] - size)
            tensor, wanted = tensor.narrow(axis, start, size), wanted.narrow(axis, start, size)
        assert computing.read(tensor) == bits(wanted)
    rows = expected.shape[0]
    if rows % 10 == 0:  # heads of ten rows, as RoPE orders them
        turned = computing.tensor.reorder(0, (rows // 10, 2, 5), (0, 2, 1))
        wanted = expected.reshape(rows // 10, 2, 5, *expected.shape[1:]).transpose(1, 2).reshape(expected.shape)
        assert computing.read(turned) == bits(wanted)
        assert computing.read(turned.permute((1, 0))) == bits(wanted.T)
    natural = expected if expected.dim() == 2 else expected.transpose(1, 2)
    data = bits(natural)
    start = computing.file.tensors[1].offset
    for _ in range(100):
        first = rng.randint(0, len(data))
        last = rng.randint(first, min(len(data), first + 3000))
        buffer = bytearray(last - first)
        computing.file.readinto(start + first, memoryview(buffer))
        assert bytes(buffer) == data[first:last]


def test_what_is_kept_of_a_matrix_turned_around_is_small_and_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strips are kept from block to block; here they are so narrow that a block needs several, one after another."""
    monkeypatch.setattr(row_reader, "_STRIP", 1 << 12)
    monkeypatch.setattr(row_reader, "_STRIPS", 6)
    monkeypatch.setattr(row_reader, "CHUNK", 1 << 10)
    weight = torch.randn(600, 130, generator=torch.Generator().manual_seed(2)).to(torch.float8_e4m3fn)
    scales = torch.rand(5, 2)
    found = stored(tmp_path / "x.safetensors", {"w": weight, "s": scales})
    one = Quantized("w", schemes.FP8, found["w"], found["s"], (), (600, 130), (128, 128))
    computing = Computing(one, "bfloat16")
    turned = computing.tensor.permute((1, 0))
    expected = from_fp8(weight, scales, (128, 128)).to(torch.bfloat16).T
    for offset, block in turned.blocks(3000):
        size = block.size
        assert computing.read(block) == bits(expected.reshape(-1)[offset : offset + size])
    kept = sum(strip.nbytes for _, _, strip in row_reader.STRIPS._kept.values())
    assert 0 < kept <= 6 * (1 << 12)


def test_what_is_kept_of_another_file_is_not_taken(tmp_path: Path) -> None:
    """A reader may be made where one that is gone has been."""
    codes = torch.arange(4000, dtype=torch.int32).to(torch.uint8).reshape(2000, 2).view(torch.float8_e4m3fn)
    found = stored(tmp_path / "x.safetensors", {"w": codes})["w"]
    reader, offset = found.file.reader, found.tensor.offset
    strips = row_reader.Strips()
    strips._kept[(id(reader), offset, 0, 2000)] = (
        LocalFile(tmp_path / "x.safetensors"),
        0,
        np.zeros((2000, 2), np.uint8),
    )
    assert strips.read(reader, offset, 2, (0, 2000, 1, 2)).tobytes() == bits(codes[:, 1])


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    special = [
        0.0,
        -0.0,
        1.0,
        float("inf"),
        -float("inf"),
        3.3895313892515355e38,
        1e-45,
        9.2e-41,
        1 + 2**-8,
        1 + 3 * 2**-8,
    ]
    numbers = np.concatenate([np.array(special), np.random.default_rng(0).standard_normal(10000) * 1e-3]).astype("<f4")
    expected = torch.from_numpy(numbers).to(torch.bfloat16).view(torch.uint16).numpy()
    assert (bfloat16(numbers) == expected).all()
    assert bfloat16(np.array([np.nan], "<f4"))[0] & 0x7FFF > 0x7F80


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_scales_in_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    source = tmp_path / "source"
    numbers = fp8_llama(source)

    def change(key: str, tensor: torch.Tensor) -> Tensors:
        return {key: tensor.to(dtype) if key.endswith("_scale_inv") else tensor}

    edit(source, change, {})
    with open_identified(source) as opened:
        stored = {key: tensor.torch() for key, tensor in Checkpoint(opened).items()}
        view = dequantized(opened, "float32")
        found = {key: Checkpoint(view)[key].torch() for key in view.tensors}
    for key in numbers:
        if is_linear(key, numbers[key]):
            numbers[key] = from_fp8(stored[key], stored[f"{key}_scale_inv"])
    assert_same(found, numbers)


def test_a_nan_stays_one(tmp_path: Path) -> None:
    codes = torch.tensor([[0x7F, 0x3C, 0xFF, 0x38]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 0x7FFFFFFF]]).view(torch.int32)
    scales[0, 1] = 0x7FFFFFFF  # whose low bits would carry into the sign
    found = stored(tmp_path / "x.safetensors", {"w": codes, "s": scales.view(torch.float32)})
    one = Quantized("w", schemes.FP8, found["w"], found["s"], (), (1, 4), (1, 2))
    data = Computing(one, "bfloat16")
    out = torch.frombuffer(bytearray(data.read(data.tensor)), dtype=torch.bfloat16)
    assert out.isnan().tolist() == [True, False, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_blocks_as_torchs_own_reader_has_them(dtype: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    numbers = fp8_llama(source, (16, 16))
    expected = {key: torch.empty(one.shape, dtype=DTYPES[dtype]) for key, one in numbers.items() if is_linear(key, one)}
    assert len(expected) == 21
    reader = QuantizedHuggingFaceStorageReader(str(source), target_dtype=DTYPES[dtype], block_size=16)
    state_dict_loader.load(expected, storage_reader=reader, no_dist=True)
    report = ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", dequantize=dtype, verify=True)
    found = read_safetensors(tmp_path / "out")
    assert_same({key: found[key] for key in expected}, expected)
    assert_same(found, cast(numbers, dtype))
    assert report.files == sorted(path.name for path in source.glob("*.safetensors"))
    assert report.moves["cast"] == sum(one.numel() * one.element_size() for one in expected.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_compressed_tensors(strategy: str, dtype: str, tmp_path: Path) -> None:
    numbers = compressed_llama(tmp_path / "source", strategy)
    ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "out", to="hf", dequantize=dtype, verify=True)
    assert_same(read_safetensors(tmp_path / "out"), cast(numbers, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gpt_oss_as_transformers_loads_it(dtype: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    held = gpt_oss(source)
    report = ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", dequantize=dtype, verify=True)
    found = read_safetensors(tmp_path / "out")
    for key in found:
        if f"{key}_blocks" in held:
            expected = convert_moe_packed_tensors(held[f"{key}_blocks"], held[f"{key}_scales"], dtype=DTYPES[dtype])
        else:
            expected = held[key]
        assert_same({key: found[key]}, {key: expected})
    assert len(found) == len(held) - 4
    assert len(report.files) > 2
    if dtype == "bfloat16":
        library: Any = transformers
        method = library.Mxfp4Config(dequantize=True)
        models = library.AutoModelForCausalLM
        theirs = models.from_pretrained(source, quantization_config=method, dtype=torch.bfloat16)
        ours, info = models.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values()), info
        assert_same(ours.state_dict(), theirs.state_dict())


def test_mxfp4_as_torchs_own_reader_computes_it(tmp_path: Path) -> None:
    """Its computation alone: a plain load with torch 2.13's reader fills only the first few columns of each tensor."""
    source = tmp_path / "source"
    held = gpt_oss(source)
    reader = QuantizedHuggingFaceStorageReader(str(source))
    with open_identified(source) as opened:
        view = dequantized(opened, "float32")
        for key in (key for key in held if key.endswith("_blocks")):
            name, blocks = key.removesuffix("_blocks"), held[key]
            whole: Any = SimpleNamespace(storage_offsets=(0, 0, 0), lengths=(*blocks.shape[:2], blocks.shape[2] * 32))
            expected = reader._dequantize_tensor_mxfp4(blocks, held[f"{name}_scales"], whole, 0, 0)
            assert bits(Checkpoint(view)[name].torch()) == bits(expected.transpose(1, 2))


def test_the_way_through_the_numbers_is_the_way_of_the_codes(tmp_path: Path) -> None:
    """Dequantized on the way to another format is the same as dequantized first."""
    source = tmp_path / "source"
    fp8_llama(source)
    first = tmp_path / "first"
    ways: dict[str, dict[str, Any]] = {"meta": {"model_parallel": 2}, "native": {}}
    ckpt_convert.convert_checkpoint(source, first, to="hf", dequantize="bfloat16")
    for to, options in ways.items():
        ckpt_convert.convert_checkpoint(source, tmp_path / to, to=to, dequantize="bfloat16", verify=True, **options)
        ckpt_convert.convert_checkpoint(first, tmp_path / f"{to}2", to=to, **options)
        if to == "meta":
            assert sums(tmp_path / to) == sums(tmp_path / f"{to}2")
        else:
            assert_same(read_safetensors(tmp_path / to), read_safetensors(tmp_path / f"{to}2"))
        ckpt_convert.convert_checkpoint(tmp_path / to, tmp_path / f"{to}-back", to="hf", verify=True)
        assert sums(tmp_path / f"{to}-back") == sums(first)
    assert [len(rank) for rank in read_meta(tmp_path / "meta")] == [30, 30]


def test_gpt_oss_to_torchtitan(tmp_path: Path) -> None:
    source = tmp_path / "source"
    gpt_oss(source)
    ckpt_convert.convert_checkpoint(source, tmp_path / "first", to="hf", dequantize="bfloat16")
    ckpt_convert.convert_checkpoint(source, tmp_path / "one", to="torchtitan", dequantize="bfloat16", verify=True)
    ckpt_convert.convert_checkpoint(tmp_path / "first", tmp_path / "two", to="torchtitan")
    ckpt_convert.convert_checkpoint(tmp_path / "one", tmp_path / "back", to="hf", verify=True)
    assert_same(read_safetensors(tmp_path / "back"), read_safetensors(tmp_path / "first"))
    assert sums(tmp_path / "one") == sums(tmp_path / "two")


def test_the_config_says_what_the_weights_are_then(tmp_path: Path) -> None:
    import json

    source = tmp_path / "source"
    fp8_llama(source)
    edit_json(source / "config.json", dtype="float16", rope_theta=1234.0)
    before = json.loads((source / "config.json").read_text())
    report = ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", dequantize="bfloat16")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert before.pop("quantization_config")["quant_method"] == "fp8"
    assert after == before | {"dtype": "bfloat16"}
    assert list(after) == list(before)
    (said,) = report.notices
    assert said.startswith("dequantized to bfloat16 (fp8 in blocks of 16 × 24: 21 of 30 tensors)")
    assert "config.json no longer says" in said
    assert json.loads((tmp_path / "out" / "ckpt_convert" / "config.json").read_text()) == after


def test_the_config_has_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    """But where most of the weights were never quantized, and are in another one: then it has theirs."""
    import json

    source = tmp_path / "source"
    fp8_llama(source)

    def change(key: str, one: torch.Tensor) -> Tensors:
        if "q_proj" in key or not key.endswith(("_proj.weight", "_scale_inv")):
            return {key: one}
        return {key: one.float()} if key.endswith(".weight") else {}

    ckpt_convert.convert_checkpoint(source, tmp_path / "asked", to="hf", dequantize="float32", dtype="bfloat16")
    assert json.loads((tmp_path / "asked" / "config.json").read_text())["dtype"] == "bfloat16"
    edit(source, change, {"dtype": "bfloat16"})
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", dequantize="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_a_cast_of_what_was_dequantized(tmp_path: Path) -> None:
    numbers = fp8_llama(tmp_path / "source")
    options: dict[str, Any] = {"dequantize": "float32", "dtype": "float16", "allow_overflow": True}
    ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "out", to="hf", verify=True, **options)
    found = read_safetensors(tmp_path / "out")
    assert_same(found, {key: one.to(torch.float16) for key, one in numbers.items()})


def test_scales_in_another_shard_than_their_weights(tmp_path: Path) -> None:
    from tests.checkpoint.quantizing import write_index

    source = tmp_path / "source"
    numbers = fp8_llama(source)
    files = sorted(source.glob("*.safetensors"))
    tensors = read_safetensors(source)
    last = {key: one for key, one in tensors.items() if key.endswith("_scale_inv")}
    weight_map: dict[str, str] = {}
    for file in files:
        own = {key: one for key, one in safetensors.torch.load_file(file).items() if key not in last}
        own |= last if file is files[-1] else {}
        safetensors.torch.save_file(own, file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file.name)
    write_index(source, weight_map)
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", dequantize="float32", verify=True)
    assert_same(read_safetensors(tmp_path / "out"), numbers)
    index = (tmp_path / "out" / "model.safetensors.index.json").read_text()
    assert "scale" not in index


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor of 64 MB in float32 is read in pieces: nothing of its size is ever asked of a file, or made."""
    import tracemalloc

    weight = torch.zeros(4096, 4096, dtype=torch.float8_e4m3fn)
    found = stored(tmp_path / "x.safetensors", {"w": weight, "s": torch.ones(32, 32)})
    one = Quantized("w", schemes.FP8, found["w"], found["s"], (), (4096, 4096), (128, 128))
    computing = Computing(one, "float32")
    buffer = np.empty(1 << 20, np.uint8)
    tracemalloc.start()
    for tensor in (computing.tensor, computing.tensor.permute((1, 0))):
        for _, block in itertools.islice(tensor.blocks(1 << 18), 6):
            computing.gatherer.read_into(block, "F32", buffer)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20
