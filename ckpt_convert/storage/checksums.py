"""Checksums, and how those of adjacent ranges are combined.

Bytes that several writers may write in ranges have a CRC, since that of a whole follows from those of its parts. Weight
files have CRC-64/XZ, as xz and 7-Zip use (Go's hash/crc64 calls it ECMA); members of zip archives have CRC-32, as the
format requires. Files with one sequential writer have XXH3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Protocol

from ckpt_convert.storage.base import read_blocks
from ckpt_convert.storage.place import Place
from ckpt_convert.values import frozen

_BLOCK = 1 << 20


@frozen(eq=False)
class Crc:
    """A bit-reflected CRC whose register starts as all ones and is inverted at the end.

    ``polynomial`` lacks its highest term; bit ``bits`` - 1 is the coefficient of x^0. ``of(data, before)`` returns the
    checksum of data appended to bytes with the checksum ``before`` (0 for none), and releases the GIL.
    """

    name: str
    bits: int
    polynomial: int
    of: Callable[[Any, int], int]

    def combine(self, first: int, second: int, nbytes: int) -> int:
        """The checksum of A + B, given those of A and of B, and the length of B in bytes.

        Appending n bytes multiplies the checksum of the bytes before them by x^(8n), modulo the polynomial (as zlib's
        crc32_combine does). The initial value and the inversion, which are equal, cancel.
        """
        return self._multiply(first, self._shift(nbytes)) ^ second if first else second

    def hex(self, value: int) -> str:
        """The checksum as manifests write it."""
        return f"{value:0{self.bits // 4}x}"

    @lru_cache(maxsize=1024)  # noqa: B019 - most pieces have one length, and there are only two instances
    def _shift(self, nbytes: int) -> int:
        """x^(8 · nbytes)."""
        factor, power = self._one, self._one >> 8
        while nbytes:
            if nbytes & 1:
                factor = self._multiply(power, factor)
            power = self._multiply(power, power)
            nbytes >>= 1
        return factor

    def _multiply(self, a: int, b: int) -> int:
        """The product of two polynomials over GF(2), modulo the CRC polynomial."""
        product, mask, one = 0, (1 << self.bits) - 1, self._one
        while a:
            if a & one:
                product ^= b
            a = (a << 1) & mask
            b = (b >> 1) ^ self.polynomial if b & 1 else b >> 1
        return product

    @property
    def _one(self) -> int:
        return 1 << (self.bits - 1)


# The libraries are imported when a checksum is computed: the names of algorithms are needed where none is.
def _crc32(data: Any, before: int) -> int:
    from fastcrc import crc32

    return crc32.iso_hdlc(data, before)


def _crc64(data: Any, before: int) -> int:
    from fastcrc import crc64

    return crc64.xz(data, before)


CRC32 = Crc("crc32", 32, 0xEDB88320, _crc32)
CRC64 = Crc("crc64_xz", 64, 0xC96C5795D7870F42, _crc64)
XXH3 = "xxh3_64"


class Digest(Protocol):
    """A running checksum, as hashlib's."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


class _Running:
    """A CRC as a ``Digest``."""

    def __init__(self, crc: Crc) -> None:
        self._crc = crc
        self._value = 0

    def update(self, data: Any, /) -> None:
        self._value = self._crc.of(data, self._value)

    def hexdigest(self) -> str:
        return self._crc.hex(self._value)


def new(kind: str) -> Digest:
    """A new running checksum: "crc64_xz", "xxh3_64", or one of hashlib's; raises ValueError for any other."""
    if kind == CRC64.name:
        return _Running(CRC64)
    if kind == XXH3:
        import xxhash

        return xxhash.xxh3_64()
    import hashlib

    return hashlib.new(kind, usedforsecurity=False)


def digest(data: bytes | Iterable[bytes], kind: str = XXH3) -> str:
    """The checksum of bytes, or of several concatenated."""
    total = new(kind)
    for part in (data,) if isinstance(data, bytes) else data:
        total.update(part)
    return total.hexdigest()


def digest_file(place: Place) -> str:
    """``digest`` of a file, read in blocks; raises as ``Place.open`` does."""
    if (known := place.known_content) is not None:
        return digest(known)
    total = new(XXH3)
    with place.open() as file:
        for block in read_blocks(file):
            total.update(block)
    return total.hexdigest()
