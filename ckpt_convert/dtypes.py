"""Element types: one table under safetensors' names, from which everything else about dtypes is derived."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from math import prod
from typing import Literal

from ckpt_convert.errors import CorruptFileError
from ckpt_convert.values import frozen

DTypeKind = Literal["float", "exponent", "complex", "int"]
OutputDType = Literal["float32", "float16", "bfloat16"]
DequantizedDType = Literal["bfloat16", "float32"]


@frozen()
class DType:
    """One element type.

    name: as in safetensors headers.
    bits: size of an element.
    torch: attribute of the torch module.
    storage: the storage class in torch's zip files; None for dtypes with an untyped storage.
    numpy: a dtype string of the same item size, an unsigned integer if numpy lacks the type.
    order: rank in the order in which the safetensors library writes dtypes; None if the format lacks it.
    kind: "float" has sign, exponent and mantissa bits; "exponent" is a power of two without sign.
    mantissa: number of mantissa bits of a float.
    special: how a float encodes infinity and NaN: by the full exponent ("ieee"), NaN only, as the last code of each
        sign ("last"), NaN only, as minus zero ("zero"), or not at all.
    """

    name: str
    bits: int
    torch: str
    storage: str | None
    numpy: str
    order: int | None
    kind: DTypeKind = "int"
    mantissa: int = 0
    special: Literal["ieee", "last", "zero"] | None = None

    @property
    def is_number(self) -> bool:
        """Whether its values are real numbers that need not be integers, as weights are."""
        return self.kind in ("float", "exponent")

    @property
    def exponent(self) -> int:
        """The number of exponent bits of a float."""
        return self.bits - 1 - self.mantissa


_TABLE = (
    DType("F64", 64, "float64", "DoubleStorage", "<f8", 2, "float", 52, "ieee"),
    DType("F32", 32, "float32", "FloatStorage", "<f4", 4, "float", 23, "ieee"),
    DType("F16", 16, "float16", "HalfStorage", "<f2", 8, "float", 10, "ieee"),
    DType("BF16", 16, "bfloat16", "BFloat16Storage", "<u2", 7, "float", 7, "ieee"),
    DType("F8_E4M3", 8, "float8_e4m3fn", None, "|u1", 14, "float", 3, "last"),
    DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", None, "|u1", 12, "float", 3, "zero"),
    DType("F8_E5M2", 8, "float8_e5m2", None, "|u1", 15, "float", 2, "ieee"),
    DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", None, "|u1", 11, "float", 2, "zero"),
    DType("F8_E8M0", 8, "float8_e8m0fnu", None, "|u1", 13, "exponent"),
    DType("C64", 64, "complex64", "ComplexFloatStorage", "<c8", 3, "complex"),
    DType("C128", 128, "complex128", "ComplexDoubleStorage", "<c16", None, "complex"),
    DType("I64", 64, "int64", "LongStorage", "<i8", 1),
    DType("I32", 32, "int32", "IntStorage", "<i4", 6),
    DType("I16", 16, "int16", "ShortStorage", "<i2", 10),
    DType("I8", 8, "int8", "CharStorage", "|i1", 16),
    DType("U64", 64, "uint64", None, "<u8", 0),
    DType("U32", 32, "uint32", None, "<u4", 5),
    DType("U16", 16, "uint16", None, "<u2", 9),
    DType("U8", 8, "uint8", "ByteStorage", "|u1", 17),
    DType("BOOL", 8, "bool", "BoolStorage", "|b1", 21),
    DType("F4", 4, "float4_e2m1fn_x2", None, "|u1", 20, "float", 1),
    DType("F6_E2M3", 6, "", None, "|u1", 19, "float", 3),
    DType("F6_E3M2", 6, "", None, "|u1", 18, "float", 2),
)

DTYPES = {dtype.name: dtype for dtype in _TABLE}
FROM_TORCH = {dtype.torch: dtype for dtype in _TABLE if dtype.torch}
FROM_STORAGE = {dtype.storage: dtype for dtype in _TABLE if dtype.storage}

CASTABLE = tuple(dtype.name for dtype in _TABLE if dtype.kind == "float" and dtype.bits >= 16)
"""Dtypes that stored tensors can be cast from and to."""

CAST_FROM = tuple(dtype.name for dtype in _TABLE if dtype.is_number and dtype.bits >= 8)
"""Dtypes that stored tensors can be cast from: also narrow ones, whose values fit every dtype of CASTS."""

CASTS = {DTYPES[name].torch: name for name in CASTABLE if DTYPES[name].bits <= 32}
"""Dtypes that an output can be cast to: torch's name → ours."""

DEQUANTIZED_DTYPES = {DTYPES[name].torch: name for name in ("BF16", "F32")}
"""Dtypes for dequantized values, which need their range: torch's name → ours."""


def torch_name(dtype: object) -> str:
    """torch's name of a dtype without "torch.", from a torch dtype or from its name in a config."""
    return str(dtype).removeprefix("torch.")


def majority_dtype(sizes: Iterable[tuple[str, int]]) -> str | None:
    """The dtype with the most bytes, from (dtype, bytes); None if there are none."""
    counts: Counter[str] = Counter()
    for dtype, nbytes in sizes:
        counts[dtype] += nbytes
    return counts.most_common(1)[0][0] if counts else None


def majority_float_dtype(sizes: Iterable[tuple[str, int]]) -> str | None:
    """torch's name of the floating-point dtype with the most bytes; None if there is none."""
    found = majority_dtype((name, nbytes) for name, nbytes in sizes if name in DTYPES and DTYPES[name].is_number)
    return DTYPES[found].torch if found else None


@lru_cache(maxsize=1 << 12)  # 100,000 tensors have only a few dtypes and shapes
def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor; elements smaller than a byte are packed and must fill whole bytes."""
    total, rest = divmod(prod(shape) * DTYPES[dtype].bits, 8)
    if rest:
        raise CorruptFileError(f"a {dtype} tensor of shape {list(shape)} does not fill whole bytes")
    return total
