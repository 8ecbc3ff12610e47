"""Quantized tensors carried as they are, within their own format, and the reasons where that is not enough."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ckpt_convert.checkpoint import generic_model
from ckpt_convert.checkpoint.mapping import SourceTensor
from ckpt_convert.checkpoint.model import Model
from ckpt_convert.checkpoint.quantized.detect import CONFIGS, Quantization
from ckpt_convert.errors import ConfigError, UnsupportedFamilyError, option_error
from ckpt_convert.storage.place import Place
from ckpt_convert.tensors.lazy import from_source

_WAY_OUT = "pass `dequantize='bfloat16'` (or float32)"


def unquantized(model: Model, format: str | None, formats: frozenset[str]) -> Model:
    """The model of weights that are not quantized, in ``format``, whatever its config says of that.

    Outside of Hugging Face's format, what it says is left out: the headers are right.
    """
    stated = [name for name in (*CONFIGS, "quantization") if isinstance(model.config.get(name), Mapping)]
    if format != "hf" or not stated:
        return model
    said = f"config.json has {stated[0]}, but no tensor is quantized"
    if formats == {"hf"}:
        return replace(model, notices=(*model.notices, f"{said}: loaders that believe it fail; remove it from there"))
    config = {name: value for name, value in model.config.items() if name not in stated}
    return replace(model, config=config, notices=(*model.notices, f"{said}: it is left out"))


def refuse_formats(found: Quantization, model: Model, formats: frozenset[str], path: Place) -> None:
    """Raise where quantized tensors cannot be carried between these formats.

    Raises UnsupportedFamilyError for a format that the family has not, ConfigError for one without a place for scales.
    """
    for format in sorted(formats):
        if not model.family.has(format):  # whatever is done about the quantization
            raise UnsupportedFamilyError(
                f"{path}: the {model.family.name} table has no {format} column; it has "
                f"{', '.join(model.family.formats)}"
            )
    if formats != {"hf"}:
        other = sorted(formats - {"hf"})[0]
        what = f"{path}: is quantized ({found.text}), and the {other} format has no place for that"
        if found.refusal is not None:
            raise ConfigError(f"{what}; {_refusal(found)}")
        raise ConfigError(f"{what}; {_WAY_OUT}")


def refuse_scheme(found: Quantization, path: Place) -> None:
    """Raise ConfigError for a scheme that can be carried, but not dequantized."""
    if found.refusal is not None:
        raise ConfigError(f"{path}: is quantized ({found.text}); {_refusal(found)}")
    parts = [part.tensor for one in found.tensors.values() for part in (one.codes, one.scale)]
    strided = [part.key for part in parts if part.strides is not None]
    offset = [part for one in found.tensors.values() for part in one.parts if part.endswith("_zero_point")]
    for keys, why in ((strided, "is stored in another order of its axes"), (offset, "shifts the codes")):
        if keys:
            raise ConfigError(
                f"{path}: {keys[0]} {why}, which cannot be dequantized here; dequantize it with the tool that made it"
            )


def refuse_cast(found: Quantization | None, scheme: str | None, path: Place, dtype: str) -> None:
    """Raise UsageError for a cast of a quantized source, of which only what is not quantized would be cast.

    ``scheme`` is one that no rule is of.
    """
    if found is None and scheme is None:
        return
    what = found.text if found is not None else scheme
    way = _WAY_OUT if found is not None and not found.refusal else "leave it out"
    raise misfit("dtype", dtype, f"{path} is quantized ({what}), and codes are not cast; {way}")


def _refusal(found: Quantization) -> str:
    return (
        f"{found.refusal}, so it can only be laid out anew as it is (`to='hf'`): dequantize it with the tool that made "
        "it, or take the model that was quantized"
    )


def dequantized_tensors(
    found: Quantization, tensors: Mapping[str, SourceTensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, SourceTensor]:
    """The tensors with each quantized one as the numbers that it stands for, to be held against a table.

    ``shapes`` are those that headers do not say; without one, such a tensor is left out.
    """
    by_codes = {one.codes.tensor.key: one for one in found.tensors.values()}
    out = {}
    for key, source in tensors.items():
        one = by_codes.get(key)
        shape = None if one is None else one.shape or shapes.get(one.key)
        if one is not None and shape is not None:
            number = source.tensor.tiles[0].source if source.tensor.tiles else 0  # nobody reads them
            out[one.key] = SourceTensor(one.key, "F32", from_source(number, shape), source.location)
        elif key not in found.owners and key not in found.extras:
            out[key] = source
    return out


def passthrough_model(
    found: Quantization, model: Model, tensors: Mapping[str, SourceTensor], order: Iterable[str]
) -> Model:
    """The model whose table is of the stored tensors themselves: codes, scales and all else under their own keys.

    They are in the ``order`` of the numbers that they stand for, what belongs together side by side.
    """
    left = dict.fromkeys(tensors)
    keys = []
    for key in order:
        one = found.tensors.get(key)
        for part in one.parts if one is not None else (key,):
            if part in left:
                del left[part]
                keys.append(part)
    family = generic_model.generic_family(tensors[key] for key in (*keys, *left))
    return replace(model, family=replace(family, name=model.family.name, title=model.family.title))
