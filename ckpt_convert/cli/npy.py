"""Writing a tensor as a .npy file, block by block, completely or not at all."""

from __future__ import annotations

import io
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from ckpt_convert import dtypes
from ckpt_convert.cli.text import echo, escape
from ckpt_convert.dtypes import DTYPES
from ckpt_convert.errors import UsageError
from ckpt_convert.storage.names import local_path
from ckpt_convert.storage.system import take_place, writing
from ckpt_convert.tensors.blocks import BlockReader, TypedTensor
from ckpt_convert.tensors.gather import StoredTensors
from ckpt_convert.wording import human_bytes

_MAGIC = b"\x93NUMPY"


def check_npy(destination: str, *, with_json: bool) -> None:
    """Refuse early a destination that cannot be written, or that is another kind of file; raises UsageError."""
    path = local_path(destination, "--npy")
    if not destination:
        raise click.UsageError("--npy needs the name of a file")
    if destination == "-":
        if with_json:
            raise click.UsageError("--npy - and --json both write to standard output; give a file to --npy")
        return
    if path.is_dir():
        raise UsageError(f"--npy {path}: is a directory; give the name of a file in it, such as {path / 'tensor.npy'}")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"--npy {path}: there is no directory {path.resolve().parent}; create it first")
    if path.is_file() and not _is_npy(path):
        raise UsageError(f"--npy {path}: is there and is no .npy file; give another name, or remove it first")


def write_npy(destination: str, tensor: TypedTensor, stored: StoredTensors) -> None:
    """Write a tensor to a file, or to standard output ("-"); prints the file's path on standard error.

    What numpy has no dtype for (bfloat16, float8) is written as float32, which holds it exactly.
    """
    target = _written_dtype(tensor.dtype)
    parts = _parts(tensor, target, stored)
    if destination == "-":
        for part in parts:
            sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
        return
    path = local_path(destination, "--npy").resolve()  # a link is written through, not replaced
    size = tensor.tensor.size * DTYPES[target].bits // 8
    with writing(path):
        if path.exists() and not path.is_file():  # a pipe: there is nothing to rename onto
            with path.open("wb") as file:
                file.writelines(parts)
        else:
            _replace(path, parts)
    kind = "" if target == tensor.dtype else f", {tensor.dtype} as float32"
    echo(f"wrote {escape(str(path))} ({human_bytes(size)}{kind})", err=True)


def _replace(path: Path, parts: Iterator[bytes | memoryview]) -> None:
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("xb") as file:
            file.writelines(parts)
            file.flush()
            take_place(file.fileno(), temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
    return dtype if is_numpys or dtype not in dtypes.CAST_FROM else "F32"


def _is_npy(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
    return not start or start == _MAGIC
