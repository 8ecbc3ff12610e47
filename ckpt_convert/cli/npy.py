"""Writing a tensor as a .npy file, block by block, completely or not at all."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from ckpt_convert.cli.output_file import OutputFile
from ckpt_convert.cli.text import echo, escape
from ckpt_convert.dtypes import CAST_FROM, DTYPES
from ckpt_convert.tensors.blocks import BlockReader, TypedTensor
from ckpt_convert.tensors.gather import StoredTensors
from ckpt_convert.wording import human_bytes

_MAGIC = b"\x93NUMPY"


def check_npy(destination: str, *, with_json: bool) -> None:
    """Refuse early a destination that is no place for a .npy file; raises what ``OutputFile.check`` does."""
    _NPY.check(destination, with_json=with_json)


def write_npy(destination: str, tensor: TypedTensor, stored: StoredTensors) -> None:
    """Write a tensor to a file, or to standard output ("-"); prints the file's path on standard error.

    What numpy has no dtype for (bfloat16, float8) is written as float32, which holds it exactly. Raises what
    ``OutputFile.write`` does.
    """
    target = _written_dtype(tensor.dtype)
    path = _NPY.write(destination, _parts(tensor, target, stored))
    if path is not None:
        size = human_bytes(tensor.tensor.size * DTYPES[target].bits // 8)
        kind = "" if target == tensor.dtype else f", {tensor.dtype} as float32"
        echo(f"wrote {escape(str(path))} ({size}{kind})", err=True)


def _parts(tensor: TypedTensor, target: str, stored: StoredTensors) -> Iterator[bytes | memoryview]:
    """The header, and the elements in order."""
    import numpy as np

    header = io.BytesIO()
    described = {"descr": DTYPES[target].numpy, "fortran_order": False, "shape": tuple(tensor.tensor.shape)}
    np.lib.format.write_array_header_1_0(header, described)
    yield header.getvalue()
    for _, block in BlockReader(stored).blocks(tensor.tensor, tensor.dtype, target):
        yield block


def _written_dtype(dtype: str) -> str:
    is_numpys = not DTYPES[dtype].is_number or DTYPES[dtype].numpy[1] == "f"
    return dtype if is_numpys or dtype not in CAST_FROM else "F32"


def _is_npy(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
    except OSError:
        return True  # the error is reported when it is written
    return not start or start == _MAGIC


_NPY = OutputFile("--npy", ".npy file", "tensor.npy", _is_npy)
