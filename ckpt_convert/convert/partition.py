"""Taking a plan apart: which ranges of its files are written one by one, and who may write which.

Nothing here reads or writes, and the same plan gives the same pieces everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ckpt_convert import dtypes
from ckpt_convert.convert.layout import OutputFile

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


def pieces(files: Sequence[OutputFile]) -> list[Piece]:
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


def partition(files: Sequence[OutputFile], count: int) -> list[list[Piece]]:
    """The pieces in ``count`` runs of about the same number of bytes, for as many writers; a run may be empty."""
    everything = pieces(files)
    total = sum(piece.nbytes for piece in everything)
    runs: list[list[Piece]] = [[] for _ in range(count)]
    done = 0
    for piece in everything:
        middle = done + piece.nbytes / 2
        runs[min(int(middle * count / total), count - 1)].append(piece)
        done += piece.nbytes
    return runs
