"""``formats``: which families can be read and written in which formats."""

from __future__ import annotations

import json
from typing import Any

import click

from ckpt_convert.cli.text import columns, echo
from ckpt_convert.convert.formats import ALL
from ckpt_convert.models import FAMILIES, Family

SCHEMA = 1
_LAYOUTS = {
    "hf": "config.json, weight files and their index",
    "meta": "params.json, consolidated files: one a rank",
    "native": "torchtune's keys; config in ckpt_convert/",
}


@click.command(
    short_help="Show which families and formats are supported.",
    epilog="""\b
Examples:
  ckpt-convert formats
  ckpt-convert formats --json | jq -r '.families[].name'""",
)
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
def formats(as_json: bool) -> None:
    """Show which families of models can be read and written, in which formats, and what files these use."""
    if as_json:
        echo(json.dumps(_document(), indent=2))
        return
    echo("\n".join([*_families(), "", *_formats()]))


def _document() -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "families": [
            {
                "name": family.name,
                "title": family.title,
                "model_types": list(family.model_types),
                "formats": list(family.formats),
            }
            for family in FAMILIES.values()
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


def _families() -> list[str]:
    head = ("FAMILY", *ALL, "MODEL_TYPE", "COVERS")
    return _table([head, *map(_family, FAMILIES.values())])


def _family(family: Family) -> tuple[str, ...]:
    # One table serves both directions: what can be read can be written.
    marks = ("yes" if format in family.formats else "-" for format in ALL)
    return (family.name, *marks, ", ".join(family.model_types), family.title)


def _formats() -> list[str]:
    head = ("FORMAT", "CONTAINERS", "LAYOUT")
    rows = [(format.name, ", ".join(format.containers), _LAYOUTS.get(format.name, "")) for format in ALL.values()]
    return _table([head, *rows])


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """The rows, the first one as a heading."""
    heading, *lines = columns(rows)
    return [click.style(heading, bold=True), *lines]
