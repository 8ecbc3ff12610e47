"""The language in which a family is written down: one row per logical parameter, one column per format.

A column says how a format stores the row: under which key, in which RoPE row order, transposed, fused with which other
rows, stacked over experts, and how it is cut over tensor-parallel ranks. Everything else (every direction of every
conversion, plans, checks) is derived from the table.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import combinations, groupby, product
from math import prod
from typing import Any, Literal, NamedTuple

from ckpt_convert.models.config import ConfigOptions, Translated
from ckpt_convert.models.lazy import LazyTensor, concat, stack, zeros

FORMATS = ("hf", "meta", "native", "torchtitan")

IN_MEMORY = "transformers"
"""The column of what transformers has in memory, which is that of hf but for the rows that say otherwise. It is no
format of files: transformers puts experts together when it loads them, and takes them apart when it saves them."""

RopeOrder = Literal["half", "interleaved"]
"""How the rows of a head are ordered. Rotary embedding turns pairs of rows (i, i + head_dim/2) in ``half`` order
(Hugging Face's rotate_half) and (2i, 2i + 1) in ``interleaved`` order (Meta's complex numbers)."""

_ATTENTION = ".self_attn."
"""What an attention layer is called in Hugging Face's keys."""

Sets = Mapping[str, tuple[int, ...]]
"""Which numbers of a placeholder belong together, by the name of the set: the dense layers, those with experts."""


class Dims(dict[str, int]):
    """The symbols of a config: sizes, switches (0 or 1), and ``sets`` of numbers, ascending."""

    def __init__(self, sizes: Mapping[str, int], sets: Mapping[str, Collection[int]] | None = None) -> None:
        super().__init__(sizes)
        self.sets: Sets = {name: tuple(sorted(members)) for name, members in (sets or {}).items()}

    def replace(self, **sizes: int) -> Dims:
        """The same with some sizes changed."""
        return Dims({**self, **sizes}, self.sets)


class _Number(NamedTuple):
    """A placeholder: {layer}, or {layer:dense} for how many of the set's members come before it."""

    name: str
    set: str | None


