"""Verifying an output: it and the source are read through their columns of the table and compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from ckpt_convert import dtypes
from ckpt_convert.checkpoint import mapping
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.mapping import LogicalTensor
from ckpt_convert.checkpoint.opening import tensors_in_file
from ckpt_convert.checkpoint.tensor_info import SourceTensor
from ckpt_convert.checkpoint.verbatim import as_stored_tensors
from ckpt_convert.convert import translate
from ckpt_convert.convert.plan import Plan, target_dtype
from ckpt_convert.convert.sources import NumberedTensors, Sources
from ckpt_convert.errors import VerificationError
from ckpt_convert.models.core.table import Instance
from ckpt_convert.tensors import lazy
from ckpt_convert.tensors.blocks import BlockReader, TypedTensor, first_difference
from ckpt_convert.tensors.header import StoredTensor, WeightFile
from ckpt_convert.tensors.pool import run_threaded
from ckpt_convert.tensors.progress import ProgressCallback, ProgressCounter
from ckpt_convert.wording import indented_list


def verify_output(
    plan: Plan, sources: Sources, output: Identified, *, workers: int, progress: ProgressCallback | None = None
) -> int:
    """Compare every logical tensor of the plan's source with the output, and return their number.

    Where the plan casts, the source is cast before it is compared. Raises VerificationError naming every tensor that
    differs or is missing.
    """
    if plan.request.verbatim:
        output = as_stored_tensors(output)
    model = output.model_for(str(plan.source.format), plan.target)
    found = translate.read_source(model, str(output.format), output.ranks, str(output.place)).logicals
    stored, carried = _passthrough(plan, output)
    given = {key: SourceTensor(key, one.dtype, one.tensor, one.location) for key, one in carried.items()}
    apart = mapping.split_fused(model.family, str(plan.source.format), model.dims, given)
    pairs: list[tuple[LogicalTensor, LogicalTensor]] = []
    problems = []
    for instance, logical in plan.logicals.tensors.items():
        other = found.tensors.get(instance) or apart.get(instance) or carried.get(logical.key)
        if other is None and (owner := plan.shared.get(logical.key)) is not None:
            other = found.tensors.get(Instance(instance.row, ((owner, 0),)))
        if other is not None and other.dtype == target_dtype(logical.dtype, instance, plan.request):
            if instance.row.lossy_column is None:
                pairs.append((logical, other))
            else:
                kept = carried.get(logical.key)
                if kept is None and logical.key in plan.passthrough:
                    problems.append(f"{logical.key}: is not kept in the output's record")
                pairs += _halves(instance, logical, other, kept, str(plan.source.format), model.dims)
        elif other is not None:
            problems.append(f"{logical.key}: is {other.dtype} in the output")
        else:
            problems.append(f"{logical.key}: neither in the output nor kept in its record")
    total = sum(p.tensor.size * dtypes.DTYPES[other.dtype].bits // 8 for p, other in pairs)
    counter = ProgressCounter("verifying", total, progress)
    read = NumberedTensors(plan, sources)

    def start() -> Callable[[tuple[LogicalTensor, LogicalTensor]], None]:
        mine, theirs = BlockReader(read), BlockReader(stored)

        def compare(pair: tuple[LogicalTensor, LogicalTensor]) -> None:
            source, other = pair
            where = _difference(mine, theirs, source, other, counter)
            if where is not None:
                problems.append(f"{source.key}: differs from {other.key} at byte {where} of the tensor")

        return compare

    run_threaded(pairs, workers, counter, start)
    if problems:
        raise VerificationError(
            f"{plan.source.place}: the output, read again, differs in {len(problems)} tensors; "
            f"the disk or memory may be faulty, or the source has changed:{indented_list(sorted(problems))}"
        )
    return len(pairs)


def _halves(
    instance: Instance,
    logical: LogicalTensor,
    other: LogicalTensor,
    carried: LogicalTensor | None,
    source: str,
    dims: Mapping[str, int],
) -> Iterator[tuple[LogicalTensor, LogicalTensor]]:
    """The pairs that must be equal for a lossy row: the values that both columns hold, and the record's original."""
    row, column = instance.row, instance.row.column(source)
    stored = logical.original or (column.to_stored(logical.tensor, row, dims) if column else logical.tensor)
    if carried is not None:
        yield replace(logical, tensor=stored), carried
    if logical.original is not None and other.original is not None:
        yield replace(logical, tensor=logical.original), replace(other, tensor=other.original)
    elif (logical.original is None) == (other.original is None):
        yield logical, other
    else:
        one, another = (replace(half, tensor=row.representable(half.tensor, dims)) for half in (logical, other))
        yield one, another


def _passthrough(
    plan: Plan, output: Identified
) -> tuple[list[tuple[WeightFile, StoredTensor]], dict[str, LogicalTensor]]:
    """The output's stored tensors with those that its record keeps for the source's format, and the latter by key."""
    stored = list(output.stored)
    out = {}
    path = output.record.passthrough_tensors(str(plan.source.format)) if output.record else None
    for file, tensor in tensors_in_file(path) if path is not None else []:
        out[tensor.key] = LogicalTensor(
            tensor.dtype, lazy.from_source(len(stored), tensor.shape), tensor.key, file.name
        )
        stored.append((file, tensor))
    return stored, out


def _difference(
    mine: BlockReader, theirs: BlockReader, source: LogicalTensor, other: LogicalTensor, counter: ProgressCounter
) -> int | None:
    if source.tensor.shape != other.tensor.shape:
        return 0
    return first_difference(
        mine, theirs, TypedTensor(source.tensor, source.dtype), TypedTensor(other.tensor, other.dtype), counter
    )
