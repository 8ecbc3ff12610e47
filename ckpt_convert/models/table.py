"""The language in which a family is written down: one row per logical parameter, one column per format.

A column says under which key a format stores the row, in which RoPE row order, and how it is cut over tensor-parallel
ranks. Everything else (every direction of every conversion, plans, checks) is derived from the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, product
from math import prod
from typing import Any, Literal

from ckpt_convert.models.config import ConfigOptions, Translated
from ckpt_convert.models.lazy import LazyTensor

FORMATS = ("hf", "meta", "native")

RopeOrder = Literal["half", "interleaved"]
"""How the rows of a head are ordered. Rotary embedding turns pairs of rows (i, i + head_dim/2) in ``half`` order
(Hugging Face's rotate_half) and (2i, 2i + 1) in ``interleaved`` order (Meta's complex numbers)."""


@dataclass(frozen=True)
class Key:
    """How one format stores a row.

    ``template`` is the key, with named placeholders for whole dot-separated parts. ``rope`` is the row order, given
    exactly for rows that rotate. ``tp`` is the axis that is cut over ranks: an axis, a symbol of the config that holds
    one, or None for a tensor that every rank holds whole. ``omitted_if_tied``: no such key where the weights are tied.
    """

    template: str
    rope: RopeOrder | None = None
    tp: int | str | None = None
    omitted_if_tied: bool = False

    def replace(self, **changes: Any) -> Key:
        """A key that differs from this one."""
        return dataclasses.replace(self, **changes)

    @property
    def placeholders(self) -> frozenset[str]:
        return frozenset(part[1:-1] for part in self.template.split(".") if _is_placeholder(part))

    def cut_axis(self, dims: Mapping[str, int]) -> int | None:
        """The axis that is cut over ranks, for this config."""
        return dims[self.tp] if isinstance(self.tp, str) else self.tp

    def to_stored(self, tensor: LazyTensor, heads: int | None) -> LazyTensor:
        """The logical tensor as this column orders it (ranks joined)."""
        return _interleave(tensor, heads) if self.rope == "interleaved" and heads else tensor

    def to_logical(self, tensor: LazyTensor, heads: int | None) -> LazyTensor:
        """The inverse of ``to_stored``."""
        return _deinterleave(tensor, heads) if self.rope == "interleaved" and heads else tensor


@dataclass(frozen=True)
class Row:
    """One logical parameter and where each format keeps it (None: the format has no place for it).

    ``shape`` are expressions over the config's symbols, such as "n_heads*head_dim"; ``heads`` the symbol that counts
    the heads of a row that rotates; ``tied_to`` names the row that this one may share its values with; ``when`` a
    symbol that switches the row on; ``derived`` marks what the config determines (RoPE tables): never required,
    carried along where the target has no place for it.
    """

    name: str
    shape: tuple[str, ...]
    hf: Key | None = None
    meta: Key | None = None
    native: Key | None = None
    heads: str | None = None
    tied_to: str | None = None
    when: str | None = None
    derived: bool = False

    def replace(self, **changes: Any) -> Row:
        """A row that differs from this one."""
        return dataclasses.replace(self, **changes)

    def column(self, format: str) -> Key | None:
        if format not in FORMATS:
            raise ValueError(f"no format {format!r}")
        key: Key | None = getattr(self, format)
        return key

    @property
    def columns(self) -> dict[str, Key]:
        return {format: key for format in FORMATS if (key := self.column(format)) is not None}

    @property
    def placeholders(self) -> frozenset[str]:
        return next(iter(self.columns.values())).placeholders

    def sizes(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The logical shape for this config."""
        return tuple(evaluate(expression, dims) for expression in self.shape)


@dataclass(frozen=True, slots=True)
class Instance:
    """A row at given indices: ("attention.q", (("layer", 3),))."""

    row: Row
    index: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return ".".join([self.row.name, *(str(value) for _, value in self.index)])

    def key(self, format: str) -> str | None:
        """The key of this instance in a format, or None if the format has no place for it."""
        column = self.row.column(format)
        return column.template.format_map(dict(self.index)) if column else None

    def heads(self, dims: Mapping[str, int]) -> int | None:
        return dims[self.row.heads] if self.row.heads else None

    def __hash__(self) -> int:
        return hash((self.row.name, self.index))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Instance) and (self.row.name, self.index) == (other.row.name, other.index)


@dataclass(frozen=True)
class Params:
    """What Meta's side of a family needs beyond the table: its params.json, its file names, its ranks.

    ``evidence`` says in words why a params.json is this family's, or None. ``sharded`` is whether the format is cut
    over ranks at all; ``container`` the usual one; ``options`` are those of ConfigOptions that it has a use for.
    ``embedding_cut`` comes from the known releases (0 for any other shape), ``release`` is the name of the one with
    this shape, ``model_parallel`` the number of ranks that it came in.
    """

    evidence: Callable[[Mapping[str, Any]], str | None]
    from_hf: Callable[[Mapping[str, Any], ConfigOptions], Translated]
    to_hf: Callable[..., Translated]
    sharded: bool
    container: Literal["pth", "safetensors"]
    options: frozenset[str]
    embedding_cut: Callable[[Mapping[str, Any], ConfigOptions], int] = lambda config, options: 0
    release: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    model_parallel: Callable[[Mapping[str, Any]], int | None] = lambda config: None


