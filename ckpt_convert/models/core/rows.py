"""Rows and keys, which tables are made of: a row is one logical parameter, a key is how one format stores it.

``Key`` lists the steps from the logical to the stored tensor. ``Dims`` are the symbols that shapes are written in.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, lru_cache
from math import prod
from typing import Any, NamedTuple

from ckpt_convert.models.core.rope import RopeOrder, reordered
from ckpt_convert.tensors.lazy import LazyTensor, concat, zeros
from ckpt_convert.values import frozen

FORMATS = ("hf", "meta", "native", "torchtitan")
_FORMATS = frozenset(FORMATS)

IN_MEMORY = "transformers"
"""The column of transformers' models in memory: that of hf, except for rows with ``in_memory``. It is no format of
files: transformers stacks experts when it loads them, and splits them again when it saves them."""

Sets = Mapping[str, tuple[int, ...]]
"""Named sets of a placeholder's indices: the dense layers, those with experts."""


EMBEDDING_AXIS = "embedding_cut"
"""The symbol for the axis on which ranks split the embedding, which differs between Meta's generations: files and
releases give it, no config does."""


class Dims(dict[str, int]):
    """The dimensions of a config: sizes, switches (0 or 1), and ``sets`` of indices, ascending."""

    def __init__(self, sizes: Mapping[str, int], sets: Mapping[str, Collection[int]] | None = None) -> None:
        super().__init__(sizes)
        self.sets: Sets = {name: tuple(sorted(members)) for name, members in (sets or {}).items()}

    def replace(self, **sizes: int) -> Dims:
        """A copy with some sizes changed."""
        return Dims({**self, **sizes}, self.sets)

    def with_embedding_axis(self, axis: int) -> Dims:
        """A copy with the embedding split on this axis."""
        return Dims({**self, EMBEDDING_AXIS: axis}, self.sets)

    @property
    def embedding_axis(self) -> int:
        """The axis on which ranks split the embedding."""
        return self[EMBEDDING_AXIS]

    @property
    def decided_by_weights(self) -> dict[str, int]:
        """The symbols that weights, files and releases decide, in which two checkpoints of one model may differ."""
        return {name: self[name] for name in ("tied", EMBEDDING_AXIS)}


def recorded_embedding_axis(dims: Mapping[str, Any]) -> int | None:
    """The axis on which ranks split the embedding, from the sizes in a record; None where it has none."""
    axis = dims.get(EMBEDDING_AXIS)
    return int(axis) if axis in (0, 1) else None


class _Number(NamedTuple):
    """A placeholder: {layer}, or {layer:dense} for the position among the set's members."""

    name: str
    set: str | None


