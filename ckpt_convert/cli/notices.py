"""The library's messages on standard error: escaped, one line each."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from ckpt_convert import log
from ckpt_convert.cli import colors
from ckpt_convert.cli.text import echo, escape


def notice(text: str) -> None:
    """Print a notice on standard error; a closed stream is no error."""
    with suppress(OSError):  # nobody reads standard error: that is no reason to stop
        echo(f"{colors.warning('notice:')} {escape(text)}", err=True)


def on_stderr(*, hidden: bool = False) -> AbstractContextManager[None]:
    """Show the library's notices, or hide them, while the block runs."""
    return log.shown_by((lambda text: None) if hidden else notice)


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Keep transformers silent and off the network while the block runs; without transformers, nothing is done.

    These switches are global to the process, which is why only the command sets them and never the library.
    """
    try:
        import logging

        from huggingface_hub import constants

        chatter: Any = importlib.import_module("transformers.utils.logging")
    except ImportError:  # reported by what needs it
        yield
        return
    level, bars, offline = chatter.get_verbosity(), chatter.is_progress_bar_enabled(), constants.HF_HUB_OFFLINE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chatter.set_verbosity(logging.CRITICAL)
        chatter.disable_progress_bar()
        constants.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = offline
            chatter.set_verbosity(level)
            if bars:
                chatter.enable_progress_bar()
