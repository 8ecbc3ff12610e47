"""``formats``: which families can be read and written in which formats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from textwrap import wrap
from typing import Any

import click

from ckpt_convert.checkpoint.hints import unknown_family
from ckpt_convert.cli import family_table, options
from ckpt_convert.cli.commands import SUMMARIES
from ckpt_convert.cli.notices import on_stderr
from ckpt_convert.cli.text import columns, echo, echo_json, terminal_width
from ckpt_convert.errors import option_error
from ckpt_convert.formats import ALL
from ckpt_convert.models import FAMILIES, Family, grouped

SCHEMA = 1
_LAYOUTS = {
    "hf": "config.json, weights and their index",
    "meta": "params.json, consolidated files",
    "native": "torchtune's keys, no config.json",
    "torchtitan": "torchtitan's keys, no config.json",
}
_WIDTH = 80
_GAP = "  "


@click.command(
    short_help=SUMMARIES["formats"],
    epilog="""\b
Examples:
  ckpt-convert formats
  ckpt-convert formats --json | jq -r '.families[].name'
  ckpt-convert formats --family llama4 --keys
  ckpt-convert formats --family qwen3_moe --keys --layers 2""",
)
@click.option("--keys", is_flag=True, help="The table of one family: keys, shapes, RoPE layout and TP axis by format.")
@click.option(
    "--family",
    metavar="NAME",
    help="The family whose table --keys shows.",
    shell_complete=options.complete_family,
)
@click.option("--layers", type=click.IntRange(1, 1000), metavar="N", help="With --keys: N layers, numbered.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def formats(keys: bool, family: str | None, layers: int | None, as_json: bool) -> None:
    """Show which families of models can be read and written, in which formats, and what files these use.

    With --family NAME --keys: each tensor of a family, its shape in dimensions of its config, and for each format its
    key, the shape stored there where it differs, the RoPE layout and the axis that is split across TP ranks.
    """
    if keys != (family is not None) or (layers is not None and not keys):
        raise click.UsageError("--keys shows the table of one --family; --layers numbers the layers of that table")
    with on_stderr():
        if family is not None:
            _table(family, layers, as_json)
        elif as_json:
            echo_json(_document())
        else:
            echo("\n".join([*_families(terminal_width() or _WIDTH), "", *_formats()]))


def _table(name: str, layers: int | None, as_json: bool) -> None:
    if name not in FAMILIES:
        raise option_error("family", name, unknown_family(name))
    family = FAMILIES[name]
    if as_json:
        echo_json(family_table.document(family, layers))
        return
    echo("\n".join(family_table.lines(family, layers, terminal_width() or family_table.WIDTH)))


def _document() -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "families": [
            {
                "name": family.name,
                "title": family.title,
                "group": group,
                "package": FAMILIES.origins.get(family.name),
                "model_types": list(family.model_types),
                "formats": list(family.formats),
                "unverified": dict(family.unverified),
            }
            for group, families in grouped().items()
            for family in families
        ],
        "formats": [
            {
                "name": format.name,
                "layout": _LAYOUTS.get(format.name, ""),
                "containers": list(format.containers),
                "config": format.config,
            }
            for format in ALL.values()
        ],
    }


def _families(width: int) -> Iterator[str]:
    """A line for each family, in groups, with a column for each format; then footnotes."""
    first = max(map(len, FAMILIES))
    sizes = [max(len(format), len("yes*")) for format in ALL]
    left = len(_GAP.join([" " * first, *(" " * size for size in sizes), ""]))

    def line(name: str, marks: Iterable[str], title: str) -> Iterator[str]:
        cells = [name.ljust(first), *(text.ljust(size) for text, size in zip(marks, sizes, strict=True)), ""]
        for at, part in enumerate(wrap(title, max(width - left, 24), break_on_hyphens=False)):
            yield (_GAP.join(cells) if at == 0 else " " * left) + part

    yield from (click.style(text, bold=True) for text in line("FAMILY", ALL, "COVERS"))
    for group, families in grouped().items():
        yield from ["", click.style(group, bold=True)]
        for family in families:
            yield from line(family.name, (mark(family, format) for format in ALL), family.title)
    for at, (names, said) in enumerate(footnotes().items()):
        yield from [""] if at == 0 else []
        yield from wrap(f"* {names}: {said}", width, subsequent_indent=_GAP, break_on_hyphens=False)


def footnotes() -> dict[str, str]:
    """The footnotes: columns that nothing outside confirms, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for family in (family for group in grouped().values() for family in group):
        for format, why in family.unverified.items():
            reasons.setdefault((format, why), []).append(family.name)
    return {
        f"{format} of {', '.join(names)}": f"not confirmed by anything outside; {why}"
        for (format, why), names in reasons.items()
    }


def mark(family: Family, format: str) -> str:
    """Whether the family can be read and written in the format: one table serves both directions."""
    if format not in family.formats:
        return "-"
    return "yes*" if format in family.unverified else "yes"


def _formats() -> list[str]:
    head = ("FORMAT", "CONTAINERS", "LAYOUT")
    rows = [(format.name, ", ".join(format.containers), _LAYOUTS.get(format.name, "")) for format in ALL.values()]
    heading, *lines = columns([head, *rows])
    return [click.style(heading, bold=True), *lines]