@dataclass(frozen=True)
class Key:
    """How one format stores a row, or a part of each of its rows.

    ``template`` is the key, with named placeholders for whole dot-separated parts: {layer} is the number itself,
    {layer:dense} its position among the numbers of the set. A placeholder of the row that the template lacks is stacked
    over: the tensors lie one after another along a new first axis.

    The steps, in the order in which they are taken towards the file:

    rope: the row order, given exactly for rows that rotate (``Row.heads``).
    transposed: the last two axes are swapped.
    shape: the shape that the part then has here, where it is another one; the same elements in row-major order.
    tp: the axis that is cut over tensor-parallel ranks: an axis, a symbol of the config that holds one, or None for a
        tensor that every rank holds whole. copies: the symbol that counts what cannot be cut (key/value heads): over
        more ranks than that, neighbouring ones hold the same part.
    fused: the axis along which all rows of the same template lie one after another, in the order of the table, or of
        ``place`` where a column has another one.
    flat: the axis that was stacked over is one with the axis after it: [experts * rows, columns].
    cells: the name of a set that says where each cell (what there is at one index of the row's first axis) lies in this
        column, which has places of that size: its numbers are place * cells + cell. A cell may lie in several places,
        of which the last is read; places without a cell are zeros, and so are cells without a place when they are read.
        Comes before the shape.

    ``omitted_if_tied``: no such key where the weights are tied. ``literal``: the template is the key itself, whatever
    braces are in it.
    """

    template: str
    rope: RopeOrder | None = None
    tp: int | str | None = None
    omitted_if_tied: bool = False
    transposed: bool = False
    shape: tuple[str, ...] | None = None
    copies: str | None = None
    fused: int | None = None
    flat: bool = False
    cells: str | None = None
    literal: bool = False
    place: int = 0

    def replace(self, **changes: Any) -> Key:
        """A key that differs from this one."""
        return dataclasses.replace(self, **changes)

    @cached_property
    def placeholders(self) -> frozenset[str]:
        return frozenset(number.name for number in self._numbers)

    @cached_property
    def _numbers(self) -> tuple[_Number, ...]:
        if self.literal:
            return ()
        return tuple(_number(part) for part in self.template.split(".") if _is_placeholder(part))

    @cached_property
    def _pattern(self) -> str:
        parts = self.template.split(".")
        return ".".join("%d" if _is_placeholder(part) else part.replace("%", "%%") for part in parts)

    def key(self, index: Mapping[str, int], sets: Sets) -> str:
        """The key at these numbers."""
        if self.literal or not self._numbers:
            return self.template
        return self._pattern % tuple(
            index[name] if members is None else bisect_left(sets[members], index[name])
            for name, members in self._numbers
        )

    def cut_axis(self, dims: Mapping[str, int]) -> int | None:
        """The axis of a part that is cut over ranks, for this config."""
        return dims[self.tp] if isinstance(self.tp, str) else self.tp

    def repeats(self, dims: Mapping[str, int], ranks: int) -> int:
        """How many ranks in succession hold the same part."""
        count = dims[self.copies] if self.copies is not None else ranks
        return ranks // count if ranks > count and ranks % count == 0 else 1

    def to_stored(self, tensor: LazyTensor, row: Row, dims: Mapping[str, int]) -> LazyTensor:
        """The logical tensor as this column orders it, before it is cut over ranks and put together with others."""
        if row.heads is not None:
            tensor = self.rows_to_stored(tensor, dims[row.heads])
        if self.transposed:
            tensor = _swapped(tensor)
        if self.shape is None:
            return tensor
        shape = self.part_shape(row, dims)
        if self.cells is not None:
            tensor = _spread(tensor, _set(dims, self.cells), prod(shape))
        return tensor.reshape(shape)

    def to_logical(self, tensor: LazyTensor, row: Row, dims: Mapping[str, int]) -> LazyTensor:
        """The inverse of ``to_stored``."""
        if self.cells is not None:
            tensor = _gathered(tensor, _set(dims, self.cells), row.sizes(dims))
        elif self.shape is not None:
            sizes = row.sizes(dims)
            tensor = tensor.reshape((*sizes[:-2], *sizes[:-3:-1]) if self.transposed else sizes)
        if self.transposed:
            tensor = _swapped(tensor)
        return tensor if row.heads is None else self.rows_to_logical(tensor, dims[row.heads])

    def rows_to_stored(self, tensor: LazyTensor, heads: int) -> LazyTensor:
        """The rows of so many heads in this column's order, whatever their length: also of a LoRA B, or a bias."""
        return _interleave(tensor, heads) if self.rope == "interleaved" else tensor

    def rows_to_logical(self, tensor: LazyTensor, heads: int) -> LazyTensor:
        """The inverse of ``rows_to_stored``."""
        return _deinterleave(tensor, heads) if self.rope == "interleaved" else tensor

    def part_shape(self, row: Row, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of what ``to_stored`` returns."""
        if self.shape is not None:
            return tuple(evaluate(expression, dims) for expression in self.shape)
        sizes = row.sizes(dims)
        return (*sizes[:-2], sizes[-1], sizes[-2]) if self.transposed else sizes


@dataclass(frozen=True)
class Row:
    """One logical parameter and where each format keeps it (None: the format has no place for it).

    ``shape`` are expressions over the config's symbols, such as "n_heads*head_dim"; ``heads`` the symbol that counts
    the heads of a row that rotates; ``tied_to`` names the row that this one may share its values with. ``when`` is a
    symbol that switches the row on, ``only`` the set of numbers (of the row's first placeholder) that have the row.
    ``optional`` marks what a checkpoint may lack: never required, and carried along where the target has no place for
    it. Optional rows of one group, which is a name in place of True, are there together or not at all, for each number
    of their first placeholder. ``derived`` is optional too: what the config determines (RoPE tables), which is no
    weight to be cast. ``each`` names a placeholder that the row has although every column stacks over it.
    """

    name: str
    shape: tuple[str, ...]
    hf: Key | None = None
    meta: Key | None = None
    native: Key | None = None
    torchtitan: Key | None = None
    in_memory: Key | None = None
    heads: str | None = None
    tied_to: str | None = None
    when: str | None = None
    only: str | None = None
    optional: bool | str = False
    derived: bool = False
    each: str | None = None

    def replace(self, **changes: Any) -> Row:
        """A row that differs from this one."""
        return dataclasses.replace(self, **changes)

    @property
    def required(self) -> bool:
        """Whether a format that has a place for the row cannot be without it."""
        return not (self.optional or self.derived)

    @cached_property
    def lossy(self) -> Key | None:
        """The column that does not hold all of the row, nor the others all of what it holds: one with cells."""
        return next((key for key in self.columns.values() if key.cells is not None), None)

    def held(self, tensor: LazyTensor, dims: Mapping[str, int]) -> LazyTensor:
        """What every column holds of a logical tensor, zeros in place of the rest."""
        return self.lossy.to_logical(self.lossy.to_stored(tensor, self, dims), self, dims) if self.lossy else tensor

    @property
    def group(self) -> str | None:
        """The optional rows that this one is there with, or absent."""
        return self.optional if isinstance(self.optional, str) else None

    def column(self, format: str) -> Key | None:
        if format == IN_MEMORY:
            return self.in_memory or self.hf
        if format not in FORMATS:
            raise ValueError(f"no format {format!r}")
        key: Key | None = getattr(self, format)
        return key

    @property
    def columns(self) -> dict[str, Key]:
        return {format: key for format in FORMATS if (key := self.column(format)) is not None}

    @cached_property
    def placeholders(self) -> frozenset[str]:
        each = frozenset() if self.each is None else frozenset({self.each})
        return each.union(*(key.placeholders for key in self.columns.values()))

    def sizes(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The logical shape for this config."""
        return tuple(evaluate(expression, dims) for expression in self.shape)


@dataclass(frozen=True, slots=True)
class Instance:
    """A row at given indices: ("attention.q", (("layer", 3),))."""

    row: Row
    index: tuple[tuple[str, int], ...]
    sets: Sets = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return ".".join([self.row.name, *(str(value) for _, value in self.index)])

    def key(self, format: str) -> str | None:
        """The key that this instance lies under in a format, or None if the format has no place for it."""
        column = self.row.column(format)
        return column.key(dict(self.index), self.sets) if column else None

    def heads(self, dims: Mapping[str, int]) -> int | None:
        return dims[self.row.heads] if self.row.heads else None

    def __hash__(self) -> int:
        return hash((self.row.name, self.index))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Instance) and (self.row.name, self.index) == (other.row.name, other.index)


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a format and what lies under it: ``rows`` has, for each fused row, the instances stacked over."""

    key: str
    rows: tuple[tuple[Instance, ...], ...]
    stacked: tuple[int, ...] = ()

    @property
    def first(self) -> Instance:
        return self.rows[0][0]

    @property
    def instances(self) -> tuple[Instance, ...]:
        return tuple(instance for row in self.rows for instance in row)

    @property
    def whole(self) -> bool:
        """Whether the key holds one instance and nothing else."""
        return len(self.rows) == 1 and not self.stacked

    def column(self, format: str) -> Key:
        column = self.first.row.column(format)
        if column is None:
            raise ValueError(f"{self.key} is no key of {format}")
        return column

    def shape(self, format: str, dims: Mapping[str, int], ranks: int = 1) -> tuple[int, ...] | None:
        """The shape of one rank's tensor, None where the sizes do not divide over the ranks."""
        parts = self._parts(format, dims, ranks)
        if parts is None:
            return None
        shape = parts[0]
        fused = self.column(format).fused
        if fused is not None:
            shape = (*shape[:fused], sum(part[fused] for part in parts), *shape[fused + 1 :])
        shape = (*self.stacked, *shape)
        return (shape[0] * shape[1], *shape[2:]) if self.column(format).flat else shape

    def _parts(self, format: str, dims: Mapping[str, int], ranks: int) -> list[tuple[int, ...]] | None:
        out = []
        for row in self.rows:
            column = row[0].row.column(format)
            shape = column.part_shape(row[0].row, dims) if column else ()
            axis = column.cut_axis(dims) if column else None
            if column is not None and axis is not None and ranks > 1:
                share = ranks // column.repeats(dims, ranks)
                if shape[axis] % share:
                    return None
                shape = (*shape[:axis], shape[axis] // share, *shape[axis + 1 :])
            out.append(shape)
        return out

    def cut_axis(self, format: str, dims: Mapping[str, int]) -> int | None:
        """The axis of the stored tensor along which ranks lie one after another, as far as they do."""
        axis = self.column(format).cut_axis(dims)
        if axis is None:
            return None
        return axis + len(self.stacked) - (1 if self.column(format).flat else 0)

    def join(self, format: str, parts: Mapping[Instance, LazyTensor]) -> LazyTensor:
        """The tensor that is stored under the key (of one rank), of the parts as the column orders them."""
        if self.whole:
            return parts[self.first]
        column = self.column(format)
        fused = [
            concat([parts[row[at]] for row in self.rows], column.fused or 0) if len(self.rows) > 1 else parts[one]
            for at, one in enumerate(self.rows[0])
        ]
        if not self.stacked:
            return fused[0]
        tensor = stack(fused, self.stacked)
        return tensor.reshape((tensor.shape[0] * tensor.shape[1], *tensor.shape[2:])) if column.flat else tensor

    def split(
        self, format: str, tensor: LazyTensor, dims: Mapping[str, int], ranks: int = 1
    ) -> dict[Instance, LazyTensor]:
        """The inverse of ``join``, for a tensor of the right shape."""
        if self.whole:
            return {self.first: tensor}
        column, parts = self.column(format), self._parts(format, dims, ranks) or []
        count = prod(self.stacked)
        if self.stacked:
            inner = (tensor.shape[0] // count, *tensor.shape[1:]) if column.flat else tensor.shape[len(self.stacked) :]
            tensor = tensor.reshape((count, *inner))
        out = {}
        for at in range(count):
            one = tensor.one(at) if self.stacked else tensor
            start, axis = 0, column.fused or 0
            for row, shape in zip(self.rows, parts, strict=True):
                out[row[at]] = one.narrow(axis, start, shape[axis]) if len(self.rows) > 1 else one
                start += shape[axis] if shape else 0
        return out


@dataclass(frozen=True)
class Params:
    """What Meta's side of a family needs beyond the table: its params.json, its file names, its ranks.

    ``evidence`` says in words why a params.json is this family's, or None. ``sharded`` is whether the format is cut
    over ranks at all; ``container`` the usual one; ``options`` are those of ConfigOptions that it has a use for.
    ``embedding_cut`` comes from the known releases (0 for any other shape), ``release`` is the name of the one with
    this shape, ``model_parallel`` the number of ranks that it came in. ``for_ranks`` gives what a params.json has
    to say for so many ranks.
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
    for_ranks: Callable[[Mapping[str, Any], Mapping[str, int], int], Mapping[str, Any]] = lambda params, dims, ranks: (
        params
    )


@dataclass(frozen=True)
class Family:
    """An architecture: its table, the symbols that its config gives, and the translation of its config.

    ``indices`` says how far each placeholder counts: {"layer": "n_layers"}. ``sets`` gives the sets of numbers that
    rows and templates name, from the config. The table is checked when it is made. ``architectures`` are the classes of
    which a config has to name one to be of this family, where others have the same model_type.

    ``from_shapes`` gives the config that the shapes of the stored tensors show, of a family whose files come without
    one; such a config is no file of any format. ``stem`` is what its safetensors files are called in Hugging Face's
    layout where nothing else says it. Several families may have one model_type: the keys tell them apart.

    ``unverified`` names the formats whose column nothing outside could be compared with, and says why. ``literal``
    marks a table of literal keys, one row for each tensor of one checkpoint: its rows are different by themselves.

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
    literal: bool = False

    def __post_init__(self) -> None:
        if not self.literal:
            object.__setattr__(self, "rows", _with_frequencies(self.rows))
            check(self)

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
        return Dims(self.dims(config), self.sets(config) if self.sets is not None else None)

    @cached_property
    def formats(self) -> tuple[str, ...]:
        """The formats that the table has a column for."""
        if self.literal:
            return ("hf",)
        return tuple(f for f in FORMATS if any(row.column(f) for row in self.rows if row.required))

    def instances(self, dims: Mapping[str, int]) -> Iterator[Instance]:
        """Every row at every index that this config has, in the order of the model's layers."""
        for run in self._runs(dims):
            yield from run

    def _runs(self, dims: Mapping[str, int]) -> Iterator[list[Instance]]:
        """``instances``, those of a row that differ in nothing but what counts fastest together (a layer's experts)."""
        if self.literal:
            yield from ([Instance(row, ())] for row in self.rows)
            return
        sets: Sets = dims.sets if isinstance(dims, Dims) else {}
        for outer, group in groupby(self.rows, key=self._outer):
            rows = [row for row in group if not row.when or dims[row.when]]
            if outer is None:
                yield from ([Instance(row, ())] for row in rows)
                continue
            inner = {row.name: self._inner(row, dims) for row in rows}
            members = {row.only: frozenset(sets[row.only]) for row in rows if row.only is not None}
            for number in range(dims[self.indices[outer]]):
                for row in rows:
                    if row.only is None or number in members[row.only]:
                        yield [Instance(row, ((outer, number), *rest), sets) for rest in inner[row.name]]

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
            columns = ((row, row.column(format)) for row in self.rows)
            yield from (Entry(key.template, ((Instance(row, ()),),)) for row, key in columns if key is not None)
            return
        groups: dict[str, dict[str, list[Instance]]] = {}
        for run in self._runs(dims):
            row = run[0].row if run else None
            column = row.column(format) if row is not None else None
            if row is None or column is None:
                continue
            # A key that says nothing but the number of the layer is the same for all of them.
            together = [run] if len(column.placeholders) < 2 else [[instance] for instance in run]
            for instances in together:
                key = column.key(dict(instances[0].index), instances[0].sets)
                groups.setdefault(key, {}).setdefault(row.name, []).extend(instances)
        for key, rows in groups.items():
            ordered = list(rows.values())
            if len(ordered) > 1:
                ordered.sort(key=lambda row: _place(row[0].row, format))
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
            return any(column.template == key for row in self.rows if (column := row.column(format)))
        parts = key.split(".")
        return any(
            len(template) == len(parts) and all(_matches(t, p) for t, p in zip(template, parts, strict=True))
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
            out.append(Row(name, (f"{row.shape[0]}/{row.heads}/2",), hf=Key(template), derived=True))
    return tuple(out)


def evaluate(expression: str, dims: Mapping[str, int]) -> int:
    """A product of symbols and numbers, with whole division: "n_heads*head_dim", "head_dim/2"."""
    factors, divisors = _parsed(expression)
    value = 1
    for factor in factors:
        value *= factor if isinstance(factor, int) else dims[factor]
    for divisor in divisors:
        value //= divisor if isinstance(divisor, int) else dims[divisor]
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
        if not row.placeholders <= set(family.indices):
            raise ValueError(f"{where} has a placeholder that counts nothing: {set(row.placeholders)}")
        if row.only is not None and not row.placeholders:
            raise ValueError(f"{where} has no placeholder whose numbers {row.only!r} could limit")
        ordered = [name for name in family.indices if name in row.placeholders]
        for format, key in {**row.columns, **({IN_MEMORY: row.in_memory} if row.in_memory else {})}.items():
            _check_key(row, key, f"{where}, column {format}")
            if [name for name in ordered if name in key.placeholders] != ordered[: len(key.placeholders)]:
                raise ValueError(f"{where}, column {format}: only the last of {ordered} can be stacked over")
            if ordered and not key.placeholders:
                raise ValueError(f"{where}, column {format}: has one tensor for every {ordered[0]}")
    for format in (*FORMATS, IN_MEMORY):
        _check_keys(family, format)


def _check_key(row: Row, key: Key, where: str) -> None:
    rank = len(key.shape or row.shape)
    if (key.rope is None) != (row.heads is None):
        raise ValueError(f"{where}: a row with heads needs a rope order in every column")
    if key.omitted_if_tied and row.tied_to is None:
        raise ValueError(f"{where}: is tied to nothing")
    if isinstance(key.tp, int) and key.tp >= rank:
        raise ValueError(f"{where}: has no axis {key.tp} to cut")
    if key.fused is not None and key.fused >= rank:
        raise ValueError(f"{where}: has no axis {key.fused} to be fused along")
    if key.transposed and len(row.shape) < 2:
        raise ValueError(f"{where}: has no two axes to transpose")
    if key.flat and not row.placeholders - key.placeholders:
        raise ValueError(f"{where}: is not stacked over anything, so it cannot be flat")
    if key.place and key.fused is None:
        raise ValueError(f"{where}: is not fused with anything, so it has no place there")
    if key.cells is not None and (key.shape is None or key.tp is not None or key.transposed):
        raise ValueError(f"{where}: cells need a shape, and are neither cut over ranks nor transposed")
    if key.copies is not None and key.tp is None:
        raise ValueError(f"{where}: is not cut over ranks, so there are no copies of its parts")


def _check_keys(family: Family, format: str) -> None:
    alike: dict[tuple[str, ...], list[tuple[Row, Key]]] = {}
    for row in family.rows:
        if column := row.column(format):
            alike.setdefault(_form(column.template), []).append((row, column))
    for rows in alike.values():
        for (row, column), (other, clash) in combinations(rows, 2):
            if not _overlap(column.template, clash.template):
                continue
            where = (
                f"{family.name}: rows {row.name!r} and {other.name!r} could have the same {format} key: "
                f"{column.template}, {clash.template}"
            )
            if row.only is not None and other.only is not None and row.only != other.only:
                continue  # of other layers; two sets that overlap are found with the config
            if column.template != clash.template or column.fused is None or column.fused != clash.fused:
                raise ValueError(where)
            if row.placeholders != other.placeholders or column.flat != clash.flat or row.when != other.when:
                raise ValueError(f"{where}; fused rows have to be alike")


def _interleave(tensor: LazyTensor, heads: int) -> LazyTensor:
    head_dim = tensor.shape[0] // heads
    return tensor.reorder(0, (heads, 2, head_dim // 2), (0, 2, 1))


def _deinterleave(tensor: LazyTensor, heads: int) -> LazyTensor:
    head_dim = tensor.shape[0] // heads
    return tensor.reorder(0, (heads, head_dim // 2, 2), (0, 2, 1))


def _spread(tensor: LazyTensor, numbers: tuple[int, ...], size: int) -> LazyTensor:
    """The cells of the first axis at their places, of which there are as many as ``size`` elements make."""
    cells, *cell = tensor.shape
    at = dict(divmod(number, cells) for number in numbers)
    empty = zeros((1, *cell))
    return concat([tensor.narrow(0, at[p], 1) if p in at else empty for p in range(size // prod(cell))], 0)


def _gathered(tensor: LazyTensor, numbers: tuple[int, ...], sizes: tuple[int, ...]) -> LazyTensor:
    """The inverse of ``_spread``, as far as there is one."""
    cells, *cell = sizes
    places = tensor.reshape((tensor.size // prod(cell), *cell))
    at = {number % cells: number // cells for number in numbers}
    empty = zeros((1, *cell))
    return concat([places.narrow(0, at[c], 1) if c in at else empty for c in range(cells)], 0)


def _set(dims: Mapping[str, int], name: str) -> tuple[int, ...]:
    return dims.sets[name] if isinstance(dims, Dims) else ()


def _swapped(tensor: LazyTensor) -> LazyTensor:
    last = len(tensor.shape) - 1
    return tensor.permute((*range(last - 1), last, last - 1))


def _place(row: Row, format: str) -> int:
    column = row.column(format)
    return column.place if column is not None else 0


def _number(part: str) -> _Number:
    name, _, members = part[1:-1].partition(":")
    return _Number(name, members or None)


@lru_cache(maxsize=1 << 12)
def _parsed(expression: str) -> tuple[tuple[str | int, ...], tuple[str | int, ...]]:
    """The factors of an expression, and what their product is divided by: symbols and numbers."""
    numerator, *divisors = expression.split("/")
    return tuple(map(_term, numerator.split("*"))), tuple(map(_term, divisors))


def _term(term: str) -> str | int:
    return int(term) if term.isdecimal() else term


def _is_placeholder(part: str) -> bool:
    return part.startswith("{") and part.endswith("}")


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdecimal() and (part == "0" or part[0] != "0")


def _matches(template: str, part: str) -> bool:
    return _is_index(part) if _is_placeholder(template) else template == part


def _form(template: str) -> tuple[str, ...]:
    """The parts of a template but for numbers and what stands for them: no key fits templates of two forms."""
    return tuple("" if _is_placeholder(part) or _is_index(part) else part for part in template.split("."))


def _overlap(left: str, right: str) -> bool:
    lefts, rights = left.split("."), right.split(".")
    return len(lefts) == len(rights) and all(
        (_is_placeholder(a) and _is_placeholder(b)) or _matches(a, b) or _matches(b, a)
        for a, b in zip(lefts, rights, strict=True)
    )
