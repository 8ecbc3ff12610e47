"""Writing an HTML page, completely or not at all."""

from __future__ import annotations

import secrets
from pathlib import Path

import click

from ckpt_convert.cli.text import echo, escape, stopping_nothing
from ckpt_convert.errors import CkptConvertError, UsageError
from ckpt_convert.storage.names import local_path
from ckpt_convert.storage.system import replace_file
from ckpt_convert.wording import human_bytes


def check_page(destination: str, *, with_json: bool = False) -> None:
    """Refuse early a destination that is a directory, or whose directory does not exist.

    Raises UsageError, and click's where the options do not go together.
    """
    path = local_path(destination, "--html")
    if not destination:
        raise click.UsageError("--html needs the name of a file")
    if destination == "-":
        if with_json:
            raise click.UsageError("--html - and --json both write to standard output; give a file to one of them")
        return
    if path.is_dir():
        raise UsageError(f"--html {path}: is a directory; give the name of a file in it, such as {path / 'page.html'}")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"--html {path}: there is no directory {path.resolve().parent}; create it first")
    if path.is_file() and not _is_page(path):
        raise UsageError(f"--html {path}: is there and is no page; give another name, or remove it first")


def write_page(destination: str, page: str) -> None:
    """Write a page to a file, replacing another page, or to standard output ("-"); prints its path on standard error.

    Raises what ``check_page`` does.
    """
    check_page(destination)
    data = page.encode("utf-8", "backslashreplace")
    if destination == "-":
        with stopping_nothing():
            click.echo(data, nl=False)  # as bytes: a page is UTF-8, whatever the terminal's encoding
        return
    path = local_path(destination, "--html")
    try:
        if path.exists() and not path.is_file():  # /dev/stdout, a pipe: there is nothing to rename onto
            path.write_bytes(data)
        else:
            real = path.resolve()  # a link is written through, not replaced
            mode = real.stat().st_mode & 0o777 if real.exists() else None
            replace_file(real, data, real.with_name(f".{real.name[:100]}.{secrets.token_hex(4)}.partial"), mode)
    except OSError as error:
        raise CkptConvertError(f"--html {path}: cannot be written: {error.strerror}; give another place") from error
    echo(f"wrote {escape(str(path))} ({human_bytes(len(data))}); open it in a browser", err=True)


def _is_page(path: Path) -> bool:
    """Whether a file may be replaced: a mistyped path must not cost a weight file or a config."""
    if path.suffix.lower() in (".html", ".htm"):
        return True
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError:
        return True  # the error is reported when it is written
    return not start or start.startswith((b"<!doctype html", b"<html"))
