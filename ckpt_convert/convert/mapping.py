"""Reading stored tensors through one column of a family's table, and writing them through another.

Nothing here touches a byte: tensors are lazy (``models.lazy``), so the same code serves files and tensors in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ckpt_convert.convert.findings import Finding, raise_if_any
from ckpt_convert.errors import ConfigError, KeyMismatchError, UsageError
from ckpt_convert.models.lazy import LazyTensor, concat
from ckpt_convert.models.table import Family, Instance, Key

_LISTED = 20


class Source(NamedTuple):
    """A stored tensor as the mapping sees it: ``where`` is the file (or rank) that a message names."""

    key: str
    dtype: str
    tensor: LazyTensor
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape


@dataclass(frozen=True, slots=True)
class Logical:
    """A row of the table at an index, in the logical layout; ``key`` and ``where`` are those of its first part."""

    dtype: str
    tensor: LazyTensor
    key: str
    where: str


@dataclass(frozen=True, slots=True)
class Equality:
    """Two tensors that have to hold the same bytes, what to say if they do not, and the key that it is said of."""

    left: LazyTensor
    right: LazyTensor
    dtype: str
    message: str
    key: str = ""


@dataclass(frozen=True)
class Logicals:
    """A checkpoint read through its column.

    ``equal`` are the copies that every rank holds of a tensor that is not cut; ``omitted`` the tied rows that the
    source does not store.
    """

    tensors: dict[Instance, Logical]
    equal: list[Equality] = field(default_factory=list)
    omitted: set[Instance] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor to be written: under ``key`` into the file or dict of ``rank``."""

    instance: Instance
    key: str
    rank: int
    dtype: str
    tensor: LazyTensor


def read(
    family: Family, format: str, dims: Mapping[str, int], ranks: Sequence[Mapping[str, Source]], what: str
) -> Logicals:
    """Claim every source key exactly once and return the logical tensors.

    ``ranks`` has one mapping for each tensor-parallel rank (one in all for formats that are not cut).
    Raises KeyMismatchError or ShapeMismatchError naming every missing, unexpected and misshapen tensor.
    """
    logicals, findings = examine(family, format, dims, ranks)
    raise_if_any(findings, what)
    return logicals


def examine(
    family: Family, format: str, dims: Mapping[str, int], ranks: Sequence[Mapping[str, Source]]
) -> tuple[Logicals, list[Finding]]:
    """What ``read`` returns, as far as the source has it, and everything that does not fit.

    The findings are of the checks ``missing``, ``unexpected`` and ``shape``, all of them errors.

    A tied row that is not stored is among the tensors only if the row it is tied to is.
    """
    findings: list[Finding] = []
    result = Logicals({})
    known: set[str] = set()
    for instance in family.instances(dims):
        column = instance.row.column(format)
        key = instance.key(format)
        if column is None or key is None:
            continue
        known.add(key)
        found = [rank.get(key) for rank in ranks]
        if not any(found):
            if instance.row.derived:
                continue
            if column.omitted_if_tied and dims["tied"]:
                result.omitted.add(instance)
                continue
            findings.append(_missing(instance, key, column, dims))
            continue
        parts = [source for source in found if source is not None]
        absent = [str(rank) for rank, source in enumerate(found) if source is None]
        if absent:
            text = f"{key} (there on other ranks, not on rank {', '.join(absent)})"
            findings.append(Finding("error", "missing", text, key=key))
            continue
        logical = _join(instance, column, dims, parts, findings, result.equal)
        if logical is not None:
            result.tensors[instance] = logical
    findings.extend(_unexpected(ranks, known, family, format))
    for instance in result.omitted:
        tied = tied_to(instance, result.tensors)
        if tied is not None:
            result.tensors[instance] = tied
    return result, findings


