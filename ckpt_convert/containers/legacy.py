"""torch's files from before 1.6, which are a row of pickles: torch itself reads them, whole."""

from __future__ import annotations

import logging
import pickle
from bisect import bisect_right
from typing import TYPE_CHECKING

from ckpt_convert.containers.flatten import flatten
from ckpt_convert.dtypes import FROM_TORCH, torch_name
from ckpt_convert.errors import CorruptFileError, InputError, UnsafeFileError, require_package
from ckpt_convert.storage.base import OnDisk, RangeReader
from ckpt_convert.tensors.header import Header, StoredTensor

if TYPE_CHECKING:
    import torch

KIND = "legacy"

_log = logging.getLogger("ckpt_convert")


class _Memory:
    """The bytes of tensors one after another, without being joined."""

    def __init__(self, name: str, pieces: list[memoryview]) -> None:
        self.name = name
        self._pieces = [piece for piece in pieces if len(piece)]
        self._starts = []
        self.size = 0
        for piece in self._pieces:
            self._starts.append(self.size)
            self.size += len(piece)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > self.size:
            raise CorruptFileError(
                f"{self.name}: bytes {offset} to {offset + len(buffer)} are needed, but its tensors have {self.size}"
            )
        number = bisect_right(self._starts, offset) - 1
        done = 0
        while done < len(buffer):
            begin = offset + done - self._starts[number]
            piece = self._pieces[number][begin : begin + len(buffer) - done]
            buffer[done : done + len(piece)] = piece
            done += len(piece)
            number += 1


def open_legacy(reader: OnDisk) -> tuple[RangeReader, Header]:
    """Load a legacy file with ``torch.load(weights_only=True)`` and return its tensors' bytes and their header.

    The bytes are dense and row-major, in the order of the keys, in memory; a tensor that stands under two keys is
    there twice. Logs a warning, because memory grows with the file. Raises UnsafeFileError when torch refuses what
    the pickle asks for, CorruptFileError when the file cannot be loaded for any other reason.
    """
    _log.warning(
        "%s is in torch's format from before 1.6: it is read whole into memory (%.1f MB)",
        reader.name,
        reader.size / 1e6,
    )
    require_package("torch", f"{reader.name}: an old torch file")
    state = _load(reader)
    import torch

    # Tensors may share a file's bytes, so a value is no promise of a byte here: the limit only has to end the walk.
    tensors, objects = flatten(reader.name, state, torch.Tensor, 10_000_000)
    stored = []
    pieces = []
    position = 0
    for key, tensor in tensors.items():
        dtype, shape = _describe(reader, key, tensor)
        piece = _bytes(tensor)
        stored.append(StoredTensor(key, dtype, shape, position))
        pieces.append(piece)
        position += len(piece)
    memory = _Memory(reader.name, pieces)
    return memory, Header(KIND, position, tuple(stored), objects=objects)


def _load(reader: OnDisk) -> object:
    import torch

    try:
        return torch.load(reader.path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(
            f"{reader.name}: torch.load(weights_only=True) refuses it, and nothing weaker is tried: {_reason(error)}. "
            "If you trust the file, load it with torch and save a plain state dict, or better a safetensors file"
        ) from error
    except Exception as error:  # torch raises whatever the damage makes of its parsing
        raise CorruptFileError(
            f"{reader.name}: torch cannot load it ({type(error).__name__}: {str(error)[:200]}); the file is damaged, "
            "so download or copy it again"
        ) from error


def _reason(error: Exception) -> str:
    """What torch's message says was wrong, without its advice to switch the check off."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines()]
    found = [line for line in lines if "global" in line.lower() or line.startswith("WeightsUnpickler")]
    return (" ".join(found) or type(error).__name__)[:300]


def _describe(reader: OnDisk, key: str, tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    name = torch_name(tensor.dtype)
    if str(tensor.layout) != "torch.strided" or tensor.is_quantized or name not in FROM_TORCH:
        raise InputError(
            f"{reader.name}: {key!r} should be a dense tensor of plain numbers, but is {tensor.layout} {name}; "
            "load it with torch and save it as a dense one"
        )
    dtype = FROM_TORCH[name]
    shape = tuple(tensor.shape)
    if dtype.bits < 8:  # torch counts bytes where safetensors counts the numbers packed in them
        shape = (*shape[:-1], shape[-1] * 8 // dtype.bits)
    return dtype.name, shape


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy().data
