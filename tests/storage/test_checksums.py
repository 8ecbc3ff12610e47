"""Checksums of joined ranges from those of the ranges, against zlib, xz and the library."""

import hashlib
import random
import zlib
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ckpt_convert.checkpoint import record
from ckpt_convert.storage import checksums
from ckpt_convert.storage.checksums import CRC32, CRC64, XXH3, Crc
from ckpt_convert.storage.place import as_place
from tests.helpers import crc64

BOTH = pytest.mark.parametrize("crc", [CRC32, CRC64], ids=lambda crc: crc.name)


@given(st.binary(max_size=3000))
def test_they_are_those_of_zlib_and_xz(data: bytes) -> None:
    assert CRC32.of(data, 0) == zlib.crc32(data)
    assert CRC64.hex(CRC64.of(data, 0)) == crc64(data)


def test_the_check_values_that_everybody_publishes() -> None:
    assert CRC32.hex(CRC32.of(b"123456789", 0)) == "cbf43926"
    assert CRC64.hex(CRC64.of(b"123456789", 0)) == "995dc9bbdf1939fa"


@BOTH
@given(a=st.binary(max_size=3000), b=st.binary(max_size=3000))
def test_combining_equals_the_checksum_of_the_joined_bytes(crc: Crc, a: bytes, b: bytes) -> None:
    joined = crc.of(a + b, 0)
    assert crc.combine(crc.of(a, 0), crc.of(b, 0), len(b)) == joined
    assert crc.of(b, crc.of(a, 0)) == joined


@BOTH
@pytest.mark.parametrize("length", [0, 1, 15, 16, 255, 256, 65535, 65536, 1 << 20])
def test_long_runs_behind(crc: Crc, length: int) -> None:
    a, b = b"before", bytes(length)
    assert crc.combine(crc.of(a, 0), crc.of(b, 0), length) == crc.of(a + b, 0)


@BOTH
def test_more_than_4_gib_in_two_steps_is_the_same_as_in_one(crc: Crc) -> None:
    half = 3 << 31
    zeros, mebibyte = 0, crc.of(bytes(1 << 20), 0)
    for _ in range(half // (1 << 20)):
        zeros = crc.combine(zeros, mebibyte, 1 << 20)
    stepwise = crc.combine(crc.combine(crc.of(b"x", 0), zeros, half), zeros, half)
    assert stepwise == crc.combine(crc.of(b"x", 0), crc.combine(zeros, zeros, half), 2 * half)


@BOTH
@pytest.mark.parametrize("seed", range(5))
def test_any_cut_into_ranges_in_any_order_of_writing(crc: Crc, seed: int) -> None:
    chance = random.Random(seed)
    data = chance.randbytes(200_000)
    cuts = sorted(chance.randrange(len(data)) for _ in range(40))
    ranges = [(start, data[start:end]) for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    chance.shuffle(ranges)
    found = {start: (crc.of(part, 0), len(part)) for start, part in ranges if part}
    total = 0
    for start in sorted(found):
        total = crc.combine(total, *found[start])
    assert total == crc.of(data, 0)


@pytest.mark.parametrize("kind", ["crc64_xz", "xxh3_64", "md5", "sha256"])
def test_a_running_checksum_is_that_of_all(kind: str, tmp_path: Path) -> None:
    parts = [bytes([n]) * (n * 37) for n in range(60)]
    total = checksums.new(kind)
    for part in parts:
        total.update(memoryview(part))
    data = b"".join(parts)
    plain = {"crc64_xz": crc64(data), "xxh3_64": xxhash.xxh3_64_hexdigest(data)}
    expected = plain.get(kind) or hashlib.new(kind, data).hexdigest()
    assert total.hexdigest() == checksums.digest(parts, kind) == checksums.digest(data, kind) == expected
    (tmp_path / "file").write_bytes(data)
    assert checksums.digest_file(as_place(tmp_path / "file")) == checksums.digest(data)


def test_the_record_has_their_names() -> None:
    assert (record.ALGORITHMS["weights"], record.ALGORITHMS["files"]) == (CRC64.name, XXH3)
