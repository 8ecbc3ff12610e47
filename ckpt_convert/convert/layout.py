"""Layouts of tensors in output files: as recorded, as in the source, or new."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ckpt_convert import dtypes
from ckpt_convert.checkpoint.mapping import Equality
from ckpt_convert.checkpoint.record import Layout
from ckpt_convert.containers import safetensors
from ckpt_convert.containers.build import has_pieces, layout_from_specs
from ckpt_convert.convert.writing import Original, TargetTensor
from ckpt_convert.errors import option_error
from ckpt_convert.tensors.header import FileLayout, Header, StoredTensor, WeightFile
from ckpt_convert.tensors.lazy import LazyTensor


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor at its offset in an output file; ``dtype`` is that of the file, ``source_dtype`` that of the source.

    ``tensor`` is in the element order of the file; so is that of ``original``, which is written instead if the values
    are unchanged.
    """

    key: str
    dtype: str
    source_dtype: str
    offset: int
    tensor: LazyTensor
    nbytes: int
    original: Original | None = None


@dataclass(frozen=True)
class OutputFile:
    """A file to write: ``layout`` has every byte that belongs to no tensor, ``tensors`` are in offset order."""

    name: str
    rank: int
    layout: FileLayout
    tensors: tuple[PlacedTensor, ...]

    @property
    def size(self) -> int:
        return self.layout.header.size


@dataclass(frozen=True)
class Assignment:
    """The targets of one file, in order; ``shared`` are the keys of those that are another one's tensor."""

    name: str
    rank: int
    container: str
    targets: tuple[TargetTensor, ...]
    metadata: Mapping[str, str]
    shared: Mapping[str, str] = field(default_factory=dict)

    def with_shared(self, shared: Mapping[str, str]) -> Assignment:
        """The same with those of the shared tensors of which it has both keys."""
        keys = {target.key for target in self.targets}
        return replace(self, shared={key: other for key, other in shared.items() if key in keys and other in keys})


def layout_like(
    layout: Layout, targets: Sequence[TargetTensor], dtype_of: Mapping[str, str]
) -> tuple[list[OutputFile], bool] | None:
    """The files of ``layout``, and whether their headers are exact; None when it has other keys than the targets.

    Headers are exact where shapes and dtypes agree; else names, assignment, order and metadata are kept. Also None
    where tensors were in pieces in several files, and headers cannot be exact.
    """
    wanted = {(target.rank, target.key): target for target in targets}
    if layout.ranked_keys != wanted.keys():
        return None
    out = []
    exactly = True
    whole = all(file.file_layout is not None or not has_pieces(file.header) for file in layout.files)
    if not whole:
        return None
    for file in layout.files:
        chosen = [wanted[file.rank, tensor.key] for tensor in file.header.tensors]
        exact = file.file_layout
        same = all(
            (tensor.box.shape if tensor.box else tensor.shape) == target.tensor.shape
            and tensor.dtype == dtype_of[target.key]
            for tensor, target in zip(file.header.tensors, chosen, strict=True)
        )
        if exact is None or not same:
            if has_pieces(file.header):
                return None
            exactly = False
            container = "torch" if file.header.kind == "legacy" else file.header.kind
            metadata = file.header.metadata
            exact = new_file_layout(Assignment(file.name, file.rank, container, tuple(chosen), metadata), dtype_of)
        out.append(_placed(file.name, file.rank, exact, {target.key: target for target in chosen}))
    return out, exactly


def new_layout(assignments: Sequence[Assignment], dtype_of: Mapping[str, str]) -> list[OutputFile]:
    """New files for an assignment."""
    return [
        _placed(a.name, a.rank, new_file_layout(a, dtype_of), {target.key: target for target in a.targets})
        for a in assignments
    ]


def new_file_layout(assignment: Assignment, dtype_of: Mapping[str, str]) -> FileLayout:
    """The header of a new file: every byte that belongs to no tensor."""
    specs = [(target.key, dtype_of[target.key], target.tensor.shape) for target in assignment.targets]
    return layout_from_specs(assignment.name, assignment.container, specs, assignment.metadata, assignment.shared)


def shared_tensors(
    targets: Sequence[TargetTensor], stored: Sequence[tuple[WeightFile, StoredTensor]], dtype_of: Mapping[str, str]
) -> dict[str, str]:
    """The keys whose tensor is the same stored one as that of an earlier key, with that key."""
    first: dict[tuple[object, ...], str] = {}
    out = {}
    for target in targets:
        sources = target.tensor.sources
        if len(sources) != 1 or not target.tensor.size:
            continue
        file, tensor = stored[min(sources)]
        place = (id(file), tensor.offset, tensor.shape, tensor.strides, tensor.box, tensor.dtype, dtype_of[target.key])
        owner = first.setdefault(place, target.key)
        if owner != target.key:
            out[target.key] = owner
    return out


def _placed(name: str, rank: int, layout: FileLayout, targets: Mapping[str, TargetTensor]) -> OutputFile:
    placed = []
    taken: set[tuple[int, int]] = set()
    for tensor in sorted(layout.header.tensors, key=lambda tensor: tensor.offset):
        place = _, nbytes = (tensor.offset, tensor.nbytes)
        if place in taken and nbytes:
            continue  # an alias of the same bytes; ``alias_checks`` compares both
        taken.add(place)
        target = targets[tensor.key]
        lazy, earlier = _as_stored(target.tensor, tensor), target.original
        if earlier is not None:
            earlier = replace(earlier, tensor=_as_stored(earlier.tensor, tensor))
        placed.append(PlacedTensor(tensor.key, tensor.dtype, target.dtype, tensor.offset, lazy, nbytes, earlier))
    return OutputFile(name, rank, layout, tuple(placed))


