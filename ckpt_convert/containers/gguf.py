"""llama.cpp's GGUF files: their metadata, and the offset of each tensor.

The structure is specified in ggml's docs/gguf.md, versions 2 and 3. We parse it ourselves, because the gguf package's
reader trusts every count in a file; the package provides the types and their block sizes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod

from ckpt_convert.dtypes import DTYPES
from ckpt_convert.errors import CorruptFileError, InputError
from ckpt_convert.storage.base import RangeReader, read_range
from ckpt_convert.tensors.header import GGUF, Header, StoredTensor

_VERSIONS = (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the scalar types, by their id."""
_FORMATS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_MAX_DEPTH = 4
_MAX_HEADER = 1 << 30
_MAX_TEXT = 1 << 12
_WINDOW = 1 << 20
_ALIGNMENT = "general.alignment"


class _Cursor:
    """Reads a file sequentially, through a window."""

    def __init__(self, reader: RangeReader) -> None:
        self.reader = reader
        self.limit = min(reader.size, _MAX_HEADER)
        self.position = 0
        self._start = 0
        self._window = b""

    def take(self, size: int) -> bytes:
        begin = self.position - self._start
        if begin + size > len(self._window):
            self._need(size)
            begin = 0
        self.position += size
        return self._window[begin : begin + size]

    def skip(self, size: int) -> None:
        self._check(size)
        self.position += size
        if self.position > self._start + len(self._window):
            self._start, self._window = self.position, b""

    def number(self, format: str) -> int:
        (value,) = struct.unpack(format, self.take(struct.calcsize(format)))
        return int(value)

    def count(self, least: int) -> int:
        """A count of items of at least ``least`` bytes each."""
        count = self.number("<Q")
        self._check(count * least)
        return count

    def text(self) -> str:
        size = self.count(1)
        if size > _MAX_TEXT:
            raise self.corrupt(f"a name of {size} bytes at byte {self.position}")
        try:
            return self.take(size).decode()
        except UnicodeDecodeError:
            raise self.corrupt(f"a name at byte {self.position} that is no UTF-8") from None

    def corrupt(self, what: str) -> CorruptFileError:
        return CorruptFileError(
            f"{self.reader.name}: the GGUF header has {what}; it is truncated or damaged, so download it again"
        )

    def _need(self, size: int) -> None:
        self._check(size)
        self._start = self.position
        self._window = read_range(self.reader, self.position, min(max(size, _WINDOW), self.limit - self.position))

    def _check(self, size: int) -> None:
        if self.position + size > self.limit:
            raise self.corrupt(f"{size} bytes from byte {self.position} on, but the file has {self.reader.size}")


