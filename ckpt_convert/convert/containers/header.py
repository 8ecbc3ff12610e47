"""What every container says about itself without a tensor byte being read, and how one is laid out for writing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckpt_convert import dtypes


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file stores it.

    ``offset`` is the absolute byte offset of element [0, …, 0]; ``strides`` are in elements, None when the tensor
    is dense and row-major (the usual case).
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return dtypes.nbytes(self.dtype, self.shape)


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

    ``tensors`` in the order in which the file names them; ``metadata`` safetensors' ``__metadata__``; ``objects``
    the entries of a pickle that are no tensors (key → type name); ``checksummed`` the zip members that hold tensors.
    """

    kind: str
    size: int
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    objects: Mapping[str, str] = field(default_factory=dict)
    checksummed: tuple[Checksummed, ...] = ()


@dataclass(frozen=True)
class FileLayout:
    """A container file ready to be filled: its header, and every byte of it that belongs to no tensor.

    ``literals`` are (offset, bytes), ascending, and complement the tensors' bytes exactly.
    """

    header: Header
    literals: tuple[tuple[int, bytes], ...]
