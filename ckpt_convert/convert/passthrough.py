"""Tensors of an output that do not come from the weights: from the record, ``like``, or the source of a live model."""

from __future__ import annotations

from dataclasses import replace

from ckpt_convert.checkpoint import mapping
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.mapping import Equality, LogicalTensor, LogicalTensors
from ckpt_convert.checkpoint.model import Model
from ckpt_convert.checkpoint.opening import tensors_in_file
from ckpt_convert.checkpoint.tensor_info import SourceTensor
from ckpt_convert.convert.request import Request
from ckpt_convert.convert.writing import Original
from ckpt_convert.models.core.table import Instance
from ckpt_convert.tensors.header import StoredTensor, WeightFile
from ckpt_convert.tensors.lazy import from_source


def add_derived(
    source: Identified,
    template: LogicalTensors,
    logicals: LogicalTensors,
    everything: list[tuple[WeightFile, StoredTensor]],
) -> None:
    """Add tensors that a model in memory does not have, such as RoPE tables, from its source."""
    numbers: dict[int, int] = {}
    for instance, logical in template.tensors.items():
        if not instance.row.required and instance not in logicals.tensors:
            for number in sorted(logical.tensor.sources - numbers.keys()):
                numbers[number] = len(everything)
                everything.append(source.stored[number])
            logicals.tensors[instance] = replace(logical, tensor=logical.tensor.with_sources(numbers))


def restore_passthrough(
    source: Identified,
    request: Request,
    like: Identified | None,
    model: Model,
    logicals: LogicalTensors,
    everything: list[tuple[WeightFile, StoredTensor]],
) -> None:
    """Add tensors that only the target's format holds, such as RoPE tables, from ``like`` or the record."""
    found: list[tuple[WeightFile, StoredTensor]] = []
    if like is not None:
        found = [(file, tensor) for file, tensor in like.stored if file.rank == 0]
    elif source.record is not None and (path := source.record.passthrough_tensors(request.to)) is not None:
        found = tensors_in_file(path)
    by_key = {tensor.key: (file, tensor) for file, tensor in found}
    for instance in model.family.instances(model.dims) if by_key else ():
        key = instance.key(request.to)
        if instance.row.required or key not in by_key or instance in logicals.tensors:
            continue
        file, tensor = by_key[key]
        if tensor.shape != instance.row.sizes(model.dims):
            continue
        lazy = from_source(len(everything), tensor.shape, tensor.strides)
        everything.append((file, tensor))
        logicals.tensors[instance] = LogicalTensor(tensor.dtype, lazy, str(key), file.name)
    if like is not None:
        return
    first = len(everything)
    left = {
        key: SourceTensor(key, tensor.dtype, from_source(first + number, tensor.shape, tensor.strides), file.name)
        for number, (key, (file, tensor)) in enumerate(by_key.items())
    }
    everything.extend(by_key.values())
    for instance, logical in mapping.split_fused(model.family, request.to, model.dims, left).items():
        if not instance.row.required:
            logicals.tensors.setdefault(instance, logical)


def restore_originals(
    source: Identified,
    request: Request,
    like: Identified | None,
    model: Model,
    template: LogicalTensors | None,
    logicals: LogicalTensors,
    everything: list[tuple[WeightFile, StoredTensor]],
) -> dict[Instance, Original]:
    """The originals of rows that another format stores lossily (``Row.lossy_column``): from record, ``like`` or source.

    ``template`` are the source's tensors where a model in memory is written. An original is valid only while its
    conversion still equals the current tensor.
    """
    found: dict[str, dict[str, tuple[WeightFile, StoredTensor]]] = {}
    if like is not None:
        found[request.to] = {tensor.key: (file, tensor) for file, tensor in like.stored if file.rank == 0}
    elif source.record is not None:
        for format in model.family.formats:
            path = source.record.passthrough_tensors(format)
            found[format] = {tensor.key: (file, tensor) for file, tensor in tensors_in_file(path)} if path else {}
    out: dict[Instance, Original] = {}
    for instance, logical in logicals.tensors.items():
        row, target = instance.row, instance.row.column(request.to)
        if target is None or (target.scatter_index is None) == (logical.original is None) or row.lossy_column is None:
            continue  # this conversion loses nothing more
        places = [(row.column(format), tensors.get(str(instance.key(format)))) for format, tensors in found.items()]
        if template is not None and instance in template.tensors:
            there = template.tensors[instance]
            number = min((there.original or there.tensor).sources)
            places.append((row.column(str(source.format)), source.stored[number]))
        for column, place in places:
            if column is None or place is None or (column.scatter_index is None) != (target.scatter_index is None):
                continue
            file, tensor = place
            if tensor.shape != column.stored_shape(row, model.dims) or tensor.dtype != logical.dtype:
                continue
            lazy = from_source(len(everything), tensor.shape, tensor.strides)
            everything.append((file, tensor))
            before = column.to_logical(lazy, row, model.dims)
            now, then = logical.tensor, before
            if logical.original is not None:
                now, then = logical.original, row.lossy_column.to_stored(before, row, model.dims)
            written = lazy if column == target else target.to_stored(before, row, model.dims)
            out[instance] = Original(written, Equality(now, then, logical.dtype, "", logical.key))
            break
    return out
