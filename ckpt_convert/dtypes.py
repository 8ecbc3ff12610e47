"""Element types under the names that safetensors gives them, and what torch and numpy call the same thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from ckpt_convert.errors import CorruptFileError


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    ``bits`` is the size of an element; ``torch`` the attribute of the torch module; ``storage`` the class that
    torch's zip files name for it (None: they use an untyped storage and name the dtype); ``numpy`` a dtype
    string of equal item size, exact where numpy has the type and an unsigned integer where it has not.
    """

    name: str
    bits: int
    torch: str
    storage: str | None
    numpy: str


_TABLE = (
    DType("F64", 64, "float64", "DoubleStorage", "<f8"),
    DType("F32", 32, "float32", "FloatStorage", "<f4"),
    DType("F16", 16, "float16", "HalfStorage", "<f2"),
    DType("BF16", 16, "bfloat16", "BFloat16Storage", "<u2"),
    DType("F8_E4M3", 8, "float8_e4m3fn", None, "|u1"),
    DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", None, "|u1"),
    DType("F8_E5M2", 8, "float8_e5m2", None, "|u1"),
    DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", None, "|u1"),
    DType("F8_E8M0", 8, "float8_e8m0fnu", None, "|u1"),
    DType("C64", 64, "complex64", "ComplexFloatStorage", "<c8"),
    DType("C128", 128, "complex128", "ComplexDoubleStorage", "<c16"),
    DType("I64", 64, "int64", "LongStorage", "<i8"),
    DType("I32", 32, "int32", "IntStorage", "<i4"),
    DType("I16", 16, "int16", "ShortStorage", "<i2"),
    DType("I8", 8, "int8", "CharStorage", "|i1"),
    DType("U64", 64, "uint64", None, "<u8"),
    DType("U32", 32, "uint32", None, "<u4"),
    DType("U16", 16, "uint16", None, "<u2"),
    DType("U8", 8, "uint8", "ByteStorage", "|u1"),
    DType("BOOL", 8, "bool", "BoolStorage", "|b1"),
    DType("F4", 4, "float4_e2m1fn_x2", None, "|u1"),
    DType("F6_E2M3", 6, "", None, "|u1"),
    DType("F6_E3M2", 6, "", None, "|u1"),
)

DTYPES = {dtype.name: dtype for dtype in _TABLE}
FROM_TORCH = {dtype.torch: dtype for dtype in _TABLE if dtype.torch}
FROM_STORAGE = {dtype.storage: dtype for dtype in _TABLE if dtype.storage}


def majority(sizes: Iterable[tuple[str, int]]) -> str | None:
    """The floating-point dtype of most bytes, in torch's words, of (dtype, bytes); None where there is none."""
    counts: Counter[str] = Counter()
    for dtype, nbytes in sizes:
        if dtype.startswith(("F", "BF")):
            counts[dtype] += nbytes
    return DTYPES[counts.most_common(1)[0][0]].torch if counts else None


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor; elements smaller than a byte are packed and have to fill whole bytes."""
    total, rest = divmod(prod(shape) * DTYPES[dtype].bits, 8)
    if rest:
        raise CorruptFileError(f"a {dtype} tensor of shape {list(shape)} does not fill whole bytes")
    return total
