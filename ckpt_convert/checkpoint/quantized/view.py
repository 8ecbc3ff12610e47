"""A quantised checkpoint as one of ordinary tensors: each is computed where it is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod
from typing import Any

from ckpt_convert.checkpoint.checkpoint import Checkpoint, usual_dtype
from ckpt_convert.checkpoint.model import Model
from ckpt_convert.checkpoint.quantized import schemes
from ckpt_convert.checkpoint.quantized.files import Computed, ComputedFile, Make
from ckpt_convert.checkpoint.quantized.recognise import CONFIGS, Quantization, Quantized
from ckpt_convert.checkpoint.record import Layout, LayoutFile
from ckpt_convert.containers.build import of_specs
from ckpt_convert.dtypes import DEQUANTIZED
from ckpt_convert.errors import ConfigError, UsageError
from ckpt_convert.formats.base import render_index
from ckpt_convert.tensors.bulk import without_collector
from ckpt_convert.tensors.header import StoredTensor, WeightFile
from ckpt_convert.tensors.lazy import row_major

SETTINGS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files beside weights that say how these are quantised; loaders believe them, also where it is no longer so."""


@dataclass
class Dequantized(Checkpoint):
    """A checkpoint whose quantised tensors are numbers of ``dtype`` (bfloat16 or float32), under the keys of those.

    The files are the original's, with other headers; config and model say nothing of the quantisation.
    """

    dtype: str = "bfloat16"
    text: str = ""

    @cached_property
    def model(self) -> Model:
        return self._plain_model(super().model)

    def model_for(self, *formats: str) -> Model:
        return self._plain_model(super().model_for(*formats))

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        found = super().config
        return None if found is None else plain(found)

    @cached_property
    def quantization(self) -> None:
        """Nothing is quantised any more, which need not be looked for."""
        return None

    def _plain_model(self, model: Model) -> Model:
        return replace(model, config=plain(model.config))

    @property
    def notices(self) -> list[str]:
        said = f"dequantised to {self.dtype} ({self.text}); config.json no longer says that the weights are quantised"
        return [*super().notices, said]

    def layout(self, *, literal: bool = False) -> Layout:
        """How it would lie in files if somebody had saved it in those of the original."""
        files: list[LayoutFile] = []
        weight_map: dict[str, str] = {}
        for file in self.files:
            header = file.header
            container = "safetensors" if header.kind == "safetensors" else "torch"
            specs = [(tensor.key, tensor.dtype, tensor.shape) for tensor in header.tensors]
            made = of_specs(file.name, container, specs, header.metadata)
            files.append(LayoutFile(file.name, file.rank, made.header, made.literals))
            weight_map |= dict.fromkeys((tensor.key for tensor in header.tensors), file.name)
        name = self.directory.index
        tensors = [tensor for file in files for tensor in file.header.tensors]
        total, parameters = sum(tensor.nbytes for tensor in tensors), sum(prod(tensor.shape) for tensor in tensors)
        index = (name, render_index(weight_map, total, parameters)) if name is not None else None
        return Layout(str(self.format), tuple(files), index)


