"""One tensor of a comparison: what differs, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ckpt_convert.analysis.diff.alignment import TensorSide
from ckpt_convert.analysis.stats.numeric import Delta
from ckpt_convert.analysis.stats.rounding import Rounding

Status = Literal["same", "differs", "shape", "dtype", "only_a", "only_b"]
STATUSES: tuple[Status, ...] = ("same", "differs", "shape", "dtype", "only_a", "only_b")


@dataclass(frozen=True, slots=True)
class Change:
    """One tensor of the comparison.

    ``status`` is "dtype" if the values are the same in another dtype; "differs" if a value is not, whatever the dtypes.
    ``delta`` is None if values were not compared; ``where`` and ``first`` are indices into the tensor as a stores it
    (ranks joined), of the largest |Δ| and of the first difference. ``note`` names a likely cause; ``rounding`` is the
    cast that explains every difference, if one does.
    """

    status: Status
    a: TensorSide | None
    b: TensorSide | None
    delta: Delta | None = None
    note: str = ""
    rounding: Rounding | None = None

    @property
    def key(self) -> str:
        """The key in a, or in b where only b has it."""
        return self._half.key

    @property
    def nbytes(self) -> int:
        return self._half.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        return self._half.shape

    @property
    def where(self) -> tuple[int, ...] | None:
        return _index(self.delta.at, self.shape) if self.delta else None

    @property
    def first(self) -> tuple[int, ...] | None:
        return _index(self.delta.first, self.shape) if self.delta else None

    def is_within(self, tolerance: float | None) -> bool:
        """Whether the values differ by no more than this ‖Δ‖/‖a‖, and nothing else is wrong with the tensor."""
        delta = self.delta
        if tolerance is None or delta is None or self.status != "differs" or self.note or delta.nan_mismatch:
            return False
        return delta.max_abs == 0 or (delta.relative_norm is not None and delta.relative_norm <= tolerance)

    def as_dict(self) -> dict[str, Any]:
        """The change as JSON-ready values."""
        a, b, delta = self.a, self.b, self.delta
        numbers = None
        if delta is not None:
            numbers = asdict(delta)
            del numbers["at"]
            numbers |= {
                "where": None if self.where is None else list(self.where),
                "first": None if self.first is None else list(self.first),
            }
        return {
            "key_a": a.key if a else None,
            "key_b": b.key if b else None,
            "status": self.status,
            "shape_a": list(a.shape) if a else None,
            "shape_b": list(b.shape) if b else None,
            "dtype_a": a.dtype if a else None,
            "dtype_b": b.dtype if b else None,
            "nbytes": self.nbytes,
            "note": self.note or None,
            "rounding": None if self.rounding is None else asdict(self.rounding),
            "delta": numbers,
        }

    @property
    def _half(self) -> TensorSide:
        half = self.a or self.b
        if half is None:
            raise ValueError("a change is of a tensor that one side has at least")
        return half


def _index(flat: int | None, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The index of an element from its row-major flat index."""
    if flat is None:
        return None
    out = []
    for size in reversed(shape):
        flat, at = divmod(flat, size)
        out.append(at)
    return tuple(reversed(out))