def parse(reader: RangeReader) -> Header:
    """Read and check the header; shapes are row-major, slowest axis first, the reverse of ggml's.

    ``metadata`` has the numbers and strings of the file, but no arrays. Raises CorruptFileError if header and file do
    not match, InputError if the gguf package is not installed or the version or a type is unknown.
    """
    names, blocks = _types(reader)
    cursor = _Cursor(reader)
    cursor.skip(4)  # its magic number, by which it was recognized
    version = cursor.number("<I")
    if version not in _VERSIONS:
        order = " (or its numbers are big-endian)" if version & 0xFFFF == 0 else ""
        raise InputError(
            f"{reader.name}: is GGUF version {version}{order}, but only 2 and 3, little-endian, can be read; "
            "convert the model again with a newer llama.cpp"
        )
    tensor_count, key_count = cursor.count(24), cursor.count(13)
    metadata: dict[str, str] = {}
    for _ in range(key_count):
        key = cursor.text()
        value = _value(cursor, cursor.number("<I"))
        if value is not None:
            metadata[key] = value
    infos = [_info(cursor) for _ in range(tensor_count)]
    alignment = int(metadata.get(_ALIGNMENT, "32")) if metadata.get(_ALIGNMENT, "32").isdecimal() else 0
    if alignment < 1 or alignment & (alignment - 1):
        raise cursor.corrupt(f"an alignment of {metadata[_ALIGNMENT]:.40}, which is no power of two")
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for key, dims, kind, offset in infos:
        if kind not in blocks:
            raise InputError(
                f"{reader.name}: {key!r} has the type {kind}, which the installed gguf package does not know; "
                "upgrade it: pip install -U gguf"
            )
        count, size = blocks[kind]
        if key in tensors or (dims and dims[0] % count) or prod(dims) >= 1 << 63:
            what = "twice" if key in tensors else f"with {list(dims)} numbers in blocks of {count}"
            raise cursor.corrupt(f"the tensor {key!r} {what}")
        nbytes = prod(dims) // count * size
        if offset % alignment or start + offset + nbytes > reader.size:
            raise CorruptFileError(
                f"{reader.name}: {key!r} should take {nbytes} bytes from byte {start + offset} on, but the file has "
                f"{reader.size}; it is truncated or damaged, so download it again"
            )
        packed = None if count == 1 and names[kind] in DTYPES else nbytes
        tensors[key] = StoredTensor(key, names[kind], dims[::-1], start + offset, packed=packed)
    return Header(GGUF, reader.size, tuple(tensors.values()), metadata)


def facts(header: Header) -> list[tuple[str, str]]:
    """Facts about the model from a GGUF file's metadata, as (label, text)."""
    said = header.metadata
    found = [("architecture", f"{said['general.architecture']} (GGUF)")] if "general.architecture" in said else []
    if said.get("general.name"):
        found.append(("name", said["general.name"]))
    kind = said.get("general.file_type", "")
    if kind.isdecimal():
        found.append(("quantised", f"{_file_type(int(kind))} (general.file_type {kind})"))
    return found


def _file_type(number: int) -> str:
    from gguf.constants import LlamaFileType

    known: Mapping[int, str] = {int(kind): kind.name for kind in LlamaFileType}
    return known.get(number, "unknown").removeprefix("ALL_").removeprefix("MOSTLY_")


def _types(reader: RangeReader) -> tuple[dict[int, str], dict[int, tuple[int, int]]]:
    """The names of the tensor types, and the block size of each in (values, bytes)."""
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError:
        raise InputError(
            f"{reader.name}: is a GGUF file; looking into one takes the gguf package: pip install 'ckpt-convert[gguf]'"
        ) from None
    return (
        {int(kind): kind.name for kind in GGML_QUANT_SIZES},
        {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()},
    )


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    key = cursor.text()
    dims = cursor.number("<I")
    if dims > _MAX_DIMS:
        raise cursor.corrupt(f"{key!r} with {dims} dimensions, where ggml has {_MAX_DIMS} at most")
    return (
        key,
        struct.unpack(f"<{dims}Q", cursor.take(8 * dims)),
        cursor.number("<I"),
        cursor.number("<Q"),
    )


def _value(cursor: _Cursor, kind: int, depth: int = 0) -> str | None:
    """A number or string; None for an array, which is skipped, and for a long string."""
    if kind in _SIZES:
        (value,) = struct.unpack(_FORMATS[kind], cursor.take(_SIZES[kind]))
        return str(value)
    if kind == _STRING:
        size = cursor.count(1)
        if size <= _MAX_TEXT:
            return cursor.take(size).decode(errors="replace")
        cursor.skip(size)
        return None
    if kind != _ARRAY or depth == _MAX_DEPTH:
        raise cursor.corrupt(f"a value of type {kind} at byte {cursor.position}, which does not exist")
    inner = cursor.number("<I")
    if inner in _SIZES:
        cursor.skip(cursor.count(_SIZES[inner]) * _SIZES[inner])
        return None
    for _ in range(cursor.count(8)):
        if inner == _STRING:
            cursor.skip(cursor.count(1))
        else:
            _value(cursor, inner, depth + 1)
    return None
