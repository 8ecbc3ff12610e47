"""A plan as a collapsed tree: source keys, target keys, and the steps between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ckpt_convert.cli import colors, tree
from ckpt_convert.cli.text import can_say, columns, display_width, escape, fits, number, shape_text, shorten, wrap
from ckpt_convert.convert.explain import COPY, TensorTransform
from ckpt_convert.wording import human_bytes


@dataclass(frozen=True, slots=True)
class Group:
    """One line: ``count`` tensors whose keys differ only in their indices, and which take the same steps."""

    source: str
    target: str | None
    shape: tuple[int, ...]
    dtype: str
    target_dtype: str
    count: int
    nbytes: int
    steps: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The group as JSON-ready values."""
        return {
            "source": self.source,
            "target": self.target,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "target_dtype": self.target_dtype,
            "count": self.count,
            "bytes": self.nbytes,
            "steps": list(self.steps),
        }


def groups(moves: Iterable[TensorTransform]) -> list[Group]:
    """The moves collapsed, in the natural order of the source's keys.

    Of source and target key, the one with more indices identifies a line's tensors; the other's indices follow.
    """
    examples: list[_Kind] = []
    rows = tree.collapse(_entries(moves, examples))
    out = [found for row in rows for found in _lines(row, examples[int(row.note)])]
    return [group for _, group in sorted(out, key=lambda found: found[0])]


def _entries(moves: Iterable[TensorTransform], examples: list[_Kind]) -> Iterator[tree.Entry]:
    """The moves by the key that identifies them in a line, each with the number of its kind in ``examples``."""
    kinds: dict[tuple[object, ...], int] = {}
    for move in moves:
        if move.target == move.source:  # as most are where only the files change
            same = (move.target_dtype, move.steps)
            at = kinds.setdefault(same, len(examples))
            if at == len(examples):
                examples.append(_Kind(move, False, None, {}))
            yield tree.Entry(move.source, move.shape, move.dtype, move.nbytes, str(at))
            continue
        source = tree.split(move.source)
        target = tree.split(move.target) if move.target is not None else None
        by_target = target is not None and len(target[1]) > len(source[1])
        key = str(move.target) if by_target else move.source
        other = source if by_target else target
        kind = (by_target, other and other[0], move.target_dtype, move.steps)
        at = kinds.setdefault(kind, len(examples))
        if at == len(examples):
            examples.append(_Kind(move, by_target, other[0] if other is not None else None, {}))
        if other is not None:
            examples[at].numbers[key] = other[1]
        yield tree.Entry(key, move.shape, move.dtype, move.nbytes, str(at))


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the moves of a line have in common, and the indices in the other key by the key that identifies them.

    ``template`` is None where there is no other key, or where it is the same.
    """

    move: TensorTransform
    by_target: bool
    template: tree.Template | None
    numbers: dict[str, tuple[int, ...]]


def _lines(row: tree.Row, kind: _Kind) -> Iterator[tuple[str, Group]]:
    """The groups of a line, each after what it is sorted by: one, unless the other key counts in another order."""
    if kind.template is None:
        target = None if kind.move.target is None else row.pattern
        yield _group(row.pattern, target, next(row.members()), row, kind, row.count)
        return
    members = list(row.members())
    numbers = [kind.numbers[key] for key in members]
    axes = [tuple(sorted(set(values))) for values in zip(*numbers, strict=True)]
    if numbers == sorted(numbers) and len(set(numbers)) == prod(map(len, axes)):
        first = tree.pattern(kind.template, [axis[:1] for axis in axes]) if kind.by_target else members[0]
        yield _group(row.pattern, tree.pattern(kind.template, axes), first, row, kind, row.count)
        return
    for key, index in zip(members, numbers, strict=True):
        other = tree.pattern(kind.template, [(number,) for number in index])
        yield _group(key, other, other if kind.by_target else key, row, kind, 1)


def _group(key: str, other: str | None, first: str, row: tree.Row, kind: _Kind, count: int) -> tuple[str, Group]:
    source, target = (str(other), key) if kind.by_target else (key, other)
    nbytes = row.nbytes * count // row.count
    move = kind.move
    group = Group(source, target, row.shape, row.dtype, move.target_dtype, count, nbytes, move.steps)
    return tree.natural(first), group


def lines(found: Sequence[Group], width: int | None) -> list[str]:
    """A line for each group; where the terminal is too narrow for two keys, target and steps are below the source."""
    arrow = "→" if can_say("→") else "->"
    rows = [
        (
            escape(group.source),
            f"{arrow} {escape(group.target)}" if group.target not in (None, group.source) else "",
            shape_text(group.shape),
            group.dtype,
            f"×{number(group.count)}" if group.count > 1 else "",
            ", ".join(group.steps).replace("→", arrow),
            human_bytes(group.nbytes) if group.nbytes else "",
        )
        for group in found
    ]
    if fits(rows, width) or not any(row[1] for row in rows):
        styles = {0: colors.key, 1: _paint_key, 3: colors.dtype, 5: _paint_steps}
        return columns(rows, right=frozenset({4, 6}), styles=styles, width=width)
    styles = {0: colors.key, 2: colors.dtype}
    above = columns([(row[0], *row[2:5], row[6]) for row in rows], right=frozenset({3, 4}), styles=styles, width=width)
    return [line for first, row in zip(above, rows, strict=True) for line in (first, *_below(row[1], row[5], width))]


def _below(target: str, steps: str, width: int | None) -> list[str]:
    """The target and the steps, on one line if they fit."""
    if target and (width is None or display_width(target) + len(steps) + 4 <= width):
        return [f"  {_paint_key(target)}  {_paint_steps(steps)}"]
    room = width - 4 if width is not None else 10**6
    shown = [f"  {_paint_key(shorten(target, room))}"] if target else []
    return shown + [f"    {_paint_steps(line)}" for line in wrap(steps.split(" "), room)]


def _paint_key(target: str) -> str:
    """A target key: a dim arrow, indices highlighted."""
    arrow, _, key = target.partition(" ")
    return f"{colors.quiet(arrow)} {colors.key(key)}"


def _paint_steps(steps: str) -> str:
    """Steps that only move bytes are dim; a cast, which changes values, is highlighted."""
    if steps == COPY:
        return colors.quiet(steps)
    return colors.warning(steps) if "cast " in steps else steps
