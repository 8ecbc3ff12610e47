"""Quantised tensors carried as they are, within their own format, and the reasons where that is not enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ckpt_convert.checkpoint import mapping
from ckpt_convert.checkpoint.findings import raise_if_any
from ckpt_convert.checkpoint.model import Model
from ckpt_convert.checkpoint.quantized.recognise import CONFIGS, Quantization
from ckpt_convert.errors import ConfigError, UnsupportedFamilyError, UsageError

if TYPE_CHECKING:
    from ckpt_convert.checkpoint.checkpoint import Checkpoint

_WAY_OUT = "pass --dequantize bfloat16 (or float32)"


def carried(checkpoint: Checkpoint, model: Model, formats: frozenset[str]) -> Model:
    """The model for what has to do with these formats alone: one whose table is of the stored tensors themselves.

    Codes, scales and all else are its rows, under their own keys, once they were held against the table of the family.
    Where nothing is quantised it is the model itself, without what its config says of a quantisation: the headers are
    right. Raises UnsupportedFamilyError for a format that the family has not, ConfigError for one that has no place for
    scales, KeyMismatchError or ShapeMismatchError for what does not fit.
    """
    found = checkpoint.quantization
    if found is None:
        return _plain(checkpoint, model, formats)
    for format in sorted(formats):
        if not model.family.has(format):  # whatever is done about the quantisation
            raise UnsupportedFamilyError(
                f"{checkpoint.path}: the {model.family.name} table has no {format} column; it has "
                f"{', '.join(model.family.formats)}"
            )
    if formats != {"hf"}:
        other = sorted(formats - {"hf"})[0]
        what = f"{checkpoint.path}: is quantised ({found.text}), and the {other} format has no place for that"
        if found.refusal is not None:
            raise ConfigError(f"{what}; {_refusal(found)}")
        raise ConfigError(f"{what}; {_WAY_OUT}")
    check(found, checkpoint)
    numbers = described(checkpoint, found, model)
    _, misfits = mapping.examine(model.family, "hf", model.dims, numbers.ranks)
    raise_if_any(misfits, str(checkpoint.path))
    return _literal(checkpoint, found, model, numbers.names.stored)


def _plain(checkpoint: Checkpoint, model: Model, formats: frozenset[str]) -> Model:
    """The model of weights that are not quantised, whatever its config says of that."""
    stated = [name for name in (*CONFIGS, "quantization") if isinstance(model.config.get(name), Mapping)]
    if checkpoint.format != "hf" or not stated:
        return model
    said = f"config.json has {stated[0]}, but no tensor is quantised"
    if formats == {"hf"}:
        return replace(model, notices=(*model.notices, f"{said}: loaders that believe it fail; remove it from there"))
    config = {name: value for name, value in model.config.items() if name not in stated}
    return replace(model, config=config, notices=(*model.notices, f"{said}: it is left out"))


def check(found: Quantization, checkpoint: Checkpoint) -> None:
    """Raise KeyMismatchError listing every scale without codes, codes without a scale, and scale of a wrong shape."""
    raise_if_any(found.findings, str(checkpoint.path))


def refuse_scheme(found: Quantization, checkpoint: Checkpoint) -> None:
    """Raise ConfigError for a scheme that can be carried, but not dequantised."""
    if found.refusal is not None:
        raise ConfigError(f"{checkpoint.path}: is quantised ({found.text}); {_refusal(found)}")
    parts = [part.tensor for one in found.tensors.values() for part in (one.codes, one.scale)]
    strided = [part.key for part in parts if part.strides is not None]
    offset = [part for one in found.tensors.values() for part in one.parts if part.endswith("_zero_point")]
    for keys, why in ((strided, "is stored in another order of its axes"), (offset, "shifts the codes")):
        if keys:
            raise ConfigError(
                f"{checkpoint.path}: {keys[0]} {why}, which cannot be dequantised here; dequantise it with the tool "
                "that made it"
            )


def refuse_cast(checkpoint: Checkpoint, dtype: str | None) -> None:
    """Raise UsageError for a cast of a quantised source, of which only what is not quantised would be cast."""
    if dtype is None:
        return
    found, scheme = checkpoint.quantization, checkpoint.unknown_scheme
    if found is not None or scheme is not None:
        what = found.text if found is not None else scheme
        way = _WAY_OUT if found is not None and not found.refusal else "leave it out"
        raise UsageError(f"--dtype {dtype}: {checkpoint.path} is quantised ({what}), and codes are not cast; {way}")


def described(checkpoint: Checkpoint, found: Quantization, model: Model) -> Checkpoint:
    """The checkpoint with each quantised tensor as one of numbers, to be looked at: not all of them can be read.

    What headers do not say of a shape is taken to be as the table has it.
    """
    from ckpt_convert.checkpoint.quantized.view import as_view

    unsaid = {key for key, one in found.tensors.items() if one.shape is None}
    shapes = {}
    if unsaid:
        entries = model.family.entries("hf", model.dims)
        shapes = {entry.key: entry.shape("hf", model.dims) or () for entry in entries if entry.key in unsaid}
    return as_view(checkpoint, found, "float32", shapes)


def _refusal(found: Quantization) -> str:
    return (
        f"{found.refusal}, so it can only be laid out anew as it is (--to hf): dequantise it with the tool that made "
        "it, or take the model that was quantised"
    )


def _literal(checkpoint: Checkpoint, found: Quantization, model: Model, names: Mapping[str, str]) -> Model:
    """The table of the stored tensors; ``names`` has what a key of the family is called in the files, if otherwise."""
    from ckpt_convert.checkpoint import unknown

    tensors = checkpoint.ranks[0]
    family = unknown.family(tensors[key] for key in _order(found, model, tensors, names))
    return replace(model, family=replace(family, name=model.family.name, title=model.family.title))


def _order(
    found: Quantization, model: Model, stored: Mapping[str, mapping.Source], names: Mapping[str, str]
) -> Iterator[str]:
    """The stored keys in the order of the layers, what belongs together side by side."""
    left = dict.fromkeys(stored)
    for entry in model.family.entries("hf", model.dims):
        name = names.get(entry.key, entry.key)
        one = found.tensors.get(name)
        for key in one.parts if one is not None else (name,):
            if key in left:
                del left[key]
                yield key
    yield from left
