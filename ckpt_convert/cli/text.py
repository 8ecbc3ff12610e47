"""Text for the terminal: escaped, measured, shortened, set in columns; counts and sizes for people."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import click

from ckpt_convert.cli.flags import document_in_flags, in_flags
from ckpt_convert.wording import with_unit

_GAP = "  "
_SECRETS = (
    (r"(\n--store-option[=\n][^\n=]*=)[^\n]*", r"\1…"),
    (r"(https?://)[^/@\n]*@|(\w+://)[^/@:\n]*:[^/@\n]*@", r"\1\2"),
    (r"(\w+://[^?\n]*\?)[^\n]+", r"\1…"),
)
"""What may be secret in a command, a line for each word: values of such options, an address' user and its query."""

_LEAST = 28
"""The first column is not shortened below this, nor by more than a third; else it gets its own lines."""

Paint = Callable[[str], str]
"""Colors a text."""


_PLAIN = {"×": "x", "Δ": "d", "‖": "|", "→": ">", "…": "~"}
"""Replacements for our own symbols where the output's encoding lacks them; of equal width."""


class Labelled(NamedTuple):
    """A label and the words after it, which are not broken; ``color`` is that of the label."""

    label: str
    words: Sequence[str]
    color: str | None = None


def escape(text: str) -> str:
    r"""A text of the library, or from a file, for the terminal: options as flags, invisible characters escaped.

    Whatever would not be visible becomes ``\xNN`` or ``\uNNNN``: control characters (C0, DEL, C1, so newlines
    and tabs too), marks that change the writing direction, characters without width, blanks other than the space,
    and lone surrogates.
    """
    text = in_flags(text)
    return text if text.isprintable() else "".join(char if char.isprintable() else _escaped(char) for char in text)


def human_count(count: int) -> str:
    """A count in three digits: "56", "34.5 K", "1.24 B"."""
    return with_unit(count, ("", "K", "M", "B", "T")).rstrip()


def number(value: int) -> str:
    """A whole number with its thousands apart: "1,235,814,400"."""
    return f"{value:,}"


def percent(part: int, whole: int) -> str:
    """A percentage that is 0% or 100% only if it is exact: "82.5%", "<0.1%"."""
    if not part or part == whole:
        return "100%" if part else "0%"
    share = 100 * part / whole
    return "<0.1%" if share < 0.1 else f"{min(share, 99.9):.1f}%"


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """A count with its noun: "1 file", "2 files"; ``nouns`` where an s does not make the plural."""
    return f"{number(count)} {noun if count == 1 else nouns or noun + 's'}"


def real(value: float) -> str:
    """A number in three significant digits, without an exponent where that is as short."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def shape_text(shape: Sequence[int]) -> str:
    """A shape as Python writes a list: "[2048, 8192]"."""
    return f"[{', '.join(map(str, shape))}]"


def display_width(text: str) -> int:
    """The terminal columns that the text takes."""
    return len(text) if text.isascii() else sum(map(_char_width, text))


def shorten(text: str, width: int) -> str:
    """At most ``width`` columns, with an ellipsis in the middle; the end, which identifies a key, is kept longer.

    Braces, as in ``layers.{0..15}``, are kept or left out as a unit.
    """
    if display_width(text) <= width:
        return text
    head = _fitting(text, (width - 1) * 2 // 5)
    start = head.rfind("{")
    end = text.find("}", start) + 1
    if start >= 0 and end > len(head):
        head = text[:end] if display_width(text[:end]) <= width * 3 // 5 else head[:start]
    tail = _fitting(text[::-1], width - 1 - display_width(head))[::-1]
    before, brace, after = tail.partition("}")
    if brace and "{" not in before and "{" in text:
        tail = after
    return f"{head}…{tail}"


def bar(share: float, width: int) -> str:
    """A bar that is ``width`` characters long where ``share`` is 1; of # where the output has no blocks."""
    if not can_say("█▏"):
        return "#" * round(share * width)
    whole, eighths = divmod(round(share * width * 8), 8)
    return "█" * whole + (chr(0x2590 - eighths) if eighths else "")


