"""A family: its table, with one row per logical parameter and one column per format, and its config translation.

A column says how a format stores the row: under which key, in which RoPE layout, transposed, fused with which other
rows, stacked over experts, and how tensor-parallel ranks split it. Everything else (every direction of every
conversion, plans, checks) is derived from the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import field
from functools import cached_property
from itertools import groupby, product
from typing import TYPE_CHECKING, Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import CONFIG
from ckpt_convert.models.core.params import Params
from ckpt_convert.models.core.rope import partial_rotary_factor
from ckpt_convert.models.core.rows import EMBEDDING_AXIS, FORMATS, IN_MEMORY, Dims, Key, Row, Sets, evaluate, matches
from ckpt_convert.models.core.stored_specs import Instance, StoredTensorSpec, fused_position
from ckpt_convert.values import frozen

if TYPE_CHECKING:
    from ckpt_convert.tokenizer.spec import TiktokenSpec

__all__ = [
    "FORMATS",
    "IN_MEMORY",
    "Dims",
    "Family",
    "Instance",
    "Key",
    "Row",
    "Sets",
    "StoredTensorSpec",
    "evaluate",
]

_ATTENTION = ".self_attn."
"""What an attention layer is called in Hugging Face's keys."""


def _vocabulary(dims: Mapping[str, int]) -> int:
    return dims["vocab_size"]


