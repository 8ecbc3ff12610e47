"""What the library reports while it works: to the command that runs, else to the logger ``ckpt_convert``.

``logging`` takes 3 ms to import, and most commands report nothing, so it is imported with the first message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_shown_by: list[Callable[[str], None]] = []


def warning(text: str, *values: object) -> None:
    """Report what the user should know."""
    if _shown_by:
        _shown_by[-1](text % values if values else text)
        return
    import logging

    logging.getLogger(__package__).warning(text, *values, stacklevel=2)


def info(text: str, *values: object) -> None:
    """Report what is as it should be; a command does not show it."""
    if not _shown_by:
        import logging

        logging.getLogger(__package__).info(text, *values, stacklevel=2)


@contextmanager
def shown_by(show: Callable[[str], None]) -> Iterator[None]:
    """Have a function of the command show warnings while the block runs."""
    _shown_by.append(show)
    try:
        yield
    finally:
        _shown_by.remove(show)
