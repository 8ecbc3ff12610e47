"""Laying out torch.distributed.checkpoint's directories: every piece an archive of its own, and ``.metadata`` for all.

What ``.metadata`` says comes from torch's own planner, which is given tensors without memory ("meta"); where each piece
lies is then written into it. The pieces are laid out as torch's own writer does it, so torch reads both alike.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from functools import lru_cache

from ckpt_convert.convert.containers import torchzip_build
from ckpt_convert.convert.containers.dcp import KIND
from ckpt_convert.convert.containers.header import Checksummed, FileLayout, Header, StoredTensor
from ckpt_convert.dtypes import DTYPES

Spec = tuple[str, str, tuple[int, ...]]


def build(tensors: Sequence[Spec]) -> FileLayout:
    """Lay out one ``.distcp`` file that holds these tensors (key, dtype, shape) whole, one after another.

    Raises UsageError for a dtype that torch does not have.
    """
    stored: list[StoredTensor] = []
    checksummed: list[Checksummed] = []
    literals: list[tuple[int, bytes]] = []
    position = 0
    for key, dtype, shape in tensors:
        archive = _archive(dtype, tuple(shape))
        stored.append(archive.header.tensors[0]._replace(key=key, offset=position + archive.header.tensors[0].offset))
        for member in archive.header.checksummed:
            places = tuple(position + place for place in member.places)
            checksummed.append(Checksummed(position + member.offset, member.nbytes, 0, places))
        for offset, data in archive.literals:
            _add(literals, position + offset, data)
        position += archive.header.size
    return FileLayout(Header(KIND, position, tuple(stored), checksummed=tuple(checksummed)), tuple(literals))


def metadata(files: Sequence[tuple[str, FileLayout]]) -> bytes:
    """The content of ``.metadata`` for files made by ``build``, by name; imports torch."""
    import torch
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    # Private by name, but every ``.metadata`` is a pickle that names it: it can neither move nor change.
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    placed = {key: _StorageInfo(*place) for key, place in _places(files)}
    planner = DefaultSavePlanner()
    planner.set_up_planner(
        {
            tensor.key: torch.empty(tensor.shape, dtype=getattr(torch, DTYPES[tensor.dtype].torch), device="meta")
            for _, layout in files
            for tensor in layout.header.tensors
        },
        None,
        True,
    )
    (plan,), found = planner.create_global_plan([planner.create_local_plan()])
    found.storage_data = {item.index: placed[item.index.fqn] for item in plan.items}
    return pickle.dumps(found)


def _places(files: Sequence[tuple[str, FileLayout]]) -> Iterator[tuple[str, tuple[str, int, int]]]:
    """Key → file, offset and length of its archive."""
    for name, layout in files:
        position = 0
        for tensor in layout.header.tensors:
            size = _archive(tensor.dtype, tensor.shape).header.size
            yield tensor.key, (name, position, size)
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
