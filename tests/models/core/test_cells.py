"""Cells that lie in several places or in none, rows that every column stacks, and tensors of zeros: toy tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckpt_convert.checkpoint import mapping
from ckpt_convert.checkpoint.tensor_info import SourceTensor
from ckpt_convert.convert import writing
from ckpt_convert.convert.state_dict import materialize
from ckpt_convert.models.core.table import Dims, Family, Key, Row
from ckpt_convert.models.core.table_check import check_table
from ckpt_convert.tensors.gather import StridedReader
from ckpt_convert.tensors.lazy import ZEROS, concat, from_source, stack, zeros

SIZES = {"n_layers": 2, "cells": 4, "width": 3, "places": 6, "experts": 3, "rows": 5, "tied": 0}
PLACES = {0: 1, 1: 0, 3: 2, 4: 1}
"""What lies in which place: cell 1 twice, cell 3 nowhere, nothing in the places 2 and 5."""


def family(*rows: Row, **settings: Any) -> Family:
    made = Family("toy", "Toy", ("toy",), rows, lambda config: dict(SIZES), sets=lambda config: dims().sets, **settings)
    check_table(made)
    return made


def dims() -> Dims:
    return Dims(SIZES, {"spread": [place * SIZES["cells"] + cell for place, cell in PLACES.items()]})


TABLE = family(
    Row(
        "grid",
        ("cells", "width"),
        hf=Key("table", scatter_index="spread", shape=("places/2", "2*width")),
        native=Key("grid", shape=("2", "2", "width")),
    )
)


def through(source: str, target: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    order = list(tensors)
    sources = {
        key: SourceTensor(key, "F32", from_source(at, tensors[key].shape), "here") for at, key in enumerate(order)
    }
    logicals = mapping.read_column(TABLE, source, dims(), [sources], "toy")
    made = writing.write_column(TABLE, target, dims(), logicals, ranks=1, keep_tied=None, source_name="toy")
    assert [instance.name for instance in made.unmapped] == ([] if source == target else ["grid"])
    return {target.key: materialize(target.tensor, list(tensors.values())) for target in made.targets}


def test_a_cell_lies_in_every_place_of_its_own() -> None:
    grid = torch.arange(1.0, 13.0).reshape(2, 2, 3)
    table = through("native", "hf", {"grid": grid})["table"]
    cells = grid.reshape(4, 3)
    expected = torch.zeros(6, 3)
    for place, cell in PLACES.items():
        expected[place] = cells[cell]
    assert torch.equal(table, expected.reshape(3, 6))


def test_the_last_of_several_places_is_read_and_cells_without_one_are_zero() -> None:
    table = torch.arange(1.0, 19.0).reshape(3, 6)
    grid = through("hf", "native", {"table": table})["grid"]
    places = table.reshape(6, 3)
    assert torch.equal(grid.reshape(4, 3), torch.stack([places[1], places[4], places[3], torch.zeros(3)]))


def test_a_format_is_a_copy_of_itself() -> None:
    table = torch.arange(1.0, 19.0).reshape(3, 6)
    assert torch.equal(through("hf", "hf", {"table": table})["table"], table)


@pytest.mark.parametrize(
    "key",
    [
        Key("table", scatter_index="spread"),
        Key("table", scatter_index="spread", shape=("places", "width"), tp_dim=0),
        Key("table", scatter_index="spread", shape=("places", "width"), transposed=True),
    ],
)
def test_cells_that_would_be_cut_or_have_no_shape_are_refused(key: Key) -> None:
    with pytest.raises(
        ValueError, match="a scatter_index needs a shape, and is neither split across ranks nor transposed"
    ):
        family(Row("grid", ("cells", "width"), hf=key))


def test_a_row_that_every_column_stacks() -> None:
    toy = family(
        Row(
            "w",
            ("rows", "width"),
            stacked_over="expert",
            hf=Key("layers.{layer}.w"),
            native=Key("layers.{layer}.w_t", transposed=True),
        ),
        indices={"layer": "n_layers", "expert": "experts"},
    )
    assert [entry.key for entry in toy.stored_specs("hf", dims())] == ["layers.0.w", "layers.1.w"]
    assert [entry.shape("native", dims()) for entry in toy.stored_specs("native", dims())] == [(3, 3, 5), (3, 3, 5)]
    assert len(list(toy.instances(dims()))) == 6


def test_a_placeholder_that_counts_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="has a placeholder without an index"):
        family(Row("w", ("rows",), stacked_over="expert", hf=Key("layers.{layer}.w")))


def test_zeros_are_made_and_not_read(tmp_path: Path) -> None:
    lazy = concat([zeros((1, 3)), from_source(0, (2, 3)), zeros((1, 3))], 0)
    assert lazy.sources == {0}
    assert lazy.contiguous_source is None
    assert zeros((2, 2)).contiguous_source is None
    assert all(tile.source == ZEROS for tile in zeros((2, 2)).reshape((4,)).permute((0,)).tiles)
    source = torch.arange(1.0, 7.0).reshape(2, 3)
    expected = torch.cat([torch.zeros(1, 3), source, torch.zeros(1, 3)])
    assert torch.equal(materialize(lazy, [source]), expected)
    assert torch.equal(materialize(lazy.permute((1, 0)), [source]), expected.T)
    assert torch.equal(materialize(lazy.narrow(0, 2, 2), [source]), expected[2:])
    assert torch.equal(materialize(stack([lazy, lazy], (2,)), [source]), torch.stack([expected, expected]))

    class Stored:
        def readinto(self, offset: int, buffer: memoryview) -> None:
            buffer[:] = source.numpy().tobytes()[offset : offset + len(buffer)]

    class File:
        reader = Stored()

    from ckpt_convert.tensors.header import StoredTensor

    gatherer = StridedReader([(File(), StoredTensor("w", "F32", (2, 3), 0))])
    for tensor, wanted in ((lazy, expected), (lazy.permute((1, 0)), expected.T)):
        buffer = np.full(tensor.size * 4, 255, np.uint8)  # what was there before must not be left
        gatherer.read_into(tensor, "F32", buffer)
        assert buffer.tobytes() == wanted.contiguous().numpy().tobytes()
    parts = list(lazy.blocks(3))
    assert [offset for offset, _ in parts] == [0, 3, 6, 9]
