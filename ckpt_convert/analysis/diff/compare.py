"""The differences between two checkpoints: structure first, then every value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import xxhash

from ckpt_convert import dtypes
from ckpt_convert.analysis.diff.alignment import AlignedTensor, TensorSide, align
from ckpt_convert.analysis.diff.change import STATUSES, Change, Status
from ckpt_convert.analysis.diff.verdict import Verdict, judge
from ckpt_convert.analysis.stats import numeric
from ckpt_convert.analysis.stats.numeric import Delta
from ckpt_convert.analysis.stats.rounding import Rounding, RoundingSearch
from ckpt_convert.checkpoint import dequantize as requests
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.mapping import Equality
from ckpt_convert.checkpoint.model import Model
from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.rope import read_rope
from ckpt_convert.tensors import pool
from ckpt_convert.tensors.blocks import BlockReader, TypedTensor, block_elements, first_difference
from ckpt_convert.tensors.gather import StoredTensors
from ckpt_convert.tensors.lazy import aligned_blocks
from ckpt_convert.tensors.progress import ProgressCallback, ProgressCounter

SCHEMA = 1
_ROW_ORDER = "the values are equal once the rows are put in the other RoPE order: a reorder was missed, or done twice"
_Sums = tuple[str, str]
_Compared = tuple[Delta | None, Rounding | None, str, _Sums]
_COMPARED = ("same", "dtype")
_SETTINGS = ("hidden_act", "rms_norm_eps", "sliding_window", "tie_word_embeddings")


@dataclass(frozen=True)
class Diff:
    """The comparison of two checkpoints.

    ``through`` is "mapping" where both were read through a family's table, else "keys"; ``config`` are settings that
    both configs state and that differ, which do not make the weights different.
    """

    a: Identified
    b: Identified
    aligned_by: str
    values: bool
    changes: Sequence[Change]
    models: tuple[Model | None, Model | None]
    config: Sequence[tuple[str, Any, Any]]
    notices: Sequence[str]

    @property
    def counts(self) -> Mapping[Status, int]:
        found = Counter(change.status for change in self.changes)
        return {status: found[status] for status in STATUSES}

    @property
    def same(self) -> bool:
        """Whether every tensor is on both sides, in one shape and dtype, and (where compared) with the same bits."""
        return self.is_same()

    def is_same(self, *, ignore_dtype: bool = False, tolerance: float | None = None) -> bool:
        """``same``; with ``ignore_dtype`` also where equal values are in another dtype.

        With ``tolerance`` also where a tensor's ‖Δ‖/‖a‖ is at most that, in any dtypes; a value that is NaN or infinite
        on one side only is always a difference. Where values were not compared, both allow nothing.
        """
        fine = ("same", "dtype") if self.values and (ignore_dtype or tolerance is not None) else ("same",)
        return all(change.status in fine or change.is_within(tolerance) for change in self.changes)

    @property
    def verdict(self) -> Verdict:
        """What the difference amounts to: the rounding of a cast, a small change, another model, …."""
        return judge(self.changes, values=self.values)

    @property
    def compared(self) -> int:
        """The bytes of a whose values were compared."""
        return sum(change.nbytes for change in self.changes if change.delta is not None)

    def sides(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a and b are, as JSON-ready values."""
        return _side(self.a, self.models[0]), _side(self.b, self.models[1])

    def as_dict(self) -> dict[str, Any]:
        """The comparison as JSON-ready values."""
        a, b = self.sides()
        return {
            "schema": SCHEMA,
            "a": a,
            "b": b,
            "same": self.same,
            "verdict": self.verdict.as_dict(),
            "values": self.values,
            "through": self.aligned_by,
            "counts": dict(self.counts),
            "config": [{"name": name, "a": ours, "b": theirs} for name, ours, theirs in self.config],
            "notices": list(self.notices),
            "tensors": [change.as_dict() for change in self.changes],
        }


