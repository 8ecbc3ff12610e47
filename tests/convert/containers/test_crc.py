"""CRC-32 of joined pieces, against zlib."""

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_convert.convert.containers.crc import crc32_combine


@given(st.binary(max_size=3000), st.binary(max_size=3000))
def test_equals_the_crc_of_the_joined_bytes(a: bytes, b: bytes) -> None:
    assert crc32_combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 255, 256, 65535, 65536, 1 << 20])
def test_lengths_on_both_sides_of_every_digit(length: int) -> None:
    a, b = b"before", bytes(length)
    assert crc32_combine(zlib.crc32(a), zlib.crc32(b), length) == zlib.crc32(a + b)


def test_more_than_4_gib_in_two_steps_is_the_same_as_in_one() -> None:
    half = 3 << 31
    zeros = 0
    for _ in range(half // (1 << 20)):
        zeros = crc32_combine(zeros, zlib.crc32(bytes(1 << 20)), 1 << 20)
    stepwise = crc32_combine(crc32_combine(zlib.crc32(b"x"), zeros, half), zeros, half)
    assert stepwise == crc32_combine(zlib.crc32(b"x"), crc32_combine(zeros, zeros, half), 2 * half)


def test_many_pieces_in_order() -> None:
    pieces = [bytes([n]) * (n * 37) for n in range(60)]
    total = 0
    for piece in pieces:
        total = crc32_combine(total, zlib.crc32(piece), len(piece))
    assert total == zlib.crc32(b"".join(pieces))
