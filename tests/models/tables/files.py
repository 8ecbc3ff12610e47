"""What the files should hold: what ``ckpt-convert formats --family NAME --keys`` prints."""

from __future__ import annotations

from pathlib import Path

import click

from ckpt_convert.cli.family_table import lines
from ckpt_convert.models import FAMILIES

FOLDER = Path(__file__).parent


def expected() -> dict[str, str]:
    """The table of every family, by its name."""
    return {name: text(name) for name in FAMILIES}


def text(name: str) -> str:
    """The table of one family, without colors."""
    return "\n".join(map(click.unstyle, lines(FAMILIES[name]))) + "\n"
