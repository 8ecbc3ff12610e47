"""Objects written part by part: in any order, once, complete or not at all."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckpt_convert.errors import OutputExistsError, UnwritableError
from ckpt_convert.storage.place import Place, checked_place
from ckpt_convert.storage.remote.uploads import MOST_PARTS, PART, PartSizes
from tests.servers.s3 import Bucket, S3Server

SIZE = 2 * PART + 12345
BLOCK = 1 << 20


@pytest.fixture
def place(bucket: Bucket) -> Place:
    return checked_place(f"s3://{bucket.name}/big")


def test_parts_cover_an_object() -> None:
    for size in (1, PART - 1, PART, PART + 1, SIZE, MOST_PARTS * PART + 1, 5 << 40):
        sizes = PartSizes(size)
        number, start, length = sizes.at(size - 1)
        assert start + length == size
        assert number < MOST_PARTS
        assert sizes.at(0)[:2] == (0, 0)
        assert sizes.at(0)[2] >= min(size, PART)


def test_parts_of_an_object_that_grows_follow_each_other() -> None:
    sizes, offset = PartSizes(None), 0
    for number in range(MOST_PARTS):
        found, start, length = sizes.at(offset)
        assert (found, start) == (number, offset)
        assert sizes.at(offset + length - 1) == (found, start, length)
        offset += length
    assert offset > 5 << 40


def test_ranges_from_several_threads_in_any_order(place: Place, bucket: Bucket, s3_server: S3Server) -> None:
    data = random.Random(0).randbytes(SIZE)
    blocks = list(range(0, SIZE, BLOCK))
    random.Random(1).shuffle(blocks)
    writer = place.store.create("big", SIZE)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda at: writer.write(at, memoryview(data)[at : at + BLOCK]), blocks))
    assert "big" not in bucket.files
    made = writer.complete(create_only=True)
    assert bucket.files["big"] == data
    assert place.identity() == made
    assert s3_server.log.kinds() == {"create": 1, "part": 3, "complete": 1, "head": 1}
    assert not bucket.uploads


def test_an_object_of_unknown_size_is_appended_to(place: Place, bucket: Bucket) -> None:
    for size in (0, 10, PART, PART + 5):
        data = random.Random(size).randbytes(size)
        writer = place.store.create("big", None)
        for at in range(0, size, BLOCK):
            writer.write(at, memoryview(data)[at : at + BLOCK])
        assert writer.complete().size == size
        assert bucket.files["big"] == data


def test_a_small_object_is_one_request(place: Place, bucket: Bucket, s3_server: S3Server) -> None:
    writer = place.store.create("big", 100)
    writer.write(50, memoryview(bytes(50)))
    writer.write(0, memoryview(bytes(50)))
    writer.complete(create_only=True)
    assert s3_server.log.kinds() == {"put": 1}


@pytest.mark.parametrize("size", [100, SIZE])
def test_a_name_that_is_taken_stays_as_it_is(place: Place, bucket: Bucket, size: int) -> None:
    bucket.put("big", b"theirs")
    writer = place.store.create("big", size)
    writer.write(0, memoryview(bytes(size)))
    with pytest.raises(OutputExistsError, match=r"s3://.*/big: is there already"):
        writer.complete(create_only=True)
    writer.abort()
    assert bucket.files == {"big": b"theirs"}
    assert not bucket.uploads


def test_what_is_given_up_leaves_no_upload(place: Place, bucket: Bucket) -> None:
    writer = place.store.create("big", SIZE)
    writer.write(0, memoryview(bytes(PART + 1)))
    writer.abort()
    writer.abort()
    assert not bucket.files
    assert not bucket.uploads
    with pytest.raises(UnwritableError, match="completed or aborted before"):
        writer.write(0, memoryview(b"x"))


def test_every_byte_is_written_once(place: Place, bucket: Bucket) -> None:
    writer = place.store.create("big", SIZE)
    writer.write(0, memoryview(bytes(PART)))
    with pytest.raises(UnwritableError, match="bytes were written twice"):
        writer.write(5, memoryview(b"x"))
    with pytest.raises(UnwritableError, match="past its end"):
        writer.write(SIZE, memoryview(b"x"))
    with pytest.raises(UnwritableError, match=r"8,400,953 of its 16,789,561 bytes were not written"):
        writer.complete()
    writer.abort()
    assert not bucket.uploads


def test_uploads_of_a_process_that_was_killed_are_aborted_by_name(place: Place, bucket: Bucket) -> None:
    for name in ("a/one", "a/two", "b/one"):
        place.store.create(name, SIZE).write(0, memoryview(bytes(PART)))
    assert sorted(bucket.uploads.values()) == ["a/one", "a/two", "b/one"]
    place.store.abort_uploads(["a/one", "a/three"], "a/")
    assert sorted(bucket.uploads.values()) == ["a/two", "b/one"]
