"""Quantized tensors that pass through as stored, within their own format, and errors where that is not possible."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ckpt_convert.checkpoint import generic_model
from ckpt_convert.checkpoint.conventions import QUANTIZATION_CONFIGS
from ckpt_convert.checkpoint.model import Model
from ckpt_convert.checkpoint.quantized.detect import Quantization
from ckpt_convert.checkpoint.tensor_info import SourceTensor
from ckpt_convert.errors import ConfigError, UnsupportedFamilyError, option_error
from ckpt_convert.storage.place import Place
from ckpt_convert.tensors.lazy import from_source

_WAY_OUT = "pass `dequantize='bfloat16'` (or float32)"


def unquantized(model: Model, format: str | None, formats: frozenset[str]) -> Model:
    """The model of weights that are not quantized, in ``format``, whatever its config states.

    The headers decide: in an output of another format than Hugging Face's the config's quantization is removed.
    """
    stated = [name for name in (*QUANTIZATION_CONFIGS, "quantization") if isinstance(model.config.get(name), Mapping)]
    if format != "hf" or not stated:
        return model
    said = f"config.json has {stated[0]}, but no tensor is quantized"
    if formats == {"hf"}:
        return replace(model, notices=(*model.notices, f"{said}: loaders that believe it fail; remove it from there"))
    config = {name: value for name, value in model.config.items() if name not in stated}
    return replace(model, config=config, notices=(*model.notices, f"{said}: it is left out"))


def refuse_formats(quantization: Quantization, model: Model, formats: frozenset[str], path: Place) -> None:
    """Raise where quantized tensors cannot pass through between these formats.

    Raises UnsupportedFamilyError for a format that the family lacks, ConfigError for a format that cannot hold scales.
    """
    for format in sorted(formats):
        if not model.family.has_column(format):  # dequantizing would not help
            raise UnsupportedFamilyError(
                f"{path}: the {model.family.name} table has no {format} column; it has "
                f"{', '.join(model.family.formats)}"
            )
    if formats != {"hf"}:
        other = sorted(formats - {"hf"})[0]
        what = f"{path}: is quantized ({quantization.text}), and the {other} format has no place for that"
        if quantization.refusal is not None:
            raise ConfigError(f"{what}; {_refusal(quantization)}")
        raise ConfigError(f"{what}; {_WAY_OUT}")


def refuse_scheme(quantization: Quantization, path: Place) -> None:
    """Raise ConfigError for a scheme that passes through, but cannot be dequantized."""
    if quantization.refusal is not None:
        raise ConfigError(f"{path}: is quantized ({quantization.text}); {_refusal(quantization)}")
    parts = [part.tensor for one in quantization.tensors.values() for part in (one.codes, one.scale)]
    strided = [part.key for part in parts if part.strides is not None]
    offset = [part for one in quantization.tensors.values() for part in one.parts if part.endswith("_zero_point")]
    for keys, why in ((strided, "is stored in another order of its axes"), (offset, "shifts the codes")):
        if keys:
            raise ConfigError(
                f"{path}: {keys[0]} {why}, which cannot be dequantized here; dequantize it with the tool that made it"
            )


def refuse_cast(quantization: Quantization | None, scheme: str | None, path: Place, dtype: str) -> None:
    """Raise UsageError for a cast of a quantized source: it would only cast the tensors that are not quantized.

    ``scheme`` is the name of a quantization scheme that no rule knows.
    """
    if quantization is None and scheme is None:
        return
    what = quantization.text if quantization is not None else scheme
    way = _WAY_OUT if quantization is not None and not quantization.refusal else "leave it out"
    raise option_error("dtype", dtype, f"{path} is quantized ({what}), and codes are not cast; {way}")


def _refusal(quantization: Quantization) -> str:
    return (
        f"{quantization.refusal}, so it can only be re-sharded (`to='hf'`): dequantize it with the tool that made it, "
        "or convert the original model"
    )


def dequantized_tensors(
    quantization: Quantization, tensors: Mapping[str, SourceTensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, SourceTensor]:
    """The tensors with each quantized one replaced by its dequantized shape, to be checked against a table.

    ``shapes`` are those that headers do not give; a tensor whose shape neither gives is left out.
    """
    by_codes = {one.codes.tensor.key: one for one in quantization.tensors.values()}
    out = {}
    for key, source in tensors.items():
        one = by_codes.get(key)
        shape = None if one is None else one.shape or shapes.get(one.key)
        if one is not None and shape is not None:
            number = source.tensor.tiles[0].source if source.tensor.tiles else 0  # never read
            out[one.key] = SourceTensor(one.key, "F32", from_source(number, shape), source.location)
        elif key not in quantization.owners and key not in quantization.extras:
            out[key] = source
    return out


def passthrough_model(
    quantization: Quantization, model: Model, tensors: Mapping[str, SourceTensor], order: Iterable[str]
) -> Model:
    """The model with a table of the stored tensors themselves: codes, scales and all others under their own keys.

    They are in the ``order`` of the dequantized keys, the parts of one tensor next to each other.
    """
    left = dict.fromkeys(tensors)
    keys = []
    for key in order:
        one = quantization.tensors.get(key)
        for part in one.parts if one is not None else (key,):
            if part in left:
                del left[part]
                keys.append(part)
    family = generic_model.generic_family(tensors[key] for key in (*keys, *left))
    return replace(model, family=replace(family, name=model.family.name, title=model.family.title))
