"""CRC-32 of joined byte runs from the CRC-32 of each, so that pieces can be summed in any order and in parallel."""

from __future__ import annotations

from functools import cache, lru_cache

_POLYNOMIAL = 0xEDB88320  # CRC-32 as zip uses it, bit-reflected: bit 31 is the coefficient of x^0
_ONE = 1 << 31


def crc32_combine(crc1: int, crc2: int, len2: int) -> int:
    """Return the CRC-32 of A + B, given those of A and of B, and the length of B in bytes.

    Appending n bytes multiplies the CRC of what stands before them by x^(8n), modulo the CRC polynomial (zlib's
    crc32_combine does the same).
    """
    return _multiply(_shift(len2), crc1) ^ crc2


@lru_cache(maxsize=1024)  # pieces of one length come in long rows
def _shift(length: int) -> int:
    """x^(8 · length)."""
    factor = _ONE
    position = 0
    while length:
        if digit := length & 15:
            factor = _multiply(_powers(position)[digit], factor)
        length >>= 4
        position += 1
    return factor


@cache
def _powers(position: int) -> tuple[int, ...]:
    """x^(8 · digit · 16^position) for the digits 0 to 15."""
    base = _multiply(_powers(position - 1)[15], _powers(position - 1)[1]) if position else _ONE >> 8
    powers = [_ONE]
    while len(powers) < 16:
        powers.append(_multiply(powers[-1], base))
    return tuple(powers)


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo the CRC polynomial."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product
