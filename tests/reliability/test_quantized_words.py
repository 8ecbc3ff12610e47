"""Headers win over what a config says of a quantization; a scheme that is not known is carried, and called by its name.

safetensors reads; torch makes the codes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ckpt_convert
from ckpt_convert.checkpoint.checkpoint import open_identified
from tests.checkpoint.quantizing import fp8_blocks
from tests.command import run
from tests.helpers import GOLDEN, Tensors, assert_same, edit_json, read_meta, read_safetensors, sums

HF = GOLDEN / "llama" / "hf"


def packed(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.int32).view(torch.uint32)


def mlx(key: str, weight: torch.Tensor) -> Tensors:
    module, groups = key.removesuffix(".weight"), torch.ones(weight.shape[0], weight.shape[1] // 8)
    return {key: packed(weight), f"{module}.scales": groups.half(), f"{module}.biases": groups.half()}


def eetq(key: str, weight: torch.Tensor) -> Tensors:
    return {key: weight.T.contiguous().to(torch.int8), f"{key}_scales": torch.ones(weight.shape[0]).half()}


def quanto(key: str, weight: torch.Tensor) -> Tensors:
    return {f"{key}._data": weight.to(torch.int8), f"{key}._scale": torch.ones(weight.shape[0], 1)}


def hqq(key: str, weight: torch.Tensor) -> Tensors:
    module = key.removesuffix(".weight")
    return {f"{module}.W_q": weight.to(torch.uint8), f"{module}.scale": torch.ones(8), f"{module}.zero": torch.ones(8)}


def bitnet(key: str, weight: torch.Tensor) -> Tensors:
    return {key: torch.zeros(weight.shape[0] // 4, weight.shape[1], dtype=torch.uint8), f"{key}_scale": torch.ones(1)}


def aqlm(key: str, weight: torch.Tensor) -> Tensors:
    module = key.removesuffix(".weight")
    return {f"{module}.codes": torch.zeros(9, 9, 1, dtype=torch.int16), f"{module}.codebooks": torch.ones(1, 4, 1, 8)}


SCHEMES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mlx": (mlx, {"quantization": {"group_size": 8, "bits": 4}}),
    **{
        name: (made, {"quantization_config": {"quant_method": name}})
        for name, made in {"eetq": eetq, "quanto": quanto, "hqq": hqq, "bitnet": bitnet, "aqlm": aqlm}.items()
    },
}


@pytest.fixture(params=SCHEMES)
def unknown(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Tensors]:
    """A Llama whose layers are quantized in a scheme that no rule is of."""
    made, config = SCHEMES[request.param]
    (tmp_path / "source").mkdir()
    shutil.copy(HF / "config.json", tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", **config)
    tensors: Tensors = {}
    for key, tensor in read_safetensors(HF).items():
        tensors |= made(key, tensor) if key.endswith("_proj.weight") else {key: tensor.bfloat16()}
    safetensors.torch.save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    return ("MLX" if request.param == "mlx" else request.param), tmp_path / "source", tensors


def test_an_unknown_scheme_is_carried_by_literal_keys(unknown: tuple[str, Path, Tensors], tmp_path: Path) -> None:
    _, source, tensors = unknown
    ckpt_convert.convert_checkpoint(source, tmp_path / "same", to="hf", verify=True)
    assert sums(tmp_path / "same") == sums(source)
    ckpt_convert.convert_checkpoint(source, tmp_path / "two", to="hf", shards=2, verify=True)
    assert_same(read_safetensors(tmp_path / "two"), tensors)
    assert (tmp_path / "two" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_elsewhere_it_is_refused_by_its_name(unknown: tuple[str, Path, Tensors], tmp_path: Path) -> None:
    name, source, _ = unknown
    for options in (
        {"to": "meta"},
        {"to": "native"},
        {"to": "hf", "dequantize": "bfloat16"},
        {"to": "hf", "dtype": "float32"},
    ):
        with pytest.raises(ckpt_convert.CkptConvertError, match=name) as caught:
            ckpt_convert.convert_checkpoint(source, tmp_path / "out", **options)  # type: ignore[arg-type]
        assert "correct config.json" not in str(caught.value)


def test_verify_calls_it_no_broken_model(unknown: tuple[str, Path, Tensors]) -> None:
    name, source, _ = unknown
    if name not in ("MLX", "hqq"):  # the command takes two seconds: one of each kind of config
        with ckpt_convert.open_checkpoint(source) as opened:
            assert opened.family is None
        return
    found = run("verify", source, "--json")
    document = json.loads(found.stdout)
    assert not [one for one in document["findings"] if one["severity"] == "error"]
    assert any(name in one["why"] for one in document["skipped"])


# A config that says more than is there


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "bitnet"])
def test_headers_win_over_a_config_that_was_left(method: str, tmp_path: Path) -> None:
    shutil.copytree(HF, tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", quantization_config={"quant_method": method})
    report = ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "meta", to="meta", verify=True)
    (said,) = [text for text in report.notices if "quantiz" in text]
    assert said == "config.json has quantization_config, but no tensor is quantized: it is left out"
    assert_same(read_meta(tmp_path / "meta")[0], read_meta(GOLDEN / "llama" / "meta-mp1")[0])
    ckpt_convert.convert_checkpoint(tmp_path / "meta", tmp_path / "back", to="hf", verify=True)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert_same(read_safetensors(tmp_path / "back"), read_safetensors(HF))
    copy = ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "copy", to="hf")
    assert sums(tmp_path / "copy") == sums(tmp_path / "source")
    assert any("remove it from there" in text for text in copy.notices)


# What cannot be is said first


@pytest.mark.parametrize("case", ["gpt_oss", "deepseek_v3"])
def test_a_format_that_a_family_has_not_is_said_before_any_advice(case: str, tmp_path: Path) -> None:
    """fp8 and MXFP4 releases to Meta's format: --dequantize would not help."""
    shutil.copytree(GOLDEN / case / "hf", tmp_path / "source")
    codes = "mlp.experts.0.gate_proj.weight" if case == "deepseek_v3" else "self_attn.q_proj.weight"
    for file in (tmp_path / "source").glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        for key in [key for key in tensors if key.endswith(codes)]:
            tensors[key], tensors[f"{key}_scale_inv"] = fp8_blocks(tensors[key], (128, 128))
        safetensors.torch.save_file(tensors, file, {"format": "pt"})
    (tmp_path / "source" / "model.safetensors.index.json").unlink()
    edit_json(tmp_path / "source" / "config.json", quantization_config={"quant_method": "fp8"})
    with open_identified(tmp_path / "source") as opened:
        assert opened.quantization is not None
    with pytest.raises(ckpt_convert.UnsupportedFamilyError, match="has no meta column") as caught:
        ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "out", to="meta")
    assert "dequantize=" not in str(caught.value)
    with pytest.raises(ckpt_convert.ConfigError, match="`dequantize="):  # where it does help
        ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "out", to="torchtitan")


# Placeholders


@pytest.mark.parametrize("model_type", ["llama", "other_model"])
def test_placeholders_of_zero_3_are_one_error(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    shutil.copy(HF / "config.json", tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", model_type=model_type)
    tensors = {k: torch.empty(0) if t.dim() > 1 else t for k, t in read_safetensors(HF).items()}
    safetensors.torch.save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    found = run("verify", tmp_path / "source", "--json")
    assert found.returncode == 1
    (error,) = [one for one in json.loads(found.stdout)["findings"] if one["severity"] == "error"]
    assert "placeholders of DeepSpeed's ZeRO-3" in error["text"]
    assert "zero_to_fp32.py" in error["text"]
    for to in ("native", "hf"):
        with pytest.raises(ckpt_convert.InputError, match="ZeRO-3"):
            ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "out", to=to)


def test_a_few_empty_tensors_are_none(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text('{"model_type": "other_model"}')
    tensors = {f"layer.{at}.weight": torch.ones(2, 3) for at in range(6)} | {"empty.weight": torch.empty(0)}
    safetensors.torch.save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    assert run("verify", tmp_path / "source").returncode == 0
    ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "out", to="hf")
