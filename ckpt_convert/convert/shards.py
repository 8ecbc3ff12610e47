"""Assigning tensors to output files: the number of files, their names and containers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ckpt_convert import formats
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.mapping import LogicalTensors
from ckpt_convert.checkpoint.model import Model
from ckpt_convert.checkpoint.record import Layout
from ckpt_convert.containers.dcp import DCP_INDEX, DCP_SUFFIX, dcp, dcp_build
from ckpt_convert.convert import layout
from ckpt_convert.convert.auxiliary_files import AuxiliaryFile
from ckpt_convert.convert.layout import OutputFile, SourceOrder
from ckpt_convert.convert.request import Request
from ckpt_convert.convert.writing import TargetTensor
from ckpt_convert.errors import ShapeMismatchError, UsageError, option_error
from ckpt_convert.formats import hf, native
from ckpt_convert.formats.base import render_index
from ckpt_convert.formats.names import (
    HF_STEMS,
    RECORD_FOLDER,
    SUFFIXES,
    common_file_names,
    container_of,
    is_found_without_index,
)
from ckpt_convert.models.core.table import Family, Instance, StoredTensorSpec
from ckpt_convert.tensors.header import FileLayout
from ckpt_convert.wording import MORE, first_few, option_text

_OURS = frozenset(common_file_names(1, "pt") or ())
"""Names that the option ``container`` gives, for torch.load rather than loaders of directories."""

_USUAL_SHARD = 5_000_000_000
"""The size of shards where nothing determines their number, as on the Hub."""


def recorded_layout(
    source: Identified, request: Request, like: Identified | None, model: Model, *, literal: bool
) -> Layout | None:
    """The target's layout: that of ``like``, of the source itself, or one that an earlier conversion recorded.

    ``literal`` keeps the source's stored keys.
    """
    if request.new_layout or request.selection:
        return None
    if like is not None:
        theirs = like.layout()
        if request.container not in (None, _container(theirs)):
            raise option_error("like", like.place, f"has {_container(theirs)} files, which `container=` contradicts")
        return theirs
    found = source.layout(literal=literal) if request.to == source.format and source.files else None
    if found is None and source.record is not None:
        found = source.record.layout(request.to)
    if found is None:
        return None
    if request.model_parallel is not None and request.to == "meta" and found.ranks != request.model_parallel:
        return None
    if request.container is not None and request.container != _container(found):
        return None
    return _findable(found, source, model) if request.to == "hf" and request.container is None else found


def _findable(candidate: Layout, source: Identified, model: Model) -> Layout | None:
    """A Hugging Face layout whose files loaders find: a source that is a single file gets the default name.

    None for files that no loader of a directory reads (``run.ckpt``). Names in a directory are kept.
    """
    names = [file.name for file in candidate.files]
    if candidate.index is not None or all(name.endswith(DCP_SUFFIX) or name in _OURS for name in names):
        return candidate
    if not all(name.endswith(tuple(SUFFIXES[container] for container in HF_STEMS)) for name in names):
        return None
    if source.place.is_folder() or is_found_without_index(names[0]) or model.family.from_shapes is not None:
        return candidate
    if container_of(names[0]) == "bin":
        return None
    return replace(candidate, files=(replace(candidate.files[0], name=f"{model.family.stem}.safetensors"),))


def count_ranks(
    source: Identified, request: Request, like: Identified | None, target_layout: Layout | None, model: Model
) -> int:
    """The number of tensor-parallel ranks of the output; raises UsageError where the family does not support it."""
    if request.to != "meta":
        return 1
    if like is not None and request.model_parallel not in (None, len(like.ranks)):
        raise option_error("like", like.place, f"has {len(like.ranks)} ranks, which `model_parallel=` contradicts")
    count = request.model_parallel or (target_layout.ranks if target_layout else 1)
    sharded = model.family.params is not None and model.family.params.sharded
    if count > 1 and sharded and _meta_container(request, model) == "safetensors":
        raise UsageError("`container='safetensors'` holds one rank; use pth for several")
    return count


def rank_notice(request: Request, model: Model, count: int, target_layout: Layout | None) -> list[str]:
    """A notice where the number of ranks was not requested, and the release came in several."""
    released = model.family.params.model_parallel(model.config) if model.family.params else None
    if request.to != "meta" or request.model_parallel or target_layout is not None or (released or 1) == count:
        return []
    return [
        f"written as one rank; {model.release} was released in {released}: pass `model_parallel={released}` for that"
    ]


def assign_shards(
    source: Identified,
    request: Request,
    targets: list[TargetTensor],
    dtype_of: Mapping[str, str],
    target_layout: Layout | None,
    count: int,
    model: Model,
    source_order: Callable[[], SourceOrder],
    shared: Mapping[str, str],
) -> tuple[list[OutputFile], bool, list[str]]:
    """The output files, whether they are exactly those of the target layout, and notices.

    ``shared`` gives the keys of a tensor that is another key's, and need not be stored again in a new layout.
    """
    notices = []
    if target_layout is not None:
        found = layout.layout_like(target_layout, targets, dtype_of)
        if found is not None:
            return *found, []
        other = target_layout.ranked_keys ^ {(target.rank, target.key) for target in targets}
        example = min((key for _, key in other), default=None)
        if request.like is not None and example is not None:
            raise ShapeMismatchError(
                f"{option_text('like', request.like)}: has other keys than this model, such as {example}"
            )
        why = f"has other keys ({example})" if example is not None else "splits tensors into pieces"
        notices.append(f"the recorded {request.to} layout {why}, so the output has a new layout")
    assignments = _assign(source, request, model, targets, dtype_of, count, source_order)
    assignments = [one.with_shared(shared) if shared else one for one in assignments]
    once = {key: other for one in assignments if one.container == "safetensors" for key, other in one.shared.items()}
    if once:
        names = first_few([f"{key} ({other})" for key, other in once.items()], 4, MORE)
        notices.append(f"stored once, with other keys in the file's metadata, as in safetensors' save_model: {names}")
    return layout.new_layout(assignments, dtype_of), False, notices


def passthrough_files(
    family: Family, source_format: str, instances: Sequence[Instance], logicals: LogicalTensors, dims: Mapping[str, int]
) -> list[OutputFile]:
    """The file of the record with the tensors that the target cannot hold."""
    if not instances:
        return []
    targets = []
    together = _together(family, source_format, instances, logicals, dims)
    for entry in together:
        parts = {}
        for instance in entry.instances:
            stacked = instance.row.column(source_format) or entry.column(source_format)
            parts[instance] = stacked.to_stored(logicals.tensors[instance].tensor, instance.row, dims)
        dtype = logicals.tensors[entry.first].dtype
        targets.append(TargetTensor(entry.first, entry.key, 0, dtype, entry.join(source_format, parts)))
    joined = {instance for entry in together for instance in entry.instances}
    for instance in (instance for instance in instances if instance not in joined):
        found, column = logicals.tensors[instance], instance.row.column(source_format)
        tensor = found.original or found.tensor
        if instance.row.lossy_column is not None and found.original is None and column is not None:
            tensor = column.to_stored(found.tensor, instance.row, dims)
        targets.append(TargetTensor(instance, found.key, 0, found.dtype, tensor))
    name = f"{RECORD_FOLDER}/layouts/{source_format}/carried.safetensors"
    dtype_of = {target.key: target.dtype for target in targets}
    return layout.new_layout(layout.assign_groups([targets], [name], "safetensors"), dtype_of)


def _together(
    family: Family, format: str, instances: Sequence[Instance], logicals: LogicalTensors, dims: Mapping[str, int]
) -> list[StoredTensorSpec]:
    """The stored tensors in which several of these instances are fused or stacked."""
    if len({logicals.tensors[instance].key for instance in instances}) == len(instances):
        return []
    chosen = set(instances)
    return [entry for entry in family.stored_specs(format, dims) if not entry.is_single and entry.first in chosen]


@dataclass(frozen=True)
class DcpMetadata:
    """The .metadata file of torch.distributed.checkpoint, generated from all files of a directory."""

    pieces: tuple[tuple[str, FileLayout], ...]
    notices: tuple[str, ...] = ()

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        return {DCP_INDEX: dcp_build.build_metadata(self.pieces)}


def index_files(
    request: Request, outputs: Sequence[OutputFile], target_layout: Layout | None, exact: bool, model: Model
) -> list[AuxiliaryFile]:
    """The index of several files: that of the target layout where headers are exact, else a new one."""
    if request.to == "meta":
        return []
    pieces = [(output.name, output.layout) for output in outputs if output.layout.header.kind == dcp.KIND]
    if exact and target_layout is not None and (target_layout.index is not None or not pieces):
        if target_layout.index is None:
            return []
        name, data = target_layout.index
        return [AuxiliaryFile.of(name, "restored", data)]
    if pieces:
        return [AuxiliaryFile(DCP_INDEX, "generated", generated=DcpMetadata(tuple(pieces)))]
    if len(outputs) == 1:
        return []
    container = outputs[0].name.rpartition(".")[2]
    name = _shard_name((hf if request.to == "hf" else native).index_name(container), request, container, model)
    if target_layout is not None and target_layout.index is not None:
        name = target_layout.index[0]
    weight_map = {tensor.key: file.name for file in outputs for tensor in file.layout.header.tensors}
    total = sum(tensor.nbytes for file in outputs for tensor in file.tensors)
    content = render_index(weight_map, total, sum(tensor.tensor.size for file in outputs for tensor in file.tensors))
    return [AuxiliaryFile.of(name, "generated", content)]


def _assign(
    source: Identified,
    request: Request,
    model: Model,
    targets: list[TargetTensor],
    dtype_of: Mapping[str, str],
    count: int,
    source_order: Callable[[], SourceOrder],
) -> list[layout.Assignment]:
    format = formats.ALL[request.to]
    if request.to == "meta":
        container = _meta_container(request, model)
        return layout.assign_by_rank(targets, format.file_names(count, container), container)
    container = request.container or format.containers[0]
    # torch.distributed.checkpoint has one file for each rank, which does not determine the number of shards.
    by_ranks = source.directory.kind == "dcp"
    if container == "pt":
        groups = [list(targets)]
    elif request.shards is not None:
        groups = layout.balanced_groups(targets, request.shards, dtype_of)
    elif request.max_shard_size is not None:
        groups = layout.groups_up_to(targets, request.max_shard_size, dtype_of)
    elif not source.files or by_ranks:
        groups = layout.groups_up_to(targets, _USUAL_SHARD, dtype_of)
    elif source.format == "meta":
        groups = layout.balanced_groups(targets, min(len(source.files), len(targets)), dtype_of)
    else:
        suffix = format.file_names(1, container)[0].rpartition(".")[2]
        names = [file.name for file in source.files]
        if not all(name.endswith(f".{suffix}") for name in names) or not source.place.is_folder():
            names = format.file_names(len(names), container)
        if names == format.file_names(len(names), container):
            names = [_shard_name(name, request, container, model) for name in names]
        return layout.assign_by_source(targets, source_order(), names, container)
    names = [_shard_name(name, request, container, model) for name in format.file_names(len(groups), container)]
    return layout.assign_groups(groups, names, container)


def _shard_name(name: str, request: Request, container: str, model: Model) -> str:
    """The name of a shard with the family's file stem (diffusers has another)."""
    if request.to != "hf" or container != "safetensors":
        return name
    return model.family.stem + name.removeprefix("model")


def _container(found: Layout) -> str:
    return container_of(found.files[0].name)


def _meta_container(request: Request, model: Model) -> str:
    params = model.family.params
    return request.container or (params.container if params else "pth")
