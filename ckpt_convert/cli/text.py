"""Text for people: escaped, measured, shortened, and set in columns; numbers and sizes as one reads them."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import click

_GAP = "  "
_LEAST = 16
"""A column is never shortened below this many characters, however narrow the terminal is."""


def escape(text: str) -> str:
    r"""Make text from a file safe for a terminal: whatever would not be seen as itself becomes ``\xNN`` or ``\uNNNN``.

    That is control characters (C0, DEL, C1, so newlines and tabs too), the marks that turn the writing direction,
    characters without width, blanks other than the space, and lone surrogates.
    """
    return text if text.isprintable() else "".join(char if char.isprintable() else _escaped(char) for char in text)


def human_bytes(size: int) -> str:
    """Bytes in decimal units, as on the Hub, in three digits: "288 B", "16.1 kB", "134 MB", "3.0 GB"."""
    return _scaled(size, ("B", "kB", "MB", "GB", "TB", "PB", "EB"))


def human_count(count: int) -> str:
    """A count in three digits: "56", "34.5 K", "1.24 B"."""
    return _scaled(count, ("", "K", "M", "B", "T")).rstrip()


def number(value: int) -> str:
    """A whole number with its thousands apart: "1,235,814,400"."""
    return f"{value:,}"


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """A count with its noun: "1 file", "2 files"; ``nouns`` where an s does not make the plural."""
    return f"{number(count)} {noun if count == 1 else nouns or noun + 's'}"


def shape_text(shape: Sequence[int]) -> str:
    """A shape as Python writes a list: "[2048, 8192]"."""
    return f"[{', '.join(map(str, shape))}]"


def display_width(text: str) -> int:
    """How many columns of a terminal the text takes."""
    return len(text) if text.isascii() else sum(map(_char_width, text))


def shorten(text: str, width: int) -> str:
    """At most ``width`` columns, with an ellipsis in the middle; more is kept of the end, which says more of a key."""
    if display_width(text) <= width:
        return text
    head = _fitting(text, (width - 1) * 2 // 5)
    tail = _fitting(text[::-1], width - 1 - display_width(head))[::-1]
    return f"{head}…{tail}"


def terminal_width() -> int | None:
    """The columns of the terminal on standard output, None where it is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


DIMS = ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")
"""The symbols of a config that are shown, in this order."""


def echo(text: str, *, err: bool = False) -> None:
    """Print to standard output, or standard error; colours only on a terminal, and not where NO_COLOR is set.

    What the encoding of the output cannot say is escaped.
    """
    encoding = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    if encoding != "utf-8" and not text.isascii():
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    click.echo(text, err=err, color=False if _is_plain() else None)


def columns(
    rows: Sequence[Sequence[str]],
    *,
    right: frozenset[int] = frozenset(),
    styles: Mapping[int, str] | None = None,
    width: int | None = None,
    indent: str = "",
) -> list[str]:
    """Rows of cells as aligned lines without tabs or trailing blanks; columns that are empty in every row are left out.

    Columns in ``right`` are flush right; ``styles`` colours columns. Where a line has to fit into ``width``, the
    first column is shortened, as far as that goes.
    """
    widths = [max(map(display_width, cells)) for cells in zip(*rows, strict=True)]
    used = [at for at, cells in enumerate(widths) if cells]
    excess = _total(widths, indent) - width if width is not None else 0
    if excess > 0:
        widths[used[0]] = min(widths[used[0]], max(widths[used[0]] - excess, _LEAST))
    colours = styles or {}
    return [indent + _line(row, used, widths, right, colours) for row in rows]


def fits(rows: Sequence[Sequence[str]], width: int | None, indent: str = "") -> bool:
    """Whether ``columns`` has no need to shorten anything."""
    return (
        width is None or _total([max(map(display_width, cells)) for cells in zip(*rows, strict=True)], indent) <= width
    )


def wrap(words: Iterable[str], width: int) -> list[str]:
    """Lines of words, none wider than ``width`` unless a word is; a word may have blanks, and is not broken there."""
    lines: list[str] = []
    for word in words:
        if lines and display_width(lines[-1]) + 1 + display_width(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _total(widths: Sequence[int], indent: str) -> int:
    used = [width for width in widths if width]
    return len(indent) + sum(used) + len(_GAP) * (len(used) - 1)


def _line(
    row: Sequence[str], used: Sequence[int], widths: Sequence[int], right: frozenset[int], colours: Mapping[int, str]
) -> str:
    last = max((at for at in used if row[at]), default=-1)
    cells = []
    for at in used:
        if at > last:
            break
        cell = shorten(row[at], widths[at]) if at == used[0] else row[at]
        blank = " " * (widths[at] - display_width(cell))
        shown = click.style(cell, fg=colours[at]) if cell and at in colours else cell
        cells.append(blank + shown if at in right else shown if at == last else shown + blank)
    return _GAP.join(cells)


def _is_plain() -> bool:
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def _scaled(value: int, units: Sequence[str]) -> str:
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


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _char_width(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _fitting(text: str, width: int) -> str:
    """As much of the beginning as fits."""
    if text.isascii():
        return text[: max(width, 0)]
    taken = 0
    for at, char in enumerate(text):
        taken += _char_width(char)
        if taken > width:
            return text[:at]
    return text
