"""Who of several writers writes which bytes: the owners of what is exchanged, and what is."""

from __future__ import annotations

import random
from math import prod

import pytest

from ckpt_convert.convert import partition
from ckpt_convert.convert.layout import OutputFile, PlacedTensor
from ckpt_convert.convert.partition import Piece, count_runs, split_into_pieces
from ckpt_convert.convert.sharing import (
    FEW,
    NONE,
    PAGE,
    OwnParts,
    ShortRuns,
    Tensors,
    all_tensors,
    exchanged_tensors,
    owned_ranges,
    tensors_of_bits,
)
from ckpt_convert.tensors.lazy import concat, from_source
from tests.convert.test_runs import made

BYTES = {"F32": 4, "BF16": 2, "F64": 8}


def files_of(chance: random.Random, count: int, *, aligned: bool = True) -> list[OutputFile]:
    """Files with tensors of some pages, and gaps of a container between them."""
    files = []
    for number in range(count):
        tensors, offset = [], 8 * chance.randint(1, 99) + (not aligned)
        for at in range(chance.randint(1, 6)):
            dtype = chance.choice(list(BYTES))
            size = chance.randint(1, 3 * PAGE)
            nbytes = size * BYTES[dtype]
            tensors.append(PlacedTensor(f"{number}.{at}", dtype, dtype, offset, from_source(at, (size,)), nbytes))
            offset += -(-nbytes // 8) * 8 + 64 * chance.randint(0, 1)
        files.append(OutputFile(f"{number}.safetensors", 0, None, tuple(tensors)))  # type: ignore[arg-type]
    return files


def check(files: list[OutputFile], exchanged: Tensors, ranges: list[list[Piece]]) -> None:
    """Every byte has one owner, and so has every page."""
    found = [piece for own in ranges for piece in own]
    assert found == sorted(found)
    expected = [piece for piece in sorted(split_into_pieces(files)) if piece[:2] in exchanged]
    assert sum(piece.nbytes for piece in found) == sum(piece.nbytes for piece in expected)
    assert len(found) < len(expected) + len(ranges)
    pages: dict[tuple[int, int], int] = {}
    at = {(piece.file, piece.tensor): (piece.offset, piece.start) for piece in reversed(expected)}
    for owner, own in enumerate(ranges):
        for piece in own:
            assert piece.nbytes > 0
            assert at[piece[:2]] == (piece.offset, piece.start)
            at[piece[:2]] = piece.offset + piece.nbytes, piece.stop
            for page in range(piece.offset // PAGE, -(-(piece.offset + piece.nbytes) // PAGE)):
                assert pages.setdefault((piece.file, page), owner) == owner


@pytest.mark.parametrize("seed", range(60))
def test_every_byte_and_every_page_has_one_owner(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr(partition, "PIECE", chance.choice([1 << 13, 1 << 14, 1 << 26]))
    files = files_of(chance, chance.randint(1, 4), aligned=seed % 5 > 0)
    exchanged = tensors_of_bits(files, all_tensors(files) if seed % 2 else chance.getrandbits(24))
    check(files, exchanged, owned_ranges(files, exchanged, chance.randint(1, 9)))


@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_owners_have_equal_shares_to_a_page(count: int) -> None:
    files = files_of(random.Random(0), 1)
    tensor = PlacedTensor("a", "BF16", "BF16", 3 * PAGE + 8, from_source(0, (100 << 20,)), 200 << 20)
    files = [OutputFile("a", 0, None, (tensor,))]  # type: ignore[arg-type]
    ranges = owned_ranges(files, frozenset({(0, 0)}), count)
    shares = [sum(piece.nbytes for piece in own) for own in ranges]
    assert max(shares) - min(shares) <= 2 * PAGE
    check(files, frozenset({(0, 0)}), ranges)


def test_a_tensor_whose_elements_cross_pages_is_not_cut() -> None:
    tensor = PlacedTensor("a", "F32", "F32", 9, from_source(0, (10 * PAGE,)), 40 * PAGE)
    files = [OutputFile("a", 0, None, (tensor,))]  # type: ignore[arg-type]
    assert list(map(len, owned_ranges(files, frozenset({(0, 0)}), 3))) == [1, 0, 0]


@pytest.mark.parametrize("seed", range(100))
def test_runs_are_counted_without_being_listed(seed: int) -> None:
    tensor = made(random.Random(seed))
    for owner in range(3):
        count, size = count_runs(tensor, owner.__eq__)
        listed = partition.spans(tensor, 0, tensor.size, owner.__eq__)
        assert size == sum(stop - start for start, stop in listed)
        assert (count == 0) == (size == 0)
        assert count <= sum(prod(tile.shape) for tile in tensor.tiles if tile.source == owner)


def columns(rows: int, width: int) -> OutputFile:
    """A file with a tensor by rows, and one by columns, each half of source 0 and of source 1."""
    by_rows = concat([from_source(0, (rows, width)), from_source(1, (rows, width))], 0)
    by_columns = concat([from_source(0, (rows, width)), from_source(1, (rows, width))], 1)
    nbytes = 2 * rows * width * 4
    placed = [
        PlacedTensor(key, "F32", "F32", at * nbytes, tensor, nbytes)
        for at, (key, tensor) in enumerate([("rows", by_rows), ("columns", by_columns)])
    ]
    return OutputFile("a", 0, None, tuple(placed))  # type: ignore[arg-type]


def test_tensors_of_many_short_runs_are_exchanged() -> None:
    files = [columns(4 * FEW, 64), columns(2, 1 << 15)]
    said = [OwnParts(owner.__eq__).short_runs(files) for owner in (0, 1)]
    assert tensors_of_bits(files, said[0].tensors) == {(0, 1)}  # rows are long, and so are wide columns
    assert said[0].runs == 4 * FEW
    assert tensors_of_bits(files, exchanged_tensors(said)) == {(0, 1)}


def test_a_few_short_runs_are_written_as_they_are() -> None:
    assert exchanged_tensors([ShortRuns(1, FEW), ShortRuns(2, FEW)]) == 0
    assert exchanged_tensors([ShortRuns(1, FEW), ShortRuns(2, FEW + 1)]) == 3


def test_runs_are_worked_out_once_for_files_that_are_the_same() -> None:
    files, own = [columns(8, 4), columns(2, 8)], OwnParts((1).__eq__)
    found = own.runs(files)
    assert own.runs([*files]) is found
    assert [run[:2] for run in own.runs(files, frozenset({(0, 1)}))].count((0, 1)) == 0
    assert own.runs(files, NONE) == found
    assert own.runs([columns(8, 4), files[1]]) == found


def test_so_are_the_ranges_of_owners() -> None:
    files, own, exchanged = [columns(1024, 4), columns(2, 8)], OwnParts((1).__eq__), frozenset({(0, 0), (0, 1)})
    found = own.ranges(files, exchanged, 3)
    assert found == owned_ranges(files, exchanged, 3)
    assert own.ranges([*files], exchanged, 3) is found
    assert own.ranges(files, exchanged, 2) == owned_ranges(files, exchanged, 2)
    assert own.ranges(files, NONE, 2) == [[], []]
