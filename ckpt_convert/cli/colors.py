"""What each color means, in one place. ``text.echo`` takes them away where they are not wanted."""

from __future__ import annotations

import re
from functools import lru_cache

import click

from ckpt_convert.dtypes import DTYPES

WARNING = "yellow"
BAD = "red"
GOOD = "green"

_BRACES = re.compile(r"(\{[^{}]*\}|…)")


def label(text: str) -> str:
    return click.style(text, bold=True)


def quiet(text: str) -> str:
    """What is there to be compared at a glance, not to be read: bars, shares, the lines of a tree."""
    return click.style(text, dim=True)


def warning(text: str) -> str:
    return click.style(text, fg=WARNING)


def bad(text: str) -> str:
    return click.style(text, fg=BAD, bold=True)


def key(text: str) -> str:
    """A key: the numbers that were collapsed stand out, and so does what was cut out of it."""
    return _BRACES.sub(lambda match: click.style(match[0], fg="cyan"), text) if "{" in text or "…" in text else text


def dtype(name: str) -> str:
    """A dtype: wide floats blue, 16-bit ones green, what is quantised (8 bits or fewer) magenta, the rest plain."""
    return _dtype(name)


@lru_cache
def _dtype(name: str) -> str:
    known = DTYPES.get(name)
    if known is None:
        return click.style(name, fg="magenta")
    if not known.is_number:
        return name
    return click.style(name, fg="bright_blue" if known.bits > 16 else "green" if known.bits == 16 else "magenta")
