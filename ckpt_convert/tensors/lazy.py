"""Lazy tensors: strided views into stored tensors, rearranged without reading a byte.

Every step between two layouts (a RoPE layout, a split across ranks, a transpose) only changes where elements come from.
A ``LazyTensor`` stores that as tiles with strides, so a step followed by its inverse cancels: the strides are those of
a plain copy again. Sizes, offsets and strides are in elements throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple, TypeVar

from ckpt_convert.tensors.axes import (
    Axis,
    axis_size,
    iter_elements,
    match_axes,
    merge_runs,
    slice_axis,
    split_axis,
    split_rows,
    splits_evenly,
)
from ckpt_convert.values import frozen

T = TypeVar("T")

ZEROS = -1
"""The source of elements that are zero and stored nowhere."""

BLOCK = 2 << 20
"""Bytes of the buffer of a block, by which tensors are moved."""

SCRATCH = 8 << 20
"""Bytes of the buffer that source rows are read into before they are put in order."""


class Tile(NamedTuple):
    """A box of a lazy tensor that comes from one source: at ``origin``, starting at element ``offset`` there."""

    origin: tuple[int, ...]
    source: int
    offset: int
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis_size(axis) for axis in self.axes)


@frozen(slots=True)
class Copy:
    """Elements to move: ``dims`` are (count, source stride, target stride), outermost first in the target."""

    source: int
    source_offset: int
    target_offset: int
    dims: tuple[tuple[int, int, int], ...]


class LazyTensor(NamedTuple):
    """A tensor of ``shape`` whose elements come from the tiles; the tiles cover it once, without overlap."""

    shape: tuple[int, ...]
    tiles: tuple[Tile, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def sources(self) -> frozenset[int]:
        """The sources that elements come from, without ZEROS."""
        return frozenset(tile.source for tile in self.tiles if tile.source != ZEROS)

    def with_sources(self, numbers: Mapping[int, int]) -> LazyTensor:
        """The same elements with the sources renumbered; those that ``numbers`` lacks keep theirs."""
        tiles = (tile._replace(source=numbers.get(tile.source, tile.source)) for tile in self.tiles)
        return LazyTensor(self.shape, tuple(tiles))

    @property
    def contiguous_source(self) -> tuple[int, int] | None:
        """(source, offset) if this is one contiguous range of one source, else None."""
        if len(self.tiles) != 1 or self.tiles[0].source == ZEROS:
            return None
        if self.tiles[0].axes == _dense(self.shape)[1]:
            return self.tiles[0].source, self.tiles[0].offset
        (copy,) = self.copies()
        if copy.dims in ((), ((self.size, 1, 1),)):
            return copy.source, copy.source_offset
        return None

    def narrow(self, axis: int, start: int, size: int) -> LazyTensor:
        """Elements ``start`` to ``start + size`` along ``axis``."""
        if start == 0 and size == self.shape[axis]:
            return self
        tiles: list[Tile] = []
        for tile in self.tiles:
            first = tile.origin[axis]
            low = max(first, start)
            high = min(first + axis_size(tile.axes[axis]), start + size)
            if low >= high:
                continue
            for at, shift, runs in slice_axis(tile.axes[axis], low - first, high - low):
                origin = _replaced(tile.origin, axis, low - start + at)
                tiles.append(Tile(origin, tile.source, tile.offset + shift, _replaced(tile.axes, axis, runs)))
        return LazyTensor(_replaced(self.shape, axis, size), tuple(tiles))

    def flat_range(self, start: int, stop: int) -> Iterator[LazyTensor]:
        """The elements ``start`` to ``stop`` in row-major order, as a few boxes of the tensor, in order."""
        if start >= stop:
            return
        if stop - start == self.size:
            yield self
            return
        if self.contiguous_source is not None and len(self.shape) > 1:
            yield from self.reshape((self.size,)).flat_range(start, stop)
            return
        row = self.size // self.shape[0]
        first, last = -(-start // row), stop // row
        if first > last:  # all of it is in one row
            yield from self.select(last).flat_range(start - last * row, stop - last * row)
            return
        if start < first * row:
            yield from self.select(first - 1).flat_range(start - (first - 1) * row, row)
        if first < last:
            yield self.narrow(0, first, last - first)
        if last * row < stop:
            yield from self.select(last).flat_range(0, stop - last * row)

    def select(self, index: int) -> LazyTensor:
        """The tensor at ``index`` of the first axis, without that axis, as torch's ``select(0, index)``."""
        tensor = self.narrow(0, index, 1)
        tiles = tuple(Tile(tile.origin[1:], tile.source, tile.offset, tile.axes[1:]) for tile in tensor.tiles)
        return LazyTensor(self.shape[1:], tiles)

    def unsqueeze(self) -> LazyTensor:
        """The tensor with a new first axis of size 1, as torch's ``unsqueeze(0)``."""
        tiles = tuple(Tile((0, *tile.origin), tile.source, tile.offset, ((), *tile.axes)) for tile in self.tiles)
        return LazyTensor((1, *self.shape), tiles)

    def permute(self, order: Sequence[int]) -> LazyTensor:
        """The axes in another order, as torch's ``permute``."""
        tiles = tuple(
            Tile(tuple(t.origin[a] for a in order), t.source, t.offset, tuple(t.axes[a] for a in order))
            for t in self.tiles
        )
        return LazyTensor(tuple(self.shape[a] for a in order), tiles)

    def reorder(self, axis: int, sizes: Sequence[int], order: Sequence[int]) -> LazyTensor:
        """Split ``axis`` into ``sizes``, permute those to ``order``, and flatten them into one axis again.

        ``sizes[0]`` is ignored: it is as many groups as the axis has. Raises ValueError if it does not hold whole ones.
        """
        group = prod(sizes[1:])
        if order[0] != 0:
            raise ValueError("the outermost part, the groups, must stay first")
        if self.shape[axis] % group:
            raise ValueError(f"{self.shape[axis]} rows are not a multiple of groups of {group}")
        tiles = []
        for tile in self.tiles:
            count = axis_size(tile.axes[axis])
            if count % group or tile.origin[axis] % group or not splits_evenly(tile.axes[axis], group):
                return self._reordered(axis, (self.shape[axis] // group, *sizes[1:]), order)
            parts = split_axis(tile.axes[axis], (count // group, *sizes[1:]))
            runs = merge_runs([run for part in order for run in parts[part]])
            tiles.append(Tile(tile.origin, tile.source, tile.offset, _replaced(tile.axes, axis, runs)))
        return LazyTensor(self.shape, tuple(tiles))

    def _reordered(self, axis: int, sizes: tuple[int, ...], order: Sequence[int]) -> LazyTensor:
        """``reorder`` where a group spans several tiles, as in a tensor that was split at arbitrary rows."""
        before, after = self.shape[:axis], self.shape[axis + 1 :]
        parts = self.reshape((*before, *sizes, *after))
        moved = parts.permute(
            [*range(axis), *(axis + part for part in order), *range(axis + len(sizes), len(parts.shape))]
        )
        return moved.reshape(self.shape)

    def reshape(self, shape: Sequence[int]) -> LazyTensor:
        """The same elements, in row-major order, in another shape, as torch's ``reshape``.

        Raises ValueError for a shape with another number of elements.
        """
        shape = tuple(shape)
        if prod(shape) != self.size:
            raise ValueError(f"{list(self.shape)} cannot be reshaped to {list(shape)}")
        if not self.size:
            origin, axes = _dense(shape)
            return LazyTensor(shape, tuple(Tile(origin, t.source, t.offset, axes) for t in self.tiles))
        tensor = self._chosen([at for at, size in enumerate(self.shape) if size != 1])
        wide = tuple(size for size in shape if size != 1)
        for at, count, sizes in reversed(list(match_axes(tensor.shape, wide))):
            tensor = tensor._merge(at, count)._split(at, sizes)
        numbers = iter(range(len(wide)))
        return tensor._chosen([next(numbers) if size != 1 else None for size in shape])

    def _chosen(self, axes: Sequence[int | None]) -> LazyTensor:
        """Select these axes, with a new one of size 1 for each None; axes left out must have size 1."""
        tiles = tuple(
            Tile(
                tuple(0 if a is None else t.origin[a] for a in axes),
                t.source,
                t.offset,
                tuple(() if a is None else t.axes[a] for a in axes),
            )
            for t in self.tiles
        )
        return LazyTensor(tuple(1 if a is None else self.shape[a] for a in axes), tiles)

    def _merge(self, at: int, count: int) -> LazyTensor:
        """``count`` axes from ``at`` as one."""
        if count == 1:
            return self
        tensor = self._merge(at + 1, count - 1)
        outer, inner = tensor.shape[at], tensor.shape[at + 1]
        tiles: list[Tile] = []
        for tile in tensor.tiles:
            above, below = tile.axes[at], tile.axes[at + 1]
            # Only a tile that fills the inner axis continues in its next row.
            rows = [(0, 0, above)] if axis_size(below) == inner else list(iter_elements(above))
            for row, shift, runs in rows:
                start = (tile.origin[at] + row) * inner + tile.origin[at + 1]
                origin = (*tile.origin[:at], start, *tile.origin[at + 2 :])
                axes = (*tile.axes[:at], merge_runs((*runs, *below)), *tile.axes[at + 2 :])
                tiles.append(Tile(origin, tile.source, tile.offset + shift, axes))
        return LazyTensor((*tensor.shape[:at], outer * inner, *tensor.shape[at + 2 :]), tuple(tiles))

    def _split(self, at: int, sizes: tuple[int, ...]) -> LazyTensor:
        """The axis ``at`` as axes of ``sizes``."""
        if len(sizes) == 1:
            return self
        outer, inner = sizes[0], prod(sizes[1:])
        tiles: list[Tile] = []
        for tile in self.tiles:
            for start, shift, runs in split_rows(tile.axes[at], tile.origin[at], inner):
                row, column = divmod(start, inner)
                size = axis_size(runs)
                above, below = ((), runs) if size < inner else split_axis(runs, (size // inner, inner))
                origin = (*tile.origin[:at], row, column, *tile.origin[at + 1 :])
                axes = (*tile.axes[:at], above, below, *tile.axes[at + 1 :])
                tiles.append(Tile(origin, tile.source, tile.offset + shift, axes))
        tensor = LazyTensor((*self.shape[:at], outer, inner, *self.shape[at + 1 :]), tuple(tiles))
        return tensor._split(at + 1, sizes[1:])

    def copies(self) -> tuple[Copy, ...]:
        """The copies that make this tensor, dense and row-major, with as few dimensions as possible."""
        if not self.size:
            return tuple(Copy(tile.source, tile.offset, 0, ((0, 1, 1),)) for tile in self.tiles)
        strides = row_major_strides(self.shape)
        return tuple(_copy(tile, strides) for tile in self.tiles)

    def blocks(self, max_elements: int) -> Iterator[tuple[int, LazyTensor]]:
        """Split into (target offset, block) of at most ``max_elements``, each contiguous in the target, in order."""
        stored, row = self.contiguous_source, prod(self.shape[1:])
        if stored is None or not 0 < row <= max_elements:
            for offset, (block,) in aligned_blocks((self,), max_elements):
                yield offset, block
            return
        step = max_elements // row * row  # whole rows, since some sources compute a row at a time
        for start in range(0, self.size, step):
            yield start, _flat(stored[0], stored[1] + start, min(step, self.size - start))


def aligned_blocks(tensors: tuple[LazyTensor, ...], max_elements: int) -> Iterator[tuple[int, tuple[LazyTensor, ...]]]:
    """Split tensors of one shape at the same offsets, as ``LazyTensor.blocks`` splits one."""
    yield from _blocks(tensors, 0, 0, max(1, max_elements))


def from_source(source: int, shape: Sequence[int], strides: Sequence[int] | None = None) -> LazyTensor:
    """The tensor stored as number ``source``, dense and row-major unless ``strides`` are given."""
    shape = tuple(shape)
    origin, axes = _dense(shape) if strides is None else _strided(shape, strides)
    return LazyTensor(shape, (Tile(origin, source, 0, axes),))


def zeros(shape: Sequence[int]) -> LazyTensor:
    """A tensor of zeros, which is stored nowhere."""
    return from_source(ZEROS, shape)


def concat(parts: Sequence[LazyTensor], axis: int) -> LazyTensor:
    """Concatenate along ``axis``; all other sizes must agree.

    Slices of one tile that are concatenated again become one tile again.
    """
    tiles: list[Tile] = []
    start = 0
    for part in parts:
        for tile in part.tiles:
            origin = _replaced(tile.origin, axis, tile.origin[axis] + start)
            moved = Tile(origin, tile.source, tile.offset, tile.axes)
            longer = _continued(tiles[-1], moved, axis) if tiles else None
            if longer is None:
                tiles.append(moved)
            else:
                tiles[-1] = longer
        start += part.shape[axis]
    return LazyTensor(_replaced(parts[0].shape, axis, start), tuple(tiles))


def stack(parts: Sequence[LazyTensor], sizes: Sequence[int]) -> LazyTensor:
    """Stack parts of one shape under new leading axes of ``sizes``, the last of them fastest."""
    tensor = concat([part.unsqueeze() for part in parts], 0)
    return tensor if len(sizes) == 1 else tensor.reshape((*sizes, *parts[0].shape))


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor, last axis fastest."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


@lru_cache(maxsize=1 << 10)
def _dense(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[Axis, ...]]:
    """The origin and axes of a dense tensor of this shape; cached, as a model has many of one shape."""
    return _strided(shape, row_major_strides(shape))


def _strided(shape: tuple[int, ...], strides: Sequence[int]) -> tuple[tuple[int, ...], tuple[Axis, ...]]:
    axes = tuple(((count, step),) if count != 1 else () for count, step in zip(shape, strides, strict=True))
    return (0,) * len(shape), axes


def _flat(source: int, offset: int, size: int) -> LazyTensor:
    """Elements that are adjacent in a source."""
    return LazyTensor((size,), (Tile((0,), source, offset, (((size, 1),) if size != 1 else (),)),))


def _replaced(values: tuple[T, ...], at: int, value: T) -> tuple[T, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _continued(tile: Tile, after: Tile, axis: int) -> Tile | None:
    """Both tiles as one if the second continues the first along ``axis``, else None."""
    if tile.source != after.source or tile.origin[:axis] != after.origin[:axis]:
        return None
    if tile.origin[axis + 1 :] != after.origin[axis + 1 :]:
        return None
    if tile.axes[:axis] != after.axes[:axis] or tile.axes[axis + 1 :] != after.axes[axis + 1 :]:
        return None
    if tile.origin[axis] + axis_size(tile.axes[axis]) != after.origin[axis]:
        return None
    step = after.offset - tile.offset
    ours, theirs = tile.axes[axis], after.axes[axis]
    runs: Axis | None = None
    if ours and theirs and ours[0][1] == theirs[0][1] and ours[1:] == theirs[1:] and step == ours[0][0] * ours[0][1]:
        runs = ((ours[0][0] + theirs[0][0], ours[0][1]), *ours[1:])
    elif ours == theirs and step > 0:
        runs = ((2, step), *ours)
    elif ours and ours[1:] == theirs and step == ours[0][0] * ours[0][1]:
        runs = ((ours[0][0] + 1, ours[0][1]), *theirs)
    elif theirs and theirs[1:] == ours and step == theirs[0][1]:
        runs = ((theirs[0][0] + 1, theirs[0][1]), *ours)
    return Tile(tile.origin, tile.source, tile.offset, _replaced(tile.axes, axis, merge_runs(runs))) if runs else None


def _copy(tile: Tile, strides: Sequence[int]) -> Copy:
    offset = 0
    dims: list[tuple[int, int, int]] = []
    for axis, start, target in zip(tile.axes, tile.origin, strides, strict=True):
        offset += start * target
        step = axis_size(axis)
        for count, source in axis:
            step //= count
            if count == 1:
                continue
            dim = (count, source, step * target)
            if dims and dims[-1][1] == count * dim[1] and dims[-1][2] == count * dim[2]:
                dims[-1] = (dims[-1][0] * count, dim[1], dim[2])
            else:
                dims.append(dim)
    return Copy(tile.source, tile.offset, offset, tuple(dims))


def _blocks(
    tensors: tuple[LazyTensor, ...], axis: int, base: int, max_elements: int
) -> Iterator[tuple[int, tuple[LazyTensor, ...]]]:
    size, shape = tensors[0].size, tensors[0].shape
    if size <= max_elements or axis == len(shape):
        if size:
            yield base, tensors
        return
    inner = size // shape[axis]
    step = _aligned(tensors, axis, max(1, max_elements // inner))
    for start, blocks in _every(tensors, axis, 0, step):
        if blocks[0].shape[axis] * inner <= max_elements:
            yield base + start * inner, blocks
        else:
            yield from _blocks(blocks, axis + 1, base + start * inner, max_elements)


def _every(
    tensors: tuple[LazyTensor, ...], axis: int, start: int, step: int
) -> Iterator[tuple[int, tuple[LazyTensor, ...]]]:
    """(start, part) of tensors split along ``axis`` every ``step``.

    Splits in halves, recursively, so that each split only visits the tiles nearby: stacked experts are one tile each.
    """
    size = tensors[0].shape[axis]
    if size <= step:
        yield start, tensors
        return
    half = -(-size // step) // 2 * step
    yield from _every(tuple(tensor.narrow(axis, 0, half) for tensor in tensors), axis, start, step)
    yield from _every(tuple(tensor.narrow(axis, half, size - half) for tensor in tensors), axis, start + half, step)


def _aligned(tensors: tuple[LazyTensor, ...], axis: int, step: int) -> int:
    """At most ``step``, and a multiple of the axis' inner runs where possible, so that no group is split."""
    runs = max((tile.axes[axis] for tensor in tensors for tile in tensor.tiles), key=len, default=())
    for inner in range(1, len(runs)):
        group = axis_size(runs[inner:])
        if group <= step:
            return step - step % group
    return step