def can_say(text: str) -> bool:
    """Whether the encoding of standard output has these characters."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def terminal_width() -> int | None:
    """The columns of the terminal on standard output, None where it is no terminal."""
    if not sys.stdout.isatty():
        return None
    import shutil

    return shutil.get_terminal_size().columns


def json_lines(document: Mapping[str, object]) -> Iterator[str]:
    """The lines of one JSON object; a list of objects has one line per object, quick to write and easy to grep."""
    import json

    yield "{"
    last = len(document) - 1
    for at, (name, value) in enumerate(document.items()):
        comma = "," if at < last else ""
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"  {json.dumps(name)}: ["
            yield ",\n".join(f"    {json_text(entry)}" for entry in value)
            yield f"  ]{comma}"
        else:
            yield f"  {json.dumps(name)}: {json_text(value)}{comma}"
    yield "}"


def json_text(value: object, **settings: Any) -> str:
    """A value as JSON, with the options in the library's texts spelled as flags."""
    import json

    text = json.dumps(value, **settings)
    return json.dumps(document_in_flags(value), **settings) if "`" in text else text


def echo_json(document: Mapping[str, object]) -> None:
    """Print one JSON object."""
    echo("\n".join(json_lines(document)))


def echo(text: str, *, err: bool = False) -> None:
    """Print to standard output, or standard error; colors only on a terminal, and not where NO_COLOR is set.

    Characters that the output's encoding lacks are escaped.
    """
    encoding = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    if encoding != "utf-8" and not text.isascii():
        for sign, plain in _PLAIN.items():
            if sign in text and sign.encode(encoding, "ignore") == b"":
                text = text.replace(sign, plain)
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    with stopping_nothing(err=err):
        click.echo(text, err=err, color=False if _is_plain() else None)


class Printed:
    """The state of a command's output: ``lost`` is whether some of it could not be written; ``words`` are its own."""

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.words = words
        self.lost = False


def command_line() -> str:
    """The command that runs, as it was typed, but for what may be secret in it; "" where nothing was typed."""
    context = click.get_current_context(silent=True)
    printed = context.find_object(Printed) if context is not None else None
    if printed is None or not printed.words:
        return ""
    import shlex

    text = "\n".join(["ckpt-convert", *(word.replace("\n", " ") for word in printed.words)])
    for pattern, kept in _SECRETS:
        text = re.sub(pattern, kept, text)
    return shlex.join(text.split("\n"))


@contextlib.contextmanager
def stopping_nothing(*, err: bool = False) -> Iterator[None]:
    """Print in this block; where that fails, nothing more is printed, and the command goes on.

    A broken pipe (head, less) is fine; any other failure is reported as lost output.
    """
    try:
        yield
    except OSError as error:
        silence(sys.stderr if err else sys.stdout)
        context = click.get_current_context(silent=True)
        printed = context.find_object(Printed) if context is not None else None
        if err or error.errno == errno.EPIPE:
            return
        if printed is not None:
            printed.lost = True
        what = f"standard output: cannot be written: {error.strerror}; what was to be printed is lost"
        echo(f"{click.style('error:', fg='red', bold=True)} {what}", err=True)


