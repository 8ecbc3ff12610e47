"""What several ranks log: the first one speaks for all, and names the others where they alone have something to say.

Which rank it is that logs is known while a thread is in a call of a checkpointer of several ranks. Elsewhere all is
logged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from ckpt_convert.wording import first_few

log = logging.getLogger("ckpt_convert")

OWN = {"of_one_rank": True}
"""For ``extra=`` of a line that is of the data that one rank holds: it names the rank, also the first one."""

Line = tuple[int, str]
"""A level and a text."""


class _Speaker(NamedTuple):
    """A rank that logs, and where its warnings are kept for the others; None: nowhere."""

    rank: int
    kept: list[Line] | None


_speaker: ContextVar[_Speaker | None] = ContextVar("speaker", default=None)


def _may_speak(record: logging.LogRecord) -> bool:
    """The filter of the logger: whether this rank logs a line."""
    speaker = _speaker.get()
    if speaker is None:
        return True
    own = hasattr(record, "of_one_rank")
    if speaker.kept is not None and record.levelno >= logging.WARNING and not (own and speaker.rank == 0):
        speaker.kept.append((record.levelno, record.getMessage()))
    if own:
        record.msg, record.args = f"rank {speaker.rank}: {record.getMessage()}", ()
    return speaker.rank == 0


log.addFilter(_may_speak)


@contextmanager
def speaking(rank: int | None, kept: list[Line] | None = None) -> Iterator[None]:
    """Log as this rank of several: nothing if it is not the first one; warnings are ``kept``. None: log everything."""
    before = _speaker.set(None if rank is None else _Speaker(rank, kept))
    try:
        yield
    finally:
        _speaker.reset(before)


def say_for(heard: Mapping[int, Sequence[Line]], said: Sequence[Line] = ()) -> None:
    """Log what ranks have to say, each line once with their numbers, but for what was said already."""
    ranks: dict[Line, list[int]] = {}
    for rank, lines in heard.items():
        for line in lines:
            ranks.setdefault(line, []).append(rank)
    with speaking(None):
        for (level, text), of in ranks.items():
            if (level, text) not in said:
                log.log(level, "rank %s: %s", first_few(of, 8, " and others"), text)
