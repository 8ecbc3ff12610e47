"""Functions that select rows of one table for another, and change them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ckpt_convert.models.core.rope import RopeOrder
from ckpt_convert.models.core.rows import FORMATS, Key, Row


def columns(rows: Iterable[Row], *formats: str) -> tuple[Row, ...]:
    """The rows with the columns of these formats alone, without rows that none of them has."""
    others = dict.fromkeys(format for format in FORMATS if format not in formats)
    return tuple(row.replace(**others) for row in rows if any(row.column(format) for format in formats))


def named(rows: Iterable[Row], *names: str) -> tuple[Row, ...]:
    """The rows with these names, in this order."""
    by_name = {row.name: row for row in rows}
    return tuple(by_name[name] for name in names)


def with_rope(rows: Iterable[Row], layout: RopeOrder | None) -> tuple[Row, ...]:
    """The rows that rotate with one RoPE layout in every column: no conversion between these reorders them.

    None says nothing of the layout, nor of heads: for a table whose formats all have the same one.
    """
    return tuple(_with_rope(row, layout) if row.heads else row for row in rows)


def fused(rows: Iterable[Row], **templates: str) -> tuple[Row, ...]:
    """The rows fused along their first axis into one tensor, whose key for each format is in ``templates``.

    Raises ValueError for a format that one of the rows has no column for.
    """
    rows = tuple(rows)
    for row in rows:
        if missing := sorted(templates.keys() - row.columns.keys()):
            raise ValueError(f"{row.name} has no key in {', '.join(missing)} to be fused")
    return tuple(
        row.replace(
            **{
                format: key.replace(template=templates[format], fused=0)
                for format, key in row.columns.items()
                if format in templates
            }
        )
        for row in rows
    )


def replaced(rows: Iterable[Row], **keys: Mapping[str, Key]) -> tuple[Row, ...]:
    """The rows with other keys for a format, by the rows' names; raises ValueError for a name that no row has."""
    rows = tuple(rows)
    names = {row.name for row in rows}
    for format, others in keys.items():
        if unknown := sorted(set(others) - names):
            raise ValueError(f"no row to change the {format} key of: {', '.join(unknown)}")
    return tuple(
        row.replace(**{format: others[row.name] for format, others in keys.items() if row.name in others})
        for row in rows
    )


def prefixed(rows: Iterable[Row], **prefixes: str) -> tuple[Row, ...]:
    """The rows with a prefix before the keys of each format: of a layer, or of a model that is part of another."""
    return tuple(
        row.replace(**{f: key.prefixed(prefixes[f]) for f, key in row.columns.items() if f in prefixes}) for row in rows
    )


def _with_rope(row: Row, layout: RopeOrder | None) -> Row:
    columns = {format: key.replace(rope=layout) for format, key in row.columns.items()}
    return row.replace(**columns) if layout else row.replace(**columns, heads=None, rotary_dim=None)