def silence(stream: TextIO) -> None:
    """Discard what is still written to a stream, at exit too."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def columns(
    rows: Sequence[Sequence[str]],
    *,
    right: frozenset[int] = frozenset(),
    styles: Mapping[int, str | Paint] | None = None,
    spare: Sequence[int] = (),
    width: int | None = None,
    indent: str = "",
) -> list[str]:
    """Rows of cells as aligned lines without tabs or trailing blanks; columns that are empty in every row are left out.

    Columns in ``right`` are flush right; ``styles`` is the color of a column, or a function for its cells. Where a line
    has to fit into ``width``, the columns in ``spare`` are left out, one after the other; then the first column is
    shortened; at last its cells get their own lines, with the others below.
    """
    if not rows:
        return []
    widths = [max(map(display_width, cells)) for cells in zip(*rows, strict=True)]
    for column in spare:
        if width is not None and _total(widths, indent) > width:
            widths[column] = 0
    used = [at for at, cells in enumerate(widths) if cells]
    paints = {at: _painter(style) for at, style in (styles or {}).items()}
    excess = _total(widths, indent) - width if width is not None else 0
    if width is not None and excess > 0:
        if widths[used[0]] - excess < max(_LEAST, widths[used[0]] * 2 // 3):
            return [_stacked(row, used, widths, right, width, indent, paints) for row in rows]
        widths[used[0]] -= excess
    return [indent + _line(row, used, widths, right, paints) for row in rows]


def labelled(said: Iterable[Labelled], width: int | None, *, least: int = 0) -> Iterator[str]:
    """Labels and the words after them, wrapped to ``width``; ``least`` is the least width of the labels."""
    said = [*said]
    room = max([least, *(display_width(one.label) + len(_GAP) for one in said)])
    for label, words, color in said:
        lines = [" ".join(words)] if width is None else wrap(words, max(width - room, room))
        for at, line in enumerate(lines or [""]):
            shown = label + " " * (room - display_width(label))
            yield (click.style(shown, fg=color, bold=True) if at == 0 and label else " " * room) + line


def fits(rows: Sequence[Sequence[str]], width: int | None, indent: str = "") -> bool:
    """Whether ``columns`` shortens nothing."""
    return (
        width is None or _total([max(map(display_width, cells)) for cells in zip(*rows, strict=True)], indent) <= width
    )


def wrap(words: Iterable[str], width: int, blank: str = " ") -> list[str]:
    """Lines of words, none wider than ``width`` unless a word is; a word may have blanks, and is not broken there.

    Words may have colors. ``blank`` separates two words on a line.
    """
    lines: list[str] = []
    taken = 0
    for word in words:
        room = display_width(click.unstyle(word))
        if lines and taken + len(blank) + room <= width:
            lines[-1] += blank + word
            taken += len(blank) + room
        else:
            lines.append(word)
            taken = room
    return lines


def _total(widths: Sequence[int], indent: str) -> int:
    used = [width for width in widths if width]
    return len(indent) + sum(used) + len(_GAP) * (len(used) - 1)


def _line(
    row: Sequence[str], used: Sequence[int], widths: Sequence[int], right: frozenset[int], styles: Mapping[int, Paint]
) -> str:
    last = max((at for at in used if row[at]), default=-1)
    cells = []
    for at in used:
        if at > last:
            break
        cell = shorten(row[at], widths[at]) if at == used[0] else row[at]
        blank = " " * (widths[at] - display_width(cell))
        shown = styles[at](cell) if cell and at in styles else cell
        cells.append(blank + shown if at in right else shown if at == last else shown + blank)
    return _GAP.join(cells)


def _painter(style: str | Paint) -> Paint:
    return style if callable(style) else lambda cell: click.style(cell, fg=style)


def _stacked(
    row: Sequence[str],
    used: Sequence[int],
    widths: Sequence[int],
    right: frozenset[int],
    width: int,
    indent: str,
    styles: Mapping[int, Paint],
) -> str:
    """The first cell on a line of its own, the rest below it, aligned if that fits."""
    room = max(width - len(indent), 8)
    first, *rest = used
    key = shorten(row[first], room).rstrip()
    lines = [styles[first](key) if key and first in styles else key] if key else []
    if _total([widths[at] for at in rest], indent + _GAP) <= width:
        lines.append(_GAP + _line(row, rest, widths, right, styles))
    else:
        cells = (styles[at](row[at]) if at in styles else row[at] for at in rest if row[at])
        lines += [_GAP + line for line in wrap(cells, room - len(_GAP), _GAP)]
    return indent + f"\n{indent}".join(line for line in lines if line.strip())


def _is_plain() -> bool:
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _char_width(char: str) -> int:
    if char < "\u0300":  # before the first that combines with others
        return 1
    import unicodedata

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
