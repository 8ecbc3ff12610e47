"""A strict reader of the central directory of a zip file whose members are not compressed.

Python's zipfile does not give the offsets of the checksums, and accepts what no writer of checkpoints produces: bytes
before the first member, comments, local headers that contradict the directory. Structure and field names are those of
PKWARE's APPNOTE.TXT 6.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from ckpt_convert.errors import CorruptFileError, UnsafeFileError
from ckpt_convert.storage.base import RangeReader, read_range
from ckpt_convert.storage.object_store import AT_ONCE, WINDOW, ObjectFile
from ckpt_convert.tensors.pool import map_threaded

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_CRC_IN_LOCAL, _CRC_IN_CENTRAL, _CRC_IN_DESCRIPTOR = 14, 16, 4

_DEFERRED, _UTF8 = 1 << 3, 1 << 11
_ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "the value is in the zip64 record"
_MAX_DIRECTORY = 1 << 29


@dataclass(frozen=True, slots=True)
class Member:
    """A stored member: the offset of its bytes, its CRC-32, and the file offsets of every field with the CRC."""

    name: str
    offset: int
    size: int
    crc: int
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of the central directory; ``place`` is the file offset of its CRC field."""

    name: bytes
    flags: int
    crc: int
    size: int
    local: int
    place: int


def list_members(reader: RangeReader) -> dict[str, Member]:
    """The members by name, in the order of their offsets.

    Raises CorruptFileError if the directory, the local headers and the size of the file disagree, or if members
    overlap, share a name or are compressed; UnsafeFileError if they are encrypted.
    """
    start, size, count = _find_directory(reader)
    raw = read_range(reader, start, size)
    entries = sorted(_entries(reader.name, raw, start), key=lambda entry: entry.local)
    if len(entries) != count:
        raise _corrupt(reader, f"the zip directory should list {count} members, but lists {len(entries)}")
    found: dict[str, Member] = {}
    limits = [*(entry.local for entry in entries[1:]), start]
    for member in _located(reader, entries, limits):
        if member.name in found:
            raise _corrupt(reader, f"a zip member's name should be unique, but there are two called {member.name!r}")
        found[member.name] = member
    return found


def _corrupt(reader: RangeReader, problem: str) -> CorruptFileError:
    return CorruptFileError(
        f"{reader.name}: {problem}; the file is truncated or damaged, so download or copy it again, "
        "or load it with torch and save it again"
    )


def _find_directory(reader: RangeReader) -> tuple[int, int, int]:
    """The central directory's offset, size in bytes and number of members."""
    place = reader.size - _END.size
    if place < 0:
        raise _corrupt(reader, f"a zip file ends with a record of {_END.size} bytes, but the file has {reader.size}")
    magic, disk, first_disk, here, count, size, start, comment = _END.unpack(read_range(reader, place, _END.size))
    if magic != b"PK\5\6" or comment:
        raise _corrupt(reader, f"a zip end record should fill the last {_END.size} bytes, but does not")
    if disk or first_disk or here != count:
        raise _corrupt(reader, "the zip file should be in one part, but is one of several")
    end = place
    locator = place - _LOCATOR.size
    if locator >= 0 and (raw := read_range(reader, locator, _LOCATOR.size)).startswith(b"PK\6\7"):
        _, disk, end, disks = _LOCATOR.unpack(raw)
        if disk or disks > 1 or end + _END64.size != locator:
            raise _corrupt(reader, "the zip64 end record should stand right before its locator, but does not")
        start, size, count = _end64(reader, end, (start, size, count))
    if size > _MAX_DIRECTORY or start + size != end:
        raise _corrupt(reader, f"the zip directory should end at byte {end}, but ends at {start + size}")
    return start, size, count


def _end64(reader: RangeReader, place: int, plain: tuple[int, int, int]) -> tuple[int, int, int]:
    magic, length, _, _, disk, first_disk, here, count, size, start = _END64.unpack(
        read_range(reader, place, _END64.size)
    )
    if magic != b"PK\6\6" or length != _END64.size - 12 or disk or first_disk or here != count:
        raise _corrupt(reader, f"a zip64 end record should stand at byte {place}, but does not")
    wide = (start, size, count)
    for one, other, full in zip(plain, wide, (_FULL32, _FULL32, _FULL16), strict=True):
        if one not in (other, full):
            raise _corrupt(reader, f"the zip64 end record says {other} where the end record says {one}")
    return wide


