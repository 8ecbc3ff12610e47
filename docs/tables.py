"""Writes the tables of the documentation that the code itself has the content of.

python docs/tables.py            writes them into docs/families.md
python docs/tables.py --check    only says, with 1, whether they are out of date
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from ckpt_convert.cli.formats import footnotes, mark
from ckpt_convert.formats import ALL
from ckpt_convert.models import grouped

PAGE = Path(__file__).parent / "families.md"
_SIGNS = {"-": "", "yes*": "yes\\*"}
BEGIN, END = "<!-- formats: python docs/tables.py -->\n", "<!-- end -->"


def families() -> Iterator[str]:
    """The families by group, with a column for each format, and the footnotes, as Markdown."""
    yield _row("family", "covers", *ALL)
    yield f"|{'---|' * (2 + len(ALL))}"
    for group, members in grouped().items():
        yield _row(f"**{group}**", "", *("" for _ in ALL))
        for family in members:
            yield _row(family.name, family.title, *(mark(family, format) for format in ALL))
    for names, why in footnotes().items():
        yield ""
        yield f"\\* {names}: {why}."


def _row(*cells: str) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in (_SIGNS.get(cell, cell) for cell in cells))


def updated(page: str) -> str:
    """The page with its table as it should be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise SystemExit(f"{PAGE.name}: has no {BEGIN.strip()} … {END}")
    return before + BEGIN + "\n".join(families()) + "\n" + END + after


def main() -> int:
    page = PAGE.read_text()
    made = updated(page)
    if "--check" in sys.argv[1:]:
        return int(made != page)
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
