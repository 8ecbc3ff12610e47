"""The header of a container file, read without any tensor bytes, and the layout of one for writing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import NamedTuple

from ckpt_convert import dtypes
from ckpt_convert.storage.base import RangeReader
from ckpt_convert.storage.place import Place
from ckpt_convert.values import frozen

IN_MEMORY = "memory"
"""``Header.kind`` of tensors in memory, which are no file."""

GGUF = "gguf"
"""``Header.kind`` of GGUF files, which are only looked at."""


Scalar = str | int | float | bool | None
"""A plain value that a file holds beside its tensors, such as an epoch or a learning rate."""

SHARDED_TENSOR_CLASSES = frozenset(
    (
        "torch.distributed.tensor.DTensor",
        "torch.distributed._tensor.api.DTensor",
        "torch.distributed._shard.sharded_tensor.api.ShardedTensor",
    )
)
"""Tensor classes of which a pickle holds only one rank's slice."""


class Box(NamedTuple):
    """Where a piece is in its tensor: ``shape`` is that of the whole tensor, ``origin`` the piece's first element."""

    shape: tuple[int, ...]
    origin: tuple[int, ...]


class StoredTensor(NamedTuple):  # a NamedTuple is the fastest to construct, and there may be 100,000
    """A tensor as a file stores it, or a piece of one.

    ``offset`` is the absolute byte offset of element [0, …, 0]; ``strides`` are in elements, None if the tensor is
    dense and row-major, as most are. ``packed`` is the size in bytes if ``dtype`` is not in ``DTYPES`` but names a
    packing of quantized values (GGUF). ``box`` is the part of the tensor that this piece holds, None for all of it.
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


@frozen()
class ChecksummedRange:
    """A range of tensor bytes whose CRC-32 the container stores: the value ``crc``, at each of ``crc_offsets``."""

    offset: int
    nbytes: int
    crc: int
    crc_offsets: tuple[int, ...]


@frozen()
class Header:
    """The header of one container file.

    tensors: in the order in which the file lists them.
    metadata: safetensors' ``__metadata__``, or GGUF's key-value pairs.
    objects: the entries that are not tensors (key → type name).
    values: those of the objects that are numbers, truth values, short texts or None; a long text ends in "…".
    checksummed: the zip members that hold tensors.
    foreign: classes that a pickle names but that rebuilding tensors does not need. Nothing of them was imported or
        constructed; such a file can be inspected but not converted.
    """

    kind: str
    size: int
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    objects: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Scalar] = field(default_factory=dict)
    checksummed: tuple[ChecksummedRange, ...] = ()
    foreign: tuple[str, ...] = ()


@frozen(eq=False)
class WeightFile:
    """An open weight file: its name in the checkpoint, its rank, and its header."""

    name: str
    rank: int
    place: Place
    reader: RangeReader
    header: Header


class FileTensor(NamedTuple):
    """A stored tensor with its file."""

    file: WeightFile
    tensor: StoredTensor


@frozen()
class FileLayout:
    """A container file ready to be filled: its header, and every byte of it that belongs to no tensor.

    ``literals`` are (offset, bytes), ascending; together with the tensors' bytes they cover the file exactly.
    """

    header: Header
    literals: tuple[tuple[int, bytes], ...]
