"""Quantized checkpoints that are carried, refused and checked: what belongs together, and what does not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_convert
from ckpt_convert.analysis.check import check_checkpoint
from ckpt_convert.analysis.diff.compare import compare_checkpoints
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.checkpoint.quantized import schemes
from ckpt_convert.checkpoint.quantized.detect import Quantization
from ckpt_convert.errors import CkptConvertError, ConfigError, KeyMismatchError, ShapeMismatchError, UsageError
from tests.checkpoint.quantizing import compressed_llama, edit, fp8_llama, gpt_oss, is_linear, write_index
from tests.helpers import GOLDEN, Tensors, assert_same, edit_json, read_safetensors, sums

LLAMA = GOLDEN / "llama" / "hf"
LAYER = "model.layers.0.self_attn"


def gptq(directory: Path) -> None:
    """A Llama whose projections are packed as AutoGPTQ has them: eight numbers of an input to a word."""
    pack(
        directory,
        {"quant_method": "gptq", "bits": 4, "group_size": 24},
        lambda rows, columns: {
            "qweight": torch.arange(columns // 8 * rows, dtype=torch.int32).reshape(columns // 8, rows),
            "qzeros": torch.ones(columns // 24 + 1, rows // 8, dtype=torch.int32),
            "scales": torch.full((columns // 24 + 1, rows), 0.5, dtype=torch.float16),
            "g_idx": torch.arange(columns, dtype=torch.int32) // 24,
        },
    )


def awq(directory: Path) -> None:
    """As AutoAWQ has them: eight numbers of an output to a word."""
    pack(
        directory,
        {"quant_method": "awq", "bits": 4, "group_size": 24},
        lambda rows, columns: {
            "qweight": torch.arange(columns * (rows // 8), dtype=torch.int32).reshape(columns, rows // 8),
            "qzeros": torch.ones(columns // 24 + 1, rows // 8, dtype=torch.int32),
            "scales": torch.full((columns // 24 + 1, rows), 0.5, dtype=torch.float16),
        },
    )


def bitsandbytes(directory: Path) -> None:
    """As bitsandbytes has them with NF4 and its scales quantized in turn."""
    pack(
        directory,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        lambda rows, columns: {
            "weight": torch.arange(rows * columns // 2).to(torch.uint8).reshape(-1, 1),
            "weight.absmax": torch.zeros(rows * columns // 64, dtype=torch.uint8),
            "weight.quant_map": torch.linspace(-1, 1, 16),
            "weight.nested_absmax": torch.ones(2),
            "weight.nested_quant_map": torch.linspace(-1, 1, 256),
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(b'{"shape": [1, 2]}'), dtype=torch.uint8),
        },
    )


def int8(directory: Path) -> None:
    """As bitsandbytes has them in eight bits."""
    pack(
        directory,
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        lambda rows, columns: {
            "weight": torch.arange(rows * columns).to(torch.int8).reshape(rows, columns),
            "SCB": torch.ones(rows),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        },
    )


def packed(directory: Path) -> None:
    """As compressed-tensors packs them."""
    pack(
        directory,
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        lambda rows, columns: {
            "weight_packed": torch.arange(rows * (columns // 8), dtype=torch.int32).reshape(rows, columns // 8),
            "weight_scale": torch.ones(rows, columns // 24 + 1, dtype=torch.bfloat16),
            "weight_shape": torch.tensor([rows, columns]),
        },
    )


def pack(directory: Path, method: dict[str, Any], parts: Callable[[int, int], Tensors]) -> None:
    shutil.copytree(LLAMA, directory)

    def change(key: str, tensor: torch.Tensor) -> Tensors:
        if not is_linear(key, tensor):
            return {key: tensor}
        module = key.removesuffix("weight")
        return {f"{module}{name}": part for name, part in parts(*tensor.shape).items()}

    edit(directory, change, {"quantization_config": method})


def fp8(directory: Path) -> None:
    fp8_llama(directory)


def channels(directory: Path) -> None:
    compressed_llama(directory, "channel")


def mxfp4(directory: Path) -> None:
    gpt_oss(directory)


READABLE = {"fp8": fp8, "channels": channels, "mxfp4": mxfp4}
PACKED = {"gptq": gptq, "awq": awq, "bitsandbytes": bitsandbytes, "int8": int8, "packed": packed}
ALL = READABLE | PACKED


@pytest.fixture(scope="module", params=ALL)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param) / request.param
    ALL[request.param](path)
    return path


def found(path: Path) -> Quantization:
    with open_identified(path) as opened:
        assert opened.quantization is not None
        return opened.quantization


def test_it_is_carried_file_for_file(source: Path, tmp_path: Path) -> None:
    report = ckpt_convert.convert_checkpoint(source, tmp_path / "same", to="hf", verify=True)
    assert sums(tmp_path / "same") == sums(source)
    assert report.moves["reordered"] == report.moves["cast"] == 0
    assert report.verified == report.tensors == len(read_safetensors(source))
    assert report.family in ("llama", "gpt_oss")


def test_it_is_laid_out_anew_and_comes_back(source: Path, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(source, tmp_path / "two", to="hf", shards=2, verify=True)
    ckpt_convert.convert_checkpoint(tmp_path / "two", tmp_path / "bin", to="hf", container="bin", verify=True)
    ckpt_convert.convert_checkpoint(tmp_path / "bin", tmp_path / "back", to="hf", container="safetensors", like=source)
    assert len(list((tmp_path / "two").glob("*.safetensors"))) == 2
    assert sums(tmp_path / "back") == sums(source)
    assert (tmp_path / "two" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_codes_and_scales_stay_in_one_file(source: Path, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", shards=3)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    apart = [
        one.key for one in found(source).tensors.values() if index[one.codes.tensor.key] != index[one.scale.tensor.key]
    ]
    assert len(apart) <= 2  # where one file ends and the next one begins


def test_it_verifies_cleanly(source: Path) -> None:
    report = check_checkpoint(source)
    assert [finding for finding in report.findings if finding.severity == "error"] == []
    assert "quantised" in report.checks
    assert "keys" in report.checks


def test_another_format_has_no_place_for_it(source: Path, tmp_path: Path) -> None:
    to = "torchtitan" if source.name == "mxfp4" else "meta"
    with pytest.raises(ConfigError) as caught:
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to=to)
    said = str(caught.value)
    assert f"is quantized ({found(source).text}), and the {to} format has no place for that" in said
    assert ("pass `dequantize='bfloat16'`" in said) == (source.name in READABLE)
    assert ("it can only be re-sharded" in said) == (source.name in PACKED)
    assert list(tmp_path.iterdir()) == []


def test_it_is_not_cast(source: Path, tmp_path: Path) -> None:
    way_out = "pass `dequantize='bfloat16'`" if source.name in READABLE else "leave it out"
    with pytest.raises(UsageError, match=f"`dtype='float32'`: .* is quantized .* codes are not cast; {way_out}"):
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", dtype="float32")


@pytest.mark.parametrize("scheme", PACKED)
def test_what_is_packed_is_not_dequantized(scheme: str, tmp_path: Path) -> None:
    PACKED[scheme](tmp_path / "source")
    with pytest.raises(ConfigError, match="dequantize it with the tool that made it"):
        ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "out", to="meta", dequantize="bfloat16")


def test_what_is_not_quantized_is_not_dequantized(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`dequantize='float32'`: .* is not quantized; leave it out, or use `dtype=`"):
        ckpt_convert.convert_checkpoint(LLAMA, tmp_path / "out", to="meta", dequantize="float32")
    with pytest.raises(UsageError, match="`dequantize='float16'`: expected one of bfloat16, float32"):
        ckpt_convert.convert_checkpoint(LLAMA, tmp_path / "out", to="meta", dequantize="float16")


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    texts = {}
    for scheme, make in ALL.items():
        make(tmp_path / scheme)
        texts[scheme] = found(tmp_path / scheme).text
    assert texts == {
        "fp8": "fp8 in blocks of 16 × 24: 21 of 30 tensors",
        "channels": "fp8, a scale for each channel: 21 of 30 tensors",
        "mxfp4": "mxfp4: 4 of 37 tensors",
        "gptq": "gptq or awq: 21 of 30 tensors",
        "awq": "gptq or awq: 21 of 30 tensors",
        "bitsandbytes": "bitsandbytes: 21 of 30 tensors",
        "int8": "bitsandbytes: 21 of 30 tensors",
        "packed": "pack-quantized: 21 of 30 tensors",
    }


def test_it_is_told_without_a_config_too(tmp_path: Path) -> None:
    for scheme, make in ALL.items():
        make(tmp_path / scheme)
        before = found(tmp_path / scheme)
        edit_json(tmp_path / scheme / "config.json", quantization_config=None)
        if scheme == "fp8":  # blocks of another size than usual are not told by their scales
            assert len(found(tmp_path / scheme).findings) == 21
        else:
            assert found(tmp_path / scheme).tensors.keys() == before.tensors.keys()


def test_the_usual_blocks_need_no_config(tmp_path: Path) -> None:
    numbers = fp8_llama(tmp_path / "source", (128, 128))
    edit_json(tmp_path / "source" / "config.json", quantization_config=None)
    assert {one.block for one in found(tmp_path / "source").tensors.values()} == {(128, 128)}
    ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "out", to="hf", dequantize="float32")
    assert_same(read_safetensors(tmp_path / "out"), numbers)


def test_narrow_numbers_without_scales_are_plain(tmp_path: Path) -> None:
    shutil.copytree(LLAMA, tmp_path / "source")
    edit(tmp_path / "source", lambda key, one: {key: one.to(torch.float8_e4m3fn) if is_linear(key, one) else one}, {})
    with open_identified(tmp_path / "source") as opened:
        assert opened.quantization is None
    ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "out", to="native", verify=True)
    assert [found for found in check_checkpoint(tmp_path / "source").findings if found.severity == "error"] == []


def broken(directory: Path) -> None:
    """A scale too few, a weight too few, a scale of a wrong shape, and one of a weight that is not quantized."""
    fp8_llama(directory)

    def change(key: str, tensor: torch.Tensor) -> Tensors:
        if key == f"{LAYER}.q_proj.weight_scale_inv" or key == f"{LAYER}.k_proj.weight":
            return {}
        if key == f"{LAYER}.v_proj.weight_scale_inv":
            return {key: tensor[:-1].contiguous()}
        return {key: tensor.float() if key == f"{LAYER}.o_proj.weight" else tensor}

    edit(directory, change, {})


WRONG = [
    f"{LAYER}.k_proj.weight_scale_inv: is a scale of fp8, but there is no {LAYER}.k_proj.weight",
    f"{LAYER}.o_proj.weight_scale_inv: is a scale of fp8, but {LAYER}.o_proj.weight is F32",
    f"{LAYER}.q_proj.weight: is fp8 (F8_E4M3), but there is no {LAYER}.q_proj.weight_scale_inv or "
    f"{LAYER}.q_proj.weight_scale",
    f"{LAYER}.v_proj.weight_scale_inv: expected [2, 3] for blocks of 16 × 24 of {LAYER}.v_proj.weight [24, 72], "
    "found [1, 3]",
]


@pytest.mark.parametrize("options", [{}, {"dequantize": "bfloat16"}], ids=["carried", "dequantized"])
def test_all_that_does_not_belong_together_is_one_error(options: dict[str, Any], tmp_path: Path) -> None:
    broken(tmp_path / "source")
    with pytest.raises(KeyMismatchError) as caught:
        ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "out", to="hf", **options)
    first, title, *lines = str(caught.value).splitlines()
    assert first == f"{tmp_path / 'source'} does not fit:"
    assert title == "  4 quantized weights and scales that do not belong together:"
    assert sorted(map(str.strip, lines)) == WRONG


def test_verify_finds_the_same_and_nothing_else(tmp_path: Path) -> None:
    broken(tmp_path / "source")
    report = check_checkpoint(tmp_path / "source")
    errors = [finding for finding in report.findings if finding.severity == "error"]
    assert sorted(finding.text for finding in errors) == WRONG
    assert {finding.check for finding in errors} == {"quantised"}
    shape = next(finding for finding in errors if finding.expected == "[2, 3]")
    assert (shape.found, shape.key, shape.file) == (
        "[1, 3]",
        f"{LAYER}.v_proj.weight_scale_inv",
        "model-00001-of-00004.safetensors",
    )


def test_mxfp4_that_does_not_belong_together(tmp_path: Path) -> None:
    source = tmp_path / "source"
    gpt_oss(source)
    experts = "model.layers.{}.mlp.experts.{}"

    def change(key: str, tensor: torch.Tensor) -> Tensors:
        if key in (experts.format(0, "down_proj_scales"), experts.format(0, "gate_up_proj_blocks")):
            return {}
        return {key: tensor[:, :, :-1].contiguous() if key == experts.format(1, "down_proj_scales") else tensor}

    edit(source, change, {})
    expected = [
        f"{experts.format(0, 'down_proj_blocks')}: is mxfp4 (U8), but there is no "
        f"{experts.format(0, 'down_proj_scales')}",
        f"{experts.format(0, 'gate_up_proj_scales')}: is a scale of mxfp4, but there is no "
        f"{experts.format(0, 'gate_up_proj_blocks')}",
        f"{experts.format(1, 'down_proj_scales')}: expected [3, 64, 3] for {experts.format(1, 'down_proj_blocks')} "
        "[3, 64, 3, 16], found [3, 64, 2]",
    ]
    assert sorted(f.text for f in check_checkpoint(source).findings if f.severity == "error") == expected
    with pytest.raises(KeyMismatchError, match="3 quantized weights and scales"):
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf")


@pytest.mark.parametrize("scheme", ["fp8", "mxfp4"])
def test_it_is_held_against_the_table(scheme: str, tmp_path: Path) -> None:
    """A layer too many, and a matrix of another shape, are found through codes and scales alike."""
    source = tmp_path / "source"
    ALL[scheme](source)
    edit_json(source / "config.json", num_hidden_layers=1)
    with pytest.raises(KeyMismatchError, match=r"unexpected keys:\n.*model\.layers\.1\."):
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf")
    edit_json(source / "config.json", num_hidden_layers=3 if scheme == "fp8" else 2, intermediate_size=64)
    with pytest.raises((ShapeMismatchError, KeyMismatchError), match=r"expected .*64.* found"):
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf")


def test_a_missing_pair_is_a_missing_tensor(tmp_path: Path) -> None:
    source = tmp_path / "source"
    gptq(source)
    gone = f"{LAYER}.q_proj"
    edit(source, lambda key, one: {} if key.startswith(gone) else {key: one}, {})
    with pytest.raises(KeyMismatchError, match=re.escape(f"1 missing keys:\n    {gone}.weight [72, 72]")):
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf")


def test_a_zero_point_is_carried_but_not_dequantized(tmp_path: Path) -> None:
    source = tmp_path / "source"
    compressed_llama(source, "channel")

    def change(key: str, one: torch.Tensor) -> Tensors:
        zero = {key.replace("_scale", "_zero_point"): torch.zeros_like(one)} if key.endswith("weight_scale") else {}
        return {key: one, **zero}

    edit(source, change, {})
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", verify=True)
    assert sums(tmp_path / "out") == sums(source)
    with pytest.raises(ConfigError, match=r"weight_zero_point shifts the codes, which cannot be dequantized here"):
        ckpt_convert.convert_checkpoint(source, tmp_path / "numbers", to="hf", dequantize="bfloat16")


def test_scales_of_activations_and_caches_go_with_the_codes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    numbers = compressed_llama(source, "tensor")

    def change(key: str, one: torch.Tensor) -> Tensors:
        extra = {f"{LAYER}.k_scale": torch.ones(1), f"{LAYER}.v_scale": torch.ones(1)}
        return {key: one, **(extra if key == "model.norm.weight" else {})}

    edit(source, change, {})
    assert [finding for finding in check_checkpoint(source).findings if finding.severity == "error"] == []
    ckpt_convert.convert_checkpoint(source, tmp_path / "same", to="hf", verify=True)
    assert sums(tmp_path / "same") == sums(source)
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", dequantize="float32", verify=True)
    assert_same(read_safetensors(tmp_path / "out"), numbers)


def test_a_quantized_model_is_the_same_as_its_numbers(tmp_path: Path) -> None:
    fp8_llama(tmp_path / "source")
    ckpt_convert.convert_checkpoint(
        tmp_path / "source", tmp_path / "out", to="meta", model_parallel=2, dequantize="bfloat16"
    )
    with open_identified(tmp_path / "source") as a, open_identified(tmp_path / "out") as b:
        for one, other in ((a, b), (b, a)):
            diff = compare_checkpoints(one, other)
            assert diff.same
            assert "compared as dequantized values" in diff.notices[0]
        assert compare_checkpoints(a, a).same
        assert compare_checkpoints(a, a).counts["same"] == 51


def test_settings_of_a_quantization_beside_the_weights_are_left_behind(tmp_path: Path) -> None:
    source = tmp_path / "source"
    fp8_llama(source)
    (source / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    (source / "notes.txt").write_text("mine")
    ckpt_convert.convert_checkpoint(source, tmp_path / "same", to="hf")
    assert sums(tmp_path / "same") == sums(source)
    for to in ("hf", "meta"):
        ckpt_convert.convert_checkpoint(source, tmp_path / to, to=to, dequantize="bfloat16")
    ckpt_convert.convert_checkpoint(tmp_path / "meta", tmp_path / "back", to="hf")
    assert sums(tmp_path / "back") == sums(tmp_path / "hf")
    assert (tmp_path / "back" / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob("[hbm]*/**/hf_quant_config.json"))


@pytest.mark.parametrize("command", [["inspect"], ["verify", "--quick"]], ids=" ".join)
def test_headers_alone_need_no_numpy(command: list[str], tmp_path: Path) -> None:
    fp8_llama(tmp_path / "source")
    arguments = [sys.executable, "-X", "importtime", "-m", "ckpt_convert", *command, str(tmp_path / "source")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "ckpt_convert.checkpoint.quantized.detect" in done.stderr
    assert not re.search(r"\| +(numpy|torch)$", done.stderr, re.MULTILINE)


def test_hostile_configs(tmp_path: Path) -> None:
    fp8_llama(tmp_path / "source")
    for method in (
        {"weight_block_size": [0, 16]},
        {"weight_block_size": ["a", None]},
        {"weight_block_size": "16x24x3"},
        {"config_groups": {"a": {"weights": {"block_structure": "9999999999999x1", "group_size": "x"}}, "b": 3}},
        {"quant_method": ["fp8"]},
    ):
        edit_json(tmp_path / "source" / "config.json", quantization_config=method)
        with pytest.raises(CkptConvertError, match="quantized weights and scales"):
            ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "out", to="hf")


def test_blocks_of_every_shape() -> None:
    of, shape = schemes.block_of, (90, 104)
    assert of(shape, (6, 5), ((16, 24),)) == (16, 24)
    assert of(shape, (6, 5), ()) is None
    whole: list[tuple[int, ...]] = [(), (1,), (1, 1)]
    for scales in whole:
        assert of(shape, scales, ()) == (90, 104)
    assert of(shape, (90,), ()) == of(shape, (90, 1), ()) == (1, 104)
    assert of(shape, (90, 13), ()) == (1, 8)
    assert of(shape, (1, 104), ()) == (90, 1)
    assert of((3, 90, 104), (3, 90, 1), ()) == (1, 104)
    assert of((3, 90, 104), (3, 1, 1), ()) == (90, 104)
    assert of((3, 90, 104), (3, 6, 5), ((16, 24),)) == (16, 24)
    wrong: list[tuple[int, ...]] = [(45, 1), (90, 7), (2, 104), (90, 0), (0, 1), (104,), (3, 90, 1)]
    for scales in wrong:
        assert of(shape, scales, ()) is None
    for empty in ((0, 8), (8, 0), (0, 0)):
        assert of(empty, (0, 0), ()) is None
        assert of(empty, (), ()) == empty


def test_reading_it_from_python(tmp_path: Path) -> None:
    fp8_llama(tmp_path / "source")
    plan = ckpt_convert.plan_conversion(tmp_path / "source", to="hf", dequantize="float32")
    assert plan.source.dequantized == "float32"
    assert plan.memory(2) > 40_000_000
    assert plan.bytes_by_kind["cast"] > plan.bytes_by_kind["copied"] > 0


def test_a_cut_file_is_found(tmp_path: Path) -> None:
    source = tmp_path / "source"
    fp8_llama(source)
    write_index(source, json.loads((source / "model.safetensors.index.json").read_text())["weight_map"])
    file = source / "model-00002-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CkptConvertError, match="model-00002"):
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", dequantize="bfloat16")
