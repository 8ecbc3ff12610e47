"""``diff``: where two checkpoints differ, tensor by tensor."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING

import click

from ckpt_convert.cli import colors, options, tree
from ckpt_convert.cli.commands import SUMMARIES
from ckpt_convert.cli.text import (
    Labelled,
    columns,
    command_line,
    echo,
    echo_json,
    escape,
    fits,
    human_count,
    labelled,
    number,
    percent,
    plural,
    real,
    shape_text,
    terminal_width,
)
from ckpt_convert.cli.tree import Entry, Numbering
from ckpt_convert.wording import human_bytes

if TYPE_CHECKING:
    from ckpt_convert.analysis.diff.change import Change, Status
    from ckpt_convert.analysis.diff.compare import Diff
    from ckpt_convert.analysis.diff.verdict import Kind
    from ckpt_convert.formats.base import FormatName
    from ckpt_convert.storage.place import StorageOptions


_SEVERITY: dict[Kind, str] = {
    "same": colors.GOOD,
    "dtype": colors.GOOD,
    "cast": colors.WARNING,
    "small": colors.WARNING,
    "partial": colors.WARNING,
    "unknown": colors.WARNING,
    "cause": colors.BAD,
    "large": colors.BAD,
    "different": colors.BAD,
}
"""The color of each kind of verdict."""


@dataclass(frozen=True)
class _Group:
    """Changes of one kind on one line: ``pattern`` is their key with its indices collapsed."""

    pattern: str
    changes: Sequence[Change]

    @property
    def differing(self) -> int:
        return sum(change.delta.differing for change in self.changes if change.delta)

    @property
    def count(self) -> int:
        return sum(change.delta.count for change in self.changes if change.delta)

    @property
    def worst(self) -> Change:
        """The change that is largest, relative to its tensor."""
        return max(self.changes, key=severity)


def severity(change: Change) -> tuple[bool, float, float, int]:
    """The sort key of "worst first": NaN where the other side has a value, then ‖Δ‖/‖a‖, then the largest |Δ|."""
    delta = change.delta
    if delta is None:
        return (False, 0.0, 0.0, 0)
    norm, largest = delta.relative_norm, delta.max_abs or 0.0
    relative = float("inf") if norm is None and largest else norm or 0.0
    return (delta.nan_mismatch > 0, relative, largest, delta.differing)


@click.command(
    short_help=SUMMARIES["diff"],
    epilog="""\b
Examples:
  ckpt-convert diff Llama-3.2-1B my-finetune
  ckpt-convert diff Llama-3.2-1B Llama-3.2-1B/original
  ckpt-convert diff base.safetensors tuned.safetensors --filter '*.mlp.*' --full
  ckpt-convert diff Llama-3.2-1B my-finetune --html changes.html
  ckpt-convert diff A B --no-values --json | jq .counts

\b
max |Δ| and mean |Δ| are over all elements, ‖Δ‖/‖a‖ is the norm of the change
against that of the tensor, ULP the most representable numbers between two
values.

