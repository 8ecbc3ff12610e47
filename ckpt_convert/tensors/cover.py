"""Whether boxes cover a tensor exactly, each element once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product

Sizes = tuple[int, ...]

Box = tuple[Sizes, Sizes]
"""(origin, shape) of a part of a tensor."""


def cut_axes(boxes: Sequence[Box], shape: Sizes) -> list[int]:
    """The axes on which some box is not as long as the tensor."""
    return [at for at, size in enumerate(shape) if any(one[1][at] != size for one in boxes)]


def covers(boxes: Sequence[Box], shape: Sizes) -> bool:
    """Whether boxes within a shape cover it exactly, each element once; linear in their number.

    A corner of a box counts +1 where an even number of its coordinates are those of the box's end, else -1. These sums
    determine the elements of each box (they are its differences along every axis), so the boxes tile the shape exactly
    if, corner by corner, theirs add up to that of the shape.
    """
    cut = cut_axes(boxes, shape)
    signs = [(ends, -1 if sum(ends) % 2 else 1) for ends in product((0, 1), repeat=len(cut))]
    corners: Counter[Sizes] = Counter()
    for origin, sizes in boxes:
        sides = [(origin[at], origin[at] + sizes[at]) for at in cut]
        for ends, sign in signs:
            corners[tuple([side[end] for side, end in zip(sides, ends, strict=True)])] += sign
    for ends, sign in signs:
        corners[tuple([shape[at] * end for at, end in zip(cut, ends, strict=True)])] -= sign
    return not any(corners.values())
