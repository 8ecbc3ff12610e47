"""Whether the other ranks are alive: each says so again and again, from a thread that does nothing else.

A rank that is slow is waited for as long as it lives and takes part. One that is not heard of any more is gone, whether
it was killed, is stopped, or its machine cannot be reached; and so is the store through which they talk.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

from ckpt_convert.errors import CkptConvertError
from ckpt_convert.tensors.pool import CallThread

T = TypeVar("T")

BEAT = 5.0
"""Seconds after which a rank says again that it is alive."""

SILENCE = 30.0
"""Seconds after which a rank that is not heard of is gone, or a store that does not answer."""

PATIENCE = 60.0
"""Seconds after which the first rank says whom it waits for; then after twice as many, and so on."""

_FIRST_LOOK = 1.0
"""Seconds of a wait in which nobody is looked at: in most of them all have come by then."""

STORE_ERRORS = (RuntimeError, ConnectionError)
"""What torch's stores raise: ``DistError`` and its kinds are RuntimeErrors."""


class Beat(NamedTuple):
    """What a rank says of itself: a number that grows, the turn it has come to in each channel, and those that it is in
    a call of all ranks of, which takes several turns."""

    number: int
    turns: Mapping[str, int]
    inside: Mapping[str, int]

    def takes_part(self, channel: str, turn: int) -> bool:
        """Whether the rank has come to a turn, or is in a call that will come to it."""
        return self.turns.get(channel, 0) >= turn or self.inside.get(channel, 0) > 0


class Heart:
    """What this rank says of itself; its thread says it, and others only change it."""

    def __init__(self, store: Any, key: str) -> None:
        self.turns: dict[str, int] = {}
        self.inside: dict[str, int] = {}
        self.watched: set[str] = set()
        self.seen: set[str] = set()
        """Keys that are looked for at each beat, and those of them that were there."""
        self._store, self._key, self._number = store, key, 0
        self._has_failed = False

    def beat(self) -> None:
        """Say that this rank is alive, and look for what is watched.

        It does so until the store fails, which whoever wants something of it will raise.
        """
        if self._has_failed:  # each further try would have torch print a page
            return
        self._number += 1
        try:
            self._store.set(self._key, json.dumps([self._number, dict(self.turns), dict(self.inside)]))
            for key in self.watched - self.seen:
                if self._store.check([key]):
                    self.seen.add(key)
        except STORE_ERRORS:
            self._has_failed = True


class Line:
    """The connection of this rank to the store: of its own, so that no wait of the training's holds it up.

    A call that takes too long is given up: a store on a machine that is gone, or in a process that is stopped, leaves
    it without an answer.
    """

    def __init__(self, store: Any, key: str) -> None:
        """``key`` is where this rank says that it is alive."""
        self._origin = store  # the process that serves it does so as long as this is there
        self._store = store.clone()
        self._is_dead = False
        self.gone: dict[int, int] = {}
        """The ranks that were found to be gone, each with its last number: they are not waited for a second time."""
        self.heart = Heart(self._store, key)
        self._thread = CallThread("ckpt-convert-ranks", self.heart.beat, BEAT)
        self.call("set", key, "[0, {}, {}]")

    def call(self, name: str, *given: Any) -> Any:
        """Call a method of the store; raises CkptConvertError where it fails, or does not answer."""
        try:
            if self._is_dead:
                raise TimeoutError
            return self._thread.call(partial(getattr(self._store, name), *given), SILENCE)
        except TimeoutError as error:
            self._is_dead = True
            raise CkptConvertError(_store_is_gone(f"has not answered for {SILENCE:g} s", "or is stopped")) from error
        except STORE_ERRORS as error:
            raise CkptConvertError(_store_is_gone("does not answer any more")) from error

    def close(self) -> None:
        """Say nothing more."""
        self._thread.close()


def _store_is_gone(what: str, more: str = "") -> str:
    return (
        f"the store of torch.distributed {what}: the process that has it, rank 0's or torchrun's, has ended"
        f"{more and ', ' + more}; look for its error first"
    )


def read_beat(value: bytes | str) -> Beat:
    """What a rank has said of itself."""
    return Beat(*json.loads(value))


@dataclass
class _Seen:
    """What was seen of one rank: its last number, and for how many seconds it was silent, and took no part."""

    number: int | None = None
    silent: float = 0.0
    away: float = 0.0


class Vigil:
    """What is seen of other ranks while they are waited for in one turn.

    Time in which this process could not look, because it was stopped itself, does not count against the others.
    """

    def __init__(
        self, channel: str, turn: int, gone: dict[int, int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``gone`` are the ranks that were found to be so, with their last numbers; others are added."""
        self._channel, self._turn, self._gone, self._clock = channel, turn, gone, clock
        self._seen: dict[int, _Seen] = {}
        self._looked = clock()
        self._report_at = PATIENCE
        self.waited = 0.0
        """Seconds since the wait began."""

    @property
    def is_due(self) -> bool:
        """Whether it is time to look again."""
        return self._clock() - self._looked >= (BEAT if self._seen else min(_FIRST_LOOK, BEAT))

    def look(self, beats: Mapping[int, Beat | None]) -> None:
        """Take what those ranks say now that are waited for; None for one that has never said anything."""
        now = self._clock()
        passed, self._looked = min(now - self._looked, 2 * BEAT), now
        self.waited += passed
        before, self._seen = self._seen, {}
        for rank, beat in beats.items():
            seen = self._seen[rank] = before.get(rank, _Seen())
            if beat is None or not beat.takes_part(self._channel, self._turn):
                seen.away += passed
            else:
                seen.away = 0.0
            number = None if beat is None else beat.number
            seen.silent = seen.silent + passed if number is not None and number == seen.number else 0.0
            seen.number = number
            if number is not None and seen.silent >= SILENCE:
                self._gone[rank] = number

    @property
    def silent(self) -> list[int]:
        """The ranks that are gone: they were alive once, and are not heard of any more."""
        return [
            rank for rank, seen in self._seen.items() if seen.number is not None and self._gone.get(rank) == seen.number
        ]

    def away(self, seconds: float = 0.0) -> list[int]:
        """The ranks that have taken no part for longer than so many seconds."""
        return [rank for rank, seen in self._seen.items() if seen.away > seconds]

    def waits_long(self) -> bool:
        """Whether it is time to say whom this one waits for; not again before it has waited twice as long."""
        if self.waited < self._report_at:
            return False
        self._report_at = 2 * self.waited
        return True
