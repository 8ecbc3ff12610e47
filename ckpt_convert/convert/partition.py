"""Partitioning a plan into pieces, the ranges of its files that are written one by one, for one or several writers.

Pure functions: the same plan gives the same pieces in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

from ckpt_convert import dtypes
from ckpt_convert.convert.layout import OutputFile, PlacedTensor
from ckpt_convert.tensors.lazy import LazyTensor, Tile, row_major_strides

PIECE = 64 << 20
"""The maximum number of bytes of a piece."""


class Piece(NamedTuple):
    """``nbytes`` bytes at ``offset`` of output file number ``file``: a range of elements of its tensor ``tensor``.

    The elements are ``start`` to ``stop``, in the element order of the file.
    """

    file: int
    tensor: int
    offset: int
    nbytes: int
    start: int
    stop: int


def split_into_pieces(files: Sequence[OutputFile]) -> list[Piece]:
    """Every piece, in an order that reads the source sequentially.

    Files are written one after another, each in offset order; files of tensor-parallel ranks are written side by side,
    since each source tensor goes into all of them.
    """
    if len({file.rank for file in files}) > 1:
        longest = max(len(file.tensors) for file in files)
        order = [(n, at) for at in range(longest) for n, file in enumerate(files) if at < len(file.tensors)]
    else:
        order = [(n, at) for n, file in enumerate(files) for at in range(len(file.tensors))]
    return [piece for number, at in order for piece in _of_tensor(files[number], number, at)]


def _of_tensor(file: OutputFile, number: int, at: int) -> Iterator[Piece]:
    placed = file.tensors[at]
    for start in range(0, placed.tensor.size, _step(placed)):
        yield _piece_at(placed, number, at, start)


def _step(placed: PlacedTensor) -> int:
    """The elements of a piece of a tensor; they fill whole bytes."""
    return PIECE // dtypes.DTYPES[placed.dtype].bits * 8


def _piece_at(placed: PlacedTensor, number: int, at: int, start: int) -> Piece:
    bits, stop = dtypes.DTYPES[placed.dtype].bits, min(start + _step(placed), placed.tensor.size)
    return Piece(number, at, placed.offset + start * bits // 8, (stop - start) * bits // 8, start, stop)


def piece_of(files: Sequence[OutputFile], run: Piece) -> Piece:
    """The piece that a run of its bytes is a part of."""
    placed = files[run.file].tensors[run.tensor]
    return _piece_at(placed, run.file, run.tensor, run.start - run.start % _step(placed))


def partition_pieces(files: Sequence[OutputFile], count: int) -> list[list[Piece]]:
    """The pieces in ``count`` consecutive lists of about equal bytes, one for each writer; a list may be empty."""
    everything = split_into_pieces(files)
    total = sum(piece.nbytes for piece in everything)
    runs: list[list[Piece]] = [[] for _ in range(count)]
    done = 0
    for piece in everything:
        middle = done + piece.nbytes / 2
        runs[min(int(middle * count / total), count - 1)].append(piece)
        done += piece.nbytes
    return runs


def runs(files: Sequence[OutputFile], pieces: Iterable[Piece], owns: Callable[[int], bool]) -> list[Piece]:
    """What one of several writers has of these pieces: the longest ranges of each whose sources the writer owns.

    ``owns`` is called with the number of a source.
    """
    return [run for piece in pieces for run in _owned(files, piece, owns)]


def count_runs(tensor: LazyTensor, owns: Callable[[int], bool]) -> tuple[int, int]:
    """How many runs of a tensor a writer owns, adjacent ones counted apart, and of how many elements in all."""
    own = [tile.shape for tile in tensor.tiles if owns(tile.source)]
    return sum(prod(_repeated(sizes, tensor.shape)) for sizes in own), sum(map(prod, own))


def _owned(files: Sequence[OutputFile], piece: Piece, owns: Callable[[int], bool]) -> Iterator[Piece]:
    placed = files[piece.file].tensors[piece.tensor]
    bits = dtypes.DTYPES[placed.dtype].bits
    for start, stop in _joined(spans(placed.tensor, piece.start, piece.stop, owns)):
        offset = piece.offset + (start - piece.start) * bits // 8
        yield piece._replace(offset=offset, nbytes=(stop - start) * bits // 8, start=start, stop=stop)


def spans(tensor: LazyTensor, start: int, stop: int, owns: Callable[[int], bool]) -> list[tuple[int, int]]:
    """(start, stop) of the elements from ``start`` to ``stop``, in row-major order, whose sources ``owns`` accepts.

    Spans are sorted; adjacent spans are not merged.
    """
    out = []
    for part in tensor.flat_range(start, stop):
        for tile in part.tiles:
            if owns(tile.source):
                out += [(start + first, start + last) for first, last in _spans(tile, part.shape)]
        start += part.size
    return sorted(out)


def _spans(tile: Tile, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The elements of a tile in a tensor of this shape, as the longest possible spans in row-major order."""
    strides, sizes = row_major_strides(shape), tile.shape
    repeated = _repeated(sizes, shape)
    length = sizes[len(repeated)] * strides[len(repeated)] if shape else 1
    first = sum(at * stride for at, stride in zip(tile.origin, strides, strict=True))
    for place in product(*map(range, repeated)):
        at = first + sum(step * stride for step, stride in zip(place, strides, strict=False))
        yield at, at + length


def _repeated(sizes: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of the outer axes of a box, along which its spans repeat.

    A span covers the innermost axis on which the box is not the whole tensor, and all axes after it.
    """
    inner = len(shape)
    while inner and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    return sizes[: max(inner - 1, 0)]


def _joined(found: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Sorted spans with adjacent ones merged."""
    start = stop = -1
    for first, last in found:
        if first != stop:
            if start < stop:
                yield start, stop
            start = first
        stop = last
    if start < stop:
        yield start, stop
