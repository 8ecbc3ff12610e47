"""Putting together the checksums of pieces of which several writers have written parts.

A CRC is linear: that of a piece is the sum (XOR) of what each of its bytes adds to it, whoever wrote that byte. So what
a writer has written of a piece is one small entry, however many runs of bytes it is, and the entries are summed in any
order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import groupby
from operator import xor

from ckpt_convert.convert.execute import FinishedPiece
from ckpt_convert.convert.layout import OutputFile
from ckpt_convert.convert.partition import Piece, piece_of
from ckpt_convert.errors import CorruptFileError
from ckpt_convert.storage.checksums import CRC32, CRC64

_ONES = b"\1" * (1 << 16)


@dataclass(frozen=True)
class WrittenPart:
    """What one writer has written of the piece at ``offset`` of a file: ``nbytes`` of its bytes, in any number of runs.

    ``checksum`` and ``crc`` are what these add to those of the piece. ``marks`` is what they would add to the CRC-64
    of a piece of bytes that are all 1: the marks of all writers sum to that if each byte was written once.
    """

    file: int
    offset: int
    nbytes: int
    checksum: int
    crc: int
    marks: int
    overflowed: int

    def as_json(self) -> Sequence[int]:
        """Its fields, JSON-ready."""
        return astuple(self)


def written_parts(files: Sequence[OutputFile], done: Iterable[FinishedPiece]) -> list[WrittenPart]:
    """What one writer has written, given its runs: at most one entry for each piece of the files."""
    ordered = sorted(done, key=lambda one: (one.piece.file, one.piece.offset))
    return [_part(piece, list(runs)) for piece, runs in groupby(ordered, lambda one: piece_of(files, one.piece))]


def _part(piece: Piece, runs: Sequence[FinishedPiece]) -> WrittenPart:
    """The sum of what runs in order add to the checksums of their piece."""
    checksum = crc = marks = nbytes = overflowed = 0
    end = piece.offset
    for run in runs:
        after = run.piece.offset + run.piece.nbytes
        checksum = CRC64.combine(checksum, run.checksum, after - end)
        crc = CRC32.combine(crc, run.crc, after - end)
        marks = CRC64.combine(marks, _marks(run.piece.nbytes), after - end)
        nbytes, overflowed, end = nbytes + run.piece.nbytes, overflowed + run.overflowed, after
    rest = piece.offset + piece.nbytes - end
    whole = (CRC64.combine(checksum, 0, rest), CRC32.combine(crc, 0, rest), CRC64.combine(marks, 0, rest))
    return WrittenPart(piece.file, piece.offset, nbytes, *whole, overflowed)


def whole_pieces(pieces: Iterable[Piece], parts: Iterable[WrittenPart]) -> list[FinishedPiece]:
    """The pieces, done, given what all writers have written of them; raises CorruptFileError for a gap or an overlap.

    Their checksums are those that a single writer would have had.
    """
    by_piece: dict[tuple[int, int], list[WrittenPart]] = {}
    for part in parts:
        by_piece.setdefault((part.file, part.offset), []).append(part)
    return [_whole(piece, by_piece) for piece in pieces]


def _whole(piece: Piece, by_piece: Mapping[tuple[int, int], Sequence[WrittenPart]]) -> FinishedPiece:
    checksum = crc = marks = nbytes = overflowed = 0
    for part in by_piece.get((piece.file, piece.offset), ()):
        checksum, crc, marks = map(xor, (checksum, crc, marks), (part.checksum, part.crc, part.marks))
        nbytes, overflowed = nbytes + part.nbytes, overflowed + part.overflowed
    if (nbytes, marks) != (piece.nbytes, _marks(piece.nbytes)):
        raise CorruptFileError(
            f"{piece.nbytes:,} bytes at {piece.offset:,} of file {piece.file} of the output: some of them were not "
            "written, or twice"
        )
    return FinishedPiece(piece, checksum, crc, overflowed)


@lru_cache(maxsize=1 << 12)
def _marks(nbytes: int) -> int:
    """The CRC-64 of so many bytes that are all 1."""
    crc = 0
    for start in range(0, nbytes, len(_ONES)):
        crc = CRC64.of(_ONES[: nbytes - start], crc)
    return crc
