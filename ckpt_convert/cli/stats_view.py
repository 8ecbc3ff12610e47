"""Statistics as lines: pooled over the tensors of a collapsed line, or one by one with checksums."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from ckpt_convert.cli import colors, tree
from ckpt_convert.cli.facts import Facts, Statistics
from ckpt_convert.cli.listing import entry, matched, sorted_rows
from ckpt_convert.cli.text import columns, escape, number, percent, plural, real, shape_text
from ckpt_convert.cli.tree import Numbering
from ckpt_convert.cli.view import View, matching, ordered
from ckpt_convert.errors import CkptConvertError
from ckpt_convert.wording import indented_list

if TYPE_CHECKING:
    from ckpt_convert.analysis.stats.summary import Stats

_HEAD = ("", "shape", "dtype", "", "min", "max", "mean", "std", "zeros", "NaN", "Inf", "xxh3")


def body(facts: Facts, view: View, statistics: Statistics) -> Iterator[str]:
    """The matching tensors with their statistics."""
    if not statistics:
        yield "no tensors" if not facts.checkpoint.tensors else f"no key matches {view.globs}"
        return
    rows: list[tuple[str, ...]] = [_HEAD]
    if view.full:
        for info in ordered(facts, view):
            one = entry(facts, info)
            rows.append(_cells(one.key, one.shape, one.dtype, 1, [statistics[info.key]], statistics[info.key].checksum))
    else:
        entries = [entry(facts, info) for info in matching(facts, view)]
        for row in sorted_rows(tree.collapse(entries, Numbering(())), view.order):
            rows.append(
                _cells(row.pattern, row.shape, row.dtype, row.count, [statistics[key] for key in row.members()], "")
            )
    used = [name if any(cells) else "" for name, *cells in zip(*rows, strict=True)]
    styles = {0: colors.key, 2: colors.dtype, 9: colors.bad, 10: colors.bad, 11: colors.quiet}
    right = frozenset(range(3, 11))
    heading, *lines = columns([used, *rows[1:]], right=right, styles=styles, spare=(11, 1, 2, 3), width=view.width)
    yield colors.label(click.unstyle(heading))
    yield from lines
    yield ""
    yield _verdict(facts, statistics)
    yield from matched(facts, view)


def _verdict(facts: Facts, statistics: Statistics) -> str:
    numbers = plural(sum(stats.count for stats in statistics.values()), "number")
    wrong = [stats for stats in statistics.values() if stats.nan or stats.inf]
    sealed = [key for key, stats in statistics.items() if not stats.count and facts.checkpoint.tensors[key].nbytes]
    rest = f"; {plural(len(sealed), 'packed tensor')} could not be looked into" if sealed else ""
    if not wrong:
        return f"no NaN and no Inf in {numbers}{rest}"
    found = f"{number(sum(s.nan for s in wrong))} NaN and {number(sum(s.inf for s in wrong))} Inf in {numbers}"
    return colors.bad(f"{found}, in {plural(len(wrong), 'tensor')}") + rest


def pooled(parts: Sequence[Stats]) -> Stats:
    """The statistics of several tensors as if they were one."""
    from ckpt_convert.analysis.stats.summary import Stats

    finite = [(part, part.count - part.nan - part.inf) for part in parts if part.mean is not None]
    total = sum(count for _, count in finite)
    mean = std = None
    if total:
        mean = math.fsum(count / total * (part.mean or 0.0) for part, count in finite)
        spread = [(part.std or 0.0, (part.mean or 0.0) - mean, count / total) for part, count in finite]
        std = math.hypot(*(math.hypot(std, off) * math.sqrt(share) for std, off, share in spread))
    return Stats(
        count=sum(part.count for part in parts),
        nan=sum(part.nan for part in parts),
        inf=sum(part.inf for part in parts),
        zeros=sum(part.zeros for part in parts),
        min=min((part.min for part in parts if part.min is not None), default=None),
        max=max((part.max for part in parts if part.max is not None), default=None),
        mean=mean,
        std=std,
    )


def refuse_nan(facts: Facts, statistics: Statistics) -> None:
    """Raise an error that names the tensors with NaN or infinite values, where there are any."""
    found = [
        f"{key}: {', '.join(f'{number(count)} {name}' for count, name in ((s.nan, 'NaN'), (s.inf, 'Inf')) if count)}"
        for key, s in statistics.items()
        if s.nan or s.inf
    ]
    if found:
        count = f"{plural(len(found), 'tensor')} {'holds' if len(found) == 1 else 'hold'}"
        raise CkptConvertError(f"{facts.checkpoint.place}: {count} NaN or infinite values:{indented_list(found)}")


def _cells(
    key: str, shape: Sequence[int], dtype: str, count: int, parts: Sequence[Stats], checksum: str
) -> tuple[str, ...]:
    stats = parts[0] if len(parts) == 1 else pooled(parts)
    return (
        escape(key),
        shape_text(shape),
        escape(dtype),
        f"×{number(count)}" if count > 1 else "",
        *("-" if value is None else real(value) for value in (stats.min, stats.max, stats.mean, stats.std)),
        percent(stats.zeros, stats.count) if stats.zeros else "",
        number(stats.nan) if stats.nan else "",
        number(stats.inf) if stats.inf else "",
        checksum,
    )
