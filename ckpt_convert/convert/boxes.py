"""What one of several writers has of a range of a file, as a message to the writer who puts the range together.

A message has the boxes of the range that come from this writer's sources: where the elements of each go, and the
elements themselves, cast and in row-major order. So its receiver needs to know nothing but the range, whatever steps
lie between the sources and the file: rows, columns, transposed or stacked tensors are boxes with other strides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ckpt_convert import dtypes
from ckpt_convert.convert.layout import OutputFile
from ckpt_convert.convert.partition import Piece
from ckpt_convert.convert.sharing import Owns
from ckpt_convert.tensors.blocks import BlockReader
from ckpt_convert.tensors.lazy import LazyTensor, Tile

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Box(NamedTuple):
    """Elements of one source in a range of bytes: ``offset`` is where they begin in it.

    ``dims`` are (count, step in bytes), outermost first, for items of ``item`` bytes.
    """

    piece: Piece
    tensor: LazyTensor
    source_dtype: str
    dtype: str
    offset: int
    item: int
    dims: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        return self.item * prod(count for count, _ in self.dims)

    @property
    def header(self) -> list[int]:
        """Where the elements go, as a message says it."""
        return [self.offset, self.item, len(self.dims), *(number for dim in self.dims for number in dim)]


def boxes_of(files: Sequence[OutputFile], pieces: Sequence[Piece], owns: Owns) -> list[Box]:
    """What a writer has of these pieces, which are one after another in the range."""
    out: list[Box] = []
    base = 0
    for piece in pieces:
        out += _boxes(files, piece, base, owns)
        base += piece.nbytes
    return out


def _boxes(files: Sequence[OutputFile], piece: Piece, base: int, owns: Owns) -> Iterator[Box]:
    placed = files[piece.file].tensors[piece.tensor]
    bits = dtypes.DTYPES[placed.dtype].bits
    at = 0
    for part in placed.tensor.flat_range(piece.start, piece.stop):
        for tile, copy in zip(part.tiles, part.copies(), strict=True):
            if owns(tile.source):
                item, dims = _in_bytes([(count, step) for count, _, step in copy.dims], bits)
                offset = base + (at + copy.target_offset) * bits // 8
                yield Box(piece, _alone(tile), placed.source_dtype, placed.dtype, offset, item, dims)
        at += part.size


def _alone(tile: Tile) -> LazyTensor:
    return LazyTensor(tile.shape, (tile._replace(origin=(0,) * len(tile.axes)),))


def _in_bytes(dims: Sequence[tuple[int, int]], bits: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The bytes of an item, and dims of (count, step in elements) with steps in bytes.

    Elements smaller than a byte are moved as the whole bytes that they fill.
    """
    if bits >= 8:
        return bits // 8, tuple((count, step * bits // 8) for count, step in dims)
    *outer, (count, _) = dims
    return 1, (*((many, step * bits // 8) for many, step in outer), (count * bits // 8, 1))


def message_size(boxes: Sequence[Box]) -> int:
    """The bytes of a message, a multiple of 8, so that messages after each other are aligned; 0 for nothing to say."""
    data = -(-sum(box.nbytes for box in boxes) // 8) * 8
    return 8 * (1 + sum(len(box.header) for box in boxes)) + data if boxes else 0


def fill_message(boxes: Sequence[Box], reader: BlockReader, message: Bytes) -> Iterator[tuple[Piece, int]]:
    """Write the message of these boxes into its memory.

    Gives each piece with the values of it that the cast made infinite.
    """
    header = np.array([len(boxes), *(number for box in boxes for number in box.header)], np.int64).view(np.uint8)
    message[: len(header)] = header
    at = len(header)
    for box in boxes:
        before = reader.overflowed
        for offset, data in reader.blocks(box.tensor, box.source_dtype, box.dtype):
            message[at + offset : at + offset + len(data)] = np.frombuffer(data, np.uint8)
        at += box.nbytes
        yield box.piece, reader.overflowed - before


def place_message(message: Bytes, target: Bytes) -> int:
    """Put what a message has where it belongs in the range; returns the number of bytes."""
    numbers = message.view(np.int64)
    headers, at = [], 1
    for _ in range(int(numbers[0])):
        offset, item, axes = map(int, numbers[at : at + 3])
        headers.append((offset, item, numbers[at + 3 : at + 3 + 2 * axes].reshape(-1, 2).T.tolist()))
        at += 3 + 2 * axes
    first = at = 8 * at
    for offset, item, (counts, steps) in headers:
        kind = np.dtype(f"u{item}" if item in (1, 2, 4, 8) else f"V{item}")
        placed = np.ndarray(counts, kind, target.data, offset, steps)
        placed[...] = np.ndarray(counts, kind, message.data, at)
        at += placed.nbytes
    return at - first
