"""Lays out torch.distributed.checkpoint's directories: one archive for each tensor, and ``.metadata`` for all.

Archives are laid out as torch's writer does, and ``.metadata`` is what torch's planner produces for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from ckpt_convert.containers.dcp import dcp_index
from ckpt_convert.containers.dcp.dcp import KIND
from ckpt_convert.containers.dcp.dcp_index import PlacedTensor
from ckpt_convert.containers.torch_zip import torchzip_build
from ckpt_convert.tensors.header import ChecksummedRange, FileLayout, Header, StoredTensor

Spec = tuple[str, str, tuple[int, ...]]


def build(tensors: Sequence[Spec]) -> FileLayout:
    """Lay out a ``.distcp`` file with these whole tensors (key, dtype, shape), one after another.

    Raises UsageError for a dtype that torch does not have.
    """
    stored: list[StoredTensor] = []
    checksummed: list[ChecksummedRange] = []
    literals: list[tuple[int, bytes]] = []
    position = 0
    for key, dtype, shape in tensors:
        archive = _archive(dtype, tuple(shape))
        stored.append(archive.header.tensors[0]._replace(key=key, offset=position + archive.header.tensors[0].offset))
        for member in archive.header.checksummed:
            places = tuple(position + place for place in member.crc_offsets)
            checksummed.append(ChecksummedRange(position + member.offset, member.nbytes, 0, places))
        for offset, data in archive.literals:
            _add(literals, position + offset, data)
        position += archive.header.size
    return FileLayout(Header(KIND, position, tuple(stored), checksummed=tuple(checksummed)), tuple(literals))


def build_metadata(files: Sequence[tuple[str, FileLayout]]) -> bytes:
    """The content of ``.metadata`` for files made by ``build``, by name."""
    return dcp_index.render_metadata(list(_placed(files)))


def _placed(files: Sequence[tuple[str, FileLayout]]) -> Iterator[PlacedTensor]:
    """Every tensor with the file, offset and length of its archive."""
    for name, layout in files:
        position = 0
        for tensor in layout.header.tensors:
            size = _archive(tensor.dtype, tensor.shape).header.size
            shape = torchzip_build.counted(tensor.dtype, tensor.shape)
            yield PlacedTensor(tensor.key, tensor.dtype, shape, name, position, size)
            position += size


@lru_cache(maxsize=1 << 10)
def _archive(dtype: str, shape: tuple[int, ...]) -> FileLayout:
    """The archive of one tensor; cached, as a model has many of one dtype and shape."""
    return torchzip_build.build_one(dtype, shape)


def _add(literals: list[tuple[int, bytes]], offset: int, data: bytes) -> None:
    """Append a range, merged with the last one if they are adjacent."""
    if literals and literals[-1][0] + len(literals[-1][1]) == offset:
        offset, data = literals[-1][0], literals.pop()[1] + data
    literals.append((offset, data))
