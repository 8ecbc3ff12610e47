"""What several writers have written of each piece, put together: the checksums of one writer, or an error."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from ckpt_convert.convert import partition
from ckpt_convert.convert.combine import WrittenPart, whole_pieces, written_parts
from ckpt_convert.convert.execute import FinishedPiece
from ckpt_convert.convert.layout import OutputFile, PlacedTensor
from ckpt_convert.convert.partition import Piece, piece_of, split_into_pieces
from ckpt_convert.errors import CorruptFileError
from ckpt_convert.storage.checksums import CRC32, CRC64
from ckpt_convert.tensors.lazy import from_source

DATA = random.Random(0).randbytes(1000)
"""The bytes of a file: 100 are no tensor's, then two tensors follow, of 4 and 2 bytes an element."""


def files_of() -> list[OutputFile]:
    tensors = (
        PlacedTensor("a", "F32", "F32", 100, from_source(0, (100,)), 400),
        PlacedTensor("b", "BF16", "F32", 500, from_source(1, (250,)), 500),
    )
    return [OutputFile("model.safetensors", 0, None, tensors)]  # type: ignore[arg-type]


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[OutputFile]:
    """Files whose pieces are small."""
    monkeypatch.setattr(partition, "PIECE", 128)
    return files_of()


def written(run: Piece, overflowed: int = 0) -> FinishedPiece:
    data = DATA[run.offset : run.offset + run.nbytes]
    return FinishedPiece(run, CRC64.of(data, 0), CRC32.of(data, 0), overflowed)


def runs(files: Sequence[OutputFile], chance: random.Random) -> list[Piece]:
    """All pieces, in runs of a few elements."""
    out = []
    for piece in split_into_pieces(files):
        size = piece.nbytes // (piece.stop - piece.start)
        start = piece.start
        while start < piece.stop:
            stop = min(start + chance.randint(1, 9), piece.stop)
            offset = piece.offset + (start - piece.start) * size
            out.append(piece._replace(offset=offset, nbytes=(stop - start) * size, start=start, stop=stop))
            start = stop
    return out


def test_a_run_knows_its_piece(files: list[OutputFile]) -> None:
    pieces = split_into_pieces(files)
    found = [piece_of(files, run) for run in runs(files, random.Random(1))]
    assert list(dict.fromkeys(found)) == pieces


@pytest.mark.parametrize("seed", range(20))
def test_whoever_writes_which_run_the_checksums_are_those_of_one_writer(seed: int, files: list[OutputFile]) -> None:
    chance, pieces = random.Random(seed), split_into_pieces(files)
    writers: list[list[FinishedPiece]] = [[] for _ in range(chance.randint(1, 5))]
    for run in runs(files, chance):
        chance.choice(writers).append(written(run, overflowed=1))
    for done in writers:
        chance.shuffle(done)
    parts = [written_parts(files, done) for done in writers]
    assert all(len(one) <= len(pieces) for one in parts)  # however many runs there are
    whole = whole_pieces(pieces, [WrittenPart(*part.as_json()) for one in parts for part in one])
    assert [one._replace(overflowed=0) for one in whole] == [written(piece) for piece in pieces]
    assert sum(one.overflowed for one in whole) == sum(map(len, writers))


def test_who_writes_nothing_says_nothing(files: list[OutputFile]) -> None:
    assert written_parts(files, []) == []


@pytest.mark.parametrize("wrong", ["a gap", "twice", "one twice and another not"])
def test_bytes_that_are_not_written_once(wrong: str, files: list[OutputFile]) -> None:
    pieces, done = split_into_pieces(files), list(map(written, runs(files, random.Random(2))))
    alike = [at for at, one in enumerate(done) if one.piece.nbytes == 8 and one.piece.tensor == 0]
    if wrong == "twice":
        done.append(done[3])
    elif wrong == "a gap":
        del done[3]
    else:
        done[alike[0]] = done[alike[1]]
    with pytest.raises(CorruptFileError, match="some of them were not written, or twice"):
        whole_pieces(pieces, written_parts(files, done))
