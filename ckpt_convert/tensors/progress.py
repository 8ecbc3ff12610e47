"""How far work is: bytes that several threads add up, told to whoever asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is: bytes of ``total`` done in this ``phase`` (checking, converting, verifying)."""

    phase: str
    done: int
    total: int


ProgressCallback = Callable[[Progress], None]


class StoppedError(Exception):
    """Ends a worker's work where another one failed, or the user has had enough; it never reaches a caller."""


class Meter:
    """Adds up bytes from several threads and passes them on; once stopped, it ends the work of those that add."""

    def __init__(self, phase: str, total: int, callback: ProgressCallback | None) -> None:
        self.phase, self.total, self.done = phase, total, 0
        self._callback = callback
        self._lock = threading.Lock()
        self._stopped = False
        if callback is not None:
            callback(Progress(phase, 0, total))

    def stop(self) -> None:
        self._stopped = True

    def add(self, nbytes: int) -> None:
        if self._stopped:
            raise StoppedError
        with self._lock:
            self.done += nbytes
            if self._callback is not None:
                self._callback(Progress(self.phase, self.done, self.total))
