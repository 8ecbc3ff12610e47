"""Reading stored tensors through one column of a family's table.

No bytes are read here: tensors are lazy (``tensors.lazy``), so the same code serves files and tensors in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field

from ckpt_convert.checkpoint.findings import Finding, raise_if_any
from ckpt_convert.checkpoint.tensor_info import SourceTensor
from ckpt_convert.models.core.table import Family, Instance, StoredTensorSpec
from ckpt_convert.tensors.lazy import LazyTensor, concat
from ckpt_convert.values import frozen

_LISTED = 20


@frozen(slots=True)
class LogicalTensor:
    """A row of the table at an index, in the logical layout; ``key`` and ``location`` are those of its first part.

    ``original`` is the source's tensor, where the logical layout loses some of its values (``Row.lossy_column``).
    """

    dtype: str
    tensor: LazyTensor
    key: str
    location: str
    original: LazyTensor | None = None


@frozen(slots=True)
class Equality:
    """Two tensors that must hold the same bytes, with the error message if they differ, and the key for it."""

    left: LazyTensor
    right: LazyTensor
    dtype: str
    message: str
    key: str = ""


@frozen()
class LogicalTensors:
    """A checkpoint read through its column.

    ``replica_checks`` compare the replicas of tensors that tensor-parallel ranks do not split; ``omitted_ties`` are the
    tied rows that the source does not store.
    """

    tensors: dict[Instance, LogicalTensor]
    replica_checks: list[Equality] = field(default_factory=list)
    omitted_ties: set[Instance] = field(default_factory=set)


def read_column(
    family: Family,
    format: str,
    dims: Mapping[str, int],
    ranks: Sequence[Mapping[str, SourceTensor]],
    source_name: str,
    way: str | None = None,
) -> LogicalTensors:
    """Claim every source key exactly once and return the logical tensors.

    ``ranks`` has one mapping for each tensor-parallel rank (a single one for formats without ranks). ``way`` is the way
    out for messages, where that is not to correct files or config. Raises KeyMismatchError or ShapeMismatchError
    naming every missing, unexpected and misshapen tensor.
    """
    logicals, findings = examine_column(family, format, dims, ranks)
    raise_if_any(findings, source_name, way)
    return logicals


def examine_column(
    family: Family, format: str, dims: Mapping[str, int], ranks: Sequence[Mapping[str, SourceTensor]]
) -> tuple[LogicalTensors, list[Finding]]:
    """What ``read_column`` returns, as far as the source has it, and a finding for everything that does not fit.

    The findings are errors of the checks ``missing``, ``unexpected`` and ``shape``. A tied row that is not stored is
    among the tensors only if the row it is tied to is.
    """
    if (same := _as_they_are(family, ranks)) is not None:
        return same, []
    findings: list[Finding] = []
    result = LogicalTensors({})
    known: set[str] = set()
    left_out: list[StoredTensorSpec] = []
    shapes: dict[tuple[int, ...], tuple[int, ...] | None] = {}  # the same for all layers and experts
    for entry in family.stored_specs(format, dims):
        known.add(entry.key)
        found = [rank.get(entry.key) for rank in ranks]
        if not any(found):
            if not any(instance.row.required for instance in entry.instances):
                left_out.append(entry)
                continue
            if entry.column(format).omitted_if_tied and dims["tied"]:
                result.omitted_ties.add(entry.first)
                continue
            findings.append(_missing(entry, format, dims))
            continue
        parts = [source for source in found if source is not None]
        absent = [str(rank) for rank, source in enumerate(found) if source is None]
        if absent:
            text = f"{entry.key} (on other ranks, but not on rank {', '.join(absent)})"
            findings.append(Finding("error", "missing", text, key=entry.key))
            continue
        rows = tuple([id(row[0].row) for row in entry.rows])
        if rows not in shapes:
            shapes[rows] = entry.shape(format, dims, len(ranks))
        result.tensors.update(_join(entry, format, dims, parts, shapes[rows], findings, result.replica_checks))
    groups = {_group(instance) for instance in (result.tensors if left_out else ())} - {None}
    findings.extend(_missing(entry, format, dims) for entry in left_out if _group(entry.first) in groups)
    findings.extend(_unexpected(ranks, known, family, format))
    if dims["tied"] and any(row.tied_to and row.column(format) is None for row in family.rows):
        result.omitted_ties.update(i for i in family.instances(dims) if i.row.tied_to and i.row.column(format) is None)
    for instance in result.omitted_ties:
        tied = tied_partner(instance, result.tensors)
        if tied is not None:
            result.tensors[instance] = tied
    return result, findings


def _as_they_are(family: Family, ranks: Sequence[Mapping[str, SourceTensor]]) -> LogicalTensors | None:
    """The tensors of a table that was made from exactly these headers; None for other tables and other tensors."""
    if not family.literal or len(ranks) != 1 or len(ranks[0]) != len(family.literal):
        return None
    tensors = {}
    shapes = {id(row): tuple(map(int, row.shape)) for row in family.rows}
    for key, row in family.literal.items():
        source = ranks[0].get(key)
        if source is None or source.shape != shapes[id(row)]:
            return None
        tensors[Instance(row, ((key, 0),))] = LogicalTensor(source.dtype, source.tensor, source.key, source.location)
    return LogicalTensors(tensors)


def split_fused(
    family: Family, format: str, dims: Mapping[str, int], sources: Mapping[str, SourceTensor]
) -> dict[Instance, LogicalTensor]:
    """The logical tensors that share a stored tensor (fused or stacked) with others, taken out of it."""
    out: dict[Instance, LogicalTensor] = {}
    for entry in family.stored_specs(format, dims) if sources else ():
        source = sources.get(entry.key)
        if entry.is_single or source is None or source.shape != entry.shape(format, dims):
            continue
        for instance, part in entry.split(format, source.tensor, dims).items():
            column = instance.row.column(format) or entry.column(format)
            tensor = column.to_logical(part, instance.row, dims)
            out[instance] = LogicalTensor(source.dtype, tensor, source.key, source.location)
    return out


def _join(
    entry: StoredTensorSpec,
    format: str,
    dims: Mapping[str, int],
    parts: Sequence[SourceTensor],
    expected_shape: tuple[int, ...] | None,
    findings: list[Finding],
    equal: list[Equality],
) -> dict[Instance, LogicalTensor]:
    """The instances stored under a key, joined from every rank's part, whose shape should be ``expected_shape``."""
    first = parts[0]
    ranks = len(parts)

    def misfit(part: SourceTensor, text: str, expected: object = None, found: object = None) -> None:
        said = [None if value is None else str(value) for value in (expected, found)]
        findings.append(Finding("error", "shape", text, part.location, part.key, *said))

    for rank, part in enumerate(parts):
        at = f" on rank {rank}" if ranks > 1 else ""
        if expected_shape is None:
            sizes = list(entry.shape(format, dims) or ())
            misfit(part, f"{part.key}{at}: {sizes} does not divide by {ranks} ranks", found=sizes)
            return {}
        if part.shape != expected_shape:
            expected, found = list(expected_shape), list(part.shape)
            misfit(part, f"{part.key}{at}: expected {expected}, found {found} in {part.location}", expected, found)
            return {}
        if part.dtype != first.dtype:
            text = f"{part.key}{at}: expected {first.dtype} as on rank 0, found {part.dtype}"
            misfit(part, text, first.dtype, part.dtype)
            return {}
    if entry.is_single and ranks == 1:  # the common case
        row = entry.first.row
        column = entry.column(format)
        kept = first.tensor if column.scatter_index is not None else None
        tensor = column.to_logical(first.tensor, row, dims)
        return {entry.first: LogicalTensor(first.dtype, tensor, first.key, first.location, kept)}
    on_ranks = [entry.split(format, part.tensor, dims, ranks) for part in parts]
    out = {}
    for instance in entry.instances:
        column = instance.row.column(format) or entry.column(format)
        axis = column.tp_axis(dims)
        same = ranks if axis is None else column.replicas(dims, ranks)
        for rank in range(ranks):
            original = rank - rank % same
            if rank != original:
                here, there = parts[rank], parts[original]
                message = (
                    f"{here.key}: rank {rank} ({here.location}) and rank {original} ({there.location}) differ, but "
                    f"every rank{'' if axis is None else f' of {same} in succession'} has to hold the same values; the "
                    "files are not from one checkpoint"
                )
                left, right = on_ranks[original][instance], on_ranks[rank][instance]
                equal.append(Equality(left, right, first.dtype, message, here.key))
        distinct = [tensors[instance] for tensors in on_ranks[::same]]
        heads = instance.heads(dims) if axis is not None else None
        if heads is not None and heads % len(distinct):
            misfit(first, f"{first.key}: {heads} heads on {len(distinct)} ranks; a rank has to hold whole heads")
            return {}
        tensor = concat(distinct, axis) if axis is not None and len(distinct) > 1 else distinct[0]
        logical = column.to_logical(tensor, instance.row, dims)
        kept = tensor if column.scatter_index is not None else None
        out[instance] = LogicalTensor(first.dtype, logical, first.key, first.location, kept)
    return out


