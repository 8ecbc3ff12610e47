"""A family's table written out for people: every row, its shape in symbols, and its columns.

No conversion uses it: the expanded table is there to be compared with a library's source.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckpt_convert.models.core.rows import Key, Row
from ckpt_convert.models.core.table import Family

IN_MEMORY = "in memory"
"""The name shown for the column of transformers' models in memory, where it differs from hf."""


@dataclass(frozen=True)
class ShownColumn:
    """How one format stores a row.

    ``shape`` is that of the row's own part of the stored tensor: transposed, reshaped and stacked as the format has it,
    but without other rows that are fused with it. ``tp`` is the axis of the stored tensor that ranks split, or the
    symbol that holds it; ``facts`` is everything else, in words.
    """

    format: str
    key: str
    shape: tuple[str, ...]
    rope: str | None
    tp: int | str | None
    facts: tuple[str, ...]


@dataclass(frozen=True)
class ShownRow:
    """One row: its name, its logical shape, the facts that hold for all columns, and each column."""

    name: str
    shape: tuple[str, ...]
    facts: tuple[str, ...]
    columns: tuple[ShownColumn, ...]


def expanded(family: Family, layers: int | None = None) -> Iterator[ShownRow]:
    """The rows of a family in the order of its table; no config is needed, so sizes are symbols.

    ``layers`` repeats the rows of a layer so many times, with indices in place of {layer}; None leaves the placeholder.
    Which layers of a real model have a row depends on its config.
    """
    for outer, rows in family.by_placeholder():
        for number in [None] if outer is None or layers is None else range(layers):
            yield from (_row(family, row, outer, number) for row in rows)


def _row(family: Family, row: Row, outer: str | None, number: int | None) -> ShownRow:
    keys = {**row.columns, **({IN_MEMORY: row.in_memory} if row.in_memory else {})}
    return ShownRow(
        row.name if number is None else f"{row.name}.{number}",
        row.shape,
        tuple(_row_facts(row)),
        tuple(_column(family, row, format, key, outer, number) for format, key in keys.items()),
    )


def _row_facts(row: Row) -> Iterator[str]:
    if row.heads is not None:
        part = "" if row.rotary_dim is None else f", the first {row.rotary_dim} rows of each"
        yield f"rotates: heads {row.heads}{part}"
    if row.layer_set is not None:
        yield f"in layers: {row.layer_set}"
    if row.enabled_by is not None:
        yield f"if {row.enabled_by}"
    if row.tied_to is not None:
        yield f"may be tied to {row.tied_to}"
    if row.derived:
        yield "derived from the config"
    elif row.optional:
        yield "optional" if row.group is None else f"optional, with the group {row.group}"
    if row.zeros is not None:
        yield f"{row.zeros} zeros where absent"


def _column(family: Family, row: Row, format: str, key: Key, outer: str | None, number: int | None) -> ShownColumn:
    stacked = [family.indices[name] for name in family.indices if name in row.placeholders - key.placeholders]
    shape = list(key.shape or row.shape)
    if key.transposed and key.shape is None:
        shape[-2:] = shape[:-3:-1]
    shape = [*stacked, *shape]
    tp = key.tp_dim
    if isinstance(tp, int):
        tp += len(stacked) - key.flatten_stacked
    if key.flatten_stacked:
        shape[:2] = [f"{shape[0]}*{shape[1]}"]
    text = key.template if number is None else key.template.replace(f"{{{outer}}}", str(number))
    return ShownColumn(format, text, tuple(shape), key.rope, tp, tuple(_facts(family, row, format, key, stacked)))


def _facts(family: Family, row: Row, format: str, key: Key, stacked: list[str]) -> Iterator[str]:
    if stacked:
        yield "stacked"
    if key.transposed:
        yield "transposed"
    if key.scatter_index is not None:
        yield f"cells {key.scatter_index}"
    if key.replicated_heads is not None:
        yield f"copies beyond {key.replicated_heads}"
    if key.fused is not None:
        parts = _fused(family, row, format, key)
        at = next(at for at, part in enumerate(parts, 1) if part.name == row.name)
        yield f"fused on axis {key.fused + len(stacked)}, part {at} of {len(parts)}"
    if key.omitted_if_tied:
        yield "absent if tied"


def _fused(family: Family, row: Row, format: str, key: Key) -> list[Row]:
    """The rows that are fused under the key of this row, in their order."""
    held = [(each, _of(each, format)) for each in family.rows if each.layer_set == row.layer_set]
    parts = [(each, other) for each, other in held if other is not None and other.template == key.template]
    return [each for each, _ in sorted(parts, key=lambda part: part[1].fused_position)]


def _of(row: Row, format: str) -> Key | None:
    return row.in_memory if format == IN_MEMORY else row.column(format)
