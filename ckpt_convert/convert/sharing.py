"""Who of several writers writes which bytes of a plan's files.

A writer writes what it has at its place in the file, as runs of bytes. Of some tensors, slices are *exchanged* instead:
a range of the file has one owner, who puts together what all have of it. Which tensors, and which ranges, are pure
functions of the plan and of what all writers say, so all of them come to the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

from ckpt_convert import dtypes
from ckpt_convert.convert.layout import OutputFile
from ckpt_convert.convert.partition import Piece, count_runs, runs, split_into_pieces
from ckpt_convert.storage.system import PAGE

Owns = Callable[[int], bool]
"""Whether a writer has what comes from the source of this number."""

Tensors = frozenset[tuple[int, int]]
"""Tensors by the number of their file, and their own in it."""

NONE: Tensors = frozenset()

SHORT = 1 << 16
"""Bytes of a run that is worth a write of its own."""

FEW = 1024
"""Short runs that a writer may as well write: they take about 0.1 s."""


class ShortRuns(NamedTuple):
    """Of which tensors a writer has only short runs of bytes, and how many these are.

    In ``tensors``, bit n stands for tensor n, counted through all files.
    """

    tensors: int
    runs: int


class OwnParts:
    """What one writer has of the files of a plan; it is worked out once, as the plan is used at every save."""

    def __init__(self, owns: Owns) -> None:
        self.owns = owns
        self._short: ShortRuns | None = None
        self._runs: list[Piece] | None = None
        self._ranges: list[list[Piece]] | None = None
        self._known: tuple[Sequence[OutputFile], Tensors] = (), NONE

    def runs(self, files: Sequence[OutputFile], exchanged: Tensors = NONE) -> list[Piece]:
        """The runs of bytes that it writes at their places: those of tensors that are not exchanged."""
        self._forget_others(files, exchanged)
        if self._runs is None:
            pieces = [piece for piece in split_into_pieces(files) if piece[:2] not in exchanged]
            self._runs = runs(files, pieces, self.owns)
        return self._runs

    def ranges(self, files: Sequence[OutputFile], exchanged: Tensors, count: int) -> list[list[Piece]]:
        """What each of ``count`` owners writes of the tensors that are exchanged."""
        self._forget_others(files, exchanged)
        if self._ranges is None or len(self._ranges) != count:
            self._ranges = owned_ranges(files, exchanged, count)
        return self._ranges

    def _forget_others(self, files: Sequence[OutputFile], exchanged: Tensors) -> None:
        """Forget what is of other files: where some are as in the source, it is decided anew at each save."""
        known, without = self._known
        if len(known) != len(files) or any(map(_is_not, known, files)) or without != exchanged:
            self._runs = self._ranges = None
            self._known = files, exchanged

    def short_runs(self, files: Sequence[OutputFile]) -> ShortRuns:
        """What it would rather not write by itself."""
        if self._short is None:
            self._short = _short_runs(files, self.owns)
        return self._short


def _is_not(one: object, other: object) -> bool:
    return one is not other


def _short_runs(files: Sequence[OutputFile], owns: Owns) -> ShortRuns:
    bits = total = 0
    for number, (file, at) in enumerate(_numbered(files)):
        placed = files[file].tensors[at]
        count, size = count_runs(placed.tensor, owns)
        if size * dtypes.DTYPES[placed.dtype].bits // 8 < count * SHORT:
            bits, total = bits | 1 << number, total + count
    return ShortRuns(bits, total)


def exchanged_tensors(said: Sequence[ShortRuns]) -> int:
    """The tensors to exchange, as the bits of ``ShortRuns``: of which somebody has short runs, if all have many."""
    few = sum(one.runs for one in said) <= FEW * len(said)
    return 0 if few else reduce(or_, (one.tensors for one in said))


def tensors_of_bits(files: Sequence[OutputFile], bits: int) -> Tensors:
    """The tensors that bits stand for."""
    return frozenset(one for one, bit in zip(_numbered(files), reversed(f"{bits:b}"), strict=False) if bit == "1")


def all_tensors(files: Sequence[OutputFile]) -> int:
    """The bits of all tensors."""
    return (1 << sum(len(file.tensors) for file in files)) - 1


def _numbered(files: Sequence[OutputFile]) -> Iterator[tuple[int, int]]:
    return ((number, at) for number, file in enumerate(files) for at in range(len(file.tensors)))


def owned_ranges(files: Sequence[OutputFile], exchanged: Tensors, count: int) -> list[list[Piece]]:
    """What each of ``count`` owners writes of the tensors that are exchanged: consecutive ranges of about equal bytes.

    No page of a file has two owners. An owner's ranges are pieces, or parts of them where it begins and ends, so all
    owners together have at most ``count`` more of them than there are pieces.
    """
    pieces = sorted(piece for piece in split_into_pieces(files) if piece[:2] in exchanged)
    total = sum(piece.nbytes for piece in pieces)
    ranges: list[list[Piece]] = [[] for _ in range(count)]
    owner = done = 0
    before: Piece | None = None
    for piece in pieces:
        bits = dtypes.DTYPES[files[piece.file].tensors[piece.tensor].dtype].bits
        rest: Piece | None = piece
        while rest is not None:
            own, rest = _cut(rest, total * (owner + 1) // count - done, bits, before)
            if own is not None:
                ranges[owner].append(own)
                done, before = done + own.nbytes, own
            owner += rest is not None
    return ranges


def _cut(piece: Piece, nbytes: int, bits: int, before: Piece | None) -> tuple[Piece | None, Piece | None]:
    """A piece up to the first page after so many of its bytes, and the rest; ``before`` is what comes before it.

    It is cut between elements, so a tensor of which none begins with a page is not cut.
    """
    follows = before is not None and before.file == piece.file and _last_page(before) == piece.offset // PAGE
    if nbytes <= 0 and not follows:
        return None, piece
    size = -(-(piece.offset + max(nbytes, 0)) // PAGE) * PAGE - piece.offset
    if size >= piece.nbytes or size * 8 % bits:
        return piece, None
    middle = piece.start + size * 8 // bits
    rest = piece._replace(offset=piece.offset + size, nbytes=piece.nbytes - size, start=middle)
    return piece._replace(nbytes=size, stop=middle), rest


def _last_page(piece: Piece) -> int:
    return (piece.offset + piece.nbytes - 1) // PAGE
