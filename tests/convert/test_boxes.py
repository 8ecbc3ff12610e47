"""Ranges of files that are put together from the messages of several writers: held against what one would write."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ckpt_convert.convert import partition
from ckpt_convert.convert.boxes import boxes_of, fill_message, message_size, place_message
from ckpt_convert.convert.layout import OutputFile, PlacedTensor
from ckpt_convert.convert.partition import split_into_pieces
from ckpt_convert.tensors.blocks import BlockReader
from ckpt_convert.tensors.header import StoredTensor
from ckpt_convert.tensors.lazy import ZEROS, LazyTensor, from_source
from tests.convert.test_runs import made

SIZES = {"U8": 1, "BF16": 2, "F32": 4, "F64": 8, "C128": 16}


class Bytes:
    """A source of bytes that have nothing in common with those of another."""

    def __init__(self, seed: int) -> None:
        self.data = random.Random(seed).randbytes(1 << 12)
        self.reader = self

    def readinto(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]


def stored(dtype: str) -> list[tuple[Any, StoredTensor]]:
    return [(Bytes(seed), StoredTensor(str(seed), dtype, (1,), 0)) for seed in range(3)]


def file_of(tensors: Sequence[LazyTensor], source: str, dtype: str) -> OutputFile:
    placed, offset = [], 24
    for number, tensor in enumerate(tensors):
        nbytes = tensor.size * SIZES[dtype]
        placed.append(PlacedTensor(str(number), dtype, source, offset, tensor, nbytes))
        offset += nbytes
    return OutputFile("a", 0, None, tuple(placed))  # type: ignore[arg-type]


def assembled(file: OutputFile, source: str, writers: Sequence[Sequence[int]]) -> tuple[bytes, int]:
    """The bytes of a file as its writers' messages make it up, each of whom has some sources, and the overflows."""
    pieces = sorted(split_into_pieces([file]))
    target = np.zeros(sum(piece.nbytes for piece in pieces), np.uint8)
    placed = overflowed = 0
    for sources in writers:
        boxes = boxes_of([file], pieces, sources.__contains__)
        message = np.empty(message_size(boxes), np.uint8)
        if boxes:
            overflowed += sum(lost for _, lost in fill_message(boxes, BlockReader(stored(source)), message))
            placed += place_message(message, target)
    assert placed == len(target)
    return target.tobytes(), overflowed


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("seed", range(40))
def test_messages_make_up_the_file(seed: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr(partition, "PIECE", 128 * chance.randint(1, 3))
    tensors = [made(chance) for _ in range(3)]
    writers = chance.choice([[[0], [1], [2]], [[2, 0], [1]], [[0, 1, 2], []]])
    file = file_of(tensors, dtype, dtype)
    reader = BlockReader(stored(dtype))
    expected = b"".join(bytes(data) for tensor in tensors for _, data in reader.blocks(tensor, dtype, dtype))
    assert assembled(file, dtype, writers) == (expected, 0)


def test_values_are_cast_before_they_are_sent() -> None:
    tensor = made(random.Random(7))
    file = file_of([tensor], "F32", "BF16")
    reader = BlockReader(stored("F32"))
    expected = b"".join(bytes(data) for _, data in reader.blocks(tensor, "F32", "BF16"))
    assert assembled(file, "F32", [[0], [1, 2]]) == (expected, reader.overflowed)


def test_zeros_that_are_stored_nowhere() -> None:
    tensor = from_source(ZEROS, (5, 3))
    assert assembled(file_of([tensor], "F32", "F32"), "F32", [[0], [ZEROS]]) == (bytes(60), 0)


def test_who_has_nothing_sends_nothing() -> None:
    file = file_of([from_source(0, (4,))], "U8", "U8")
    assert message_size(boxes_of([file], split_into_pieces([file]), lambda _: False)) == 0


def test_a_place_outside_of_the_range_is_refused() -> None:
    file = file_of([from_source(0, (4,))], "U8", "U8")
    boxes = boxes_of([file], split_into_pieces([file]), lambda _: True)
    message = np.empty(message_size(boxes), np.uint8)
    list(fill_message(boxes, BlockReader(stored("U8")), message))
    with pytest.raises((ValueError, TypeError)):
        place_message(message, np.empty(3, np.uint8))
