"""TransferProgress in bytes, added up over threads and passed to a callback."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TransferProgress:
    """Bytes of ``total`` done in this ``phase``: checking, converting, verifying, loading or saving."""

    phase: str
    done: int
    total: int


ProgressCallback = Callable[[TransferProgress], None]


class StoppedError(Exception):
    """Ends a worker's work after another one failed or the user interrupted; it never reaches a caller."""


class ProgressCounter:
    """Adds up bytes from several threads and reports them; once stopped, ``add`` raises StoppedError.

    The callback is called by one thread at a time, without holding the lock: while one thread calls it, others only
    add, and that thread reports their bytes, too.
    """

    def __init__(self, phase: str, total: int, callback: ProgressCallback | None) -> None:
        self.phase, self.total, self.done = phase, total, 0
        self._callback = callback
        self._lock = threading.Lock()
        self._reporting = False
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
            if self._callback is None or self._reporting:
                return
            self._reporting = True
        self._report(self._callback, done)

    def _report(self, callback: ProgressCallback, done: int) -> None:
        reported = -1
        try:
            while reported != done:
                callback(TransferProgress(self.phase, done, self.total))
                with self._lock:
                    reported, done = done, self.done
                    self._reporting = reported != done
        except BaseException:
            self._reporting = False
            raise