@frozen()
class Key:
    """How one format stores a row.

    ``template`` is the key, with named placeholders for whole dot-separated parts: {layer} is the layer's index,
    {layer:dense} its position among the layers of the set. A row is stacked over a placeholder that its template lacks:
    its tensors are one tensor with a new first axis.

    The steps from the logical tensor to the stored one, in the order in which they are applied:

    rope: the RoPE layout, given exactly for rows that rotate (``Row.heads``).
    transposed: the last two axes are swapped.
    shape: the shape that the tensor then has, where it is another one: the same elements, in row-major order.
    tp_dim: the axis that is split across tensor-parallel ranks: a number, a symbol of the config that holds one, or
        None for a tensor that every rank holds whole. replicated_heads: the symbol that counts what cannot be split
        further (key/value heads): with more ranks than that, neighboring ranks hold replicas of one slice.
    fused: the axis along which all rows of one template are concatenated, in the order of the table, or of
        ``fused_position`` where a format has another order.
    flatten_stacked: the stacked axis is merged with the axis after it: [experts * rows, columns].
    scatter_index: the name of a set that says where this format keeps each index of the row's first axis, of n. The
        stored tensor has places of the same size: index i is at every place p for which the set has p * n + i. Where an
        index has several places, the last one is read; places without an index are zeros, and so is an index without a
        place when it is read. Applied before the shape.

    ``omitted_if_tied``: the format has no such key where the weights are tied. ``is_literal_key``: the template is the
    key itself, whatever braces it has; it is also the name of the row's only placeholder.
    """

    template: str
    rope: RopeOrder | None = None
    tp_dim: int | str | None = None
    omitted_if_tied: bool = False
    transposed: bool = False
    shape: tuple[str, ...] | None = None
    replicated_heads: str | None = None
    fused: int | None = None
    flatten_stacked: bool = False
    scatter_index: str | None = None
    is_literal_key: bool = False
    fused_position: int = 0

    def replace(self, **changes: Any) -> Key:
        """A key that differs from this one."""
        return dataclasses.replace(self, **changes)

    def renamed(self, before: str, after: str) -> Key:
        """The key with a part of its template replaced; raises ValueError for a template without that part."""
        if before not in self.template:
            raise ValueError(f"{self.template} has no {before!r} to be replaced")
        return self.replace(template=self.template.replace(before, after))

    def unprefixed(self, prefix: str) -> Key:
        """The key without the beginning of its template; raises ValueError for a template that begins otherwise."""
        if not self.template.startswith(prefix):
            raise ValueError(f"{self.template} does not begin with {prefix!r}")
        return self.replace(template=self.template.removeprefix(prefix))

    def prefixed(self, prefix: str) -> Key:
        """The key with a prefix before its template."""
        return self.replace(template=prefix + self.template)

    def suffixed(self, suffix: str) -> Key:
        """The key with a suffix after its template."""
        return self.replace(template=self.template + suffix)

    @cached_property
    def placeholders(self) -> frozenset[str]:
        return frozenset(number.name for number in self._numbers)

    @cached_property
    def sets(self) -> frozenset[str]:
        """The sets that the key names."""
        named = {number.set for number in self._numbers} | {self.scatter_index}
        return frozenset(name for name in named if name is not None)

    @cached_property
    def _numbers(self) -> tuple[_Number, ...]:
        if self.is_literal_key:
            return ()
        return tuple(_number(part) for part in self.template.split(".") if is_placeholder(part))

    @cached_property
    def _pattern(self) -> str:
        parts = self.template.split(".")
        return ".".join("%d" if is_placeholder(part) else part.replace("%", "%%") for part in parts)

    def key(self, index: Mapping[str, int], sets: Sets) -> str:
        """The key at these indices."""
        if self.is_literal_key:
            return next(iter(index))
        if not self._numbers:
            return self.template
        return self._pattern % tuple(
            [
                index[name] if members is None else bisect_left(sets[members], index[name])
                for name, members in self._numbers
            ]
        )

    def at(self, index: Sequence[tuple[str, int]], sets: Sets) -> str:
        """``key`` of an instance's index."""
        if self.is_literal_key:
            return index[0][0]
        return self.key(dict(index), sets)

    def tp_axis(self, dims: Mapping[str, int]) -> int | None:
        """The axis that is split across ranks, for this config."""
        return dims[self.tp_dim] if isinstance(self.tp_dim, str) else self.tp_dim

    def replicas(self, dims: Mapping[str, int], ranks: int) -> int:
        """How many consecutive ranks hold replicas of one slice."""
        count = dims[self.replicated_heads] if self.replicated_heads is not None else ranks
        return ranks // count if ranks > count and ranks % count == 0 else 1

    def to_stored(self, tensor: LazyTensor, row: Row, dims: Mapping[str, int]) -> LazyTensor:
        """The logical tensor in this column's layout, before it is split across ranks, fused and stacked."""
        if (turned := row.rotation(dims)) is not None:
            tensor = self.rows_to_stored(tensor, *turned)
        if self.transposed:
            tensor = _swapped(tensor)
        if self.shape is None:
            return tensor
        shape = self.stored_shape(row, dims)
        if self.scatter_index is not None:
            tensor = _scattered(tensor, _set(dims, self.scatter_index), prod(shape))
        return tensor.reshape(shape)

    def to_logical(self, tensor: LazyTensor, row: Row, dims: Mapping[str, int]) -> LazyTensor:
        """The inverse of ``to_stored``."""
        if self.scatter_index is not None:
            tensor = _gathered(tensor, _set(dims, self.scatter_index), row.sizes(dims))
        elif self.shape is not None:
            sizes = row.sizes(dims)
            tensor = tensor.reshape((*sizes[:-2], *sizes[:-3:-1]) if self.transposed else sizes)
        if self.transposed:
            tensor = _swapped(tensor)
        turned = row.rotation(dims)
        return tensor if turned is None else self.rows_to_logical(tensor, *turned)

    def rows_to_stored(self, tensor: LazyTensor, heads: int, rotary: int | None = None) -> LazyTensor:
        """The rows of so many heads in this column's RoPE layout, of any tensor with that first axis: a LoRA B, a bias.

        Only the first ``rotary`` rows of each head rotate; all of them if it is None.
        """
        return reordered(tensor, heads, rotary, inverse=False) if self.rope == "interleaved" else tensor

    def rows_to_logical(self, tensor: LazyTensor, heads: int, rotary: int | None = None) -> LazyTensor:
        """The inverse of ``rows_to_stored``."""
        return reordered(tensor, heads, rotary, inverse=True) if self.rope == "interleaved" else tensor

    def stored_shape(self, row: Row, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of what ``to_stored`` returns."""
        if self.shape is not None:
            return tuple(evaluate(expression, dims) for expression in self.shape)
        sizes = row.sizes(dims)
        return (*sizes[:-2], sizes[-1], sizes[-2]) if self.transposed else sizes


@frozen()
class Row:
    """One logical parameter, and how each format stores it (None: the format does not have it).

    ``shape`` are expressions over the config's symbols, such as "n_heads*head_dim". ``heads`` is the symbol that counts
    the heads of a row that rotates ("1" for a norm over one head, whose values are in the order of the head's rows);
    ``rotary_dim`` the symbol that counts the rows of each head that rotate, where only the first ones do. ``tied_to``
    names the row that this one may share its values with. ``in_memory`` is the key in the module that transformers
    builds, where that is another one than in its files.

    ``enabled_by`` is a symbol, 0 or 1, that switches the row on; ``layer_set`` the set of layers (of the row's first
    placeholder) that have the row. ``optional`` marks what a checkpoint may lack: never required, and passed through
    where the target does not have it. A name in place of True makes a group: its rows are there together or not at all,
    for each index of their first placeholder. ``derived`` is optional too, and no weight to be cast: what the config
    determines (RoPE tables). ``zeros`` is the dtype of a row without which a model computes as with zeros: it is
    written as zeros where the source does not have it, and lost where the target does not, unless it is all zeros.
    ``stacked_over`` names a placeholder that the row has although every format stacks over it.
    """

    name: str
    shape: tuple[str, ...]
    hf: Key | None = None
    meta: Key | None = None
    native: Key | None = None
    torchtitan: Key | None = None
    in_memory: Key | None = None
    heads: str | None = None
    rotary_dim: str | None = None
    tied_to: str | None = None
    enabled_by: str | None = None
    layer_set: str | None = None
    optional: bool | str = False
    derived: bool = False
    zeros: str | None = None
    stacked_over: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple):
            raise TypeError(f"row {self.name!r}: the shape is a tuple of strings, found {self.shape!r}")
        for format in (*FORMATS, "in_memory"):
            if not isinstance(key := getattr(self, format), Key | None):
                raise TypeError(f"row {self.name!r}, column {format}: must be a Key or None, found {key!r}")

    def replace(self, **changes: Any) -> Row:
        """A row that differs from this one."""
        return dataclasses.replace(self, **changes)

    @property
    def required(self) -> bool:
        """Whether every checkpoint of a format that has the row has to have it."""
        return not (self.optional or self.derived or self.zeros)

    @cached_property
    def lossy_column(self) -> Key | None:
        """The column with a scatter index: it does not hold all of the row, nor do the others hold all that it does."""
        return next((key for key in self.columns.values() if key.scatter_index is not None), None)

    def representable(self, tensor: LazyTensor, dims: Mapping[str, int]) -> LazyTensor:
        """The logical tensor with zeros where not every column holds it."""
        return (
            self.lossy_column.to_logical(self.lossy_column.to_stored(tensor, self, dims), self, dims)
            if self.lossy_column
            else tensor
        )

    @property
    def group(self) -> str | None:
        """The group of optional rows that are there together or not at all."""
        return self.optional if isinstance(self.optional, str) else None

    def column(self, format: str) -> Key | None:
        if format in _FORMATS:
            key: Key | None = getattr(self, format)
            return key
        if format == IN_MEMORY:
            return self.in_memory or self.hf
        raise ValueError(f"no format {format!r}")

    @property
    def columns(self) -> dict[str, Key]:
        return {format: key for format in FORMATS if (key := self.column(format)) is not None}

    @cached_property
    def placeholders(self) -> frozenset[str]:
        each = frozenset() if self.stacked_over is None else frozenset({self.stacked_over})
        return each.union(*(key.placeholders for key in self.columns.values()))

    @cached_property
    def symbols(self) -> frozenset[str]:
        """The symbols of the config that the row needs."""
        texts = (*self.shape, self.heads, self.rotary_dim, self.enabled_by)
        terms = (term for text in texts if text is not None for part in _parsed(text) for term in part)
        return frozenset(term for term in terms if isinstance(term, str))

    @cached_property
    def sets(self) -> frozenset[str]:
        """The sets of layers that the row and its keys name."""
        own = frozenset() if self.layer_set is None else frozenset({self.layer_set})
        return own.union(*(key.sets for key in self.columns.values()))

    def rotation(self, dims: Mapping[str, int]) -> tuple[int, int | None] | None:
        """How many heads rotate, and how many rows of each (None: all); None if the row does not rotate."""
        if self.heads is None:
            return None
        return evaluate(self.heads, dims), None if self.rotary_dim is None else evaluate(self.rotary_dim, dims)

    def sizes(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The logical shape for this config."""
        return tuple(evaluate(expression, dims) for expression in self.shape)


def evaluate(expression: str, dims: Mapping[str, int]) -> int:
    """The value of a product of symbols and numbers, with floor division: "n_heads*head_dim", "head_dim/2"."""
    factors, divisors = _parsed(expression)
    value = 1
    for factor in factors:
        value *= factor if isinstance(factor, int) else dims[factor]
    for divisor in divisors:
        value //= divisor if isinstance(divisor, int) else dims[divisor]
    return value


def _scattered(tensor: LazyTensor, numbers: tuple[int, ...], size: int) -> LazyTensor:
    """Scatter the indices of the first axis to their places, as many as ``size`` elements make; zeros elsewhere."""
    cells, *cell = tensor.shape
    at = dict(divmod(number, cells) for number in numbers)
    empty = zeros((1, *cell))
    return concat([tensor.narrow(0, at[p], 1) if p in at else empty for p in range(size // prod(cell))], 0)


def _gathered(tensor: LazyTensor, numbers: tuple[int, ...], sizes: tuple[int, ...]) -> LazyTensor:
    """The inverse of ``_scattered``, as far as there is one."""
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


def _number(part: str) -> _Number:
    name, _, members = part[1:-1].partition(":")
    return _Number(name, members or None)


@lru_cache(maxsize=1 << 12)
def _parsed(expression: str) -> tuple[tuple[str | int, ...], tuple[str | int, ...]]:
    """The factors and the divisors of an expression: symbols and numbers."""
    numerator, *divisors = expression.split("/")
    return tuple(map(_term, numerator.split("*"))), tuple(map(_term, divisors))


def _term(term: str) -> str | int:
    return int(term) if term.isdecimal() else term


def is_placeholder(part: str) -> bool:
    return part.startswith("{") and part.endswith("}")


def is_index(part: str) -> bool:
    return part.isascii() and part.isdecimal() and (part == "0" or part[0] != "0")


def matches(template: str, part: str) -> bool:
    return is_index(part) if is_placeholder(template) else template == part
