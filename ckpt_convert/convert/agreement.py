"""What is decided from the values of tensors before they are written, where each of several writers has a part of them.

Each writer looks at the elements that it has; what all of them have found is put together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ckpt_convert.checkpoint.mapping import Equality
from ckpt_convert.convert.execute import count_nonzero, settle_originals
from ckpt_convert.convert.partition import spans
from ckpt_convert.convert.plan import Plan
from ckpt_convert.convert.sharing import OwnParts
from ckpt_convert.convert.sources import NumberedTensors, Sources
from ckpt_convert.errors import TiedWeightsError, UsageError
from ckpt_convert.tensors.blocks import BlockReader, TypedTensor, first_difference
from ckpt_convert.tensors.header import IN_MEMORY
from ckpt_convert.tensors.lazy import ZEROS, LazyTensor
from ckpt_convert.wording import indented_list

Spans = Sequence[tuple[int, int]]


def owns(plan: Plan, source: int, first: bool) -> bool:
    """Whether a writer has what comes from a source: in its memory, or if it is the first one, in a file or zero."""
    return source not in plan.elsewhere if _is_in_memory(plan, source) else first


def own_parts(plan: Plan, first: bool) -> OwnParts:
    """What a writer has of the plan's files."""
    return OwnParts(partial(owns, plan, first=first))


def _is_in_memory(plan: Plan, source: int) -> bool:
    return source != ZEROS and plan.sources[plan.stored_in[source]].kind == IN_MEMORY


@dataclass(frozen=True)
class Look:
    """What one writer has found: for each pair how many elements it compared, and whether they are equal.

    ``nonzero`` counts, by key, values that the target cannot hold.
    """

    pairs: Sequence[tuple[int, bool]]
    nonzero: Mapping[str, int]

    def as_json(self) -> Any:
        """The findings as JSON-ready values."""
        return [[list(pair) for pair in self.pairs], dict(self.nonzero)]

    @classmethod
    def from_json(cls, content: Any) -> Look:
        """What ``as_json`` gave."""
        pairs, nonzero = content
        return cls([(int(count), bool(equal)) for count, equal in pairs], nonzero)


def look(plan: Plan, sources: Sources, first: bool) -> Look:
    """Look at what this writer has."""
    stored = NumberedTensors(plan, sources)
    left, right = BlockReader(stored), BlockReader(stored)

    pairs = [_compare(plan, left, right, pair, first) for pair in _pairs(plan)]
    nonzero = {
        check.key: sum(
            count_nonzero(left, part, check.dtype) for part in _parts(check.left, partial(owns, plan, first=first))
        )
        for check in plan.losses
    }
    return Look(pairs, nonzero)


def merge(looks: Sequence[Look]) -> Look:
    """What all writers have found together."""
    pairs = [
        (sum(count for count, _ in found), all(equal for _, equal in found))
        for found in zip(*(one.pairs for one in looks), strict=True)
    ]
    return Look(pairs, {key: sum(one.nonzero[key] for one in looks) for key in looks[0].nonzero})


def settle(plan: Plan, found: Look) -> Plan:
    """The plan to carry out, given what all writers have found together.

    Raises TiedWeightsError for pairs that have to be equal and are not, and UsageError for those of which nobody has
    both.
    """
    pairs = list(zip(_pairs(plan), found.pairs, strict=True))
    apart = [pair for pair, (count, equal) in pairs if equal and count < pair.left.size]
    if apart:
        raise UsageError(
            f"{plan.source.place}: tensors have to be compared, and no process has the same part of both; split them "
            f"alike:{indented_list([pair.message or pair.key for pair in apart])}"
        )
    checks = len(plan.checks)
    failed = [check.message for check, (_, equal) in pairs[:checks] if not equal]
    if failed:
        raise TiedWeightsError(f"{plan.source.place}: tensors that have to be equal are not:{indented_list(failed)}")
    known = iter(equal for _, (_, equal) in pairs[checks:])
    return settle_originals(plan, lambda _: next(known))


def _pairs(plan: Plan) -> Iterator[Equality]:
    """What has to be equal, and then the originals, each with what it is the original of."""
    yield from plan.checks
    for file in plan.files:
        yield from (placed.original.unchanged for placed in file.tensors if placed.original is not None)


def _compare(plan: Plan, left: BlockReader, right: BlockReader, pair: Equality, first: bool) -> tuple[int, bool]:
    one, other = (tensor.reshape((tensor.size,)) for tensor in (pair.left, pair.right))
    own, public = partial(owns, plan, first=False), partial(_is_public, plan)
    kinds = [(own, own), (own, public), (public, own), *([(public, public)] if first else [])]
    common = [span for mine, others in kinds for span in _common(_spans(one, mine), _spans(other, others))]
    count, equal = 0, True
    for start, stop in common:
        count += stop - start
        here, there = (TypedTensor(tensor.narrow(0, start, stop - start), pair.dtype) for tensor in (one, other))
        equal = equal and first_difference(left, right, here, there) is None
    return count, equal


def _is_public(plan: Plan, source: int) -> bool:
    return not _is_in_memory(plan, source)


def _spans(tensor: LazyTensor, wanted: Callable[[int], bool]) -> Spans:
    return spans(tensor, 0, tensor.size, wanted)


def _parts(tensor: LazyTensor, wanted: Callable[[int], bool]) -> Iterator[LazyTensor]:
    """The elements that come from such sources, as boxes."""
    for start, stop in _spans(tensor, wanted):
        yield from tensor.flat_range(start, stop)


def _common(one: Spans, other: Spans) -> list[tuple[int, int]]:
    """What is in both of two lists of spans in order."""
    out = []
    at = to = 0
    while at < len(one) and to < len(other):
        start, stop = max(one[at][0], other[to][0]), min(one[at][1], other[to][1])
        if start < stop:
            out.append((start, stop))
        if one[at][1] < other[to][1]:
            at += 1
        else:
            to += 1
    return out