def _as_stored(tensor: LazyTensor, place: StoredTensor) -> LazyTensor:
    """The part of a tensor that belongs at ``place``, in the file's element order (a transposed one transposed)."""
    if place.box is not None:
        for axis, (start, size) in enumerate(zip(place.box.origin, place.shape, strict=True)):
            tensor = tensor.narrow(axis, start, size)
    if place.strides is None:
        return tensor
    strides = place.strides
    return tensor.permute(sorted(range(len(strides)), key=lambda axis: -strides[axis]))


def alias_checks(files: Iterable[OutputFile], targets: Sequence[TargetTensor]) -> list[Equality]:
    """Pairs of keys that share bytes in one of these files, and so must be equal."""
    out = []
    for file in files:
        if file.layout.header.kind != safetensors.KIND:  # in which nothing is shared
            by_key = {target.key: target for target in targets if target.rank == file.rank}
            out += _aliases(file.layout.header, by_key, file.name)
    return out


def _aliases(header: Header, targets: Mapping[str, TargetTensor], file: str) -> list[Equality]:
    first: dict[tuple[int, int], StoredTensor] = {}
    out = []
    for tensor in header.tensors:
        nbytes = tensor.nbytes
        other = first.setdefault((tensor.offset, nbytes), tensor) if nbytes else tensor
        if other is tensor:
            continue
        left, right = _as_stored(targets[other.key].tensor, other), _as_stored(targets[tensor.key].tensor, tensor)
        if left != right:
            message = (
                f"{other.key} and {tensor.key} share their bytes in {file}, but their values differ now; "
                "write a new layout that separates them, with `shards=` or `max_shard_size=`"
            )
            out.append(Equality(left, right, targets[other.key].dtype, message))
    return out


class SourceOrder(NamedTuple):
    """Which of the source's files has a stored tensor, by number; ``counterparts`` are those that others replace."""

    files: Mapping[int, int]
    counterparts: Mapping[int, int]


def assign_by_source(
    targets: Sequence[TargetTensor], source: SourceOrder, names: Sequence[str], container: str
) -> list[Assignment]:
    """One file for each of the source's, with its tensors in the source's order.

    Tensors that ``source`` does not have (those from the record) go into the first file; ``names`` are the new names of
    the files.
    """
    groups: dict[int, list[tuple[int, TargetTensor]]] = {}
    for target in targets:
        numbers = (source.counterparts.get(number, number) for number in target.tensor.sources)
        first = min(numbers, default=len(source.files))
        groups.setdefault(source.files.get(first, 0), []).append((first, target))
    return [
        Assignment(names[number], 0, container, tuple(t for _, t in sorted(group, key=lambda i: i[0])), _FORMAT_PT)
        for number, group in sorted(groups.items())
    ]


def balanced_groups(
    targets: Sequence[TargetTensor], count: int, dtype_of: Mapping[str, str]
) -> list[list[TargetTensor]]:
    """``count`` consecutive groups of about equal bytes, in the order of the layers.

    Raises UsageError when there are fewer tensors than files.
    """
    if count > len(targets):
        raise option_error("shards", count, f"there are only {len(targets)} tensors; choose fewer files")
    sizes = [dtypes.nbytes(dtype_of[target.key], target.tensor.shape) for target in targets]
    total = sum(sizes)
    groups: list[list[TargetTensor]] = [[]]
    done = 0
    for at, (target, size) in enumerate(zip(targets, sizes, strict=True)):
        left = len(targets) - at
        behind = count - len(groups)
        # Close a file when the tensor's middle passes the boundary, and always when only enough tensors are left.
        full = done + size / 2 > total * len(groups) / count and behind > 0
        if groups[-1] and (full or left == behind):
            groups.append([])
        groups[-1].append(target)
        done += size
    return groups


def groups_up_to(targets: Sequence[TargetTensor], limit: int, dtype_of: Mapping[str, str]) -> list[list[TargetTensor]]:
    """Groups of at most ``limit`` bytes of tensors, in order; a larger tensor gets its own group."""
    groups: list[list[TargetTensor]] = []
    room = 0
    for target in targets:
        size = dtypes.nbytes(dtype_of[target.key], target.tensor.shape)
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(target)
        room -= size
    return groups


def assign_groups(groups: Sequence[Sequence[TargetTensor]], names: Sequence[str], container: str) -> list[Assignment]:
    """One file for each group."""
    return [Assignment(name, 0, container, tuple(group), _FORMAT_PT) for name, group in zip(names, groups, strict=True)]


def assign_by_rank(targets: Sequence[TargetTensor], names: Sequence[str], container: str) -> list[Assignment]:
    """One file for each rank."""
    return [
        Assignment(name, rank, container, tuple(target for target in targets if target.rank == rank), _FORMAT_PT)
        for rank, name in enumerate(names)
    ]


_FORMAT_PT = {"format": "pt"}
