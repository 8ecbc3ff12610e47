"""Writing an HTML page, completely or not at all."""

from __future__ import annotations

from pathlib import Path

from ckpt_convert.cli.output_file import OutputFile
from ckpt_convert.cli.text import echo, escape
from ckpt_convert.wording import human_bytes


def check_page(destination: str, *, with_json: bool = False) -> None:
    """Refuse early a destination that is no place for a page; raises what ``OutputFile.check`` does."""
    _PAGE.check(destination, with_json=with_json)


def write_page(destination: str, page: str) -> None:
    """Write a page to a file, replacing another page, or to standard output ("-"); prints its path on standard error.

    Raises what ``OutputFile.write`` does.
    """
    data = page.encode("utf-8", "backslashreplace")
    path = _PAGE.write(destination, [data])
    if path is not None:
        echo(f"wrote {escape(str(path))} ({human_bytes(len(data))}); open it in a browser", err=True)


def _is_page(path: Path) -> bool:
    if path.suffix.lower() in (".html", ".htm"):
        return True
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError:
        return True  # the error is reported when it is written
    return not start or start.startswith((b"<!doctype html", b"<html"))


_PAGE = OutputFile("--html", "page", "page.html", _is_page)
