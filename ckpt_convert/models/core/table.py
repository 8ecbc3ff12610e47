"""The language in which a family is written down: one row per logical parameter, one column per format.

A column says how a format stores the row: under which key, in which RoPE row order, transposed, fused with which other
rows, stacked over experts, and how it is cut over tensor-parallel ranks. Everything else (every direction of every
conversion, plans, checks) is derived from the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, product
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import CONFIG
from ckpt_convert.models.core.entry import Entry, Instance, fused_position
from ckpt_convert.models.core.params import Params
from ckpt_convert.models.core.rope import partial_rotary_factor
from ckpt_convert.models.core.rows import EMBEDDING_AXIS, FORMATS, IN_MEMORY, Dims, Key, Row, Sets, evaluate, matches
from ckpt_convert.models.core.tokenizers import LLAMA_3
from ckpt_convert.tokenizer.spec import TiktokenSpec

__all__ = [
    "FORMATS",
    "IN_MEMORY",
    "Dims",
    "Entry",
    "Family",
    "Instance",
    "Key",
    "Row",
    "Sets",
    "evaluate",
]

_ATTENTION = ".self_attn."
"""What an attention layer is called in Hugging Face's keys."""


def _vocabulary(dims: Mapping[str, int]) -> int:
    return dims["vocab_size"]


@dataclass(frozen=True)
class Family:
    """An architecture: its table, the symbols that its config gives, and the translation of its config.

    ``indices`` says how far each placeholder counts: {"layer": "n_layers"}. ``sets`` gives the sets of numbers that
    rows and templates name, from the config. ``architectures`` are the classes of which a config has to name one to be
    of this family, where others have the same model_type. What a table must not say is in ``table_check``.

    ``from_shapes`` gives the config that the shapes of the stored tensors show, of a family whose files come without
    one; such a config is no file of any format. ``stem`` is what its safetensors files are called in Hugging Face's
    layout where nothing else says it. ``tokenizer`` is what a tokenizer.model of tiktoken ranks is taken for,
    ``tokens`` how many rows the embedding has. Several families may have one model_type: the keys tell them apart.

    ``unverified`` names the formats whose column nothing outside could be compared with, and says why. ``literal``
    is a table of literal keys: the row of each tensor of one checkpoint, by its key; a row is that of all tensors of a
    shape.

    Every table has a row for the rotation frequencies that old releases of Hugging Face's models stored, whether it is
    among ``rows`` or not.
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
    tokenizer: TiktokenSpec = LLAMA_3
    tokens: Callable[[Mapping[str, int]], int] = _vocabulary
    literal: Mapping[str, Row] = field(default_factory=dict)

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
        """What a user of these formats should know of their columns: that nothing outside confirms them, and why."""
        said = "nothing outside the project confirms this family's"
        return tuple(
            f"{self.name}: {said} {format} keys: {self.unverified[format]}"
            for format in dict.fromkeys(formats)
            if format in self.unverified
        )

    def symbols(self, config: Mapping[str, Any]) -> Dims:
        """What the config says, under the names that the table has for it; raises ConfigError."""
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
        """Whether ranks of Meta's layout cut the embedding on an axis that no config says."""
        return any(key.tp_dim == EMBEDDING_AXIS for row in self.rows if (key := row.meta) is not None)

    def check_rotation(self, config: Mapping[str, Any], *formats: str) -> None:
        """Raise ConfigError where heads would be reordered whole although the config rotates only a part of each.

        Formats that order them alike, and tables that say which rows rotate (``Row.rotary_dim``), are fine.
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
        """``instances``, those of a row that differ in nothing but what counts fastest together (a layer's experts)."""
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
        """The rows in their order, those together that the same placeholder numbers (a layer's), with its name."""
        for outer, group in groupby(self.rows, key=self._outer):
            yield outer, list(group)

    def _inner(self, row: Row, dims: Mapping[str, int]) -> list[tuple[tuple[str, int], ...]]:
        """The numbers of a row's placeholders but the one that counts slowest, at each of its indices."""
        names = [name for name in self.indices if name in row.placeholders][1:]
        return list(product(*([(name, number) for number in range(dims[self.indices[name]])] for name in names)))

    def _outer(self, row: Row) -> str | None:
        """The placeholder of a row that counts slowest."""
        return next((name for name in self.indices if name in row.placeholders), None)

    def entries(self, format: str, dims: Mapping[str, int]) -> Iterator[Entry]:
        """Every key that a format has for this config, with what lies under it, in the order of the layers.

        Raises ValueError for a config with which two rows would have one key.
        """
        if self.literal:
            known = self.literal.items() if format in self.formats else ()
            yield from (Entry(key, ((Instance(row, ((key, 0),)),),)) for key, row in known)
            return
        groups: dict[str, Instance | dict[str, list[Instance]]] = {}
        for run in self._runs(dims):
            row = run[0].row if run else None
            column = row.column(format) if row is not None else None
            if row is None or column is None:
                continue
            alone = column.fused is None and row.placeholders == column.placeholders
            # A key that says nothing but the number of the layer is the same for all of them.
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
                yield Entry(key, ((rows,),))
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
            yield Entry(key, members, tuple(dims[self.indices[name]] for name in missing))

    @cached_property
    def _patterns(self) -> dict[str, list[tuple[tuple[str, ...], Row]]]:
        return {
            format: [(tuple(key.template.split(".")), row) for row in self.rows if (key := row.column(format))]
            for format in (*FORMATS, IN_MEMORY)
        }

    def has(self, column: str) -> bool:
        """Whether the table has this column: that of a format, or of transformers' models in memory."""
        return ("hf" if column == IN_MEMORY else column) in self.formats

    def column_of(self, format: str, keys: Iterable[str]) -> str:
        """The column that the keys of a model in memory are of: ``format``, or of hf's two the one that knows them."""
        if format != "hf" or not any(row.in_memory for row in self.rows):
            return format
        return IN_MEMORY if any(self.knows(IN_MEMORY, key) and not self.knows("hf", key) for key in keys) else "hf"

    def knows(self, format: str, key: str) -> bool:
        """Whether some row of the column could have this key, at any index (a config is not needed)."""
        if self.literal:
            return format in self.formats and key in self.literal
        parts = key.split(".")
        return any(
            len(template) == len(parts) and all(matches(t, p) for t, p in zip(template, parts, strict=True))
            for template, _ in self._patterns[format]
        )


def _with_frequencies(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows, and a derived one for the table of frequencies of each attention in Hugging Face's layout."""
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
            # Half of what rotates of a head, which is as long as the rows say.
            half = f"{row.rotary_dim}/2" if row.rotary_dim is not None else f"{row.shape[0]}/{row.heads}/2"
            out.append(Row(name, (half,), hf=Key(template), derived=True))
    return tuple(out)
