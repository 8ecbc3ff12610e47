"""Work on many things at once: in threads, in processes, or behind the caller. Nothing else here starts either."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from typing import Any, TypeVar

from ckpt_convert.errors import CkptConvertError
from ckpt_convert.tensors.progress import Meter, Progress, ProgressCallback

T = TypeVar("T")
R = TypeVar("R")

_BATCH = 32 << 20
"""Bytes that a worker is given at a time: small tensors go together, so that what is said of them costs little."""

_MOST = 1 << 10
"""Tensors in a batch, however small they are."""

_REPORT = 8 << 20
"""Bytes after which a worker says how far it is."""


# Threads


def spread(items: Iterable[T], workers: int, meter: Meter, start: Callable[[], Callable[[T], None]]) -> None:
    """Do ``start()(item)`` for every item in a few threads, each with a function (and buffers) of its own.

    The first error ends the others at the next bytes they add to the meter, and is raised.
    """
    queue = deque(items)

    def work() -> None:
        do = start()
        while True:
            try:
                item = queue.popleft()
            except IndexError:
                return
            do(item)

    with ThreadPoolExecutor(workers, meter.phase) as pool:
        try:
            for future in as_completed([pool.submit(work) for _ in range(workers)]):
                future.result()
        except BaseException:
            queue.clear()
            meter.stop()
            raise


class Background:
    """One thread that does what it is handed in order; what fails is raised at the next call."""

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


# Processes
#
# Threads would do if numpy's calls were long. They take some ten microseconds on what fits a processor's cache, and so
# often giving the interpreter to each other costs two threads more than the second core gains.


def results(
    items: Sequence[tuple[T, int]],
    start: Callable[[Meter], Callable[[T], R]],
    *,
    workers: int,
    phase: str,
    progress: ProgressCallback | None = None,
) -> Iterator[R]:
    """``start(meter)(item)`` for each of the (item, bytes), in their order; ``start`` is called once for a worker.

    The workers are forked from this process, so the items and what ``start`` refers to may be anything, open files
    too; results have to be picklable. Where there is one worker (or no Linux, on which alone forking is safe) all is
    done here. Raises what the work raises, and CkptConvertError where a worker was killed.
    """
    total = sum(nbytes for _, nbytes in items)
    batches = _batches([nbytes for _, nbytes in items])
    count = min(workers, len(batches))
    if count < 2 or sys.platform != "linux":
        do = start(Meter(phase, total, progress))
        for item, _ in items:
            yield do(item)
        return
    import multiprocessing

    context = multiprocessing.get_context("fork")
    crew: list[tuple[Any, Any]] = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, items, start, phase), daemon=True)
            process.start()
            theirs.close()  # so that nobody but the worker holds it, and its end is noticed
            crew.append((process, ours))
        # Not before: what shows the progress may start threads, and a process that has some is not to be forked.
        meter = Meter(phase, total, progress)
        yield from _collected([connection for _, connection in crew], batches, meter)
    finally:
        for process, connection in crew:
            process.kill()
            process.join()
            connection.close()


def _batches(sizes: Sequence[int]) -> list[range]:
    """Runs of neighbours that are about _BATCH bytes together."""
    out: list[range] = []
    first = nbytes = 0
    for at, size in enumerate(sizes):
        nbytes += size
        if nbytes >= _BATCH or at - first + 1 == _MOST or at == len(sizes) - 1:
            out.append(range(first, at + 1))
            first, nbytes = at + 1, 0
    return out


def _collected(connections: list[Any], batches: Sequence[range], meter: Meter) -> Iterator[Any]:
    from multiprocessing.connection import wait as ready_of

    queue = deque(enumerate(batches))
    killed = CkptConvertError(
        f"{meter.phase}: a worker process was killed, perhaps for lack of memory; try `workers=1`"
    )

    def give(connection: Any) -> None:
        try:
            connection.send(queue.popleft())
        except OSError:
            raise killed from None

    for connection in connections:
        give(connection)
    done: dict[int, list[Any]] = {}
    turn = 0
    while turn < len(batches):
        ready: list[Any] = ready_of(connections)
        for connection in ready:
            try:
                message: Any = connection.recv()
            except (EOFError, OSError):
                raise killed from None
            if isinstance(message, int):
                meter.add(message)
            elif isinstance(message, BaseException):
                raise message
            else:
                number, found = message
                done[number] = found
                if queue:
                    give(connection)
        while turn in done:
            yield from done.pop(turn)
            turn += 1


def _work(connection: Any, items: Sequence[tuple[Any, int]], start: Callable[[Meter], Any], phase: str) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # an interruption is for the parent, which ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    said = 0

    def report(progress: Progress) -> None:
        nonlocal said
        if progress.done - said >= _REPORT:
            connection.send(progress.done - said)
            said = progress.done

    meter = Meter(phase, 0, report)
    try:
        do = start(meter)
        while True:
            number, batch = connection.recv()
            found = [do(items[at][0]) for at in batch]
            connection.send(meter.done - said)
            said = meter.done
            connection.send((number, found))
    except (EOFError, BrokenPipeError):
        os._exit(1)  # the parent is gone
    except BaseException as error:
        connection.send(_portable(error, phase))


def _portable(error: BaseException, phase: str) -> BaseException:
    """The error with its traceback, as it can be sent: what cannot be pickled, or made again, only by its text."""
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = CkptConvertError(f"{phase}: a worker process failed: {type(error).__name__}: {error}")
    error.add_note(trace)
    return error
