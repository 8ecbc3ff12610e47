"""What the library logs, on standard error: escaped, one line each."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ckpt_convert.cli import colours
from ckpt_convert.cli.text import echo, escape


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # nobody reads standard error: that is no reason to stop
            notice(record.getMessage())


def notice(text: str) -> None:
    """Say something on standard error that does not stop what is being done."""
    echo(f"{colours.warning('notice:')} {escape(text)}", err=True)


@contextmanager
def on_stderr(*, hidden: bool = False) -> Iterator[None]:
    """Show the library's notices, or hide them, while the block runs."""
    log = logging.getLogger("ckpt_convert")
    handler = logging.NullHandler() if hidden else _Stderr()
    log.addHandler(handler)
    was, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = was
