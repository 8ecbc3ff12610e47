"""Quantized checkpoints made of plain ones, with torch alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from tests.helpers import GOLDEN, Tensors, edit_json

LLAMA = GOLDEN / "llama" / "hf"
FP8_MAX = 448.0
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BLOCK = (16, 24)
"""A size of blocks that divides none of the golden matrices, so that all of them are cut at their edges."""


def fp8_blocks(weight: torch.Tensor, block: tuple[int, int] = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and the scale of each block, the last ones of a row or column smaller."""
    rows, columns = weight.shape
    grid = -(-rows // block[0]), -(-columns // block[1])
    scales = torch.empty(grid, dtype=torch.float32)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale = (weight[part].float().abs().max() / FP8_MAX).clamp(min=1e-12)
            scales[i, j] = scale
            codes[part] = (weight[part].float() / scale).to(torch.float8_e4m3fn)
    return codes, scales


def from_fp8(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] = BLOCK) -> torch.Tensor:
    """The numbers, in float32, by torch's own conversion of float8."""
    grown = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return codes.float() * grown[: codes.shape[0], : codes.shape[1]]


def edit(directory: Path, change: Any, config: Mapping[str, Any]) -> dict[str, str]:
    """Rewrite every shard with what ``change(key, tensor)`` returns, and the index; returns the index's map."""
    weight_map: dict[str, str] = {}
    for file in sorted(directory.glob("*.safetensors")):
        out: Tensors = {}
        for key, tensor in safetensors.torch.load_file(file).items():
            out |= change(key, tensor)
        safetensors.torch.save_file(out, file, {"format": "pt"})
        weight_map |= dict.fromkeys(out, file.name)
    edit_json(directory / "config.json", **config)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: Mapping[str, str]) -> None:
    """The index of these shards."""
    size = parameters = 0
    for file in directory.glob("*.safetensors"):
        for tensor in safetensors.torch.load_file(file).values():
            size += tensor.numel() * tensor.element_size()
            parameters += prod(tensor.shape)
    content = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": dict(weight_map)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def is_linear(key: str, tensor: torch.Tensor) -> bool:
    return key.endswith("_proj.weight") and tensor.ndim == 2


def fp8_llama(directory: Path, block: tuple[int, int] = BLOCK, source: Path = LLAMA) -> Tensors:
    """The golden Llama with its projections in fp8 blocks, as DeepSeek's and Qwen's releases have them.

    Returns what it stands for: every tensor, dequantized to float32 by torch where it is quantized.
    """
    shutil.copytree(source, directory)
    numbers: Tensors = {}

    def change(key: str, tensor: torch.Tensor) -> Tensors:
        if not is_linear(key, tensor):
            numbers[key] = tensor
            return {key: tensor}
        codes, scales = fp8_blocks(tensor, block)
        numbers[key] = from_fp8(codes, scales, block)
        return {key: codes, f"{key}_scale_inv": scales}

    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(block)}
    edit(directory, change, {"quantization_config": method})
    return numbers


def compressed_llama(directory: Path, strategy: str) -> Tensors:
    """The golden Llama in compressed-tensors' fp8: a scale for each tensor or channel, and one for the input."""
    shutil.copytree(LLAMA, directory)
    numbers: Tensors = {}

    def change(key: str, tensor: torch.Tensor) -> Tensors:
        if not is_linear(key, tensor):
            numbers[key] = tensor
            return {key: tensor}
        largest = tensor.float().abs().amax(1, keepdim=True) if strategy == "channel" else tensor.float().abs().max()
        scale = (largest / FP8_MAX).to(torch.bfloat16 if strategy == "channel" else torch.float32)
        codes = (tensor.float() / scale.float()).to(torch.float8_e4m3fn)
        numbers[key] = codes.float() * scale.float()
        module = key.removesuffix(".weight")
        one = {key: codes, f"{module}.weight_scale": scale if strategy == "channel" else scale.reshape(1)}
        return one | {f"{module}.input_scale": torch.tensor([0.25])}

    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    method: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    method |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    edit(directory, change, {"quantization_config": method})
    return numbers


def mxfp4_codes(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes of [..., rows, groups, 16] and their scales, every code and most exponents among them."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 255, shape[:-1], dtype=torch.uint8, generator=generator)
    return blocks, scales


def gpt_oss(directory: Path) -> Tensors:
    """A tiny gpt-oss whose experts are MXFP4, as in the releases; returns all else, and codes and scales."""
    torch.manual_seed(5)
    config = transformers.GptOssConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    models: Any = transformers.AutoModelForCausalLM
    model = models.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory, max_shard_size="40KB")
    stored: Tensors = {}

    def change(key: str, tensor: torch.Tensor) -> Tensors:
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[key] = tensor
            return {key: tensor}
        experts, columns, rows = tensor.shape
        blocks, scales = mxfp4_codes((experts, rows, columns // 32, 16), seed=len(stored))
        scales = scales % 6 + 120
        out = {f"{key}_blocks": blocks, f"{key}_scales": scales}
        stored.update(out)
        return out

    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    edit(directory, change, {"quantization_config": method})
    return stored
