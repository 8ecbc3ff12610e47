"""Reads torch.distributed.checkpoint's directories: ``.metadata`` maps each piece of a tensor to a file and offset.

``.metadata`` is a pickle of torch.distributed.checkpoint.metadata.Metadata, and is read by our own interpreter, without
torch. Each piece in a ``.distcp`` file is a small torch.save archive, or the file is one safetensors file. The offset
of a piece's bytes in its archive is looked up when they are read: listing the tensors opens only ``.metadata``.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ckpt_convert.containers import safetensors
from ckpt_convert.containers.dcp import DCP_INDEX, DCP_SUFFIX, INDEX_OF_RANK
from ckpt_convert.containers.dcp.dcp_metadata import DcpMetadata, Extent, check_cover, load_metadata, merge_metadata
from ckpt_convert.containers.torch_zip import torchzip
from ckpt_convert.dtypes import DTYPES, nbytes
from ckpt_convert.errors import CheckpointNotFoundError, CorruptFileError, InputError
from ckpt_convert.storage.base import Entry, OpenFile, RangeReader
from ckpt_convert.storage.names import check_name
from ckpt_convert.storage.object_store import ObjectFile
from ckpt_convert.storage.place import FilePool, Place
from ckpt_convert.tensors.header import Box, Header, StoredTensor

KIND = "dcp"
_FILE = re.compile(r"__(\d+)_\d+\.distcp")


@dataclass(frozen=True)
class DcpFile:
    """One ``.distcp`` file: its header, and the reader that the header's offsets refer to."""

    name: str
    place: Place
    reader: RangeReader
    header: Header


def is_dcp_directory(directory: Place) -> bool:
    """Whether a directory looks like one that torch.distributed.checkpoint wrote."""
    return bool(_metadata_files(directory)) or any(entry.name.endswith(DCP_SUFFIX) for entry in directory.children())


def read_dcp_directory(directory: Place) -> tuple[list[DcpFile], list[tuple[str, str]]]:
    """The files with their headers, and facts about the directory as (label, text).

    A piece's ``offset`` is that of its record, and refers to the file's ``reader``; only the metadata is read (and the
    headers of safetensors files). Raises CheckpointNotFoundError if the metadata or a file that it names is missing,
    CorruptFileError if it is malformed, if pieces do not cover their tensor exactly, or if a file is too short, and
    UnsafeFileError for a file name that leaves the directory.
    """
    names = _metadata_files(directory)
    if not names:
        raise CheckpointNotFoundError(
            f"{directory}: has {DCP_SUFFIX} files but no {DCP_INDEX}, which is written last and locates the tensors; "
            "the save was cut short, or the file was not copied (its name starts with a dot)"
        )
    said = str(directory / names[0])
    metadata = merge_metadata([load_metadata(directory.resolve_member(name, str(directory))) for name in names], said)
    pieces: dict[str, list[tuple[StoredTensor, Extent]]] = {}
    for key, tensor in metadata.tensors.items():
        check_cover(f"{said}: {key!r}", tensor)
        for origin, (sizes, place) in tensor.pieces.items():
            packed = None if tensor.dtype in DTYPES else place.length
            box = Box(tensor.shape, origin) if len(tensor.pieces) > 1 else None
            stored = StoredTensor(key, tensor.dtype, sizes, place.offset, packed=packed, box=box)
            pieces.setdefault(place.file, []).append((stored, place))
    objects: dict[str, dict[str, str]] = {}
    for key, found in metadata.objects.items():
        if found is not None:
            pieces.setdefault(found.file, [])
            objects.setdefault(found.file, {})[key] = "object"
    pool = FilePool()
    files = [
        _file(directory, said, name, pieces[name], objects.get(name, {}), metadata.foreign if not at else (), pool)
        for at, name in enumerate(sorted(pieces, key=_natural))
    ]
    return files, _facts(metadata, names, files)


def files_in_metadata(path: Place) -> list[str]:
    """The names of the files that one metadata file refers to, sorted; raises CorruptFileError, UnsafeFileError."""
    metadata = load_metadata(path)
    records = [extent for tensor in metadata.tensors.values() for _, extent in tensor.pieces.values()]
    records += [extent for extent in metadata.objects.values() if extent is not None]
    return sorted({check_name(extent.file, str(path)) for extent in records})


def _metadata_files(directory: Place) -> list[str]:
    """The metadata file of all ranks, or one for each rank if they saved without coordination (``no_dist``)."""
    if (directory / DCP_INDEX).is_regular_file():
        return [DCP_INDEX]
    ranks = {int(m[1]): entry.name for entry in directory.children() if (m := re.fullmatch(INDEX_OF_RANK, entry.name))}
    return [ranks[rank] for rank in sorted(ranks)]


