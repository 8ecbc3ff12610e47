"""Quantized checkpoints as dequantized values, on request or for a comparison."""

from __future__ import annotations

from ckpt_convert.checkpoint.findings import raise_if_any
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.quantized.as_stored import refuse_scheme
from ckpt_convert.errors import ConfigError, option_error
from ckpt_convert.wording import option_text


def dequantized(source: Identified, dtype: str) -> Identified:
    """The checkpoint with its quantized tensors as values of ``dtype``; the same one where nothing is quantized.

    Raises KeyMismatchError where codes and scales do not belong together, and ConfigError for a scheme that can only
    pass through.
    """
    found = source.quantization
    if found is None:
        return source
    raise_if_any(found.findings, str(source.place))
    refuse_scheme(found, source.place)
    return source.with_values(found, dtype)


def dequantize_if_asked(source: Identified, dtype: str | None) -> Identified:
    """``dequantized`` unless ``dtype`` is None; raises UsageError where nothing is quantized."""
    if dtype is None:
        return source
    if source.unknown_scheme is not None:
        raise ConfigError(
            f"{option_text('dequantize', dtype)}: {source.place} is quantized ({source.unknown_scheme}), an unknown "
            "scheme; dequantize it with the tool that made it, or use the original model"
        )
    if source.quantization is None:
        raise option_error("dequantize", dtype, f"{source.place} is not quantized; leave it out, or use `dtype=`")
    return dequantized(source, dtype)


def dequantize_to_compare(a: Identified, b: Identified) -> tuple[Identified, Identified, list[str]]:
    """Two checkpoints to compare, and notices: if only one of them is quantized, it is dequantized.

    It gets the other side's dtype, so that a checkpoint equals its own dequantized output bit for bit.
    """
    if (a.quantization is None) == (b.quantization is None):
        return a, b, []
    quantized, other = (a, b) if a.quantization is not None else (b, a)
    found = quantized.quantization
    if found is None or found.findings or found.refusal is not None:
        return a, b, []
    dtype = "float32" if other.opened.majority_dtype in ("F32", "F64") else "bfloat16"
    numbers = dequantized(quantized, dtype)
    said = f"{quantized.place}: compared as dequantized values ({found.text}), in {dtype}"
    return (numbers, b, [said]) if quantized is a else (a, numbers, [said])