def dequantized(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """The checkpoint with its quantised tensors as numbers of ``dtype``; itself where nothing is quantised.

    Raises KeyMismatchError where codes and scales do not belong together, and ConfigError for a scheme that can only
    be carried.
    """
    from ckpt_convert.checkpoint.quantized.carry import check, refuse_scheme

    found = checkpoint.quantization
    if found is None:
        return checkpoint
    check(found, checkpoint)
    refuse_scheme(found, checkpoint)
    return as_view(checkpoint, found, dtype)


@without_collector()
def requested(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """``dequantized`` where somebody asked for it; raises UsageError where nothing is quantised."""
    if dtype is None:
        return checkpoint
    if checkpoint.unknown_scheme is not None:
        raise ConfigError(
            f"--dequantize {dtype}: {checkpoint.path} is quantised ({checkpoint.unknown_scheme}), which is no scheme "
            "that is known here; dequantise it with the tool that made it, or take the model that was quantised"
        )
    if checkpoint.quantization is None:
        raise UsageError(f"--dequantize {dtype}: {checkpoint.path} is not quantised; leave it out, or use --dtype")
    return dequantized(checkpoint, dtype)


def alike(a: Checkpoint, b: Checkpoint) -> tuple[Checkpoint, Checkpoint, list[str]]:
    """Two checkpoints to be compared, and what to say: where one alone is quantised, as the numbers it stands for.

    They are of the other side's dtype, so that what was dequantised once is the same, bit for bit.
    """
    if (a.quantization is None) == (b.quantization is None):
        return a, b, []
    quantised, other = (a, b) if a.quantization is not None else (b, a)
    found = quantised.quantization
    if found is None or found.findings or found.refusal is not None:
        return a, b, []
    dtype = "float32" if usual_dtype(other) in ("F32", "F64") else "bfloat16"
    numbers = dequantized(quantised, dtype)
    said = f"{quantised.path}: compared as the numbers that it stands for ({found.text}), in {dtype}"
    return (numbers, b, [said]) if quantised is a else (a, numbers, [said])


def is_computed(file: WeightFile, tensor: StoredTensor) -> bool:
    """Whether a stored tensor is one of a view, computed where it is read."""
    return isinstance(file.reader, ComputedFile) and file.reader.is_computed(tensor)


def as_view(
    checkpoint: Checkpoint, found: Quantization, dtype: str, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Dequantized:
    """``dequantized`` as far as it goes: what does not belong together, or cannot be read, is at least described.

    ``shapes`` are those of tensors whose headers do not say them; without one, such a tensor is left out.
    """
    by_file: dict[str, dict[str, Quantized]] = {}
    for one in found.tensors.values():
        by_file.setdefault(one.codes.file.name, {})[one.codes.tensor.key] = one
    gone = found.owners.keys() | found.extras
    files = tuple(
        _file(file, by_file.get(file.name, {}), gone, DEQUANTIZED[dtype], shapes or {}) for file in checkpoint.files
    )
    weight_map = checkpoint.directory.weight_map
    if weight_map is not None:
        kept = {key: name for key, name in weight_map.items() if key not in gone}
        kept |= {key: weight_map.get(one.codes.tensor.key, one.codes.file.name) for key, one in found.tensors.items()}
        weight_map = kept
    settings = {one.name: getattr(checkpoint, one.name) for one in fields(Checkpoint)}
    settings |= {"files": files, "directory": replace(checkpoint.directory, weight_map=weight_map)}
    return Dequantized(**settings, dtype=dtype, text=found.text)


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
            tensors.append((_described(one, shape, dtype), _make(one, dtype)))
        elif tensor.key not in gone:
            tensors.append((tensor, None))
    reader = ComputedFile(file.reader, tensors)
    header = replace(file.header, size=reader.size, tensors=reader.tensors, checksummed=())
    return replace(file, reader=reader, header=header)


def _described(one: Quantized, shape: tuple[int, ...], dtype: str) -> StoredTensor:
    if one.rule is not schemes.MXFP4:
        return StoredTensor(one.key, dtype, shape, 0)
    *leading, columns, rows = shape  # it is stored with these two the other way round
    strides = row_major((*leading, rows, columns))
    return StoredTensor(one.key, dtype, shape, 0, (*strides[:-2], strides[-1], strides[-2]))


def _make(one: Quantized, dtype: str) -> Make:
    def make() -> Computed:
        from ckpt_convert.checkpoint.quantized import fp8, mxfp4
        from ckpt_convert.checkpoint.quantized.reading import Numbers, Rows

        numbers: Numbers | None = None
        if one.rule is schemes.MXFP4 and one.shape is not None:
            numbers = mxfp4.numbers(one)
        elif one.rule is schemes.FP8 and one.block is not None:
            numbers = fp8.numbers(one)
        if numbers is None:
            raise ConfigError(f"{one.key}: is quantised in a way that cannot be read as numbers")
        return Rows(numbers, dtype)

    return make


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says nothing of a quantisation."""
    out = {name: value for name, value in config.items() if name not in CONFIGS}
    text = out.get("text_config")
    if isinstance(text, Mapping):
        out["text_config"] = {name: value for name, value in text.items() if name not in CONFIGS}
    return out