def compare_checkpoints(
    a: Identified,
    b: Identified,
    *,
    values: bool = True,
    is_wanted: Callable[..., bool] = lambda *keys: True,
    workers: int = 2,
    progress: ProgressCallback | None = None,
) -> Diff:
    """Compare two checkpoints, of the same format or not, over as many ranks or not, tensor by tensor.

    ``values`` reads and compares every element, in memory that does not depend on the size of the tensors; ``keep`` is
    asked with a tensor's keys in a and in b whether it is compared at all. Where only one side is quantized, the
    dequantized values are compared. Raises what ``alignment.align`` raises, and CorruptFileError for a
    file that cannot be read to its end.
    """
    a, b, said = requests.dequantize_to_compare(a, b)
    found = align(a, b)
    pairs = [pair for pair in found.pairs if is_wanted(*(half.key for half in (pair.a, pair.b) if half is not None))]
    changes = [_structure(pair) for pair in pairs]
    if values:
        changes = _values(a, b, pairs, changes, workers, progress)
    notices = [*said, *found.notices]
    return Diff(a, b, found.aligned_by, values, changes, found.models, _config(*found.models), notices)


def _structure(pair: AlignedTensor) -> Change:
    if pair.a is None or pair.b is None:
        return Change("only_a" if pair.b is None else "only_b", pair.a, pair.b)
    if pair.a.shape != pair.b.shape:
        return Change("shape", pair.a, pair.b)
    return Change("same" if pair.a.dtype == pair.b.dtype else "dtype", pair.a, pair.b)


def _values(
    a: Identified,
    b: Identified,
    pairs: Sequence[AlignedTensor],
    structure: Sequence[Change],
    workers: int,
    progress: ProgressCallback | None,
) -> list[Change]:
    wanted = [at for at, pair in enumerate(pairs) if pair.replicas or _is_comparable(structure[at])]
    items = [((structure[at], pairs[at]), _cost(structure[at], pairs[at])) for at in wanted]
    start = partial(_comparing, a.stored, b.stored)
    found = pool.run_in_processes(items, start, workers=workers, phase="comparing", progress=progress)
    out, digests = list(structure), {}
    for at, (delta, rounding, note, sums) in zip(wanted, found, strict=True):
        change = structure[at]
        is_other = bool(note or (delta is not None and delta.differing))
        status: Status = "differs" if is_other and change.status in _COMPARED else change.status
        out[at] = Change(status, change.a, change.b, delta, note, rounding)
        digests[at] = sums
    return _exchanged(out, digests)


def _comparing(
    a: StoredTensors, b: StoredTensors, counter: ProgressCounter
) -> Callable[[tuple[Change, AlignedTensor]], _Compared]:
    """The function that compares a pair, in one worker."""
    movers = BlockReader(a), BlockReader(b)

    def work(item: tuple[Change, AlignedTensor]) -> _Compared:
        change, pair = item
        delta, rounding, note, sums = None, None, "", ("", "")
        if change.a is not None and change.b is not None and _is_comparable(change):
            delta, rounding, sums = _delta(*movers, change.a, change.b, counter)
            if delta.differing and _is_reordered(*movers, pair):
                note = _ROW_ORDER
        for side, check in pair.replicas:
            note = note if _is_copy(movers[side], check, counter) else check.message
        return delta, rounding, note, sums

    return work


def _cost(change: Change, pair: AlignedTensor) -> int:
    """The bytes of a that are read, and those of the replicas that are compared."""
    copies = sum(dtypes.nbytes(check.dtype, check.left.shape) for _, check in pair.replicas)
    return copies + (change.nbytes if _is_comparable(change) else 0)


def _is_comparable(change: Change) -> bool:
    if change.status not in _COMPARED:
        return False
    return change.a is not None and change.b is not None and numeric.comparable(change.a.dtype, change.b.dtype)