def _file(
    directory: Place,
    said: str,
    name: str,
    pieces: list[tuple[StoredTensor, Extent]],
    objects: Mapping[str, str],
    foreign: tuple[str, ...],
    pool: FilePool,
) -> DcpFile:
    path = directory.resolve_member(name, said)
    records = [(place.offset, place.offset + place.length) for _, place in pieces]
    part = _Part(path, path.identity(), pool, records)
    size = part.identity.size
    for stored, place in pieces:
        if place.offset + place.length > size:
            raise CorruptFileError(
                f"{path}: {stored.key!r} should end at byte {place.offset + place.length}, but the file has {size}: "
                "it is truncated, so copy it again"
            )
    pieces.sort(key=lambda piece: piece[1].offset)
    tensors = tuple(stored for stored, _ in pieces)
    reader: RangeReader
    unreadable = next((stored for stored, place in pieces if not place.is_plain or stored.packed is not None), None)
    if unreadable is not None:
        reader = _Unreadable(path, size, unreadable)
    elif pieces and all(stored.nbytes == place.length for stored, place in pieces):
        tensors = _in_safetensors(part, tensors)
        reader = _Reopened(part)
    else:
        _check_records(path, pieces)
        reader = _Records(part, pieces)
    return DcpFile(name, path, reader, Header(KIND, size, tensors, objects=objects, foreign=foreign))


def _check_records(path: Place, pieces: Sequence[tuple[StoredTensor, Extent]]) -> None:
    end = 0
    for stored, place in pieces:
        if place.offset < end or stored.nbytes > place.length:
            raise CorruptFileError(
                f"{path}: the record of {stored.key!r} at byte {place.offset} overlaps the one before it, or has fewer "
                f"bytes ({place.length}) than the tensor ({stored.nbytes}); the metadata is damaged, so copy it again"
            )
        end = place.offset + place.length


@dataclass(frozen=True)
class _Part:
    """One of the files with its identity; opened on demand, for there may be thousands.

    ``records`` are the (start, stop) of its pieces; small ones of a file in a store are read with their neighbors.
    """

    place: Place
    identity: Entry
    pool: FilePool
    records: Sequence[tuple[int, int]]

    @contextmanager
    def open(self) -> Iterator[OpenFile]:
        with self.pool.open(self.place, self.identity) as file:
            if isinstance(file, ObjectFile) and not file.is_joined:
                file.join(self.records)
            yield file


def _in_safetensors(part: _Part, pieces: Sequence[StoredTensor]) -> tuple[StoredTensor, ...]:
    """The pieces with their true offsets; in the metadata, all have the offset at which the safetensors file starts."""
    with part.open() as file:
        start = pieces[0].offset
        header = safetensors.parse(_Slice(file, start, file.size - start))
    found = {tensor.key: tensor for tensor in header.tensors}
    out = []
    for piece in pieces:
        held = found.get(piece.key)
        if held is None or (held.dtype, held.shape) != (piece.dtype, piece.shape):
            raise CorruptFileError(
                f"{part.place}: should hold {piece.key!r} as {piece.dtype} {list(piece.shape)}, but "
                f"{'has no such tensor' if held is None else f'has {held.dtype} {list(held.shape)}'}; copy it again"
            )
        out.append(StoredTensor(piece.key, piece.dtype, piece.shape, start + held.offset, box=piece.box))
    return tuple(out)


@dataclass(frozen=True, slots=True)
class _Slice:
    """A range of a file, read as a file of its own."""

    file: RangeReader
    start: int
    size: int

    @property
    def name(self) -> str:
        return self.file.name

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self.file.readinto(self.start + offset, buffer)


@dataclass(frozen=True)
class _Reopened:
    """A file that is reopened on demand."""

    part: _Part

    @property
    def name(self) -> str:
        return str(self.part.place)

    @property
    def size(self) -> int:
        return self.part.identity.size

    def readinto(self, offset: int, buffer: memoryview) -> None:
        with self.part.open() as file:
            file.readinto(offset, buffer)

    def close(self) -> None:
        self.part.pool.close()


@dataclass(frozen=True)
class _Unreadable:
    """A file whose records are compressed or of an unknown dtype: its tensors can be listed, but not read."""

    place: Place
    size: int
    first: StoredTensor

    @property
    def name(self) -> str:
        return str(self.place)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        why = "compressed or otherwise transformed" if self.first.packed is None else f"of dtype {self.first.dtype}"
        raise InputError(
            f"{self.name}: {self.first.key!r} is {why}, so the file cannot be read in place; load the checkpoint with "
            "torch.distributed.checkpoint and save it again"
        )


