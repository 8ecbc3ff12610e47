"""A plan in words: the steps of each tensor from the source's column of the table to the target's.

Execution does not use these steps: lazy tensors compose strides and offsets, in which a step and its inverse cancel.
Both are derived from the same table, and tests compare them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ckpt_convert import dtypes
from ckpt_convert.checkpoint.mapping import LogicalTensor
from ckpt_convert.convert.plan import Plan, target_dtype
from ckpt_convert.models.core.table import Instance, Key, Row

COPY = "copy"
"""The only step of a tensor whose elements stay as they are."""


class TensorTransform(NamedTuple):
    """The transformation of one logical tensor from the key ``source`` to ``target`` (None: no key of its own there).

    ``shape`` has all ranks joined; tensors that are stacked on both sides are one, with their number as first axis.
    ``nbytes`` are the bytes written, with the replicas on all ranks; ``steps`` are in order, and never empty.
    """

    source: str
    target: str | None
    shape: tuple[int, ...]
    dtype: str
    target_dtype: str
    nbytes: int
    steps: tuple[str, ...]


class _Ranks(NamedTuple):
    before: int
    after: int


def explain_plan(plan: Plan) -> Iterator[TensorTransform]:
    """The transformation of every tensor that the plan reads or writes, in the order of the table."""
    columns = (instance.row.column(plan.target) for instance in plan.logicals.tensors)
    if all(column is not None and column.is_literal_key for column in columns):  # nothing is stacked
        yield from _each(plan)
        return
    counts: dict[TensorTransform | str, int] = {}
    firsts = []
    for move in _each(plan):
        alike = move if move.target is not None else move.source
        counts[alike] = count = counts.get(alike, 0) + 1
        if count == 1:
            firsts.append((alike, move))
    for alike, move in firsts:
        count = counts[alike]
        yield move._replace(shape=(count, *move.shape), nbytes=move.nbytes * count) if count > 1 else move


def _each(plan: Plan) -> Iterator[TensorTransform]:
    ranks = _Ranks(plan.source.ranks, max(file.rank for file in plan.weights) + 1)
    scattered = {
        tensor.key for file in plan.weights for tensor in file.tensors if tensor.tensor.contiguous_source is None
    }
    written = {tensor.key for file in plan.weights for tensor in file.layout.header.tensors}
    known: dict[tuple[object, ...], tuple[str, ...]] = {}  # the same for all layers and experts
    for instance, logical in plan.logicals.tensors.items():
        shape, dtype = logical.tensor.shape, logical.dtype
        column, key = instance.row.column(plan.target), instance.key(plan.target)
        if column is None and instance.row.tied_to and plan.dims["tied"]:
            if instance not in plan.logicals.omitted_ties:
                yield TensorTransform(logical.key, None, shape, dtype, dtype, 0, ("tied: stored once",))
        elif column is None:
            how = "kept in the record" if instance.row.zeros is None else "kept in the record, refused if not zero"
            yield TensorTransform(logical.key, None, shape, dtype, dtype, dtypes.nbytes(dtype, shape), (how,))
        elif key in written:
            cast = target_dtype(dtype, instance, plan.request)
            computed = _computed(plan, logical)
            alike = instance.row.name, dtype, computed, instance in plan.logicals.omitted_ties
            if alike not in known:
                known[alike] = tuple(_steps(plan, instance, logical, column, cast, ranks))
            found = known[alike]
            if not found and key in scattered and logical.tensor.size:
                found = ("laid out row by row",)  # the source stores it transposed
            copies = ranks.after if column.tp_axis(plan.dims) is None else 1
            yield TensorTransform(
                logical.key, key, shape, dtype, cast, dtypes.nbytes(cast, shape) * copies, found or (COPY,)
            )
        elif instance not in plan.logicals.omitted_ties:
            yield TensorTransform(logical.key, None, shape, dtype, dtype, 0, ("tied: stored once",))


def _computed(plan: Plan, logical: LogicalTensor) -> tuple[str, ...]:
    """How a tensor that no file holds as it is comes about."""
    changed = sorted({plan.changed[number] for number in logical.tensor.sources if number in plan.changed})
    return tuple(changed) or ((f"dequantize to {logical.dtype}",) if plan.is_computed(logical.tensor) else ())


def _steps(
    plan: Plan, instance: Instance, logical: LogicalTensor, column: Key, dtype: str, ranks: _Ranks
) -> Iterator[str]:
    yield from _computed(plan, logical)
    source = instance.row.column(str(plan.source.format))
    if instance in plan.logicals.omitted_ties:
        yield "tied: written as well"
    elif plan.undecided_tie is not None and instance.row.tied_to:
        yield "tied if equal"
    if not logical.tensor.sources:
        yield "zeros, as the source has none"
    elif source is None:
        yield "restored from the record" if plan.request.like is None else "as `like=` has it"
    read = source.tp_axis(plan.source.dims) if source is not None else None
    write = column.tp_axis(plan.dims)
    before = ranks.before if source is not None else 1
    recut = before > 1 and ranks.after > 1 and read == write
    if before > 1 and not recut:
        yield f"join {before} ranks on axis {read}" if read is not None else f"one of {before} copies"
    if source is not None and source is not column:
        yield from _taken_apart(instance.row, source, column)
        if source.rope != column.rope and instance.row.heads:
            turned = instance.row.rotation(plan.dims)
            part = f", the first {turned[1]} rows of a head" if turned is not None and turned[1] is not None else ""
            yield f"rope {source.rope}→{column.rope}{part}"
    if dtype != logical.dtype:
        yield f"cast {logical.dtype}→{dtype}"
    if source is not column:
        yield from _put_together(source, column)
    if ranks.after == 1 or (recut and before == ranks.after):
        return
    if write is None:
        yield f"replicated on {ranks.after} ranks"
    else:
        how = f"{before}→{ranks.after} ranks" if recut else f"split over {ranks.after} ranks"
        yield f"{how} on axis {write}"


def _taken_apart(row: Row, source: Key, column: Key) -> Iterator[str]:
    """Steps that take a tensor out of a fused or stacked one, transpose or reshape it."""
    if source.fused is not None and column.fused is None:
        yield "split off"
    if source.placeholders < column.placeholders:
        yield "unstack"
    if source.transposed != column.transposed:
        yield "transpose"
    if (source.shape or row.shape, source.scatter_index) != (column.shape or row.shape, column.scatter_index):
        yield "reshape"


def _put_together(source: Key | None, column: Key) -> Iterator[str]:
    """Steps that fuse or stack tensors for the target."""
    if column.fused is not None and (source is None or source.fused is None):
        yield "fuse"
    if source is not None and column.placeholders < source.placeholders:
        yield "stack"
