"""A plan as a collapsed tree: from which keys to which, and what happens to their tensors on the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_convert.cli import colours, tree
from ckpt_convert.cli.text import (
    can_say,
    columns,
    display_width,
    escape,
    fits,
    human_bytes,
    number,
    shape_text,
    shorten,
    wrap,
)
from ckpt_convert.convert.steps import COPY, Move


@dataclass(frozen=True, slots=True)
class Group:
    """One line: ``count`` tensors whose keys differ only in their numbers, and to which the same happens."""

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


def groups(moves: Iterable[Move]) -> list[Group]:
    """The moves collapsed, in the natural order of the source's keys."""
    kinds: dict[tuple[object, ...], int] = {}
    examples: list[tuple[Move, tree.Template | None]] = []
    entries = []
    for move in moves:
        _, index = tree.split(move.source)
        template, places = tree.split(move.target) if move.target is not None else (None, ())
        if places != index:
            template = None  # the numbers are not those of the source, so this target has a line of its own
        kind = (template or move.target, move.target_dtype, move.steps)
        at = kinds.setdefault(kind, len(examples))
        if at == len(examples):
            examples.append((move, template))
        entries.append(tree.Entry(move.source, move.shape, move.dtype, move.nbytes, str(at)))
    out = []
    for row in tree.collapse(entries):
        move, template = examples[int(row.note)]
        target = tree.pattern(template, row.axes) if template is not None else move.target
        out.append(
            Group(row.pattern, target, row.shape, row.dtype, move.target_dtype, row.count, row.nbytes, move.steps)
        )
    return out


def lines(found: Sequence[Group], width: int | None) -> list[str]:
    """A line for each group; where that is too narrow for two keys, the target and the steps lie below the source."""
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
        styles = {0: colours.key, 1: _paint_key, 3: colours.dtype, 5: _paint_steps}
        return columns(rows, right=frozenset({4, 6}), styles=styles, width=width)
    styles = {0: colours.key, 2: colours.dtype}
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
    """A target: the arrow recedes, the numbers stand out."""
    arrow, _, key = target.partition(" ")
    return f"{colours.quiet(arrow)} {colours.key(key)}"


def _paint_steps(steps: str) -> str:
    """What only moves bytes recedes; a cast, which changes values, stands out."""
    if steps == COPY:
        return colours.quiet(steps)
    return colours.warning(steps) if "cast " in steps else steps
