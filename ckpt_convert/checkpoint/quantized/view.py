"""Quantized files as files of ordinary tensors, each dequantized on read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

from ckpt_convert.checkpoint.conventions import QUANTIZATION_CONFIGS
from ckpt_convert.checkpoint.opening import OpenedFiles
from ckpt_convert.checkpoint.quantized import schemes
from ckpt_convert.checkpoint.quantized.computed_file import Computed, ComputedFile, Make
from ckpt_convert.checkpoint.quantized.detect import Quantization, Quantized
from ckpt_convert.checkpoint.record import Layout, LayoutFile
from ckpt_convert.containers.build import layout_from_specs
from ckpt_convert.dtypes import DEQUANTIZED_DTYPES
from ckpt_convert.errors import ConfigError
from ckpt_convert.formats.base import render_index
from ckpt_convert.tensors.header import StoredTensor, WeightFile
from ckpt_convert.tensors.lazy import row_major_strides

SETTINGS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Auxiliary files that describe a quantization; loaders trust them, so a dequantized output must not have them."""


@dataclass(frozen=True)
class Dequantized:
    """Quantized tensors are read as values of ``dtype`` (bfloat16 or float32); ``text`` describes the stored ones."""

    dtype: str
    text: str

    @property
    def notice(self) -> str:
        return f"dequantized to {self.dtype} ({self.text}); config.json no longer says that the weights are quantized"


def dequantized_files(
    opened: OpenedFiles, quantization: Quantization, dtype: str, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> OpenedFiles:
    """The same files with other headers: each quantized tensor is one of ``dtype``, under its dequantized key.

    Tensors that cannot be dequantized are described, but raise when they are read. ``shapes`` are those that headers do
    not give; a tensor without a shape is left out.
    """
    by_file: dict[str, dict[str, Quantized]] = {}
    for one in quantization.tensors.values():
        by_file.setdefault(one.codes.file.name, {})[one.codes.tensor.key] = one
    gone = quantization.owners.keys() | quantization.extras
    files = tuple(
        _file(file, by_file.get(file.name, {}), gone, DEQUANTIZED_DTYPES[dtype], shapes or {}) for file in opened.files
    )
    weight_map = opened.directory.weight_map
    if weight_map is not None:
        kept = {key: name for key, name in weight_map.items() if key not in gone}
        kept |= {
            key: weight_map.get(one.codes.tensor.key, one.codes.file.name) for key, one in quantization.tensors.items()
        }
        weight_map = kept
    return replace(opened, files=files, directory=replace(opened.directory, weight_map=weight_map))


def dequantized_layout(opened: OpenedFiles) -> Layout:
    """The layout of the dequantized tensors in files with the original's names and assignment."""
    files: list[LayoutFile] = []
    weight_map: dict[str, str] = {}
    for file in opened.files:
        header = file.header
        container = "safetensors" if header.kind == "safetensors" else "torch"
        specs = [(tensor.key, tensor.dtype, tensor.shape) for tensor in header.tensors]
        made = layout_from_specs(file.name, container, specs, header.metadata)
        files.append(LayoutFile(file.name, file.rank, made.header, made.literals))
        weight_map |= dict.fromkeys((tensor.key for tensor in header.tensors), file.name)
    name = opened.directory.index
    tensors = [tensor for file in files for tensor in file.header.tensors]
    total, parameters = sum(tensor.nbytes for tensor in tensors), sum(prod(tensor.shape) for tensor in tensors)
    index = (name, render_index(weight_map, total, parameters)) if name is not None else None
    return Layout(str(opened.format), tuple(files), index)


def is_view(file: WeightFile) -> bool:
    """Whether a file has computed tensors."""
    return isinstance(file.reader, ComputedFile)


def is_computed(file: WeightFile, tensor: StoredTensor) -> bool:
    """Whether a stored tensor is computed on read."""
    return isinstance(file.reader, ComputedFile) and file.reader.is_computed(tensor)


def _file(
    file: WeightFile,
    by_codes: Mapping[str, Quantized],
    gone: Collection[str],
    dtype: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> WeightFile:
    tensors: list[tuple[StoredTensor, Make | None]] = []
    for tensor in sorted(file.header.tensors, key=lambda tensor: tensor.offset):
        one = by_codes.get(tensor.key)
        shape = None if one is None else one.shape or shapes.get(one.key)
        if one is not None and shape is not None:
            tensors.append((_described(one, shape, dtype), partial(_computed, one, dtype)))
        elif tensor.key not in gone:
            tensors.append((tensor, None))
    reader = ComputedFile(file.reader, tensors)
    header = replace(file.header, size=reader.size, tensors=reader.tensors, checksummed=())
    return replace(file, reader=reader, header=header)


def _described(quantized: Quantized, shape: tuple[int, ...], dtype: str) -> StoredTensor:
    if quantized.rule is not schemes.MXFP4:
        return StoredTensor(quantized.key, dtype, shape, 0)
    *leading, columns, rows = shape  # stored with the last two axes swapped
    strides = row_major_strides((*leading, rows, columns))
    return StoredTensor(quantized.key, dtype, shape, 0, (*strides[:-2], strides[-1], strides[-2]))


def _computed(quantized: Quantized, dtype: str) -> Computed:
    from ckpt_convert.checkpoint.quantized import fp8, mxfp4
    from ckpt_convert.checkpoint.quantized.row_reader import MatrixBytes, ValueMatrix

    numbers: ValueMatrix | None = None
    if quantized.rule == schemes.MXFP4 and quantized.shape is not None:
        numbers = mxfp4.mxfp4_values(quantized)
    elif quantized.rule == schemes.FP8 and quantized.block is not None:
        numbers = fp8.fp8_values(quantized)
    if numbers is None:
        raise ConfigError(f"{quantized.key}: is quantized in a way that cannot be dequantized")
    return MatrixBytes(numbers, dtype)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without its quantization."""
    out = {name: value for name, value in config.items() if name not in QUANTIZATION_CONFIGS}
    text = out.get("text_config")
    if isinstance(text, Mapping):
        out["text_config"] = {name: value for name, value in text.items() if name not in QUANTIZATION_CONFIGS}
    return out
