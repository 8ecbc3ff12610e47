"""Whether two tensors differ by the rounding of a cast alone: every value of one side is that of the other, rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ckpt_convert.dtypes import CASTABLE, DTYPES
from ckpt_convert.tensors.casts import Caster

_STEPS = ("F32", "BF16", "F16")
"""The dtypes that values are rounded to where weights are cast."""

_FEW = 4096
"""Elements that are looked at first: they rule out most casts, at a fraction of the cost of a block."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """``side`` is the one that was rounded, ``dtype`` (as safetensors spells it) is what its values were rounded to."""

    side: Literal["a", "b"]
    dtype: str


class RoundingSearch:
    """The casts that may explain a difference, fewer with every block of the two tensors that is added.

    A tensor may have been cast to another dtype than it has now: bfloat16 weights that went through float16, say.
    """

    def __init__(self, dtype_a: str, dtype_b: str) -> None:
        self._dtypes = dtype_a, dtype_b
        self._casters = Caster(), Caster()
        self._left: list[Rounding] = []
        if dtype_a in CASTABLE and dtype_b in CASTABLE:
            self._left = [Rounding("b", step) for step in _rounds(dtype_a, dtype_b)]
            self._left += [Rounding("a", step) for step in _rounds(dtype_b, dtype_a)]

    def add(self, a: memoryview, b: memoryview) -> None:
        """Drop the casts that do not explain these elements, the same of both tensors."""
        if not self._left:  # of dtypes that no cast leads to, such as packed ones, the sizes may not be known
            return
        one, other = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
        sizes = [DTYPES[dtype].bits // 8 for dtype in self._dtypes]
        for count in (_FEW, len(one)):
            if self._left:
                few, same = one[: count * sizes[0]], other[: count * sizes[1]]
                self._left = [rounding for rounding in self._left if self._explains(rounding, few, same)]

    @property
    def found(self) -> Rounding | None:
        """The first cast that explains all elements that were added."""
        return self._left[0] if self._left else None

    def _explains(self, rounding: Rounding, a: np.ndarray, b: np.ndarray) -> bool:
        (exact, rounded), (source, target) = ((a, b), self._dtypes)
        if rounding.side == "a":
            exact, rounded, source, target = rounded, exact, target, source
        for caster, step in zip(self._casters, (rounding.dtype, target), strict=True):
            if source != step:
                exact, _ = caster.cast(exact, source, step)
                source = step
        return np.array_equal(exact, rounded)


def _rounds(source: str, target: str) -> list[str]:
    """The dtypes by way of which a cast from ``source`` to ``target`` rounds, the target first."""
    steps = dict.fromkeys((target, *_STEPS))
    return [step for step in steps if step != source and _loses(source, step)]


def _loses(source: str, step: str) -> bool:
    one, other = DTYPES[source], DTYPES[step]
    return one.mantissa > other.mantissa or one.exponent > other.exponent
