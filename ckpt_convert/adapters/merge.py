"""Merged weights of a training model with adapters, computed when they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ckpt_convert.adapters.arithmetic import BLOCK_ROWS, Array, LastBlock, Ranges, RowBlocks, Tiles, merge_blocks
from ckpt_convert.adapters.config import AdapterConfig
from ckpt_convert.adapters.modules import Modules
from ckpt_convert.adapters.parameters import SplitTensors
from ckpt_convert.errors import ConfigError
from ckpt_convert.wording import indented_list

# Torch starts its own threads for large operations: a background thread must not wait for the cores that training uses.
_PIECE = (1 << 15) - 1


@dataclass(frozen=True)
class Merge:
    """The adapter of one weight and its scale; ``a`` [rank, in], ``b`` [out, rank], ``magnitude`` [out] with DoRA."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    def rows(self, weight: torch.Tensor, start: int = 0, columns: Ranges | None = None) -> torch.Tensor:
        """The merged rows for ``weight`` [n, in], rows of the base from ``start`` on; see ``merged_rows``."""
        return merged_rows(weight, self.a, self.b, self.scale, self.magnitude, start=start, columns=columns)


def plan_merges(parts: SplitTensors, config: AdapterConfig, modules: Modules) -> dict[str, Merge]:
    """The adapter to merge into each base weight, by its plain key.

    The full model has ``found.saved`` in place of ``found.base`` where it is there, then these merged.
    Raises ConfigError for an adapter on an output layer that is tied to the embedding, which would be changed as well.
    """
    tied = [module for module in parts.adapters if modules.is_tied and modules.linear[module].row.tied_to is not None]
    if tied:
        raise ConfigError(
            f"adapters cannot be merged into weights that are tied to the embedding:{indented_list(tied)}\n"
            "  save the adapter alone, or untie the model first"
        )
    return {
        f"{module}.weight": Merge(a, b, config.scale_of(*modules.both_names(module)), magnitude)
        for module, (a, b, magnitude) in parts.adapters.items()
    }


def merged_rows(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    magnitude: torch.Tensor | None = None,
    *,
    start: int = 0,
    columns: Ranges | None = None,
) -> torch.Tensor:
    """Rows ``start`` on of the merged weight, in new memory on the CPU, in the dtype of ``weight`` [n, in], the base's.

    With ``columns``, ``weight`` has these, one range after another, and not all of them; not with DoRA.

    ``a`` [rank, in], ``b`` [out, rank] and ``magnitude`` [out] are full tensors in the RoPE layout of the weight. LoRA:
    W' = W + scale · B · A. DoRA: each row of W' times magnitude / its length. Computed in float32, in float64 for a
    float64 weight. The bits of an element do not depend on the rows and columns that are asked for with it.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    count, width = weight.shape
    out = torch.empty((count, width), dtype=weight.dtype)
    base, left = torch.zeros((BLOCK_ROWS, width), dtype=dtype), torch.zeros((BLOCK_ROWS, len(a)), dtype=dtype)
    lengths = None if magnitude is None else torch.zeros(BLOCK_ROWS, dtype=dtype)
    right, merged = Tiles(_numbers(a, dtype)), np.empty((BLOCK_ROWS, width), base.numpy().dtype)
    for first in range(start - start % BLOCK_ROWS, start + count, BLOCK_ROWS):
        low, high = max(first, start), min(first + BLOCK_ROWS, start + count)
        within = slice(low - first, high - first)
        _copy(base[within], weight[low - start : high - start].detach())
        left[within] = b[low:high].detach().to("cpu", dtype)
        if lengths is not None and magnitude is not None:
            lengths[within] = magnitude[low:high].detach().to("cpu", dtype)
        norms = None if lengths is None else lengths.numpy()
        merge_blocks(base.numpy(), left.numpy(), right, scale, norms, columns=columns, out=merged)
        _copy(out[low - start : high - start], torch.from_numpy(merged)[within])
    return out


class MergedReader:
    """The bytes of a merged weight, dense and row-major, as a file reader: computed on demand.

    ``rows`` and ``columns`` are those of the base that ``weight`` has, if it does not have all; ``last`` is what it
    shares with the readers of other weights.
    """

    def __init__(
        self,
        name: str,
        weight: torch.Tensor,
        merge: Merge,
        rows: Ranges | None = None,
        columns: Ranges | None = None,
        last: LastBlock | None = None,
    ) -> None:
        self.name = name
        self.size = weight.numel() * weight.element_size()
        self._weight = weight.detach()
        self._merge = merge
        self._held = [(0, len(weight))] if rows is None else rows
        self._columns = columns
        self._blocks = RowBlocks(len(weight), weight.shape[1] * weight.element_size(), self._rows, last)
        self._overflowed: dict[int, int] = {}

    @property
    def overflowed(self) -> int:
        """The number of finite base values that became infinite in what was read so far."""
        return sum(self._overflowed.values())

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (writable, one byte an item) from byte ``offset`` on."""
        self._blocks.readinto(offset, buffer)

    def _rows(self, start: int, stop: int, out: Array) -> None:
        """Fill ``out`` with the bytes of merged rows; overflows are counted by block, as one may be read twice."""
        made = torch.from_numpy(out).view(self._weight.dtype).view(stop - start, -1)
        for first in range(start, stop, self._blocks.step):
            base = self._weight[first : min(first + self._blocks.step, stop)]
            rows = made[first - start :][: len(base)]
            at = 0
            for merged in self._merged(base, first):
                _copy(rows[at : at + len(merged)], merged)
                at += len(merged)
            if (infinite := torch.isinf(rows)).any():
                self._overflowed[first] = int((infinite & torch.isfinite(base.to(rows.device))).sum())

    def _merged(self, base: torch.Tensor, first: int) -> Iterator[torch.Tensor]:
        """The merged rows for some of the weight's, from its row ``first`` on: those of each range of the base."""
        at = 0
        for start, stop in self._held:
            low, high = max(first, at), min(first + len(base), at + stop - start)
            if low < high:
                yield self._merge.rows(base[low - first : high - first], start + low - at, self._columns)
            at += stop - start


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy rows, cast to the dtype of the target, in parts that are too small for torch to start threads."""
    step = max(1, _PIECE // max(1, target.shape[1]))
    for first in range(0, len(target), step):
        target[first : first + step].copy_(source[first : first + step])


def _numbers(tensor: torch.Tensor, dtype: torch.dtype) -> Array:
    found: Array = tensor.detach().to("cpu", dtype).contiguous().numpy()
    return found
