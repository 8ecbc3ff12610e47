"""Laying out torch.distributed.checkpoint's directories: every piece an archive of its own, and ``.metadata`` for all.

The pieces are laid out as torch's own writer does it, and ``.metadata`` says what torch's own planner makes of them.
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
    """Lay out one ``.distcp`` file that holds these tensors (key, dtype, shape) whole, one after another.

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
    """Every tensor with the place of its archive."""
    for name, layout in files:
        position = 0
        for tensor in layout.header.tensors:
            size = _archive(tensor.dtype, tensor.shape).header.size
            shape = torchzip_build.counted(tensor.dtype, tensor.shape)
            yield PlacedTensor(tensor.key, tensor.dtype, shape, name, position, size)
            position += size


@lru_cache(maxsize=1 << 10)
def _archive(dtype: str, shape: tuple[int, ...]) -> FileLayout:
    """The archive of one tensor; a model has many of one dtype and shape."""
    return torchzip_build.build_one(dtype, shape)


def _add(literals: list[tuple[int, bytes]], offset: int, data: bytes) -> None:
    """Add bytes, joined with the last ones where they touch."""
    if literals and literals[-1][0] + len(literals[-1][1]) == offset:
        offset, data = literals[-1][0], literals.pop()[1] + data
    literals.append((offset, data))
