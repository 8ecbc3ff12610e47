"""The thread that uploads the steps of a run behind the training: one at a time, in order, until each has arrived."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ckpt_convert.checkpointer.distributed.ranks import Ranks, rank_of
from ckpt_convert.checkpointer.distributed.speaking import speaking
from ckpt_convert.errors import NotEnoughSpaceError, UnreadableError, UnwritableError
from ckpt_convert.tensors.pool import start_thread

log = logging.getLogger("ckpt_convert")

WhenBehind = Literal["wait", "skip"]
Mode = Literal["behind", "direct"]

WAITING = 2
"""Steps that may be on their way: one that is uploaded, and a complete one that waits for it."""

_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
"""Seconds between two attempts: the first time, doubled each time, and at most."""

_PASSES = (UnwritableError, UnreadableError, NotEnoughSpaceError)
"""Errors of a store or a network that may pass."""


@dataclass(frozen=True)
class UploadOptions:
    """How the steps of a run get into an object store: from a disk, behind the training, or written there directly.

    ``local_dir`` is where they are written first, None for a temporary directory, and ``keep_local`` how many stay
    there; ``deadline`` are the seconds that failing uploads are tried for before the run is told; ``when_behind`` is
    what a save does that is due while two steps are on their way.
    """

    mode: Mode = "behind"
    local_dir: str | Path | None = None
    keep_local: int = 1
    deadline: float = 3600.0
    when_behind: WhenBehind = "wait"

    def problems(self) -> Iterator[str]:
        """What is wrong with the options, by the names of the checkpointer's."""
        if self.mode not in get_args(Mode):
            yield f"upload={self.mode!r}: expected one of {', '.join(get_args(Mode))}"
        elif self.mode == "direct" and self != UploadOptions("direct"):
            yield 'upload="direct": writes into the store, so local_dir and other options of uploads do nothing with it'
        if type(self.keep_local) is not int or self.keep_local < 0:
            yield f"keep_local={self.keep_local!r}: expected a whole number from 0 on"
        if not isinstance(self.deadline, int | float) or not self.deadline > 0:
            yield f"upload_deadline={self.deadline!r}: expected a number of seconds"
        if self.when_behind not in get_args(WhenBehind):
            yield f"when_behind={self.when_behind!r}: expected one of {', '.join(get_args(WhenBehind))}"


class Uploader:
    """A thread that does what it is given in order, and again where a store or a network fails, until it succeeds.

    What has failed for longer than the deadline is raised by ``check`` and ``wait``, and tried again afterwards. After
    an error that does not pass, such as a lost lock, nothing more is done. Each of several ranks has such a thread; it
    fails where another one does, and the first one speaks.
    """

    def __init__(self, deadline: float, ranks: Ranks | None) -> None:
        self._deadline = deadline
        self._ranks = ranks
        self._work: deque[tuple[bool, str, Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failing_since: float | None = None
        self._told_at = 0.0
        self._error: Exception | None = None
        self._ends = False

    def submit(self, what: str, work: Callable[[], None], *, is_step: bool = False) -> None:
        """Do this after all that was given before; ``is_step`` counts it among the steps on their way."""
        with self._changed:
            self._work.append((is_step, what, work))
            if self._thread is None:
                self._thread = start_thread("ckpt-convert-upload", self._run)
            self._changed.notify_all()

    @property
    def steps(self) -> int:
        """The steps on their way."""
        with self._changed:
            return self._steps()

    def _steps(self) -> int:
        return 0 if self._ends else sum(is_step for is_step, _, _ in self._work)

    @property
    def is_done(self) -> bool:
        """Whether all that was given is done."""
        with self._changed:
            return not self._work

    def check(self) -> None:
        """Raise what has failed for longer than the deadline; never waits."""
        with self._changed:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self, steps: int = 0) -> None:
        """Wait until at most so many steps are on their way, or with 0 until all is done; raises as ``check``."""
        with self._changed:
            while self._error is None and not self._ends and (self._steps() > steps if steps else self._work):
                self._changed.wait(0.5)  # so that a signal is handled
        self.check()

    def close(self) -> None:
        """End the thread; what is not done is left."""
        with self._changed:
            self._ends = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        with speaking(rank_of(self._ranks)), contextlib.nullcontext() if self._ranks is None else self._ranks.at_work():
            self._work_off()

    def _work_off(self) -> None:
        pause = _PAUSE
        while True:
            with self._changed:
                while not self._work and not self._ends:
                    self._changed.wait()
                if self._ends:
                    return
                _, what, work = self._work[0]
            try:
                work()
            except _PASSES as error:
                self._failed(what, error)
            except Exception as error:
                with self._changed:
                    self._error, self._ends = error, True
                    self._changed.notify_all()
                return
            else:
                self._done(what)
                pause = _PAUSE
                continue
            with self._changed:
                self._changed.wait_for(lambda: self._ends, pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _done(self, what: str) -> None:
        with self._changed:
            self._work.popleft()
            if self._failing_since is not None:
                log.warning("%s: succeeded after %.0f s", what, time.monotonic() - self._failing_since)
            self._failing_since = None
            self._changed.notify_all()

    def _failed(self, what: str, error: Exception) -> None:
        """Note a failure that may pass: told to the run after the deadline."""
        with self._changed:
            now = time.monotonic()
            if self._failing_since is None:
                self._failing_since = self._told_at = now
                log.warning("%s failed, and is tried again: %s", what, error)
            if now - self._told_at >= self._deadline:
                seconds, self._told_at = now - self._failing_since, now
                text = f"{what} has failed for {seconds:.0f} s, and is tried again as long as the run lasts: {error}"
                self._error = type(error)(text)
                self._changed.notify_all()