@dataclass(frozen=True)
class Family:
    """An architecture: its table, the symbols that its config gives, and the translation of its config.

    ``indices`` says how far each placeholder counts: {"layer": "n_layers"}. The table is checked when it is made.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    rows: tuple[Row, ...]
    dims: Callable[[Mapping[str, Any]], dict[str, int]]
    params: Params | None = None
    indices: Mapping[str, str] = field(default_factory=lambda: {"layer": "n_layers"})

    def __post_init__(self) -> None:
        check(self)

    def replace(self, **changes: Any) -> Family:
        """A family that differs from this one; ``rows`` may be a function of the rows."""
        rows = changes.get("rows")
        if callable(rows):
            changes["rows"] = tuple(rows(self.rows))
        return dataclasses.replace(self, **changes)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that the table has a column for."""
        return tuple(f for f in FORMATS if any(row.column(f) for row in self.rows if not row.derived))

    def instances(self, dims: Mapping[str, int]) -> Iterator[Instance]:
        """Every row at every index that this config has, in the order of the model's layers."""
        for placeholders, group in groupby(self.rows, key=lambda row: row.placeholders):
            names = [name for name in self.indices if name in placeholders]
            rows = list(group)
            for values in product(*(range(dims[self.indices[name]]) for name in names)):
                index = tuple(zip(names, values, strict=True))
                yield from (Instance(row, index) for row in rows if not row.when or dims[row.when])

    @cached_property
    def _patterns(self) -> dict[str, list[tuple[tuple[str, ...], Row]]]:
        return {
            format: [(tuple(key.template.split(".")), row) for row in self.rows if (key := row.column(format))]
            for format in FORMATS
        }

    def knows(self, format: str, key: str) -> bool:
        """Whether some row of the column could have this key, at any index (a config is not needed)."""
        parts = key.split(".")
        return any(
            len(template) == len(parts) and all(_matches(t, p) for t, p in zip(template, parts, strict=True))
            for template, _ in self._patterns[format]
        )


def evaluate(expression: str, dims: Mapping[str, int]) -> int:
    """A product of symbols and numbers, with whole division: "n_heads*head_dim", "head_dim/2"."""
    numerator, *divisors = expression.split("/")
    value = prod(_term(term, dims) for term in numerator.split("*"))
    for divisor in divisors:
        value //= _term(divisor, dims)
    return value


def check(family: Family) -> None:
    """Refuse a table that could be read in two ways; raises ValueError naming the rows."""
    names = [row.name for row in family.rows]
    for row in family.rows:
        where = f"{family.name}: row {row.name!r}"
        if names.count(row.name) > 1:
            raise ValueError(f"{where} is there twice")
        if not row.columns:
            raise ValueError(f"{where} has no column")
        if row.tied_to is not None and row.tied_to not in names:
            raise ValueError(f"{where} is tied to {row.tied_to!r}, which is no row")
        for format, key in row.columns.items():
            if key.placeholders != row.placeholders:
                raise ValueError(f"{where} has other placeholders in column {format}")
            if not key.placeholders <= set(family.indices):
                raise ValueError(f"{where} has a placeholder that counts nothing: {set(key.placeholders)}")
            if (key.rope is None) != (row.heads is None):
                raise ValueError(f"{where}: a row with heads needs a rope order in every column, column {format}")
            if key.omitted_if_tied and row.tied_to is None:
                raise ValueError(f"{where} is tied to nothing, column {format}")
            if isinstance(key.tp, int) and key.tp >= len(row.shape):
                raise ValueError(f"{where} has no axis {key.tp} to cut, column {format}")
    for format in FORMATS:
        keys = [(row.name, column.template) for row in family.rows if (column := row.column(format))]
        for at, (name, template) in enumerate(keys):
            for other, clash in keys[at + 1 :]:
                if _overlap(template, clash):
                    raise ValueError(
                        f"{family.name}: rows {name!r} and {other!r} could have the same {format} key: "
                        f"{template}, {clash}"
                    )


def _interleave(tensor: LazyTensor, heads: int) -> LazyTensor:
    head_dim = tensor.shape[0] // heads
    return tensor.reorder(0, (heads, 2, head_dim // 2), (0, 2, 1))


def _deinterleave(tensor: LazyTensor, heads: int) -> LazyTensor:
    head_dim = tensor.shape[0] // heads
    return tensor.reorder(0, (heads, head_dim // 2, 2), (0, 2, 1))


def _term(term: str, dims: Mapping[str, int]) -> int:
    return int(term) if term.isdecimal() else dims[term]


def _is_placeholder(part: str) -> bool:
    return part.startswith("{") and part.endswith("}")


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdecimal() and (part == "0" or part[0] != "0")


def _matches(template: str, part: str) -> bool:
    return _is_index(part) if _is_placeholder(template) else template == part


def _overlap(left: str, right: str) -> bool:
    lefts, rights = left.split("."), right.split(".")
    return len(lefts) == len(rights) and all(
        (_is_placeholder(a) and _is_placeholder(b)) or _matches(a, b) or _matches(b, a)
        for a, b in zip(lefts, rights, strict=True)
    )
