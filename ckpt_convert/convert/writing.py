"""Writing logical tensors through a column of a family's table. No bytes are read here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ckpt_convert.checkpoint.mapping import Equality, LogicalTensor, LogicalTensors
from ckpt_convert.convert import ties
from ckpt_convert.errors import ConfigError, KeyMismatchError, option_error
from ckpt_convert.models.core.table import Family, Instance, Key, StoredTensorSpec, evaluate
from ckpt_convert.tensors.lazy import LazyTensor, zeros
from ckpt_convert.wording import first_few

_LISTED = 20


@dataclass(frozen=True, slots=True)
class Original:
    """A tensor from before a lossy conversion, and the pair that must be equal for it to be still valid."""

    tensor: LazyTensor
    unchanged: Equality


@dataclass(frozen=True, slots=True)
class TargetTensor:
    """One tensor to write: under ``key`` into the file or dict of ``rank``.

    ``original`` is written instead if its values are unchanged.
    """

    instance: Instance
    key: str
    rank: int
    dtype: str
    tensor: LazyTensor
    original: Original | None = None


@dataclass
class ColumnTensors:
    """The target's tensors in the order of the table; ``unmapped`` are those that the target has no key for.

    ``tie_checks`` are the pairs that tied weights require to be equal. Rows that the target stores with a loss
    (``Row.lossy_column``) are in both lists.
    """

    targets: list[TargetTensor] = field(default_factory=list)
    unmapped: list[Instance] = field(default_factory=list)
    tie_checks: list[Equality] = field(default_factory=list)


def to_stored(instance: Instance, logical: LogicalTensor, column: Key, dims: Mapping[str, int]) -> LazyTensor:
    """A logical tensor as a column stores it; the source's original where the logical layout is lossy."""
    if column.scatter_index is not None and logical.original is not None:
        return logical.original
    return column.to_stored(logical.tensor, instance.row, dims)


def fill_zeros(
    family: Family,
    format: str,
    dims: Mapping[str, int],
    logicals: LogicalTensors,
    wants_key: Callable[[str], bool] = lambda key: True,
) -> None:
    """Add zeros for rows that a format has and the source lacks (``Row.zeros``), where ``wants_key(key)``."""
    if not any(row.zeros for row in family.rows):
        return
    for instance in family.instances(dims):
        dtype = instance.row.zeros
        key = instance.key(format) if dtype is not None else None
        if dtype is not None and key is not None and instance not in logicals.tensors and wants_key(key):
            logicals.tensors[instance] = LogicalTensor(dtype, zeros(instance.row.sizes(dims)), key, "")


def write_column(
    family: Family,
    format: str,
    dims: Mapping[str, int],
    logicals: LogicalTensors,
    *,
    ranks: int,
    keep_tied: bool | Collection[str] | None,
    source_name: str,
    originals: Mapping[Instance, Original] | None = None,
) -> ColumnTensors:
    """Every tensor of a target in this format.

    ``keep_tied`` is whether to write rows that the column omits when tied, or which keys of them (None: as in the
    source). ``originals`` goes into the targets. Raises KeyMismatchError for tensors that the target cannot hold,
    ConfigError for sizes that the ranks do not divide.
    """
    _check_ranks(family, format, dims, ranks, source_name)
    if family.literal:
        return ColumnTensors([*_as_they_were(logicals, format)])
    out = ColumnTensors()
    no_place = _leave_out(format, dims, logicals, out)
    missing: list[str] = []
    for entry in family.stored_specs(format, dims):
        there = [instance for instance in entry.instances if instance in logicals.tensors]
        if len(there) < len(entry.instances):
            tied = entry.column(format).omitted_if_tied and dims["tied"]
            if there or (entry.first.row.required and not tied):
                missing.append(entry.key)
            continue
        if entry.is_single and dims["tied"] and _omits(entry, format, logicals, keep_tied, out):
            continue
        made = _cut(entry, format, dims, logicals.tensors, ranks)
        before = (originals or {}).get(entry.first)
        out.targets.extend(made if before is None else (replace(target, original=before) for target in made))
    if no_place:
        raise KeyMismatchError(
            f"{source_name}: the {format} format of {family.name} has no place for {len(no_place)} tensors: "
            f"{first_few(no_place, _LISTED, ' …')}. "
            "Convert to a format that has one (hf), or remove them first if they are all zero."
        )
    if missing:
        raise KeyMismatchError(
            f"{source_name}: the {format} format of {family.name} needs {first_few(missing, _LISTED, ' …')}, "
            "which the source does not have"
        )
    return out


