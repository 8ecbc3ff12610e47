"""Axes of strided views: an axis is nested runs of elements, sliced, split and merged by arithmetic alone.

Positions, sizes and strides are in elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Run = tuple[int, int]
"""(count, stride): ``count`` elements, ``stride`` apart in the source."""

Axis = tuple[Run, ...]
"""One axis as nested runs, outermost first; its size is the product of the counts, () has size 1."""


def axis_size(axis: Axis) -> int:
    size = 1
    for count, _ in axis:
        size *= count
    return size


def merge_runs(runs: Sequence[Run]) -> Axis:
    """The same elements as as few runs as possible."""
    out: list[Run] = []
    for count, stride in runs:
        if count == 1:
            continue
        if out and out[-1][1] == count * stride:
            out[-1] = (out[-1][0] * count, stride)
        else:
            out.append((count, stride))
    return tuple(out)


def split_axis(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Split the axis into one of each size; ValueError if a run would have to be split unevenly."""
    runs = list(axis)
    parts: list[Axis] = []
    for size in reversed(sizes):
        taken: list[Run] = []
        need = size
        while need > 1:
            if not runs:
                raise ValueError(f"an axis of {axis_size(axis)} has no parts of {list(sizes)}")
            count, stride = runs.pop()
            if need % count == 0:
                taken.insert(0, (count, stride))
                need //= count
            elif count % need == 0:
                taken.insert(0, (need, stride))
                runs.append((count // need, stride * need))
                need = 1
            else:
                raise ValueError(f"an axis of {axis_size(axis)} has no parts of {list(sizes)}")
        parts.insert(0, tuple(taken))
    return parts


def slice_axis(axis: Axis, start: int, size: int) -> Iterator[tuple[int, int, Axis]]:
    """Elements ``start`` to ``start + size`` as pieces (position in the slice, source offset, axis)."""
    if size == axis_size(axis):
        yield 0, 0, axis
        return
    stride, inner = axis[0][1], axis[1:]
    if not inner:
        yield 0, start * stride, merge_runs([(size, stride)])
        return
    step = axis_size(inner)
    end = start + size
    at = start
    while at < end:
        index, within = divmod(at, step)
        if within == 0 and end - at >= step:
            whole = (end - at) // step
            yield at - start, index * stride, merge_runs([(whole, stride), *inner])
            at += whole * step
        else:
            length = min(step - within, end - at)
            for piece, shift, runs in slice_axis(inner, within, length):
                yield at - start + piece, index * stride + shift, runs
            at += length


def match_axes(old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Match axes of equal product: (first in ``old``, how many, their sizes in ``new``), the fewest at a time."""
    at = to = 0
    while at < len(old):
        start, begin = at, to
        left, right = old[at], new[to]
        at, to = at + 1, to + 1
        while left != right:
            if left < right:
                left *= old[at]
                at += 1
            else:
                right *= new[to]
                to += 1
        yield start, at - start, new[begin:to]


def iter_elements(axis: Axis) -> Iterator[tuple[int, int, Axis]]:
    """The axis element by element, as (position, source offset, the axis of one element)."""
    for at in range(axis_size(axis)):
        for _, shift, runs in slice_axis(axis, at, 1):
            yield at, shift, runs


def split_rows(axis: Axis, start: int, inner: int) -> Iterator[tuple[int, int, Axis]]:
    """Split the axis, which starts at ``start``, into pieces of whole rows of ``inner``, or within one row.

    Yields (start of the piece, source offset, axis).
    """
    at, size = 0, axis_size(axis)
    while at < size:
        within, left = (start + at) % inner, size - at
        count = left - left % inner if not within and left >= inner else min(inner - within, left)
        for piece, shift, runs in slice_axis(axis, at, count):
            first = start + at + piece
            if first % inner + axis_size(runs) <= inner or (first % inner == 0 and splits_evenly(runs, inner)):
                yield first, shift, runs
            else:
                yield from ((s, shift + more, r) for s, more, r in _one_by_one(runs, first, inner))
        at += count


def _one_by_one(axis: Axis, start: int, inner: int) -> Iterator[tuple[int, int, Axis]]:
    """Split the axis into pieces that are each within one row of ``inner``."""
    at, size = 0, axis_size(axis)
    while at < size:
        count = min(inner - (start + at) % inner, size - at)
        for piece, shift, runs in slice_axis(axis, at, count):
            yield start + at + piece, shift, runs
        at += count


def splits_evenly(axis: Axis, inner: int) -> bool:
    """Whether the axis can be split into rows of ``inner``."""
    try:
        split_axis(axis, (axis_size(axis) // inner, inner))
    except ValueError:
        return False
    return axis_size(axis) % inner == 0