def tied_partner(instance: Instance, tensors: Mapping[Instance, LogicalTensor]) -> LogicalTensor | None:
    """The tensor that a tied row is equal to."""
    return next((logical for other, logical in tensors.items() if other.row.name == instance.row.tied_to), None)


def _group(instance: Instance) -> tuple[str, int | None] | None:
    """The group that an optional tensor belongs to: its row's group at its layer."""
    if instance.row.group is None:
        return None
    return instance.row.group, instance.index[0][1] if instance.index else None


def _missing(entry: StoredTensorSpec, format: str, dims: Mapping[str, int]) -> Finding:
    shape = str(list(entry.shape(format, dims) or ()))
    said = shape
    if entry.column(format).omitted_if_tied and not dims["tied"]:
        said = "(may be absent only where the config has tie_word_embeddings: true)"
    return Finding("error", "missing", f"{entry.key} {said}", key=entry.key, expected=shape)


def _unexpected(
    ranks: Sequence[Mapping[str, SourceTensor]], known: set[str], family: Family, format: str
) -> Iterator[Finding]:
    hints = 0
    for rank in ranks:
        for key, source in rank.items():
            if key in known:
                continue
            hint = ""
            hints += 1
            if family.has_key(format, key):
                hint = "; the config has no such layer, or says that the model has no such tensor"
            elif hints <= _LISTED:
                import difflib

                near = difflib.get_close_matches(key, known, 1, 0.8)
                hint = f"; the nearest known key is {near[0]}" if near else ""
            shape = str(list(source.shape))
            text = f"{key} {shape} in {source.location}{hint}"
            yield Finding("error", "unexpected", text, source.location, key, found=shape)