class _Records:
    """A file of archives, read as if each piece's dense bytes were at the start of its archive.

    They are smaller than the archive around them, so pieces do not overlap.
    """

    def __init__(self, part: _Part, pieces: Sequence[tuple[StoredTensor, Extent]]) -> None:
        self.name = str(part.place)
        self.size = part.identity.size
        self.part = part
        self._pieces = pieces
        self._starts = [place.offset for _, place in pieces]
        self._found: dict[int, StoredTensor] = {}

    def readinto(self, offset: int, buffer: memoryview) -> None:
        number = max(bisect_right(self._starts, offset) - 1, 0)
        stored, place = self._pieces[number]
        within = offset - place.offset
        if within < 0 or within + len(buffer) > stored.nbytes:
            raise CorruptFileError(f"{self.name}: bytes {offset} to {offset + len(buffer)} are not those of one piece")
        with self.part.open() as file:
            held = self._at(number, file)
            if held.strides is None:
                file.readinto(held.offset + within, buffer)
            elif len(buffer):
                _gather(DcpFile(self.name, self.part.place, file, Header(KIND, file.size, ())), held, within, buffer)

    def _at(self, number: int, file: OpenFile) -> StoredTensor:
        held = self._found.get(number)
        if held is None:
            held = self._found[number] = _held(file, *self._pieces[number])
        return held

    def close(self) -> None:
        self.part.pool.close()

    def located(self, header: Header) -> Header:
        """The header with the true offsets and strides of the pieces."""
        with self.part.open() as file:
            held = [self._at(number, file) for number in range(len(self._pieces))]
        tensors = [
            stored._replace(offset=found.offset, strides=found.strides)
            for (stored, _), found in zip(self._pieces, held, strict=True)
        ]
        return Header(KIND, self.size, tuple(tensors), objects=header.objects, foreign=header.foreign)


def resolve_offsets(file: DcpFile) -> Header | None:
    """The header with the true offsets of the tensors' bytes, looked up in the file; None if it cannot be read.

    Raises CorruptFileError if an archive does not match the metadata.
    """
    if isinstance(file.reader, _Reopened):
        return file.header
    return file.reader.located(file.header) if isinstance(file.reader, _Records) else None


def whole_file(reader: RangeReader, place: Place) -> RangeReader:
    """The bytes of the file of a ``DcpFile`` as they are, whatever the offsets of its header refer to."""
    return _Reopened(reader.part) if isinstance(reader, _Records) else place.open()


def _held(file: RangeReader, stored: StoredTensor, place: Extent) -> StoredTensor:
    """Look up the offset of a piece's bytes in its archive."""
    header = torchzip.parse(_Slice(file, place.offset, place.length))
    (held, *others) = header.tensors or (None,)
    if held is None or others or (held.dtype, held.shape) != (stored.dtype, stored.shape):
        found = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in header.tensors[:3]) or "no tensor"
        raise CorruptFileError(
            f"{file.name}: the record of {stored.key!r} at byte {place.offset} should hold {stored.dtype} "
            f"{list(stored.shape)}, but holds {found}; the files are not of one checkpoint, so copy them again"
        )
    return StoredTensor(held.key, held.dtype, held.shape, place.offset + held.offset, held.strides)


def _gather(file: DcpFile, held: StoredTensor, start: int, buffer: memoryview) -> None:
    """Read bytes from ``start`` on of a strided tensor as if it were dense."""
    import numpy as np

    from ckpt_convert.tensors.gather import StridedReader
    from ckpt_convert.tensors.lazy import from_source

    row = nbytes(held.dtype, held.shape[1:])
    first, last = start // row, -(-(start + len(buffer)) // row)
    rows = from_source(0, held.shape, held.strides).narrow(0, first, last - first)
    gathered = np.empty((last - first) * row, np.uint8)
    gatherer = StridedReader([(file, held)])
    gatherer.read_into(rows, held.dtype, gathered)
    buffer[:] = gathered[start - first * row :][: len(buffer)].data


def _facts(metadata: DcpMetadata, names: Sequence[str], files: Sequence[DcpFile]) -> list[tuple[str, str]]:
    version = f" {metadata.version}" if metadata.version else ""
    ranks = {match[1] for file in files if (match := _FILE.fullmatch(file.name))}
    pieces = sum(len(file.header.tensors) for file in files)
    told = f"torch.distributed.checkpoint{version} (DCP): {len(metadata.tensors):,} tensors in {pieces:,} pieces"
    if len(ranks) > 1:
        told += f", written by {len(ranks)} ranks"
    if len(names) > 1:
        told += f", {len(names)} metadata files"
    return [("container", told)]


def _natural(name: str) -> list[Any]:
    # Numbers are compared as strings of digits: a name may have thousands of them.
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(0, len(part.lstrip("0")), part.lstrip("0")) if part.isdecimal() else (1, 0, part) for part in parts]