def _delta(
    left: BlockReader, right: BlockReader, a: TensorSide, b: TensorSide, counter: ProgressCounter
) -> tuple[Delta, Rounding | None, _Sums]:
    """The difference between two tensors, the cast that explains it, and a checksum of each, "" if they are equal."""
    counted = 0
    if a.dtype == b.dtype:
        # Most tensors are equal, and comparing bytes is several times as fast as computing a difference.
        found = first_difference(
            left, right, TypedTensor(a.tensor, a.element), TypedTensor(b.tensor, b.element), counter
        )
        if found is None:
            nothing = numeric.Comparison(a.dtype, b.dtype).result()
            relative = None if a.packed else 0.0
            return replace(nothing, count=a.tensor.size, relative_norm=relative), None, ("", "")
        counted = found
    comparison, search = numeric.Comparison(a.dtype, b.dtype), RoundingSearch(a.dtype, b.dtype)
    digests = xxhash.xxh3_128(), xxhash.xxh3_128()
    seen, block = 0, min(block_elements(a.element, a.element), block_elements(b.element, b.element))
    for offset, (ours, theirs) in aligned_blocks((a.tensor, b.tensor), block):
        one, other = left.read(ours, a.element, a.element), right.read(theirs, b.element, b.element)
        comparison.add(one, other, offset)
        search.add(one, other)
        digests[0].update(one)
        digests[1].update(other)
        seen += len(one)
        if seen > counted:
            counter.add(len(one))
    delta = comparison.result()
    return delta, search.found if delta.differing else None, (digests[0].hexdigest(), digests[1].hexdigest())


def _is_reordered(left: BlockReader, right: BlockReader, pair: AlignedTensor) -> bool:
    """Whether b's tensor is a's in the other RoPE layout: a permutation that was missed, or done twice."""
    if pair.a is None or pair.b is None or pair.a.dtype != pair.b.dtype:
        return False
    one = TypedTensor(pair.a.tensor, pair.a.dtype)
    return any(
        first_difference(left, right, one, TypedTensor(tensor, pair.b.dtype)) is None for tensor in pair.reordered
    )


def _exchanged(changes: list[Change], digests: Mapping[int, _Sums]) -> list[Change]:
    """Note for each tensor that differs whether b has there what a has under another key."""
    places = {(changes[at].shape, ours): changes[at].key for at, (ours, _) in digests.items() if ours}
    out = list(changes)
    for at, (_, theirs) in digests.items():
        change = changes[at]
        other = places.get((change.shape, theirs))
        if other is not None and not change.note and change.a and change.b and change.a.dtype == change.b.dtype:
            out[at] = replace(change, note=f"b has here what a has as {other}")
    return out


def _is_copy(mover: BlockReader, check: Equality, counter: ProgressCounter) -> bool:
    """Whether a replica on another rank is equal to the one that is compared."""
    left, right = TypedTensor(check.left, check.dtype), TypedTensor(check.right, check.dtype)
    return first_difference(mover, BlockReader(mover.stored), left, right, counter) is None


def _config(left: Model | None, right: Model | None) -> list[tuple[str, Any, Any]]:
    """The settings that both configs state and that differ."""
    if left is None or right is None:
        return []
    ours, theirs = _settings(left), _settings(right)
    return [(name, ours[name], theirs[name]) for name in ours if name in theirs and ours[name] != theirs[name]]


def _settings(model: Model) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: size for name, size in model.dims.items() if name not in model.dims.decided_by_weights
    }
    try:
        rope = read_rope(model.config)
        found |= {"rope_theta": rope.theta, "rope_scaling": {"rope_type": rope.kind, **rope.parameters}}
    except ConfigError:
        pass
    found |= {name: model.config[name] for name in _SETTINGS if name in model.config}
    if model.tied is None:
        found.pop("tie_word_embeddings", None)
    return {name: value for name, value in found.items() if value is not None}


def _side(checkpoint: Identified, model: Model | None) -> dict[str, Any]:
    tensors = checkpoint.tensors.values()
    known = all(info.settled for info in tensors)
    return {
        "path": str(checkpoint.place),
        "format": checkpoint.format,
        "family": model.family.name if model else None,
        "model_parallel": len(checkpoint.ranks) if checkpoint.format == "meta" else None,
        "tensors": len(checkpoint.tensors),
        "parameters": sum(prod(info.shape) for info in tensors) if known else None,
        "bytes": sum(info.nbytes for info in tensors),
    }