\b
Exit codes: 0 the same, 1 different, 2 usage, 3 no readable checkpoint.""",
)
@options.Argument("a")
@options.Argument("b")
@click.option("--values/--no-values", default=True, show_default=True, help="Compare values, not only keys and shapes.")
@click.option("--full", is_flag=True, help="One line for each tensor that differs.")
@options.FILTERS
@click.option("--ignore-dtype", is_flag=True, help="Equal values in another dtype do not count as a difference.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    metavar="X",
    help="Tensors whose ‖Δ‖/‖a‖ is at most X, in any dtypes, do not count as a difference.",
)
@options.JSON
@options.HTML
@options.from_format("A", "-a")
@options.from_format("B", "-b")
@options.FAMILY
@options.config("A", "-a")
@options.config("B", "-b")
@options.revision("A", "-a")
@options.revision("B", "-b")
@options.CACHE
@options.WORKERS
@options.STORE_OPTIONS
@options.QUIET
def diff(
    a: str,
    b: str,
    values: bool,
    full: bool,
    filters: tuple[str, ...],
    ignore_dtype: bool,
    tolerance: float | None,
    as_json: bool,
    html: str | None,
    from_a: FormatName | None,
    from_b: FormatName | None,
    family: str | None,
    config_a: str | None,
    config_b: str | None,
    revision_a: str | None,
    revision_b: str | None,
    cache: bool,
    workers: int | None,
    storage_options: StorageOptions | None,
    quiet: bool,
) -> int:
    """Show where checkpoints A and B differ: keys, shapes, dtypes, then every value.

    A and B are directories, weight files, URLs or Hub ids, in any formats and with any number of tensor-parallel ranks:
    tensors are aligned through the family's table. Nothing is written.
    """
    from ckpt_convert.analysis.diff.api import diff_checkpoints
    from ckpt_convert.cli.html import diff_page
    from ckpt_convert.cli.notices import on_stderr
    from ckpt_convert.cli.pages import check_page, write_page
    from ckpt_convert.cli.progress import Bar

    if tolerance is not None and isnan(tolerance):
        raise click.UsageError("--tolerance nan: expected a number, such as 1e-3")
    if tolerance is not None and not values:
        raise click.UsageError("--tolerance is about values; leave out --no-values")
    if html is not None:
        check_page(html, with_json=as_json)
    with on_stderr(hidden=quiet), Bar(hidden=quiet) as bar:
        found = diff_checkpoints(
            options.in_cache(a, revision_a, from_a, cache=cache),
            options.in_cache(b, revision_b, from_b, cache=cache),
            values=values,
            filters=filters,
            format_a=from_a,
            format_b=from_b,
            family=family,
            config_a=config_a,
            config_b=config_b,
            revision_a=revision_a,
            revision_b=revision_b,
            workers=workers,
            progress=bar,
            storage_options=storage_options,
        )
        bar.stop()
        if html is not None:
            write_page(html, diff_page(found.as_dict(), command_line()))
        if as_json:
            echo_json(found.as_dict())
        elif not quiet and html != "-":
            echo("\n".join(_lines(found, full=full, width=terminal_width(), tolerance=tolerance)))
        return int(not found.is_same(ignore_dtype=ignore_dtype, tolerance=tolerance))


def _lines(found: Diff, *, full: bool, width: int | None, tolerance: float | None) -> Iterator[str]:
    yield from labelled([*_header(found), *_verdict(found, tolerance)], width)
    changed = [change for change in found.changes if change.status == "differs"]
    if changed:
        yield ""
        yield from _changed(changed, found, full=full, width=width)
    for status, title in (
        ("dtype", "the same values in another dtype" if found.values else "another dtype"),
        ("shape", "another shape"),
        ("only_a", "only in a"),
        ("only_b", "only in b"),
    ):
        rows = [change for change in found.changes if change.status == status]
        if rows:
            yield ""
            yield click.style(f"{title}: {plural(len(rows), 'tensor')}", fg=colors.WARNING, bold=True)
            yield from _listed(rows, full=full, width=width)
    if found.config:
        yield ""
        yield click.style("the configs differ", fg=colors.WARNING, bold=True)
        rows_ = [(name, _said(ours), "→", _said(theirs)) for name, ours, theirs in found.config]
        yield from columns(rows_, width=width, indent="  ")


def _header(found: Diff) -> Iterator[Labelled]:
    for name, side in zip("ab", found.sides(), strict=True):
        words = [side["format"] or "unknown format"]
        words += [side["family"]] if side["family"] else []
        words += [f"{side['model_parallel']} ranks"] if (side["model_parallel"] or 1) > 1 else []
        if side["parameters"] is not None:
            words.append(f"{human_count(side['parameters'])} parameters")
        words += [plural(side["tensors"], "tensor"), human_bytes(side["bytes"])]
        yield Labelled(name, [escape(side["path"]), *f"({', '.join(words)})".split()])
    how = (
        "through the family's table: RoPE layouts and rank splits undone"
        if found.aligned_by == "mapping"
        else "key by key"
    )
    if found.values:
        yield Labelled("compared", f"{human_bytes(found.compared)} of a with b, {how}".split())
    else:
        yield Labelled("compared", f"keys, shapes and dtypes only, {how}".split())
    casts = Counter((c.a.dtype, c.b.dtype) for c in found.changes if c.a and c.b and c.delta)
    for (ours, theirs), count in casts.most_common():
        if ours != theirs:
            text = f"{ours} in a, {theirs} in b: {plural(count, 'tensor')} compared after an exact upcast"
            yield Labelled("dtypes", text.split(), colors.WARNING)
    for notice in found.notices:
        yield Labelled("notice", escape(notice).split(" "), colors.WARNING)
    counts = found.counts
    total = sum(counts.values())
    if not total:
        yield Labelled("same", ["no tensor was compared: no key matches"], colors.WARNING)
        return
    if found.same:
        what = ", bit for bit" if found.values else " in key, shape and dtype; values were not compared"
        yield Labelled("same", f"all {plural(total, 'tensor')}{what}".split(), colors.GOOD)
        return
    said: dict[Status, str] = {
        "differs": "in values",
        "dtype": "in dtype alone" if found.values else "in dtype",
        "shape": "in shape",
        "only_a": "only in a",
        "only_b": "only in b",
        "same": "the same",
    }
    words = [f"{number(counts[status])} {text}" for status, text in said.items() if counts[status]]
    text = f"{', '.join(words)}, of {plural(total, 'tensor')}"
    yield Labelled("differs", text.split(), colors.BAD)


def _verdict(found: Diff, tolerance: float | None) -> Iterator[Labelled]:
    """What the difference amounts to, and how much of it is beyond the tolerance."""
    verdict = found.verdict
    if verdict.kind != "same":
        yield Labelled("verdict", escape(verdict.text).split(), _SEVERITY[verdict.kind])
    if tolerance is None:
        return
    differing = [change for change in found.changes if change.status == "differs"]
    beyond = sum(not change.is_within(tolerance) for change in differing)
    if differing:
        text = f"‖Δ‖/‖a‖ is above {tolerance:g} in {number(beyond)} of {plural(len(differing), 'tensor')} that differ"
        yield Labelled("tolerance", text.split(), colors.BAD if beyond else colors.GOOD)


def _groups(changes: Sequence[Change], *, full: bool, all_keys: Numbering) -> list[_Group]:
    if full:
        return [_Group(change.key, (change,)) for change in changes]
    by_key = {change.key: change for change in changes}
    entries = [
        Entry(change.key, change.shape, change.a.dtype if change.a else "", 0, _kind(change)) for change in changes
    ]
    rows = tree.collapse(entries, all_keys)
    return [_Group(row.pattern, [by_key[key] for key in row.members()]) for row in rows]


def _kind(change: Change) -> str:
    """What two changes on one line have in common."""
    shape = change.b.shape if change.b else None
    return f"{change.status} {change.b.dtype if change.b else ''} {shape} {change.note}"


def _changed(changes: Sequence[Change], found: Diff, *, full: bool, width: int | None) -> Iterator[str]:
    groups = _groups(changes, full=full, all_keys=Numbering([change.key for change in found.changes]))
    groups.sort(key=lambda group: severity(group.worst), reverse=True)
    head = ("worst first", "max |Δ|", "mean |Δ|", "‖Δ‖/‖a‖", "ULP", "changed", "largest at")
    rows = [_numbers(group) for group in groups]
    right = frozenset({1, 2, 3, 4, 5})
    if fits([head, *rows], width):
        lines = columns([head, *rows], right=right, width=width)
    else:
        # A key that would be shortened gets its own line.
        lines = columns([("", *head[1:]), *(("", *row[1:]) for row in rows)], right=right, width=width, indent="  ")
        lines = [lines[0], *(f"{escape(group.pattern)}\n{line}" for group, line in zip(groups, lines[1:], strict=True))]
    yield click.style(lines[0], bold=True)
    for group, line in zip(groups, lines[1:], strict=True):
        yield line
        for note in dict.fromkeys(change.note for change in group.changes if change.note):
            yield click.style(f"    {escape(note)}", fg=colors.WARNING)
        mismatches = sum(change.delta.nan_mismatch for change in group.changes if change.delta)
        if mismatches:
            where = "is" if mismatches == 1 else "are"
            text = f"    {plural(mismatches, 'element')} {where} NaN or infinite on one side only"
            yield click.style(text, fg=colors.BAD)


def _numbers(group: _Group) -> tuple[str, ...]:
    worst = group.worst
    deltas = [change.delta for change in group.changes if change.delta]
    if not deltas:
        return (escape(group.pattern), "", "", "", "", "", "")
    norms = [delta.relative_norm for delta in deltas if delta.relative_norm is not None]
    ulps = [delta.max_ulp for delta in deltas if delta.max_ulp is not None]
    largest = [delta.max_abs for delta in deltas if delta.max_abs is not None]
    mean = sum((delta.mean_abs or 0.0) * delta.count for delta in deltas) / max(group.count, 1)
    found = worst.where if worst.where is not None else worst.first
    place = "" if found is None else str(list(found))
    at = worst.key if len(group.changes) > 1 else ""
    return (
        escape(group.pattern),
        real(max(largest)) if largest else "",
        real(mean) if largest else "",
        real(max(norms)) if norms else "",
        human_count(max(ulps)) if ulps else "",
        _share(group.differing, group.count),
        f"{_number_in(at)}{place}" if place else "",
    )


def _number_in(key: str) -> str:
    """Which tensor of a group: the indices in its key."""
    numbers = tree.split(key)[1]
    return f"{'.'.join(map(str, numbers))}: " if numbers else ""


def _listed(changes: Sequence[Change], *, full: bool, width: int | None) -> list[str]:
    groups = _groups(changes, full=full, all_keys=Numbering([change.key for change in changes]))
    rows = []
    for group in groups:
        change = group.changes[0]
        halves = [half for half in (change.a, change.b) if half is not None]
        shapes = dict.fromkeys(shape_text(half.shape) for half in halves)
        kinds = dict.fromkeys(half.dtype for half in halves)
        count = f"×{number(len(group.changes))}" if len(group.changes) > 1 else ""
        rows.append((escape(group.pattern), " → ".join(shapes), " → ".join(kinds), count))
    return columns(rows, right=frozenset({3}), width=width, indent="  ")


def _share(part: int, whole: int) -> str:
    """A small count as a number, a larger one as a percentage."""
    return str(part) if part < min(10, whole) else percent(part, whole)


def _said(value: object) -> str:
    return escape(json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value))