def write(
    family: Family,
    format: str,
    dims: Mapping[str, int],
    logicals: Logicals,
    *,
    ranks: int,
    keep_tied: bool | None,
    what: str,
) -> tuple[list[Target], list[Instance], list[Equality]]:
    """The target's tensors in the order of the table, what the target has no place for, and the ties to check.

    ``keep_tied`` says whether rows that the column omits when tied are written all the same (None: as the source).
    Raises KeyMismatchError for tensors that the target cannot hold, ConfigError for sizes that do not divide over
    the ranks.
    """
    _check_ranks(family, format, dims, ranks, what)
    targets: list[Target] = []
    carried: list[Instance] = []
    ties: list[Equality] = []
    no_place: list[str] = []
    for instance, logical in logicals.tensors.items():
        column = instance.row.column(format)
        key = instance.key(format)
        if column is None or key is None:
            if instance.row.derived:
                carried.append(instance)
            else:
                no_place.append(logical.key)
            continue
        if instance.row.tied_to and dims["tied"] and keep_tied is not None and instance not in logicals.omitted:
            ties += [check] if (check := tie(instance, logical, logicals)) is not None else []
        if column.omitted_if_tied and dims["tied"]:
            keep = instance not in logicals.omitted if keep_tied is None else keep_tied
            if not keep:
                continue
        stored = column.to_stored(logical.tensor, instance.heads(dims))
        targets.extend(_cut(instance, key, column, dims, replace(logical, tensor=stored), ranks))
    if no_place:
        listed = ", ".join(no_place[:_LISTED]) + (" …" if len(no_place) > _LISTED else "")
        raise KeyMismatchError(
            f"{what}: the {format} format of {family.name} has no place for {len(no_place)} tensors: {listed}. "
            "Convert to a format that has one (hf), or remove them first if they are all zero."
        )
    return targets, carried, ties


def expected_shape(instance: Instance, column: Key, dims: Mapping[str, int], ranks: int) -> tuple[int, ...] | None:
    """The shape of one rank's part, or None when the sizes do not divide over the ranks."""
    shape = list(instance.row.sizes(dims))
    axis = column.cut_axis(dims)
    if axis is not None and ranks > 1:
        if shape[axis] % ranks:
            return None
        shape[axis] //= ranks
    return tuple(shape)


def _join(
    instance: Instance,
    column: Key,
    dims: Mapping[str, int],
    parts: Sequence[Source],
    findings: list[Finding],
    equal: list[Equality],
) -> Logical | None:
    first = parts[0]
    wanted = expected_shape(instance, column, dims, len(parts))

    def misfit(part: Source, text: str, expected: object = None, found: object = None) -> None:
        said = [None if value is None else str(value) for value in (expected, found)]
        findings.append(Finding("error", "shape", text, part.where, part.key, *said))

    for rank, part in enumerate(parts):
        at = f" on rank {rank}" if len(parts) > 1 else ""
        if wanted is None:
            sizes = list(instance.row.sizes(dims))
            misfit(part, f"{part.key}{at}: {sizes} does not divide over {len(parts)} ranks", found=sizes)
            return None
        if part.shape != wanted:
            expected, found = list(wanted), list(part.shape)
            misfit(part, f"{part.key}{at}: expected {expected}, found {found} in {part.where}", expected, found)
            return None
        if part.dtype != first.dtype:
            text = f"{part.key}{at}: expected {first.dtype} as on rank 0, found {part.dtype}"
            misfit(part, text, first.dtype, part.dtype)
            return None
    axis = column.cut_axis(dims)
    if axis is None:
        tensor = first.tensor
        for rank, part in enumerate(parts[1:], 1):
            message = (
                f"{part.key}: rank {rank} ({part.where}) and rank 0 ({first.where}) differ, but every rank has to hold "
                "the same values; the files are not of one checkpoint"
            )
            equal.append(Equality(first.tensor, part.tensor, first.dtype, message, part.key))
    else:
        tensor = concat([part.tensor for part in parts], axis)
    try:
        logical = column.to_logical(tensor, instance.heads(dims))
    except ValueError as error:
        misfit(first, f"{first.key}: {error}; heads have to lie whole on a rank")
        return None
    return Logical(first.dtype, logical, first.key, first.where)