@frozen()
class Family:
    """An architecture: its table, the dimensions that its config gives, and the translation of its config.

    ``dims`` reads the dimensions from a config.json, which has one of the ``model_types``. ``indices`` gives the
    dimension that each placeholder counts to, the slowest first: {"layer": "n_layers"}. ``sets`` gives the sets of
    indices that rows and templates name. Several families may have one model_type: a config has to name one of the
    ``architectures`` if there are any, and the keys decide between the rest. ``table_check`` has the rules for tables.

    ``params`` translates params.json, for a table with a meta column. ``from_shapes`` gives the config from the shapes
    of the stored tensors, for a family whose files come without one. ``stem`` is the default name of its safetensors
    files in Hugging Face's layout. ``tokenizer`` is the one that a tokenizer.model of tiktoken ranks belongs to,
    if it is another than Llama 3's; ``tokens`` is the number of rows of the embedding.

    ``unverified`` names the formats whose column could not be compared with any other implementation, and why.
    ``literal`` is a table of literal keys: the row of each tensor of one checkpoint, by its key.

    Every table has a row for the RoPE frequencies (inv_freq) that old releases stored, whether ``rows`` has it or not.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    rows: tuple[Row, ...]
    dims: Callable[[Mapping[str, Any]], dict[str, int]]
    params: Params | None = None
    indices: Mapping[str, str] = field(default_factory=lambda: {"layer": "n_layers"})
    sets: Callable[[Mapping[str, Any]], Mapping[str, Collection[int]]] | None = None
    architectures: tuple[str, ...] = ()
    unverified: Mapping[str, str] = field(default_factory=dict)
    from_shapes: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]] | None = None
    stem: str = "model"
    tokenizer: TiktokenSpec | None = None
    tokens: Callable[[Mapping[str, int]], int] = _vocabulary
    literal: Mapping[str, Row] = field(default_factory=dict)

    @property
    def tiktoken(self) -> TiktokenSpec:
        """The tokenizer that a tokenizer.model of tiktoken ranks belongs to."""
        from ckpt_convert.models.core.tokenizers import LLAMA_3

        return self.tokenizer or LLAMA_3

    def __post_init__(self) -> None:
        if not self.literal:
            object.__setattr__(self, "rows", _with_frequencies(self.rows))

    def replace(self, **changes: Any) -> Family:
        """A family that differs from this one; ``rows`` may be a function of the rows."""
        rows = changes.get("rows")
        if callable(rows):
            changes["rows"] = tuple(rows(self.rows))
        return dataclasses.replace(self, **changes)

    def caveats(self, *formats: str) -> tuple[str, ...]:
        """A warning for each of these formats whose column no other implementation confirms, with the reason."""
        said = "nothing outside the project confirms this family's"
        return tuple(
            f"{self.name}: {said} {format} keys: {self.unverified[format]}"
            for format in dict.fromkeys(formats)
            if format in self.unverified
        )

    def config_dims(self, config: Mapping[str, Any]) -> Dims:
        """The dimensions and sets that the config gives; raises ConfigError."""
        dims = Dims(self.dims(config), self.sets(config) if self.sets is not None else None)
        self._check_symbols(dims)
        return dims

    def _check_symbols(self, dims: Dims) -> None:
        """Raise ConfigError, naming the row, where the table needs a symbol or a set that the config did not give."""
        for row in self.rows:
            if row.enabled_by is not None and not dims.get(row.enabled_by, True):
                continue
            counts = [self.indices[name] for name in row.placeholders if not self.literal]
            symbols = {*row.symbols, *counts} - dims.keys()
            missing = [*sorted(symbols), *sorted(row.sets - dims.sets.keys())]
            if missing:
                raise ConfigError(
                    f"{CONFIG}: the table of {self.name} needs {missing[0]!r} for its row {row.name!r}, which the "
                    "family's dims and sets do not give for this config"
                )

    @cached_property
    def formats(self) -> tuple[str, ...]:
        """The formats that the table has a column for."""
        if self.literal:
            return ("hf",)
        return tuple(f for f in FORMATS if any(row.column(f) for row in self.rows if row.required))

    @property
    def has_two_embedding_splits(self) -> bool:
        """Whether ranks of Meta's layout split the embedding on an axis that no config gives."""
        return any(key.tp_dim == EMBEDDING_AXIS for row in self.rows if (key := row.meta) is not None)

    def check_rotation(self, config: Mapping[str, Any], *formats: str) -> None:
        """Raise ConfigError where whole heads would be permuted although the config rotates only a part of each.

        Formats of one RoPE layout, and tables that say which rows rotate (``Row.rotary_dim``), are fine.
        """
        part = partial_rotary_factor(config)
        for row in self.rows if part is not None else ():
            orders = {key.rope for format in formats if (key := row.column(format)) is not None}
            if row.heads is not None and row.rotary_dim is None and len(orders) > 1:
                raise ConfigError(
                    f"{CONFIG}: partial_rotary_factor is {part:g}, so only a part of each head rotates, but "
                    f"{' and '.join(dict.fromkeys(formats))} order the rows of {row.name} differently, and the table "
                    f"of {self.name} knows of whole heads alone; convert within formats of one order"
                )

    def instances(self, dims: Mapping[str, int]) -> Iterator[Instance]:
        """Every row at every index that this config has, in the order of the model's layers."""
        for run in self._runs(dims):
            yield from run

    def _runs(self, dims: Mapping[str, int]) -> Iterator[list[Instance]]:
        """``instances`` in runs: one row at one index of its slowest placeholder (all experts of a layer)."""
        if self.literal:
            yield from ([Instance(row, ((key, 0),))] for key, row in self.literal.items())
            return
        sets: Sets = dims.sets if isinstance(dims, Dims) else {}
        for outer, group in self.by_placeholder():
            rows = [row for row in group if not row.enabled_by or dims[row.enabled_by]]
            if outer is None:
                yield from ([Instance(row, ())] for row in rows)
                continue
            inner = {row.name: self._inner(row, dims) for row in rows}
            members = {row.layer_set: frozenset(sets[row.layer_set]) for row in rows if row.layer_set is not None}
            for number in range(dims[self.indices[outer]]):
                for row in rows:
                    if row.layer_set is None or number in members[row.layer_set]:
                        yield [Instance(row, ((outer, number), *rest), sets) for rest in inner[row.name]]

    def by_placeholder(self) -> Iterator[tuple[str | None, list[Row]]]:
        """Consecutive rows with the same slowest placeholder (those of a layer), with its name."""
        for outer, group in groupby(self.rows, key=self._outer):
            yield outer, list(group)

    def _inner(self, row: Row, dims: Mapping[str, int]) -> list[tuple[tuple[str, int], ...]]:
        """Every combination of the indices of a row's placeholders, without the slowest one."""
        names = [name for name in self.indices if name in row.placeholders][1:]
        return list(product(*([(name, number) for number in range(dims[self.indices[name]])] for name in names)))

    def _outer(self, row: Row) -> str | None:
        """The slowest placeholder of a row."""
        return next((name for name in self.indices if name in row.placeholders), None)

    def stored_specs(self, format: str, dims: Mapping[str, int]) -> Iterator[StoredTensorSpec]:
        """Every key that a format has for this config, with the instances that it holds, in the order of the layers.

        Raises ValueError for a config with which two rows would have one key.
        """
        if self.literal:
            known = self.literal.items() if format in self.formats else ()
            yield from (StoredTensorSpec(key, ((Instance(row, ((key, 0),)),),)) for key, row in known)
            return
        groups: dict[str, Instance | dict[str, list[Instance]]] = {}
        for run in self._runs(dims):
            row = run[0].row if run else None
            column = row.column(format) if row is not None else None
            if row is None or column is None:
                continue
            alone = column.fused is None and row.placeholders == column.placeholders
            # A key with no placeholder but the layer is one key for the whole run.
            together = [run] if len(column.placeholders) < 2 else [[instance] for instance in run]
            for instances in together:
                key = column.at(instances[0].index, instances[0].sets)
                there = groups.get(key)
                if alone and there is None:  # as most are
                    groups[key] = instances[0]
                    continue
                if there is None or isinstance(there, Instance):
                    there = groups[key] = {} if there is None else {there.row.name: [there]}
                there.setdefault(row.name, []).extend(instances)
        for key, rows in groups.items():
            if isinstance(rows, Instance):
                yield StoredTensorSpec(key, ((rows,),))
                continue
            ordered = list(rows.values())
            if len(ordered) > 1:
                ordered.sort(key=lambda row: fused_position(row[0].row, format))
            members = tuple(tuple(row) for row in ordered)
            first = members[0][0]
            column = first.row.column(format)
            if column is None or (len(members) > 1 and column.fused is None):
                raise ValueError(f"{self.name}: {', '.join(rows)} have one {format} key: {key}")
            missing = [name for name in self.indices if name in first.row.placeholders - column.placeholders]
            yield StoredTensorSpec(key, members, tuple(dims[self.indices[name]] for name in missing))

    @cached_property
    def _patterns(self) -> dict[str, list[tuple[tuple[str, ...], Row]]]:
        return {
            format: [(tuple(key.template.split(".")), row) for row in self.rows if (key := row.column(format))]
            for format in (*FORMATS, IN_MEMORY)
        }

    def has_column(self, column: str) -> bool:
        """Whether the table has this column: a format, or ``IN_MEMORY``."""
        return ("hf" if column == IN_MEMORY else column) in self.formats

    def detect_column(self, format: str, keys: Iterable[str]) -> str:
        """The column that the keys of a model in memory belong to: ``format``, or for hf possibly ``IN_MEMORY``."""
        if format != "hf" or not any(row.in_memory for row in self.rows):
            return format
        return IN_MEMORY if any(self.has_key(IN_MEMORY, key) and not self.has_key("hf", key) for key in keys) else "hf"

    def has_key(self, format: str, key: str) -> bool:
        """Whether some row of the column could have this key, at any index (a config is not needed)."""
        if self.literal:
            return format in self.formats and key in self.literal
        parts = key.split(".")
        return any(
            len(template) == len(parts) and all(matches(t, p) for t, p in zip(template, parts, strict=True))
            for template, _ in self._patterns[format]
        )


def _with_frequencies(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows, and a derived one for the RoPE frequencies of each attention module in Hugging Face's layout."""
    out: list[Row] = []
    rows = tuple(rows)
    there = {row.hf.template for row in rows if row.hf is not None}
    names = {row.name for row in rows}
    for row in rows:
        out.append(row)
        module, is_attention, _ = row.hf.template.partition(_ATTENTION) if row.hf is not None else ("", "", "")
        template = f"{module}{_ATTENTION}rotary_emb.inv_freq"
        if row.heads is not None and is_attention and template not in there:
            there.add(template)
            name = "rotary.inv_freq" if "rotary.inv_freq" not in names else f"rotary.inv_freq.{len(there)}"
            names.add(name)
            # Half as many as the rows of a head that rotate.
            half = f"{row.rotary_dim}/2" if row.rotary_dim is not None else f"{row.shape[0]}/{row.heads}/2"
            out.append(Row(name, (half,), hf=Key(template), derived=True))
    return tuple(out)
