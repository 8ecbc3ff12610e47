"""Taking a plan apart: which ranges of its files are written one by one, and who may write which.

Nothing here reads or writes, and the same plan gives the same pieces everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from ckpt_convert import dtypes
from ckpt_convert.convert.layout import OutputFile
from ckpt_convert.tensors.lazy import LazyTensor, Tile, row_major_strides

PIECE = 64 << 20
"""Bytes of a piece, at most."""


class Piece(NamedTuple):
    """``nbytes`` bytes at ``offset`` of the output file of this number: elements of the tensor of this number in it.

    They are those from ``start`` to ``stop``, in the order in which the file has them.
    """

    file: int
    tensor: int
    offset: int
    nbytes: int
    start: int
    stop: int


def split_into_pieces(files: Sequence[OutputFile]) -> list[Piece]:
    """Every piece, in the order in which the source is read best.

    Files are written one after another, each in offset order; only where the files are ranks they are written side by
    side, since every source row goes into all of them.
    """
    if len({file.rank for file in files}) > 1:
        longest = max(len(file.tensors) for file in files)
        order = [(n, at) for at in range(longest) for n, file in enumerate(files) if at < len(file.tensors)]
    else:
        order = [(n, at) for n, file in enumerate(files) for at in range(len(file.tensors))]
    return [piece for number, at in order for piece in _of_tensor(files[number], number, at)]


def _of_tensor(file: OutputFile, number: int, at: int) -> Iterator[Piece]:
    placed = file.tensors[at]
    bits, size = dtypes.DTYPES[placed.dtype].bits, placed.tensor.size
    step = PIECE // bits * 8  # elements, which fill whole bytes
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield Piece(number, at, placed.offset + start * bits // 8, (stop - start) * bits // 8, start, stop)


def partition_pieces(files: Sequence[OutputFile], count: int) -> list[list[Piece]]:
    """The pieces in ``count`` runs of about the same number of bytes, for as many writers; a run may be empty."""
    everything = split_into_pieces(files)
    total = sum(piece.nbytes for piece in everything)
    runs: list[list[Piece]] = [[] for _ in range(count)]
    done = 0
    for piece in everything:
        middle = done + piece.nbytes / 2
        runs[min(int(middle * count / total), count - 1)].append(piece)
        done += piece.nbytes
    return runs


def runs(files: Sequence[OutputFile], owns: Callable[[int], bool]) -> list[Piece]:
    """What one of several writers has to write: the runs of bytes of each piece that come from sources which it owns.

    ``owns`` is asked by the number of a source. A run is a piece as well, a shorter one, and as long as can be.
    """
    return [run for piece in split_into_pieces(files) for run in _owned(files, piece, owns)]


def _owned(files: Sequence[OutputFile], piece: Piece, owns: Callable[[int], bool]) -> Iterator[Piece]:
    placed = files[piece.file].tensors[piece.tensor]
    bits = dtypes.DTYPES[placed.dtype].bits
    for start, stop in _joined(spans(placed.tensor, piece.start, piece.stop, owns)):
        offset = piece.offset + (start - piece.start) * bits // 8
        yield piece._replace(offset=offset, nbytes=(stop - start) * bits // 8, start=start, stop=stop)


def spans(tensor: LazyTensor, start: int, stop: int, owns: Callable[[int], bool]) -> list[tuple[int, int]]:
    """(start, stop) of the elements between two, in row-major order, that come from sources for which ``owns`` holds.

    They are in order; what follows on each other may be several spans.
    """
    out = []
    for part in tensor.flat_range(start, stop):
        for tile in part.tiles:
            if owns(tile.source):
                out += [(start + first, start + last) for first, last in _spans(tile, part.shape)]
        start += part.size
    return sorted(out)


def _spans(tile: Tile, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The elements of a tensor of this shape that a tile is, as few runs of them in row-major order."""
    strides, sizes = row_major_strides(shape), tile.shape
    inner = len(shape)
    while inner and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    inner = max(inner - 1, 0)  # the first axis that is not whole is the last one along which a run goes on
    length = sizes[inner] * strides[inner] if shape else 1
    first = sum(at * stride for at, stride in zip(tile.origin, strides, strict=True))
    for place in product(*(range(size) for size in sizes[:inner])):
        at = first + sum(step * stride for step, stride in zip(place, strides, strict=False))
        yield at, at + length


def _joined(found: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Spans in order, those that follow on each other as one."""
    start = stop = -1
    for first, last in found:
        if first != stop:
            if start < stop:
                yield start, stop
            start = first
        stop = last
    if start < stop:
        yield start, stop
