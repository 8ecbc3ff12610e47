"""Work behind the training, one piece at a time; what fails is raised at the next call."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """One thread that does what it is handed in order. A new save waits for the one before it."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._running: list[Future[None]] = []

    @property
    def busy(self) -> bool:
        return any(not one.done() for one in self._running)

    def run(self, work: Callable[[], None]) -> None:
        """Start the work once what went on before is done; raises what that raised."""
        self.wait()
        self.then(work)

    def then(self, work: Callable[[], None]) -> None:
        """Do the work after what goes on, without waiting for that."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "ckpt-convert-save")
        self._running.append(self._pool.submit(work))

    def check(self) -> None:
        """Raise what failed, if anything did; never waits."""
        while self._running and self._running[0].done():
            self._running.pop(0).result()

    def wait(self) -> None:
        """Wait until nothing goes on; raises what failed first, once everything is done."""
        running, self._running = self._running, []
        wait(running)
        for one in running:
            one.result()

    def settle(self) -> Exception | None:
        """Wait until nothing goes on; returns what failed first, instead of raising it."""
        try:
            self.wait()
        except Exception as error:
            return error
        return None

    def close(self) -> None:
        """Wait, and end the thread; raises what failed."""
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None
