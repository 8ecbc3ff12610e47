"""Proof that an output holds the source's weights: both are read through their own columns and compared bit for bit."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from ckpt_convert import dtypes
from ckpt_convert.convert import mapping
from ckpt_convert.convert.blocks import Meter, Mover, ProgressCallback, Read, difference
from ckpt_convert.convert.checkpoint import Checkpoint
from ckpt_convert.convert.mapping import Logical
from ckpt_convert.convert.plan import Plan, target_dtype
from ckpt_convert.errors import VerificationError, listing
from ckpt_convert.models.table import Instance


def verify(plan: Plan, output: Checkpoint, *, workers: int, progress: ProgressCallback | None = None) -> int:
    """Compare every logical tensor of the plan's source with the output, and return how many there were.

    Where the plan casts, the source is cast before it is compared. Raises VerificationError naming every tensor that
    differs or is not there.
    """
    model = output.model
    found = mapping.read(model.family, str(output.format), model.dims, output.ranks, str(output.path))
    pairs: list[tuple[Instance, Logical, Logical]] = []
    problems = []
    for instance, logical in plan.logicals.tensors.items():
        other = found.tensors.get(instance)
        if other is not None and other.dtype == target_dtype(logical.dtype, instance, plan.request):
            pairs.append((instance, logical, other))
        elif other is not None:
            problems.append(f"{logical.key}: is {other.dtype} in the output")
        elif not instance.row.derived:
            problems.append(f"{logical.key}: not in the output")
    total = sum(p.tensor.size * dtypes.DTYPES[other.dtype].bits // 8 for _, p, other in pairs)
    meter = Meter("verifying", total, progress)
    queue = deque(pairs)
    lock = threading.Lock()

    def work() -> None:
        mine, theirs = Mover(plan.stored), Mover(output.stored)
        while True:
            with lock:
                if not queue:
                    return
                _, source, other = queue.popleft()
            where = _difference(mine, theirs, source, other, meter)
            if where is not None:
                with lock:
                    problems.append(f"{source.key}: differs from {other.key} at byte {where} of the tensor")

    with ThreadPoolExecutor(workers, "verify") as pool:
        for future in [pool.submit(work) for _ in range(workers)]:
            future.result()
    if problems:
        raise VerificationError(
            f"{plan.source.path}: the output, read again, differs in {len(problems)} tensors; "
            f"the disk or memory may be faulty, or the source changed meanwhile:{listing(sorted(problems))}"
        )
    return len(pairs)


def _difference(mine: Mover, theirs: Mover, source: Logical, other: Logical, meter: Meter) -> int | None:
    if source.tensor.shape != other.tensor.shape:
        return 0
    return difference(mine, theirs, Read(source.tensor, source.dtype), Read(other.tensor, other.dtype), meter)
