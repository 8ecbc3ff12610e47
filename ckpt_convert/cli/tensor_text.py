"""A tensor's values as torch prints them, without torch: four digits, edges of what is large, 80 columns.

The rules are those of torch 2.13 (torch/_tensor_str.py) with its default print options. Only the values that are
printed have to be read: of an axis that is abbreviated the first three and the last three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ckpt_convert.dtypes import DTYPES
from ckpt_convert.tensors import decode
from ckpt_convert.tensors.lazy import LazyTensor, concat

_PRECISION = 4
_THRESHOLD = 1000
_EDGE = 3
_WIDTH = 80
_PREFIX = "tensor("
_UNNAMED = ("F32", "C64", "I64", "BOOL")
"""Dtypes that torch does not print, since tensors have them by default."""


@dataclass(frozen=True, slots=True)
class _Formatter:
    """How all values of a tensor are printed: with a point, an exponent, or neither; flush right in ``width``."""

    width: int
    is_float: bool
    is_integral: bool = True
    has_exponent: bool = False

    def text(self, value: Any) -> str:
        if not self.is_float:
            shown = f"{value}"
        elif self.has_exponent:
            shown = f"{value:.{_PRECISION}e}"
        elif self.is_integral:
            shown = f"{value:.0f}" + "." * math.isfinite(value)
        else:
            shown = f"{value:.{_PRECISION}f}"
        return shown.rjust(self.width)


def printed_part(tensor: LazyTensor) -> LazyTensor:
    """The part of a tensor whose values are printed: all of a small one, the edges of each axis of a large one."""
    if tensor.size <= _THRESHOLD:
        return tensor
    for axis, size in enumerate(tensor.shape):
        if size > 2 * _EDGE:
            ends = [tensor.narrow(axis, 0, _EDGE), tensor.narrow(axis, size - _EDGE, _EDGE)]
            tensor = concat(ends, axis)
    return tensor


def values_of(data: bytes, dtype: str) -> list[Any]:
    """The elements as Python's numbers, exactly; dtypes below a byte are not decoded."""
    codec = decode.codec_of(dtype)
    if codec is None or codec.values_per_unit > 1:
        raise ValueError(f"{dtype} packs several values together")
    raw = np.frombuffer(data, np.uint8)
    if dtype == "BOOL":
        return [bool(value) for value in raw.tolist()]
    if codec.kind == "int":
        return list(raw.view(codec.unit_dtype).tolist())
    if DTYPES[dtype].kind == "complex":
        return list(raw.view(DTYPES[dtype].numpy).tolist())
    return list(decode.decode_values(codec, raw, np.empty(len(raw), codec.value_dtype)).tolist())


def torch_text(values: Sequence[Any], shape: Sequence[int], dtype: str) -> str:
    """What ``print`` shows of a torch tensor; ``values`` are the elements of its ``printed_part``, row-major."""
    kind, is_empty = DTYPES[dtype], not prod(shape)
    suffixes = [f"size={tuple(shape)}"] if is_empty and len(shape) != 1 else []
    if dtype != "F32" and (is_empty or dtype not in _UNNAMED):
        suffixes.append(f"dtype=torch.{kind.torch}")
    if is_empty:
        return _with_suffixes("[]", suffixes)
    is_float = kind.kind != "int"
    if kind.kind == "complex":
        real, imaginary = ([part(value) for value in values] for part in (_real, _imaginary))
        formatters = [_formatter(real, is_float), _formatter(imaginary, is_float)]
    else:
        formatters = [_formatter(values, is_float)]
    return _with_suffixes(_nested(iter(values), shape, formatters, prod(shape) > _THRESHOLD, len(_PREFIX)), suffixes)


def _real(value: complex) -> float:
    return value.real


def _imaginary(value: complex) -> float:
    return value.imag


def _formatter(values: Sequence[Any], is_float: bool) -> _Formatter:
    if not is_float:
        return _Formatter(max(len(f"{value}") for value in values), is_float)
    found = [value for value in values if math.isfinite(value) and value]
    if not found:
        return _Formatter(1, is_float)
    least, largest = min(map(abs, found)), max(map(abs, found))
    is_integral = all(value == math.ceil(value) for value in found)
    has_exponent = largest / least > 1000 or largest > 1e8 or least < 1e-4
    plain = _Formatter(1, is_float, is_integral, has_exponent)
    return _Formatter(max(len(plain.text(value)) for value in found), is_float, is_integral, has_exponent)


def _nested(values: Any, shape: Sequence[int], formatters: Sequence[_Formatter], is_short: bool, indent: int) -> str:
    """The next elements of ``values`` as a tensor of this shape, in brackets."""
    if not shape:
        return _element(next(values), formatters)
    size, *inner = shape
    is_cut = is_short and size > 2 * _EDGE
    if not inner:
        return _vector(values, size, formatters, is_cut, indent)
    rows = [_nested(values, inner, formatters, is_short, indent + 1) for _ in range(2 * _EDGE if is_cut else size)]
    if is_cut:
        rows.insert(_EDGE, "...")
    return "[" + ("," + "\n" * len(inner) + " " * (indent + 1)).join(rows) + "]"


def _vector(values: Any, size: int, formatters: Sequence[_Formatter], is_cut: bool, indent: int) -> str:
    # Each element with ", " behind it; of a complex one also the j.
    width = sum(formatter.width for formatter in formatters) + len(formatters) + 1
    count = max(1, (_WIDTH - indent) // width)
    texts = [_element(next(values), formatters) for _ in range(2 * _EDGE if is_cut else size)]
    if is_cut:
        texts.insert(_EDGE, " ...")
    lines = [", ".join(texts[at : at + count]) for at in range(0, len(texts), count)]
    return "[" + (",\n" + " " * (indent + 1)).join(lines) + "]"


def _element(value: Any, formatters: Sequence[_Formatter]) -> str:
    if len(formatters) == 1:
        return formatters[0].text(value)
    imaginary = f"{formatters[1].text(value.imag)}j".lstrip()
    return formatters[0].text(value.real) + ("" if imaginary[0] in "+-" else "+") + imaginary


def _with_suffixes(text: str, suffixes: Sequence[str]) -> str:
    text = f"{_PREFIX}{text}"
    last = len(text) - text.rfind("\n") + 1
    out = [text]
    for suffix in suffixes:
        if last + len(suffix) + 2 > _WIDTH:
            out.append(f",\n{' ' * len(_PREFIX)}{suffix}")
            last = len(_PREFIX) + len(suffix)
        else:
            out.append(f", {suffix}")
            last += len(suffix) + 2
    return "".join([*out, ")"])