def _entries(name: str, raw: bytes, start: int) -> Iterator[_Entry]:
    position = 0
    while position < len(raw):
        if position + _CENTRAL.size > len(raw):
            raise CorruptFileError(f"{name}: the zip directory ends within an entry; copy or download the file again")
        fields = _CENTRAL.unpack_from(raw, position)
        magic, _, _, flags, method, _, _, crc, packed, size, name_len, extra_len, comment_len, *_, local = fields
        text = position + _CENTRAL.size
        extra = text + name_len
        end = extra + extra_len + comment_len
        if magic != b"PK\1\2" or end > len(raw):
            raise CorruptFileError(
                f"{name}: the zip directory should have an entry at byte {start + position}, but has none; "
                "the file is damaged, so download or copy it again"
            )
        member = raw[text:extra]
        if _FULL32 in (size, packed, local):
            size, packed, local = _wide(name, member, raw[extra : extra + extra_len], (size, packed, local))
        _check_storage(name, member, flags, method, size, packed)
        yield _Entry(member, flags, crc, size, local, start + position + _CRC_IN_CENTRAL)
        position = end


def _wide(name: str, member: bytes, extra: bytes, values: tuple[int, ...]) -> tuple[int, ...]:
    """Replace the fields of (size, packed size, offset) that are saturated by those of the zip64 extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        body = extra[position + 4 : position + 4 + length]
        position += 4 + length
        if kind == 1 and length == 8 * values.count(_FULL32) == len(body):
            wide = iter(struct.unpack(f"<{length // 8}Q", body))
            return tuple(next(wide) if value == _FULL32 else value for value in values)
    raise CorruptFileError(
        f"{name}: {member!r} should have its size or offset in a zip64 field, but has none that fits; "
        "the file is damaged, so download or copy it again"
    )


def _check_storage(name: str, member: bytes, flags: int, method: int, size: int, packed: int) -> None:
    if flags & _ENCRYPTED:
        raise UnsafeFileError(f"{name}: {member!r} is encrypted; decrypt the archive first")
    if method or size != packed:
        raise CorruptFileError(
            f"{name}: {member!r} should be stored as it is, but is compressed (method {method}, {packed} bytes for "
            f"{size}), so that its tensors cannot be read in place; load it with torch and torch.save it again, "
            "or repack it with zip -0"
        )


def _located(reader: RangeReader, entries: Sequence[_Entry], limits: Sequence[int]) -> Iterable[Member]:
    """The members, whose local headers are all over the file: of a file in a store, many are read at a time."""
    if not isinstance(reader, ObjectFile):
        return map(partial(_locate, reader), entries, limits)
    reader.join(((entry.local, limit) for entry, limit in zip(entries, limits, strict=True)), 4 * WINDOW)
    return map_threaded(lambda pair: _locate(reader, *pair), zip(entries, limits, strict=True), AT_ONCE)


def _locate(reader: RangeReader, entry: _Entry, limit: int) -> Member:
    """Check an entry against its local header; its bytes must end by ``limit``, where the next record starts."""
    start = entry.local + _LOCAL.size
    if start > limit:
        raise _corrupt(reader, f"{entry.name!r} overlaps the next member")
    magic, _, flags, method, _, _, crc, _, size, name_len, extra_len = _LOCAL.unpack(
        read_range(reader, entry.local, _LOCAL.size)
    )
    if magic != b"PK\3\4" or method or flags & _ENCRYPTED or name_len != len(entry.name):
        raise _corrupt(reader, f"{entry.name!r} should have a local header at byte {entry.local}, but has not")
    data = start + name_len + extra_len
    if data + entry.size > limit:
        raise _corrupt(
            reader, f"{entry.name!r} should end by byte {limit}, where the next thing starts, "
            f"but takes {entry.size} bytes from {data} on"
        )  # fmt: skip
    if read_range(reader, start, name_len) != entry.name:
        raise _corrupt(reader, f"{entry.name!r} has another name in its local header")
    places = [entry.place]
    deferred = flags & _DEFERRED
    if crc == entry.crc and (crc or not deferred):
        places.append(entry.local + _CRC_IN_LOCAL)
    elif crc or not deferred:
        raise _corrupt(reader, f"{entry.name!r} has another CRC-32 in its local header")
    if not deferred and size not in (entry.size, _FULL32):
        raise _corrupt(reader, f"{entry.name!r} has {entry.size} bytes, but {size} in its local header")
    end = data + entry.size
    if deferred and end + 16 <= limit and read_range(reader, end, 8) == b"PK\7\x08" + entry.crc.to_bytes(4, "little"):
        places.append(end + _CRC_IN_DESCRIPTOR)
    return Member(_decode(reader, entry), data, entry.size, entry.crc, tuple(sorted(places)))


def _decode(reader: RangeReader, entry: _Entry) -> str:
    try:
        return entry.name.decode("utf-8" if entry.flags & _UTF8 else "ascii")
    except UnicodeDecodeError:
        raise _corrupt(reader, f"the member name {entry.name!r} should be UTF-8, but is not") from None
