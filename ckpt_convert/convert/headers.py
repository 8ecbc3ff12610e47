"""The bytes of an output file that belong to no tensor, each run of them ready as soon as it is known.

A zip archive stores the CRC-32 of a member in front of it and again in its directory at the end. So what stands in
front of a tensor is known when all of the tensor is, and not when all of the file is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from operator import attrgetter

from ckpt_convert.storage.checksums import CRC32, CRC64
from ckpt_convert.tensors.header import ChecksummedRange, FileLayout


class HeaderBytes:
    """The literals of a layout, with the CRC-32s of members filled in as their pieces are reported."""

    def __init__(self, layout: FileLayout) -> None:
        self._literals = layout.literals
        self._starts = [offset for offset, _ in layout.literals]
        self._members = sorted(layout.header.checksummed, key=attrgetter("offset"))
        self._member_starts = [member.offset for member in self._members]
        self._runs = [self._literals_in(member) for member in self._members]
        self._missing = [
            member.nbytes - sum(nbytes for _, nbytes, _ in runs)
            for member, runs in zip(self._members, self._runs, strict=True)
        ]
        self._unknown = Counter(self._literal_at(place) for member in self._members for place in member.crc_offsets)
        self._known: dict[int, list[tuple[int, int]]] = {}
        self._ready = [number for number in range(len(self._literals)) if not self._unknown[number]]
        for number, missing in enumerate(self._missing):
            if not missing:
                self._settle(number)

    def add(self, offset: int, nbytes: int, crc: int) -> None:
        """Report a finished piece, or a part of one, with its CRC-32."""
        number = bisect_right(self._member_starts, offset) - 1
        if not nbytes or number < 0:
            return
        self._runs[number].append((offset, nbytes, crc))
        self._missing[number] -= nbytes
        if not self._missing[number]:
            self._settle(number)

    def take_ready(self) -> list[tuple[int, bytes]]:
        """The (offset, bytes) that became known since the last call."""
        taken, self._ready = self._ready, []
        return [(self._starts[number], self._bytes(number)) for number in taken]

    def checksum(self) -> int:
        """The CRC-64 of all of them in file order, once all are known."""
        checksum = 0
        for number in range(len(self._literals)):
            checksum = CRC64.of(self._bytes(number), checksum)
        return checksum

    def _settle(self, number: int) -> None:
        """Fill in the CRC-32 of a member of which all bytes are known."""
        crc = 0
        for _, nbytes, value in sorted(self._runs[number]):
            crc = CRC32.combine(crc, value, nbytes)
        for place in self._members[number].crc_offsets:
            literal = self._literal_at(place)
            self._known.setdefault(literal, []).append((place - self._starts[literal], crc))
            self._unknown[literal] -= 1
            if not self._unknown[literal]:
                self._ready.append(literal)

    def _bytes(self, number: int) -> bytes:
        data = self._literals[number][1]
        if number not in self._known:
            return data
        patched = bytearray(data)
        for place, crc in self._known[number]:
            patched[place : place + 4] = crc.to_bytes(4, "little")
        return bytes(patched)

    def _literals_in(self, member: ChecksummedRange) -> list[tuple[int, int, int]]:
        """(offset, number of bytes, CRC-32) of what is within a member and in no tensor."""
        return [(start, len(data), CRC32.of(data, 0)) for start, data in self._overlaps(member)]

    def _overlaps(self, member: ChecksummedRange) -> Iterator[tuple[int, bytes]]:
        end = member.offset + member.nbytes
        for number in range(max(self._literal_at(member.offset), 0), len(self._literals)):
            offset, data = self._literals[number]
            if offset >= end:
                return
            start = max(offset, member.offset)
            if data[start - offset : end - offset] and start < offset + len(data):
                yield start, data[start - offset : end - offset]

    def _literal_at(self, offset: int) -> int:
        """The number of the last literal that begins at this offset or before."""
        return bisect_right(self._starts, offset) - 1
