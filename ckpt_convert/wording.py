"""Building blocks of messages: the first few of many names, shortened values, sizes, and options.

A message names options as Python spells them, in backticks: `workers=0`, `overwrite=True`, `to=`. The command line
finds them by that, and replaces them with its own flags.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MORE = " and {} more"


def indented_list(lines: Sequence[str], limit: int = 20) -> str:
    """Indented lines for a message, at most ``limit`` of them."""
    shown = "".join(f"\n    {line}" for line in lines[:limit])
    return shown + (f"\n    … and {len(lines) - limit} more" if len(lines) > limit else "")


def first_few(names: Iterable[object], limit: int, more: str = ", …") -> str:
    """The first ``limit`` names on one line, then ``more`` if there are others; "{}" in it is their number."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:limit]) + (more.format(len(texts) - limit) if len(texts) > limit else "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" with the names that a mistyped one is close to; "" where there are none."""
    import difflib  # only errors need it

    near = difflib.get_close_matches(name, [*known], 3, 0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def short_repr(value: object, limit: int = 80) -> str:
    """A value from a file, shortened: an untrusted file must not fill the terminal."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print an integer of thousands of digits
        return "a very large number"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def option_text(name: str, value: object) -> str:
    """An option with its value, as in a message."""
    return f"`{name}={python_literal(value)}`"


def python_literal(value: object) -> str:
    """A value as a Python literal, for an option in backticks."""
    return repr(value if isinstance(value, int | float) else str(value)).replace("`", r"\x60")


def human_bytes(size: int) -> str:
    """Bytes in decimal units, as on the Hub, in three digits: "288 B", "16.1 kB", "134 MB", "3.0 GB"."""
    return with_unit(size, ("B", "kB", "MB", "GB", "TB", "PB", "EB"))


def with_unit(value: int, units: Sequence[str]) -> str:
    """A number in three digits with the unit that fits; each unit is a thousand times the one before."""
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
