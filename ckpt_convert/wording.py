"""How messages put things: a few names of many, what a file says, sizes, and options.

A message names options as Python spells them, in backticks: `workers=0`, `overwrite=True`, `to=`. Whoever has other
names for them, as the command line has, finds them by that and says them in its own words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MORE = " and {} more"


def indented_list(lines: Sequence[str], limit: int = 20) -> str:
    """The lines of a message, one below the other and indented; at most a screenful of them."""
    shown = "".join(f"\n    {line}" for line in lines[:limit])
    return shown + (f"\n    … and {len(lines) - limit} more" if len(lines) > limit else "")


def first_few(names: Iterable[object], limit: int, more: str = ", …") -> str:
    """The first few names on one line, and ``more`` where there are others, whose number may stand in it."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:limit]) + (more.format(len(texts) - limit) if len(texts) > limit else "")


def short_repr(value: object, limit: int = 80) -> str:
    """A value that a file says, in short: a hostile file must not fill the terminal."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print an integer of thousands of digits
        return "a very large number"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def option_text(name: str, value: object) -> str:
    """An option that was given, or is to be, with its value."""
    return f"`{name}={python_literal(value)}`"


def python_literal(value: object) -> str:
    """A value as Python spells it, for an option or an argument in backticks."""
    return repr(value if isinstance(value, int | float) else str(value)).replace("`", r"\x60")


def human_bytes(size: int) -> str:
    """Bytes in decimal units, as on the Hub, in three digits: "288 B", "16.1 kB", "134 MB", "3.0 GB"."""
    return with_unit(size, ("B", "kB", "MB", "GB", "TB", "PB", "EB"))


def with_unit(value: int, units: Sequence[str]) -> str:
    """A number in three digits of the unit that fits, each a thousand times the one before."""
    size: float = value
    for unit in units:
        digits = 0 if unit == units[0] or size >= 99.95 else 1 if size >= 9.995 else 2
        shown = f"{size:.{digits}f}"
        if float(shown) < 1000 or unit == units[-1]:
            break
        size /= 1000
    if shown.endswith("0") and digits == 2:
        shown = shown[:-1]
    return f"{shown} {unit}"