def _leave_out(format: str, dims: Mapping[str, int], logicals: LogicalTensors, out: ColumnTensors) -> list[str]:
    """Collect unmapped tensors and tie checks; returns the keys of required tensors that the format cannot hold."""
    no_place = []
    for instance, logical in logicals.tensors.items():
        row, place = instance.row, instance.row.column(format)
        if place is not None:
            if row.lossy_column is not None and (place.scatter_index is None) != (logical.original is None):
                out.unmapped.append(instance)
        elif row.tied_to and dims["tied"]:  # stored as the row that it is tied to
            out.tie_checks += ties.tie_checks(instance, logicals)
        elif row.required:
            no_place.append(logical.key)
        else:
            out.unmapped.append(instance)
    return no_place


def _omits(
    entry: StoredTensorSpec,
    format: str,
    logicals: LogicalTensors,
    keep_tied: bool | Collection[str] | None,
    out: ColumnTensors,
) -> bool:
    """Whether a key of a tied model is omitted, as its weights are stored under another one."""
    instance = entry.first
    if instance.row.tied_to and keep_tied is not None and instance not in logicals.omitted_ties:
        out.tie_checks += ties.tie_checks(instance, logicals)
    if not entry.column(format).omitted_if_tied:
        return False
    if keep_tied is None:
        return instance in logicals.omitted_ties
    return not (keep_tied if isinstance(keep_tied, bool) else entry.key in keep_tied)


def _as_they_were(logicals: LogicalTensors, format: str) -> Iterator[TargetTensor]:
    """The targets of a generic table."""
    for instance, logical in logicals.tensors.items():
        key = instance.key(format)
        if key is not None:
            yield TargetTensor(instance, key, 0, logical.dtype, logical.tensor)


def _cut(
    entry: StoredTensorSpec,
    format: str,
    dims: Mapping[str, int],
    logicals: Mapping[Instance, LogicalTensor],
    ranks: int,
) -> Iterator[TargetTensor]:
    """The slice of a key that every rank stores."""
    first = logicals[entry.first]
    if entry.is_single and ranks == 1:  # the common case
        yield TargetTensor(
            entry.first, entry.key, 0, first.dtype, to_stored(entry.first, first, entry.column(format), dims)
        )
        return
    parts: dict[Instance, tuple[LazyTensor, int | None, int]] = {}
    for instance in entry.instances:
        column = instance.row.column(format) or entry.column(format)
        tensor = to_stored(instance, logicals[instance], column, dims)
        axis = column.tp_axis(dims) if ranks > 1 else None
        parts[instance] = tensor, axis, column.replicas(dims, ranks)
        if logicals[instance].dtype != first.dtype:
            other = logicals[instance]
            raise KeyMismatchError(
                f"{other.key}: has dtype {other.dtype}, but {first.key} has {first.dtype}, and the {format} format has "
                f"both in one tensor, {entry.key}; cast them to one dtype (`dtype=`)"
            )
    for rank in range(ranks):
        shares: dict[Instance, LazyTensor] = {}
        for instance, (tensor, axis, same) in parts.items():
            if axis is None:
                shares[instance] = tensor
            else:
                step = tensor.shape[axis] * same // ranks
                shares[instance] = tensor.narrow(axis, rank // same * step, step)
        yield TargetTensor(entry.first, entry.key, rank, first.dtype, entry.join(format, shares))


def _check_ranks(family: Family, format: str, dims: Mapping[str, int], ranks: int, source_name: str) -> None:
    """Refuse a number of ranks that the family, or its sizes, cannot be split across."""
    if ranks == 1:
        return
    if ranks < 1:
        raise option_error("model_parallel", ranks, "expected 1 or more")
    if family.params is None or not family.params.sharded:
        raise option_error(
            "model_parallel", ranks, f"{family.name}'s consolidated layout is one file, not split across ranks"
        )
    cut: dict[str, tuple[int, Key]] = {}
    for row in family.rows:
        column = row.column(format)
        axis = column.tp_axis(dims) if column else None
        if column is None or axis is None or (row.enabled_by and not dims[row.enabled_by]):
            continue
        # Ranks hold whole heads, so where there are heads they are what has to divide.
        name = row.heads or (column.shape or row.shape)[axis]
        size = evaluate(name, dims) if row.heads else column.stored_shape(row, dims)[axis]
        cut[name] = size, column

    def uneven_over(count: int) -> list[str]:
        return [
            f"{name} = {size} is not divisible by {count}"
            for name, (size, column) in cut.items()
            if size * column.replicas(dims, count) % count
        ]

    uneven = uneven_over(ranks)
    if uneven:
        even = [str(count) for count in range(1, 129) if not uneven_over(count)]
        raise ConfigError(
            f"{source_name}: cannot be split across {ranks} ranks: {'; '.join(uneven)}; `model_parallel=` may be "
            f"{', '.join(even)}"
        )
