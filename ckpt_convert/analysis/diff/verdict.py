"""What a difference amounts to: the rounding of a cast, one cause, a small or a large change, or another model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Literal

from ckpt_convert.analysis.diff.change import Change
from ckpt_convert.dtypes import DTYPES

Kind = Literal["same", "dtype", "cast", "cause", "partial", "small", "large", "different", "unknown"]

SMALL, LARGE = 0.1, 0.5
"""Average ‖Δ‖/‖a‖ up to which a change is small, and up to which b may still be made from a.

Fine-tuning moves weights by a few percent at most, rounding to 4 bits by about a tenth. Of two models that were trained
apart no value is near the other's: ‖Δ‖/‖a‖ is then √2.
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """``kind`` for programs, ``text`` for people.

    same: bit for bit. dtype: the same values in another dtype. cast: one side is the other, rounded. cause: every
    tensor that differs has a note that explains it. partial: what both sides have is the same, and one has more.
    small, large: by the average ‖Δ‖/‖a‖. different: beyond that, or less than half of the values are in tensors that
    both sides have. unknown: no values were compared.
    """

    kind: Kind
    text: str

    def as_dict(self) -> dict[str, str]:
        """The verdict as JSON-ready values."""
        return asdict(self)


def judge(changes: Sequence[Change], *, values: bool) -> Verdict:
    """The verdict on the changes of a comparison, of ``values`` or of keys and shapes alone."""
    differing = [change for change in changes if change.status == "differs"]
    others = Counter(change.status for change in changes)
    alone = others["only_a"] + others["only_b"] + others["shape"]
    if not changes or (alone == len(changes)):
        return Verdict("different" if changes else "unknown", "no tensor is on both sides in one shape")
    if 2 * sum(map(_elements, changes)) < sum(_all_elements(change) for change in changes):
        return Verdict("different", "different models: most values are in tensors of one side, or of another shape")
    if not values:
        return Verdict("unknown", f"values were not compared{_besides(alone)}")
    if not differing:
        kind: Kind = "partial" if alone else "dtype" if others["dtype"] else "same"
        return Verdict(kind, f"the same values{' in another dtype' if others['dtype'] else ''}{_besides(alone)}")
    if all(change.note for change in differing):
        return Verdict("cause", f"every tensor that differs has a cause that is named below{_besides(alone)}")
    if all(change.rounding for change in differing) and not alone:
        return Verdict("cast", _cast(differing))
    return _by_size(changes, alone)


def _by_size(changes: Sequence[Change], alone: int) -> Verdict:
    sizes = [
        (change.delta.count, size) for change in changes if change.delta and (size := _relative(change)) is not None
    ]
    if not sizes:
        return Verdict("unknown", f"values that cannot be decoded differ{_besides(alone)}")
    mean = sum(count * size for count, size in sizes) / max(sum(count for count, _ in sizes), 1)
    infinite = sum(change.delta.nan_mismatch for change in changes if change.delta)
    more = (
        f"; {infinite:,} {'value is' if infinite == 1 else 'values are'} NaN or infinite on one side only"
        if infinite
        else ""
    )
    said = f"‖Δ‖/‖a‖ is {mean:.2g} on average{more}{_besides(alone)}"
    if mean <= SMALL:
        return Verdict("small", f"a small change: {said}")
    if mean <= LARGE:
        return Verdict("large", f"a large change: {said}")
    return Verdict("different", f"different models: {said}")


def _cast(differing: Sequence[Change]) -> str:
    casts = dict.fromkeys(change.rounding for change in differing if change.rounding)
    said = " and ".join(
        f"{cast.side} has the values of {'b' if cast.side == 'a' else 'a'} in {DTYPES[cast.dtype].torch}"
        for cast in casts
    )
    infinite = sum(change.delta.nan_mismatch for change in differing if change.delta)
    more = f", of which {infinite:,} became infinite" if infinite else ""
    return f"the rounding of a cast: {said}{more}"


def _relative(change: Change) -> float | None:
    """‖Δ‖/‖a‖ of a tensor; 1 where a is zero, None where values cannot be decoded."""
    delta = change.delta
    if delta is None or delta.max_abs is None:
        return 0.0 if delta is not None and not delta.differing else None
    return delta.relative_norm if delta.relative_norm is not None else float(delta.max_abs > 0)


def _elements(change: Change) -> int:
    """The elements of a tensor that is on both sides in one shape."""
    return prod(change.shape) if change.a and change.b and change.a.shape == change.b.shape else 0


def _all_elements(change: Change) -> int:
    return max(prod(side.shape) for side in (change.a, change.b) if side is not None)


def _besides(alone: int) -> str:
    verb = "tensor is" if alone == 1 else "tensors are"
    return f"; {alone:,} {verb} on one side only, or of another shape" if alone else ""
