"""``verify``: everything that is wrong with a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from ckpt_convert.cli import colors, options
from ckpt_convert.cli.commands import SUMMARIES
from ckpt_convert.cli.text import Labelled, echo, echo_json, escape, labelled, plural, terminal_width, wrap
from ckpt_convert.wording import human_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckpt_convert.analysis.check import Verification
    from ckpt_convert.analysis.logits.logits import LogitsReport
    from ckpt_convert.checkpoint.findings import Finding
    from ckpt_convert.formats.base import FormatName
    from ckpt_convert.storage.place import StorageOptions

_COLORS = {"error": colors.BAD, "warning": colors.WARNING, "note": "cyan"}
_LABEL = 9
_MOST = 12
"""Findings of one check that are shown without --full."""


@click.command(
    short_help=SUMMARIES["verify"],
    epilog="""\b
Examples:
  ckpt-convert verify Llama-3.2-1B
  ckpt-convert verify Llama-3-70B/original --quick
  ckpt-convert verify my-upload --json | jq '.findings[].text'
  ckpt-convert verify Llama-3.2-1B-meta --against Llama-3.2-1B
  ckpt-convert verify my-finetune --logits
  ckpt-convert verify Llama-3.2-1B-meta --accept params.json

\b
Exit codes: 0 no errors, 1 errors found (with --strict, warnings too), 2 usage, 3 no checkpoint found.""",
)
@options.Argument("path")
@click.option("--quick", is_flag=True, help="Read headers and small files only, no values.")
@click.option("--against", "other", metavar="PATH", help="Compare every tensor with this checkpoint, in any format.")
@click.option("--logits", "with_logits", is_flag=True, help="Also run it through transformers on random tokens.")
@click.option(
    "--accept",
    "accepted",
    metavar="FILE",
    multiple=True,
    help="Accept an edited config or tokenizer file; repeatable.",
)
@click.option("--full", is_flag=True, help="Show every finding, however many are of one kind.")
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings, too (NaN, leftover shards).")
@options.JSON
@options.from_format()
@options.FAMILY
@options.config()
@options.revision()
@options.CACHE
@options.WORKERS
@options.STORE_OPTIONS
@options.QUIET
def verify(
    path: str,
    quick: bool,
    other: str | None,
    with_logits: bool,
    accepted: tuple[str, ...],
    full: bool,
    strict: bool,
    as_json: bool,
    from_format: FormatName | None,
    family: str | None,
    config: str | None,
    revision: str | None,
    cache: bool,
    workers: int | None,
    storage_options: StorageOptions | None,
    quiet: bool,
) -> int:
    """Check a checkpoint and report everything that is wrong with it: files, headers, index, config, checksums, values.

    PATH is a directory, one weight file, a URL or a Hub id (org/name). Every byte is read once, unless --quick. Nothing
    is written, except with --accept: before the checks, the checksums of these files beside the weights are renewed in
    ckpt_convert/manifest.json.
    """
    from ckpt_convert.analysis.check.api import verify_checkpoint
    from ckpt_convert.cli.notices import on_stderr, silent_transformers
    from ckpt_convert.cli.progress import Bar

    cache = cache or with_logits  # transformers is kept offline, so both checkpoints are downloaded first
    place = options.in_cache(path, revision, from_format, cache=cache)
    against = None if other is None else options.in_cache(other, None, None, cache=cache)
    quietly = silent_transformers() if with_logits else contextlib.nullcontext()
    with on_stderr(hidden=quiet), Bar(hidden=quiet) as bar, quietly:
        report = verify_checkpoint(
            place,
            values=not quick,
            against=against,
            logits=with_logits,
            accept=accepted,
            format=from_format,
            family=family,
            config=config,
            revision=revision,
            workers=workers,
            progress=bar,
            storage_options=storage_options,
        )
    if as_json:
        echo_json(report.as_dict())
    else:
        width = terminal_width()
        lines = [
            *(() if quiet else labelled(_header(report), width, least=_LABEL)),
            *_findings(report, width, full=full, quiet=quiet, strict=strict),
        ]
        lines += () if quiet else [*_logits(report.logits, width), _summary(report)]
        if lines:
            echo("\n".join(lines))
    return 0 if report.ok and not (strict and report.counts["warnings"]) else 1


def _header(report: Verification) -> Iterator[Labelled]:
    what = ", ".join(filter(None, (report.format or report.kind or "unknown format", report.family)))
    yield Labelled("path", escape(report.path).split(" "))
    size = f"{plural(report.files, 'file')}, {plural(report.tensors, 'tensor')}, {human_bytes(report.nbytes)}"
    yield Labelled("what", escape(f"{what}: {size}").split())
    for one in report.accepted or ():
        yield Labelled("accepted", escape(f"{one.file}: checksum {one.found}, was {one.expected}").split(" "))
    by_reason: dict[str, list[str]] = {}
    for skipped in report.skipped:
        by_reason.setdefault(skipped.why, []).append(skipped.check)
    for why, checks in by_reason.items():
        yield Labelled("skipped", escape(f"{', '.join(checks)}: {why.splitlines()[0]}").split(" "))


def _findings(report: Verification, width: int | None, *, full: bool, quiet: bool, strict: bool) -> Iterator[str]:
    """A line for each finding, errors first; of many from one check, the first few."""
    counting = ("error", "warning") if strict else ("error",)
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in report.findings:
        if finding.severity in counting or not quiet:
            groups.setdefault((finding.severity, finding.check), []).append(finding)
    if groups and not quiet:
        yield ""
    column = max((len(check) for _, check in groups), default=0) + 2
    for (severity, check), found in groups.items():
        texts = _collapsed(found) if check == "against" and not full else [finding.text for finding in found]
        shown = texts if full else texts[:_MOST]
        for text in shown:
            yield from _finding(severity, check, text, column, width)
        if len(texts) > len(shown):
            more = f"… and {len(texts) - len(shown)} more of this check; --full shows them"
            yield from _finding("", "", more, column, width)


def _finding(severity: str, check: str, text: str, column: int, width: int | None) -> Iterator[str]:
    words = escape(" ".join(text.split("\n"))).split(" ")
    indent = _LABEL + column
    lines = [" ".join(words)] if width is None or width < indent + 20 else wrap(words, width - indent)
    head = click.style(f"{severity:<{_LABEL}}", fg=_COLORS.get(severity), bold=True) + f"{check:<{column}}"
    yield head + lines[0]
    yield from (" " * indent + line for line in lines[1:])


def _collapsed(found: Sequence[Finding]) -> list[str]:
    """Tensors that differ; those whose keys differ in indices alone share a line."""
    from ckpt_convert.cli.tree import Entry, collapse

    kinds: dict[str, list[Finding]] = {}
    for finding in found:
        what = finding.text.removeprefix(finding.key or "").strip()
        if what.startswith("differs"):
            _, bracket, note = what.partition(" (")
            what = f"differ in values{bracket}{note}"
        kinds.setdefault(what, []).append(finding)
    out = []
    for what, findings in kinds.items():
        by_key = {finding.key or "": finding for finding in findings}
        for row in collapse([Entry(key, (), "", 0) for key in by_key]):
            one = by_key.get(row.pattern)
            out.append(one.text if one is not None else f"{row.pattern} {what} (×{row.count})")
    return out


def _logits(found: LogitsReport | None, width: int | None) -> Iterator[str]:
    if found is not None:
        yield ""
        yield from labelled(_computed(found), width, least=_LABEL)


def _computed(found: LogitsReport) -> Iterator[Labelled]:
    for outcome in (found.a, found.b):
        if outcome is not None:
            text = f"{escape(outcome.path)}: {found.prompts} prompts of {found.length} random tokens: "
            text += "all logits finite" if outcome.finite else "NaN or infinite logits"
            if outcome.entropy is not None:
                text += f", entropy {outcome.entropy:.3f} of at most {outcome.uniform_entropy:.3f} nats"
            yield Labelled("logits", text.split(" "))
    if found.difference is not None:
        gap = found.difference
        text = (
            f"max |Δ| {gap.max_abs:.3g}, mean |Δ| {gap.mean_abs:.3g}, KL {gap.kl_mean:.3g}, same likeliest token at "
            f"{100 * gap.agreement:.4g}% of the positions"
        )
        yield Labelled("", text.split(" "))


def _summary(report: Verification) -> str:
    """The last line: the number of problems, or what was checked."""
    counts = report.counts
    words = [plural(counts[f"{name}s"], name) for name in _COLORS if counts[f"{name}s"]]
    if counts["errors"] or counts["warnings"]:
        worst = "error" if counts["errors"] else "warning"
        return "\n" + click.style(", ".join(words), fg=_COLORS[worst], bold=True)
    noted = f", {words[0]}" if words else ""
    text = click.style(f"no problems{noted}", fg=colors.GOOD, bold=True)
    read = f"{human_bytes(report.bytes_read)} read" if report.bytes_read else "no values read"
    return f"\n{text}: {plural(report.tensors, 'tensor')}, {read}, checks: {', '.join(report.checks)}"
