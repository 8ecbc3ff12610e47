"""What makes rows in pairs, picks rows of one table for another, and changes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ckpt_convert.models.core.rope import RopeOrder
from ckpt_convert.models.core.rows import FORMATS, Key, Row


def affine(name: str, shape: tuple[str, ...], **settings: Any) -> tuple[Row, Row]:
    """A weight and its bias, of which each column has the key of their module, or a ``Key`` that says more of it."""
    keys = {format: settings[format] for format in FORMATS if settings.get(format) is not None}
    modules = {format: Key(key) if isinstance(key, str) else key for format, key in keys.items()}
    weight = {format: key.replace(template=f"{key.template}.weight") for format, key in modules.items()}
    bias = {format: key.replace(template=f"{key.template}.bias", shape=None) for format, key in modules.items()}
    return Row(name, shape, **{**settings, **weight}), Row(f"{name}.bias", shape[:1], **{**settings, **bias})


def columns(rows: Iterable[Row], *formats: str) -> tuple[Row, ...]:
    """The rows as far as these formats have them: without other columns, and without rows that none of them has."""
    others = dict.fromkeys(format for format in FORMATS if format not in formats)
    return tuple(row.replace(**others) for row in rows if any(row.column(format) for format in formats))


def named(rows: Iterable[Row], *names: str) -> tuple[Row, ...]:
    """The rows of these names, in this order."""
    by_name = {row.name: row for row in rows}
    return tuple(by_name[name] for name in names)


def half(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows with their heads in rotate-half order in every column: no conversion between these reorders them."""
    return tuple(_ordered(row, "half") if row.heads else row for row in rows)


def interleaved(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows with their heads in interleaved order in every column: no conversion between these reorders them."""
    return tuple(_ordered(row, "interleaved") if row.heads else row for row in rows)


def unordered(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows without a word on the order of their heads' rows, which is the same in every column."""
    return tuple(_ordered(row, None).replace(heads=None, rotary_dim=None) if row.heads else row for row in rows)


def fused(rows: Iterable[Row], **templates: str) -> tuple[Row, ...]:
    """The rows one after another along their first axis in one tensor: ``templates`` has its key for a format.

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


def prefixed(rows: Iterable[Row], prefix: str) -> tuple[Row, ...]:
    """The rows with something before Hugging Face's keys: of a language model that is a part of another model."""
    return tuple(row.replace(hf=row.hf.prefixed(prefix)) if row.hf is not None else row for row in rows)


def _ordered(row: Row, order: RopeOrder | None) -> Row:
    return row.replace(**{format: key.replace(rope=order) for format, key in row.columns.items()})
