"""``diff``: where two checkpoints differ, tensor by tensor, through the mapping."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import click

from ckpt_convert.cli import tree
from ckpt_convert.cli.text import (
    columns,
    echo,
    escape,
    fits,
    human_bytes,
    human_count,
    number,
    plural,
    shape_text,
    terminal_width,
    wrap,
)
from ckpt_convert.cli.tree import Entry, Numbering
from ckpt_convert.models.table import FORMATS

if TYPE_CHECKING:
    from ckpt_convert.convert.compare import Change, Diff, Status

_BAD, _WARNING, _GOOD = "red", "yellow", "green"
_LABEL = 10


@dataclass(frozen=True)
class _Group:
    """Changes of one kind on one line: ``pattern`` is their key with its numbers collapsed."""

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
        """The one whose change is largest, measured against the tensor itself."""
        return max(self.changes, key=severity)


def severity(change: Change) -> tuple[float, float, int]:
    """What "worst first" sorts by: NaN where the other side has a number, then ‖Δ‖/‖a‖, then the largest |Δ|."""
    delta = change.delta
    if delta is None:
        return (0.0, 0.0, 0)
    norm, largest = delta.relative_norm, delta.max_abs or 0.0
    relative = float("inf") if delta.nan_mismatch or (norm is None and largest) else norm or 0.0
    return (relative, largest, delta.differing)


@click.command(
    short_help="Show where two checkpoints differ, across formats.",
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
values. Exit codes: 0 the same, 1 different.""",
)
@click.argument("a")
@click.argument("b")
@click.option("--values/--no-values", default=True, show_default=True, help="Compare values, not only keys and shapes.")
@click.option("--full", is_flag=True, help="One line for each tensor that differs.")
@click.option(
    "--filter", "filters", multiple=True, metavar="GLOB", help="Only keys (of A or B) that match; repeatable."
)
@click.option("--ignore-dtype", is_flag=True, help="Equal values in another dtype are no difference.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
@click.option("--html", "html", metavar="FILE", type=click.Path(), help="Write a page that shows what changed.")
@click.option("--from-a", type=click.Choice(FORMATS), help="Format of A (default: detected).")
@click.option("--from-b", type=click.Choice(FORMATS), help="Format of B (default: detected).")
@click.option("--family", metavar="NAME", help="The family, where it cannot be told.")
@click.option("--config-a", metavar="PATH", type=click.Path(), help="The config.json or params.json of A.")
@click.option("--config-b", metavar="PATH", type=click.Path(), help="The config.json or params.json of B.")
@click.option("--revision-a", metavar="NAME", help="Branch, tag or commit, where A is a Hub id.")
@click.option("--revision-b", metavar="NAME", help="Branch, tag or commit, where B is a Hub id.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads (default: one a core, 2 to 4).")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing; the exit code says it.")
def diff(
    a: str,
    b: str,
    values: bool,
    full: bool,
    filters: tuple[str, ...],
    ignore_dtype: bool,
    as_json: bool,
    html: str | None,
    from_a: str | None,
    from_b: str | None,
    family: str | None,
    config_a: str | None,
    config_b: str | None,
    revision_a: str | None,
    revision_b: str | None,
    workers: int | None,
    quiet: bool,
) -> int:
    """Show where checkpoints A and B differ: keys, shapes, dtypes, then every value.

    A and B are directories, weight files or Hub ids, in any formats and over any number of ranks: tensors are brought
    together through the family's table, with RoPE row orders and cuts undone. Nothing is written.
    """
    from ckpt_convert.cli.notices import on_stderr
    from ckpt_convert.cli.progress import Bar
    from ckpt_convert.convert.api import WORKERS
    from ckpt_convert.convert.checkpoint import open_checkpoint
    from ckpt_convert.convert.compare import compare
    from ckpt_convert.storage import hub

    def keep(*keys: str) -> bool:
        return not filters or any(fnmatchcase(key, glob) for key in keys for glob in filters)

    with (
        on_stderr(hidden=quiet),
        open_checkpoint(hub.locate(a, revision_a), format=from_a, family=family, config=config_a) as left,
        open_checkpoint(hub.locate(b, revision_b), format=from_b, family=family, config=config_b) as right,
        Bar(hidden=quiet) as bar,
    ):
        found = compare(left, right, values=values, keep=keep, workers=workers or WORKERS, progress=bar)
        bar.stop()
        if html is not None:
            _write_page(found, html)
        if as_json:
            echo("\n".join(json_lines(found.document())))
        elif not quiet:
            echo("\n".join(_lines(found, full=full, width=terminal_width())))
        return int(not found.is_same(ignore_dtype=ignore_dtype))


def json_lines(document: dict[str, object]) -> Iterator[str]:
    """The lines of one JSON object; a list of objects has a line for each."""
    fields = []
    for name, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inner = ",\n    ".join(map(json.dumps, value))
            fields.append(f"  {json.dumps(name)}: [\n    {inner}\n  ]")
        else:
            fields.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    yield "{"
    yield ",\n".join(fields)
    yield "}"


def _write_page(found: Diff, path: str) -> None:
    from ckpt_convert.cli.html import diff_page
    from ckpt_convert.cli.pages import write_page

    write_page(path, diff_page(found.document()))


def _lines(found: Diff, *, full: bool, width: int | None) -> Iterator[str]:
    yield from _header(found, width)
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
            yield click.style(f"{title}: {plural(len(rows), 'tensor')}", fg=_WARNING, bold=True)
            yield from _listed(rows, full=full, width=width)
    if found.config:
        yield ""
        yield click.style("the configs differ", fg=_WARNING, bold=True)
        rows_ = [(name, _said(ours), "→", _said(theirs)) for name, ours, theirs in found.config]
        yield from columns(rows_, width=width, indent="  ")


def _header(found: Diff, width: int | None) -> Iterator[str]:
    for name, side in zip("ab", found.sides(), strict=True):
        words = [side["format"] or "unknown format"]
        words += [side["family"]] if side["family"] else []
        words += [f"{side['model_parallel']} ranks"] if (side["model_parallel"] or 1) > 1 else []
        if side["parameters"] is not None:
            words.append(f"{human_count(side['parameters'])} parameters")
        words += [plural(side["tensors"], "tensor"), human_bytes(side["bytes"])]
        yield from _labelled(name, [escape(side["path"]), *f"({', '.join(words)})".split()], width)
    how = "through the family's table: row orders and cuts are undone" if found.through == "mapping" else "key by key"
    if found.values:
        yield from _labelled("compared", f"{human_bytes(found.compared)} of a with b, {how}".split(), width)
    else:
        yield from _labelled("compared", f"keys, shapes and dtypes only, {how}".split(), width)
    casts = Counter((c.a.dtype, c.b.dtype) for c in found.changes if c.a and c.b and c.delta)
    for (ours, theirs), count in casts.most_common():
        if ours != theirs:
            text = f"{ours} in a, {theirs} in b: {plural(count, 'tensor')} compared after an exact upcast"
            yield from _labelled("dtypes", text.split(), width, fg=_WARNING)
    for notice in found.notices:
        yield from _labelled("notice", escape(notice).split(" "), width, fg=_WARNING)
    counts = found.counts
    total = sum(counts.values())
    if not total:
        yield from _labelled("same", ["no tensor was compared: no key matches"], width, fg=_WARNING)
        return
    if found.same:
        what = ", bit for bit" if found.values else " in key, shape and dtype; values were not compared"
        yield from _labelled("same", f"all {plural(total, 'tensor')}{what}".split(), width, fg=_GOOD)
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
    yield from _labelled("differs", text.split(), width, fg=_BAD)


def _labelled(label: str, words: Sequence[str], width: int | None, fg: str | None = None) -> Iterator[str]:
    lines = [" ".join(words)] if width is None else wrap(words, max(width - _LABEL, _LABEL))
    for at, line in enumerate(lines):
        shown = label if at == 0 else ""
        yield click.style(f"{shown:<{_LABEL}}", fg=fg, bold=True) + line


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
    """What has to agree for two to share a line."""
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
        # The key has a line of its own where it would be cut.
        lines = columns([("", *head[1:]), *(("", *row[1:]) for row in rows)], right=right, width=width, indent="  ")
        lines = [lines[0], *(f"{escape(group.pattern)}\n{line}" for group, line in zip(groups, lines[1:], strict=True))]
    yield click.style(lines[0], bold=True)
    for group, line in zip(groups, lines[1:], strict=True):
        yield line
        for note in dict.fromkeys(change.note for change in group.changes if change.note):
            yield click.style(f"    {escape(note)}", fg=_WARNING)
        mismatches = sum(change.delta.nan_mismatch for change in group.changes if change.delta)
        if mismatches:
            where = "is" if mismatches == 1 else "are"
            text = f"    {plural(mismatches, 'element')} {where} NaN or infinite on one side only"
            yield click.style(text, fg=_BAD)


def _numbers(group: _Group) -> tuple[str, ...]:
    worst = group.worst
    deltas = [change.delta for change in group.changes if change.delta]
    if not deltas:
        return (escape(group.pattern), "", "", "", "", "", "")
    norms = [delta.relative_norm for delta in deltas if delta.relative_norm is not None]
    ulps = [delta.max_ulp for delta in deltas if delta.max_ulp is not None]
    largest = [delta.max_abs for delta in deltas if delta.max_abs is not None]
    mean = sum((delta.mean_abs or 0.0) * delta.count for delta in deltas) / max(group.count, 1)
    place = list(worst.where if worst.where is not None else worst.first or ())
    at = worst.key if len(group.changes) > 1 else ""
    return (
        escape(group.pattern),
        _real(max(largest)) if largest else "",
        _real(mean) if largest else "",
        _real(max(norms)) if norms else "",
        human_count(max(ulps)) if ulps else "",
        _share(group.differing, group.count),
        f"{_number_in(at)}{place}",
    )


def _number_in(key: str) -> str:
    """Which of a group's tensors: the numbers in its key."""
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


def _real(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}"


def _share(part: int, whole: int) -> str:
    """A share in percent that says neither 0 nor 100 where it is not."""
    if part == whole:
        return "100%"
    if part < 10:
        return str(part)
    percent = 100 * part / whole
    return "<0.1%" if percent < 0.1 else f"{min(percent, 99.9):.1f}%"


def _said(value: object) -> str:
    return escape(json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value))
