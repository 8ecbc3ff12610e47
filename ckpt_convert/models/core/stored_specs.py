"""Rows at given indices, and the instances that one key of a format holds: several where it fuses or stacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from math import prod

from ckpt_convert.models.core.rows import Key, Row, Sets
from ckpt_convert.tensors.lazy import LazyTensor, concat, stack
from ckpt_convert.values import frozen

_NO_SETS: Sets = {}
"""Shared by all instances of tables without sets, of which a checkpoint may have 100,000."""


@frozen(slots=True)
class Instance:
    """A row at given indices: ("attention.q", (("layer", 3),))."""

    row: Row
    index: tuple[tuple[str, int], ...]
    sets: Sets = field(default_factory=lambda: _NO_SETS, repr=False)

    @property
    def name(self) -> str:
        return ".".join([self.row.name, *(str(value) for _, value in self.index)])

    def key(self, format: str) -> str | None:
        """The key that a format stores this instance under, or None if the format does not have it."""
        column = self.row.column(format)
        return column.at(self.index, self.sets) if column else None

    def heads(self, dims: Mapping[str, int]) -> int | None:
        turned = self.row.rotation(dims)
        return turned[0] if turned is not None else None

    def __hash__(self) -> int:
        return hash((self.row.name, self.index))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Instance) and (self.row.name, self.index) == (other.row.name, other.index)


@frozen(slots=True)
class StoredTensorSpec:
    """One key of a format and what it holds: ``rows`` has, for each fused row, the instances that are stacked."""

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
    def is_single(self) -> bool:
        """Whether the key holds one instance and nothing else."""
        return len(self.rows) == 1 and not self.stacked

    def column(self, format: str) -> Key:
        column = self.first.row.column(format)
        if column is None:
            raise ValueError(f"{self.key} is not a key of {format}")
        return column

    def shape(self, format: str, dims: Mapping[str, int], ranks: int = 1) -> tuple[int, ...] | None:
        """The shape of one rank's tensor, None if the sizes are not divisible by the ranks."""
        parts = self._parts(format, dims, ranks)
        if parts is None:
            return None
        shape = parts[0]
        fused = self.column(format).fused
        if fused is not None:
            shape = (*shape[:fused], sum(part[fused] for part in parts), *shape[fused + 1 :])
        shape = (*self.stacked, *shape)
        return (shape[0] * shape[1], *shape[2:]) if self.column(format).flatten_stacked else shape

    def _parts(self, format: str, dims: Mapping[str, int], ranks: int) -> list[tuple[int, ...]] | None:
        out = []
        for row in self.rows:
            column = row[0].row.column(format)
            shape = column.stored_shape(row[0].row, dims) if column else ()
            axis = column.tp_axis(dims) if column else None
            if column is not None and axis is not None and ranks > 1:
                share = ranks // column.replicas(dims, ranks)
                if shape[axis] % share:
                    return None
                shape = (*shape[:axis], shape[axis] // share, *shape[axis + 1 :])
            out.append(shape)
        return out

    def tp_axis(self, format: str, dims: Mapping[str, int]) -> int | None:
        """The axis of the stored tensor that is split across ranks; None if every rank holds it whole."""
        axis = self.column(format).tp_axis(dims)
        if axis is None:
            return None
        return axis + len(self.stacked) - (1 if self.column(format).flatten_stacked else 0)

    def join(self, format: str, parts: Mapping[Instance, LazyTensor]) -> LazyTensor:
        """The stored tensor (of one rank), fused and stacked from its parts in the column's layout."""
        if self.is_single:
            return parts[self.first]
        column = self.column(format)
        fused = [
            concat([parts[row[at]] for row in self.rows], column.fused or 0) if len(self.rows) > 1 else parts[one]
            for at, one in enumerate(self.rows[0])
        ]
        if not self.stacked:
            return fused[0]
        tensor = stack(fused, self.stacked)
        return (
            tensor.reshape((tensor.shape[0] * tensor.shape[1], *tensor.shape[2:])) if column.flatten_stacked else tensor
        )

    def split(
        self, format: str, tensor: LazyTensor, dims: Mapping[str, int], ranks: int = 1
    ) -> dict[Instance, LazyTensor]:
        """The inverse of ``join``, for a tensor of the right shape."""
        if self.is_single:
            return {self.first: tensor}
        column, parts = self.column(format), self._parts(format, dims, ranks) or []
        count = prod(self.stacked)
        if self.stacked:
            inner = (
                (tensor.shape[0] // count, *tensor.shape[1:])
                if column.flatten_stacked
                else tensor.shape[len(self.stacked) :]
            )
            tensor = tensor.reshape((count, *inner))
        out = {}
        for at in range(count):
            one = tensor.select(at) if self.stacked else tensor
            start, axis = 0, column.fused or 0
            for row, shape in zip(self.rows, parts, strict=True):
                out[row[at]] = one.narrow(axis, start, shape[axis]) if len(self.rows) > 1 else one
                start += shape[axis] if shape else 0
        return out


def fused_position(row: Row, format: str) -> int:
    """The position of a row among those that a format fuses with it."""
    column = row.column(format)
    return column.fused_position if column is not None else 0
