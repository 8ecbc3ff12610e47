"""How far work is: bytes that several threads add up, told to whoever asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TransferProgress:
    """How far a conversion is: bytes of ``total`` done in this ``phase`` (checking, converting, verifying)."""

    phase: str
    done: int
    total: int


ProgressCallback = Callable[[TransferProgress], None]


class StoppedError(Exception):
    """Ends a worker's work where another one failed, or the user has had enough; it never reaches a caller."""


class Meter:
    """Adds up bytes from several threads and passes them on; once stopped, it ends the work of those that add.

    The callback is called by one thread at a time, and under no lock: while one calls it, others only add, and what
    they have added is told by that one.
    """

    def __init__(self, phase: str, total: int, callback: ProgressCallback | None) -> None:
        self.phase, self.total, self.done = phase, total, 0
        self._callback = callback
        self._lock = threading.Lock()
        self._telling = False
        self._stopped = False
        if callback is not None:
            callback(TransferProgress(phase, 0, total))

    def stop(self) -> None:
        self._stopped = True

    def add(self, nbytes: int) -> None:
        if self._stopped:
            raise StoppedError
        with self._lock:
            self.done += nbytes
            done = self.done
            if self._callback is None or self._telling:
                return
            self._telling = True
        self._tell(self._callback, done)

    def _tell(self, callback: ProgressCallback, done: int) -> None:
        told = -1
        try:
            while told != done:
                callback(TransferProgress(self.phase, done, self.total))
                with self._lock:
                    told, done = done, self.done
                    self._telling = told != done
        except BaseException:
            self._telling = False
            raise
