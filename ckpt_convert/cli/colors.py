"""The meaning of each color. ``text.echo`` removes colors where they are not wanted."""

from __future__ import annotations

import re
from functools import lru_cache

import click

from ckpt_convert.dtypes import DTYPES

WARNING = "yellow"
BAD = "red"
GOOD = "green"

_BRACES = r"(\{[^{}]*\}|…)"


def label(text: str) -> str:
    return click.style(text, bold=True)


def quiet(text: str) -> str:
    """What is glanced at, not read: bars, shares, the lines of a tree."""
    return click.style(text, dim=True)


def warning(text: str) -> str:
    return click.style(text, fg=WARNING)


def bad(text: str) -> str:
    return click.style(text, fg=BAD, bold=True)


def key(text: str) -> str:
    """A key, with its collapsed indices and its ellipsis highlighted."""
    return re.sub(_BRACES, lambda match: click.style(match[0], fg="cyan"), text) if "{" in text or "…" in text else text


def dtype(name: str) -> str:
    """A dtype: wide floats blue, 16-bit ones green, quantized ones (8 bits or fewer) magenta, the rest plain."""
    return _dtype(name)


@lru_cache
def _dtype(name: str) -> str:
    known = DTYPES.get(name)
    if known is None:
        return click.style(name, fg="magenta")
    if not known.is_number:
        return name
    return click.style(name, fg="bright_blue" if known.bits > 16 else "green" if known.bits == 16 else "magenta")