def _cut(
    instance: Instance, key: str, column: Key, dims: Mapping[str, int], logical: Logical, ranks: int
) -> list[Target]:
    axis = column.cut_axis(dims)
    if axis is None or ranks == 1:
        return [Target(instance, key, rank, logical.dtype, logical.tensor) for rank in range(ranks)]
    step = logical.tensor.shape[axis] // ranks
    return [
        Target(instance, key, rank, logical.dtype, logical.tensor.narrow(axis, rank * step, step))
        for rank in range(ranks)
    ]


def _check_ranks(family: Family, format: str, dims: Mapping[str, int], ranks: int, what: str) -> None:
    """Refuse a number of ranks that the family, or its sizes, cannot be cut over."""
    if ranks == 1:
        return
    if ranks < 1:
        raise UsageError(f"--model-parallel {ranks}: expected 1 or more")
    if family.params is None or not family.params.sharded:
        raise UsageError(
            f"--model-parallel {ranks}: {family.name}'s consolidated layout is one file, not cut over ranks"
        )
    sizes: dict[str, int] = {}
    for row in family.rows:
        column = row.column(format)
        axis = column.cut_axis(dims) if column else None
        if axis is None or (row.when and not dims[row.when]):
            continue
        # Ranks hold whole heads, so where there are heads they are what has to divide.
        name = row.heads or row.shape[axis]
        sizes[name] = dims[name] if row.heads else row.sizes(dims)[axis]
    uneven = [f"{name} = {size} is not divisible by {ranks}" for name, size in sizes.items() if size % ranks]
    if uneven:
        even = [str(n) for n in range(1, 129) if not any(size % n for size in sizes.values())]
        raise ConfigError(
            f"{what}: cannot be cut over {ranks} ranks: {'; '.join(uneven)}; --model-parallel may be {', '.join(even)}"
        )


def tied_pair(logicals: Logicals) -> Equality | None:
    """The two stored tensors whose bytes decide whether the weights are tied, where no file says it."""
    for instance, logical in logicals.tensors.items():
        if instance.row.tied_to and instance not in logicals.omitted:
            other = tied_to(instance, logicals.tensors)
            return Equality(other.tensor, logical.tensor, logical.dtype, "") if other is not None else None
    return None


def tied_to(instance: Instance, tensors: Mapping[Instance, Logical]) -> Logical | None:
    """The tensor that a tied row shares its values with."""
    return next((logical for other, logical in tensors.items() if other.row.name == instance.row.tied_to), None)


def tie(instance: Instance, logical: Logical, logicals: Logicals) -> Equality | None:
    """What has to hold of a tied row that is stored all the same; None where the row it is tied to is not there."""
    other = tied_to(instance, logicals.tensors)
    if other is None:
        return None
    message = (
        f"{logical.key} and {other.key} differ, but the config ties them (tie_word_embeddings: true), and "
        "the target stores tied weights once. If they are not tied, set tie_word_embeddings to false in the "
        "source's config.json (ckpt_convert/config.json where that is the only one)."
    )
    return Equality(other.tensor, logical.tensor, logical.dtype, message, logical.key)


def _missing(instance: Instance, key: str, column: Key, dims: Mapping[str, int]) -> Finding:
    shape = str(list(instance.row.sizes(dims)))
    said = shape
    if column.omitted_if_tied and not dims["tied"]:
        said = "(may be absent only where the config has tie_word_embeddings: true)"
    return Finding("error", "missing", f"{key} {said}", key=key, expected=shape)


def _unexpected(
    ranks: Sequence[Mapping[str, Source]], known: set[str], family: Family, format: str
) -> Iterator[Finding]:
    hints = 0
    for rank in ranks:
        for key, source in rank.items():
            if key in known:
                continue
            hint = ""
            hints += 1
            if family.knows(format, key):
                hint = "; the config has no such layer, or says that the model has no such tensor"
            elif hints <= _LISTED:
                import difflib

                near = difflib.get_close_matches(key, known, 1, 0.8)
                hint = f"; the nearest known key is {near[0]}" if near else ""
            shape = str(list(source.shape))
            text = f"{key} {shape} in {source.where}{hint}"
            yield Finding("error", "unexpected", text, source.where, key, found=shape)
