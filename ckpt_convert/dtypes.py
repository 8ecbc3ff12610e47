"""Element types: one table, under the names that safetensors gives them; what is asked of a dtype follows from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from ckpt_convert.errors import CorruptFileError

DTypeKind = Literal["float", "exponent", "complex", "int"]
OutputDType = Literal["float32", "float16", "bfloat16"]
DequantizedDType = Literal["bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    ``bits`` is the size of an element; ``torch`` the attribute of the torch module; ``storage`` the class that
    torch's zip files name for it (None: they use an untyped storage and name the dtype); ``numpy`` a dtype
    string of equal item size, exact where numpy has the type and an unsigned integer where it has not.

    A float has a sign, then its exponent, then ``mantissa`` bits. ``special`` is what stands for infinity and NaN:
    the full exponent ("ieee"), the last code of each sign for NaN alone ("last"), the code of minus zero for NaN alone
    ("zero"), or nothing. An "exponent" is a power of two without a sign. ``order`` is the place of the dtype in the
    order in which the safetensors library writes tensors; None is a dtype that is not in that format.
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
        """Whether it stands for real numbers that need not be whole, as weights do."""
        return self.kind in ("float", "exponent")

    @property
    def exponent(self) -> int:
        """The bits of a float's exponent."""
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
"""What a tensor in a file may be cast from, and to."""

CAST_FROM = tuple(dtype.name for dtype in _TABLE if dtype.is_number and dtype.bits >= 8)
"""What a tensor in a file may be cast from: those, and the narrow ones, whose values every dtype of CASTS holds."""

CASTS = {DTYPES[name].torch: name for name in CASTABLE if DTYPES[name].bits <= 32}
"""What may be asked for as the dtype of an output, in torch's words, and the dtype that it is."""

DEQUANTIZED_DTYPES = {DTYPES[name].torch: name for name in ("BF16", "F32")}
"""The same of numbers that are worked out of codes and scales: what has the range of these."""


def torch_name(dtype: object) -> str:
    """What torch calls a dtype, given as torch has it or as a config or caller spells it: without the module's name."""
    return str(dtype).removeprefix("torch.")


def majority_dtype(sizes: Iterable[tuple[str, int]]) -> str | None:
    """The dtype of most bytes, of (dtype, bytes); None where there is none."""
    counts: Counter[str] = Counter()
    for dtype, nbytes in sizes:
        counts[dtype] += nbytes
    return counts.most_common(1)[0][0] if counts else None


def majority_float_dtype(sizes: Iterable[tuple[str, int]]) -> str | None:
    """The floating-point dtype of most bytes, in torch's words; None where there is none."""
    found = majority_dtype((name, nbytes) for name, nbytes in sizes if name in DTYPES and DTYPES[name].is_number)
    return DTYPES[found].torch if found else None


@lru_cache(maxsize=1 << 12)  # of 100,000 tensors only a few kinds are different
def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor; elements smaller than a byte are packed and have to fill whole bytes."""
    total, rest = divmod(prod(shape) * DTYPES[dtype].bits, 8)
    if rest:
        raise CorruptFileError(f"a {dtype} tensor of shape {list(shape)} does not fill whole bytes")
    return total
