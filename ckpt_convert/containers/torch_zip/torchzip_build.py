"""Lays out a zip file of tensors exactly as torch.save does, without torch and without the tensors' bytes.

Follows torch 2.13: ``_save`` in torch/serialization.py for the records, PyTorchStreamWriter in
caffe2/serialize/inline_container.cc for their alignment, and its miniz for the zip structures.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ckpt_convert.containers.pickle import pickle_writer
from ckpt_convert.containers.pickle.pickle_writer import Call, Global, Items, Persistent, Text
from ckpt_convert.dtypes import DTYPES, nbytes
from ckpt_convert.errors import KeyMismatchError, UsageError
from ckpt_convert.tensors.header import ChecksummedRange, FileLayout, Header, StoredTensor

KIND = "torch"

_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_DEFERRED, _UTF8 = 1 << 3, 1 << 11

_PROTOCOL: Literal[2] = 2
_TYPED_TENSOR, _TENSOR = (Global("torch._utils", f"_rebuild_tensor_{version}") for version in ("v2", "v3"))
_STORAGES = {name: Global("torch", dtype.storage) for name, dtype in DTYPES.items() if dtype.storage}
_UNTYPED = Global("torch.storage", "UntypedStorage")
_DTYPES = {name: Global("torch", dtype.torch) for name, dtype in DTYPES.items()}
_ORDERED_DICT = Global("collections", "OrderedDict")

Spec = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Record:
    """A member to be written: its bytes, or only their number for a tensor."""

    name: str
    size: int
    data: bytes | None


def build(
    tensors: Sequence[Spec], *, root: str, alignment: int = 64, shared: Mapping[str, str] | None = None
) -> FileLayout:
    """Lay out the file that torch.save writes for a dict of ``tensors`` (key, dtype, shape), each contiguous.

    ``shared`` gives the keys of those that have the storage of another key. ``root`` is the folder in the archive
    (torch uses the file's stem), ``alignment`` that of every member in bytes. The CRC-32 of the tensors are 0 until
    they are patched at the offsets in ``header.checksummed``. The result is deterministic: the serialization id, the
    only difference from torch.save, is derived from names and sizes. Raises KeyMismatchError for a duplicate key,
    UsageError for what torch cannot express.
    """
    _check(tensors, root, alignment)
    owners = shared or {}
    numbers = {key: number for number, key in enumerate(key for key, _, _ in tensors if key not in owners)}
    storages = [numbers[owners.get(key, key)] for key, _, _ in tensors]
    sizes = [nbytes(dtype, shape) for key, dtype, shape in tensors if key not in owners]
    rebuilt = (
        (Text(key), _rebuilt(number, dtype, shape, sizes[number]))
        for number, (key, dtype, shape) in zip(storages, tensors, strict=True)
    )
    data = pickle_writer.dumps(Items(len(tensors), rebuilt), _PROTOCOL)
    return _laid_out(tensors, storages, sizes, data, root, alignment)


def build_one(dtype: str, shape: tuple[int, ...]) -> FileLayout:
    """Lay out what torch.save writes for a single tensor, whose key is then empty.

    Raises UsageError for what torch cannot express.
    """
    tensors = [("", dtype, shape)]
    _check(tensors, "archive", 64)
    size = nbytes(dtype, shape)
    data = pickle_writer.dumps(_rebuilt(0, dtype, shape, size), _PROTOCOL)
    return _laid_out(tensors, [0], [size], data, "archive", 64)


def _laid_out(
    tensors: Sequence[Spec], storages: Sequence[int], sizes: Sequence[int], data: bytes, root: str, alignment: int
) -> FileLayout:
    """The file with these tensors, each in the storage with its number, of which ``sizes`` are the bytes."""
    writer = _Writer(root, alignment)
    starts: list[int] = []
    for record in _records(data, sizes, alignment):
        start = writer.add(record)
        if record.data is None:
            starts.append(start)
    size, places = writer.finish()
    stored = [
        StoredTensor(key, dtype, tuple(shape), starts[number])
        for number, (key, dtype, shape) in zip(storages, tensors, strict=True)
    ]
    checksummed = [
        ChecksummedRange(starts[number], size, 0, tuple(sorted(places[f"data/{number}"])))
        for number, size in enumerate(sizes)
    ]
    header = Header(KIND, size, tuple(stored), checksummed=tuple(checksummed))
    return FileLayout(header, tuple((offset, bytes(data)) for offset, data in writer.literals if data))


def _check(tensors: Sequence[Spec], root: str, alignment: int) -> None:
    if not root or "/" in root or not root.isprintable():
        raise UsageError(f"the folder in the archive should be one plain name, but is {root!r}")
    if not 1 <= alignment <= 1 << 14:
        raise UsageError(f"the alignment should be 1 to {1 << 14} bytes, but is {alignment}")
    twice = sorted(key for key, count in Counter(key for key, _, _ in tensors).items() if count > 1)
    if twice:
        raise KeyMismatchError(f"keys should be unique in a file, but these are given twice: {', '.join(twice)}")
    for key, dtype, shape in tensors:
        if DTYPES[dtype].bits < 8 and (not shape or shape[-1] * DTYPES[dtype].bits % 8):
            raise UsageError(f"{key}: torch packs {dtype} along the last dimension, which {list(shape)} does not fill")
        if not DTYPES[dtype].torch:
            raise UsageError(f"{key}: torch has no dtype {dtype}; write a safetensors file instead")
        try:
            key.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{key!r} is no valid Unicode; rename it") from None


def _records(data: bytes, sizes: Sequence[int], alignment: int) -> Iterator[_Record]:
    for name, content in (
        ("data.pkl", data),
        (".format_version", b"1"),
        (".storage_alignment", str(alignment).encode()),
        ("byteorder", b"little"),
    ):
        yield _Record(name, len(content), content)
    for number, size in enumerate(sizes):
        yield _Record(f"data/{number}", size, None)
    yield _Record("version", 2, b"3\n")
    digest = int.from_bytes(hashlib.sha256(data).digest(), "little")
    yield _Record(".data/serialization_id", 40, f"{digest % 10**40:040}".encode())


class _Writer:
    """Appends members and collects every byte that belongs to no tensor."""

    def __init__(self, root: str, alignment: int) -> None:
        self.root = root
        self.alignment = alignment
        self.literals: list[tuple[int, bytearray]] = [(0, bytearray())]
        self.directory = bytearray()
        self.count = 0
        self.places: dict[str, list[int]] = {}
        self.central: list[tuple[str, int]] = []

    @property
    def position(self) -> int:
        offset, data = self.literals[-1]
        return offset + len(data)

    def add(self, record: _Record) -> int:
        """Add a member and return the offset of its first byte."""
        name = f"{self.root}/{record.name}".encode()
        crc = zlib.crc32(record.data) if record.data is not None else 0
        flags = _UTF8 | (_DEFERRED if record.size else 0)
        local = self.position
        places = self.places[record.name] = []
        wide = record.size >= _FULL32 or local >= _FULL32
        # miniz knows the packed size only after writing the data, and writes 0 before
        extra = _extra64(record.size, 0, local)
        padding = -(local + 30 + len(name) + len(extra) + 4) % self.alignment
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        out = self.literals[-1][1]
        out += struct.pack("<4s5H3I2H", b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra
        start = self.position
        if record.data is not None:
            out += record.data
        elif record.size:
            self.literals.append((start + record.size, bytearray()))
        if record.size:
            places.append(self.position + 4)
            self.literals[-1][1].extend(
                struct.pack("<4sI2Q" if wide else "<4s3I", b"PK\7\x08", crc, record.size, record.size)
            )
        else:
            places.append(local + 14)
        self._list(record, name, crc, flags, local)
        return start

    def _list(self, record: _Record, name: bytes, crc: int, flags: int, local: int) -> None:
        extra = _extra64(record.size, record.size, local)
        size = min(record.size, _FULL32)
        self.central.append((record.name, len(self.directory) + 16))
        self.directory += struct.pack(
            "<4s6H3I5H2I",
            *(b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, size, size),
            *(len(name), len(extra), 0, 0, 0, 0, min(local, _FULL32)),
        )
        self.directory += name + extra
        self.count += 1

    def finish(self) -> tuple[int, dict[str, list[int]]]:
        """Write the directory and the end records; returns the size of the file and the offsets of every CRC-32."""
        start, size = self.position, len(self.directory)
        for name, place in self.central:
            self.places[name].append(start + place)
        out = self.literals[-1][1]
        out += self.directory
        end = start + size
        # torch always writes the zip64 records; 0x031E is its "made by"
        out += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, self.count, self.count, size, start)
        out += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
        count = min(self.count, _FULL16)
        out += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, min(size, _FULL32), min(start, _FULL32), 0)
        return self.position, self.places


def _extra64(size: int, packed: int, local: int) -> bytes:
    values = []
    if size >= _FULL32:
        values += [size, packed]
    if local >= _FULL32:
        values.append(local)
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _rebuilt(number: int, dtype: str, shape: tuple[int, ...], size: int) -> Call:
    """The pickled call that rebuilds a CPU tensor of the whole storage ``number``."""
    kind = DTYPES[dtype]
    shape = counted(dtype, shape)
    elements = size * 8 // kind.bits if kind.storage else size
    storage = Persistent(("storage", _STORAGES.get(dtype, _UNTYPED), Text(str(number)), "cpu", elements))
    arguments = (storage, 0, shape, _strides(shape), False, Call(_ORDERED_DICT, ()))
    return Call(_TYPED_TENSOR, arguments) if kind.storage else Call(_TENSOR, (*arguments, _DTYPES[dtype]))


def counted(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape as torch counts: in bytes where safetensors counts the values packed in them."""
    bits = DTYPES[dtype].bits
    return (*shape[:-1], shape[-1] * bits // 8) if bits < 8 else shape


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return tuple(strides)
