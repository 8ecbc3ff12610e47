"""What every container says about itself without a tensor byte being read, and how one is laid out for writing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ckpt_convert import dtypes
from ckpt_convert.storage.base import RangeReader
from ckpt_convert.storage.place import Place

IN_MEMORY = "memory"
"""The kind of what is no file, but a tensor in memory."""


SLICES = frozenset(
    (
        "torch.distributed.tensor.DTensor",
        "torch.distributed._tensor.api.DTensor",
        "torch.distributed._shard.sharded_tensor.api.ShardedTensor",
    )
)
"""The classes of tensors of which a pickle holds one rank's part."""


class Box(NamedTuple):
    """Where a piece lies in its tensor: ``shape`` is that of the whole tensor, ``origin`` the piece's first element."""

    shape: tuple[int, ...]
    origin: tuple[int, ...]


class StoredTensor(NamedTuple):  # of all values the quickest to make, and there may be 100,000 of them
    """A tensor as a file stores it, or a piece of one.

    ``offset`` is the absolute byte offset of element [0, …, 0]; ``strides`` are in elements, None when the tensor
    is dense and row-major (the usual case). ``packed`` is the number of bytes where ``dtype`` is none of ``DTYPES``
    but the name of a packing of quantised numbers (GGUF's). ``box`` says which part of a tensor this piece is, None
    for a whole tensor.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None
    packed: int | None = None
    box: Box | None = None

    @property
    def nbytes(self) -> int:
        return dtypes.nbytes(self.dtype, self.shape) if self.packed is None else self.packed


@dataclass(frozen=True, slots=True)
class Checksummed:
    """A run of tensor bytes whose CRC-32 the container keeps: ``crc`` as the file says it, at each of ``places``."""

    offset: int
    nbytes: int
    crc: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """The header of one container file.

    ``tensors`` in the order in which the file names them; ``metadata`` safetensors' ``__metadata__``, or what a GGUF
    file says of itself; ``objects`` the entries that are no tensors (key → type name); ``checksummed`` the zip
    members that hold tensors; ``foreign`` the classes that a pickle names although rebuilding tensors needs none of
    them: nothing of them was imported or made, and such a file may be looked at, but not converted.
    """

    kind: str
    size: int
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    objects: Mapping[str, str] = field(default_factory=dict)
    checksummed: tuple[Checksummed, ...] = ()
    foreign: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class WeightFile:
    """An open weight file: its name in the checkpoint, its rank, and its header."""

    name: str
    rank: int
    place: Place
    reader: RangeReader
    header: Header


@dataclass(frozen=True)
class FileLayout:
    """A container file ready to be filled: its header, and every byte of it that belongs to no tensor.

    ``literals`` are (offset, bytes), ascending, and complement the tensors' bytes exactly.
    """

    header: Header
    literals: tuple[tuple[int, bytes], ...]
