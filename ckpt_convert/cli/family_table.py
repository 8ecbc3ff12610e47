"""A family's table as text and as JSON: ``formats --family NAME --keys``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from textwrap import wrap
from typing import Any

import click

from ckpt_convert.models.core.expanded import ShownColumn, ShownRow, expanded
from ckpt_convert.models.core.table import Family

SCHEMA = 1
WIDTH = 100
_INDENT = "  "
_FORMAT = len("torchtitan")


def document(family: Family, layers: int | None = None) -> dict[str, Any]:
    """The table as one JSON object."""
    return {
        "schema": SCHEMA,
        "family": family.name,
        "title": family.title,
        "model_types": list(family.model_types),
        "unverified": dict(family.unverified),
        "counts": dict(family.indices),
        "rows": [dataclasses.asdict(row) for row in expanded(family, layers)],
    }


def lines(family: Family, layers: int | None = None, width: int = WIDTH) -> Iterator[str]:
    """The table in lines of at most ``width`` columns, except where a key alone is longer."""
    yield click.style(f"{family.name}: {family.title}", bold=True)
    counts = ", ".join(f"{{{name}}} below {symbol}" for name, symbol in family.indices.items())
    yield from [counts] if counts else []
    for format, why in family.unverified.items():
        yield from wrap(f"{format} is not confirmed by anything outside: {why}", width, break_on_hyphens=False)
    for row in expanded(family, layers):
        yield ""
        yield from _row(row, width)


def _row(row: ShownRow, width: int) -> Iterator[str]:
    head = f"{click.style(row.name, bold=True)}  {_shape(row.shape)}"
    plain = len(click.unstyle(head))
    facts = "; ".join(row.facts)
    if facts and plain + len(_INDENT) + len(facts) <= width:
        yield f"{head}{_INDENT}{facts}"
    else:
        yield head
        yield from _wrapped(facts, width, _INDENT)
    left = max(len(column.key) for column in row.columns)
    for column in row.columns:
        yield from _column(column, row.shape, left, width)


def _column(column: ShownColumn, logical: tuple[str, ...], left: int, width: int) -> Iterator[str]:
    start = f"{_INDENT}{column.format:<{_FORMAT}}{_INDENT}"
    facts = "; ".join(_facts(column, logical))
    if len(start) + left + len(_INDENT) + len(facts) <= width:
        yield f"{start}{column.key:<{left}}{_INDENT}{facts}".rstrip()
    else:
        yield start + column.key
        yield from _wrapped(facts, width, " " * len(start) + _INDENT)


def _facts(column: ShownColumn, logical: tuple[str, ...]) -> Iterator[str]:
    if column.shape != logical:
        yield _shape(column.shape)
    if column.rope is not None:
        yield f"rope {column.rope}"
    if column.tp is not None:
        yield f"tp {column.tp}"
    yield from column.facts


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _shape(shape: tuple[str, ...]) -> str:
    return f"[{', '.join(shape)}]"
