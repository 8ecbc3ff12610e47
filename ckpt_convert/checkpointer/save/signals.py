"""Deferring signals that ask a run to end, such as SIGTERM and SIGINT, to the end of a training step."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from ckpt_convert.errors import UsageError

log = logging.getLogger("ckpt_convert")

HANDLED = (signal.SIGTERM, signal.SIGINT)
"""The signals that ``save_on_signal=True`` means."""

_UNHANDLED = {"SIGKILL", "SIGSTOP", "SIGCHLD", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL"}
"""Signals that cannot be handled, or after which nothing may be saved."""


def parse_signals(given: Any) -> tuple[int, ...]:
    """The signals of ``save_on_signal``: True, False, a name such as "SIGUSR1" or "USR1", a number, or several of them.

    Raises UsageError for anything else, and for signals that cannot be deferred.
    """
    if isinstance(given, bool):
        return HANDLED if given else ()
    every = given if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    return tuple(dict.fromkeys(_signal(one) for one in every))


def _signal(given: Any) -> int:
    try:
        if isinstance(given, str):
            found = signal.Signals[given if given.startswith("SIG") else f"SIG{given}"]
        else:
            found = signal.Signals(given)
    except (KeyError, ValueError):
        found = None
    if found is None or found.name in _UNHANDLED:
        raise UsageError(
            f"save_on_signal={given!r}: expected True (SIGTERM and SIGINT), or signals that can wait for the end of a "
            'step, such as ["SIGTERM", "SIGUSR1"]'
        )
    return int(found)


class Signals:
    """Records the first of each of some signals; further ones go to the previous handlers. A context manager.

    ``received`` is the number of the signal that came first, None as long as there was none.
    """

    def __init__(self, handled: Sequence[int] = HANDLED, *, is_told: bool = True) -> None:
        """``is_told``: whether to log that one came; of many processes that get the same one, not all do."""
        self._handled, self._is_told = handled, is_told
        self.received: int | None = None
        self._seen: set[int] = set()
        self._previous: dict[int, signal._HANDLER] = {}
        self._process = 0
        self._active = False

    def install(self) -> None:
        """Handle the signals from now on; raises UsageError outside of the main thread."""
        if self._active:
            return
        if threading.current_thread() is not threading.main_thread():
            raise UsageError(
                "signals can only be handled in the main thread: call this there, or pass save_on_signal=False and "
                "call save() when a signal of your own says so"
            )
        self.received = None
        self._seen.clear()
        self._process = os.getpid()
        self._active = True
        for number in self._handled:
            if number not in self._previous:  # else somebody had wrapped the handler, which then stayed
                self._previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Restore the previous handlers; a handler that was installed by others since is kept.

        Outside of the main thread, where handlers cannot be set, signals are passed on to those from before.
        """
        self._active = False
        if threading.current_thread() is not threading.main_thread():
            return
        for number in [number for number in self._previous if signal.getsignal(number) == self._handle]:
            previous = self._previous.pop(number)
            signal.signal(number, signal.SIG_DFL if previous is None else previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = number not in self._seen
        self._seen.add(number)
        child = os.getpid() != self._process
        if not self._active or not first or (child and number == signal.SIGTERM):
            self._pass_on(number, frame)
        elif not child:
            self.received = self.received or number
            if self._is_told:
                name = signal.Signals(number).name
                log.warning("%s received: saving at the next step; a second one is not waited for", name)
        # Ctrl-C in a terminal also signals forked data loading workers; they have to continue so that the step can end.

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(number, signal.SIG_DFL)
        if callable(previous):
            previous(number, frame)
        elif previous != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __enter__(self) -> Signals:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
