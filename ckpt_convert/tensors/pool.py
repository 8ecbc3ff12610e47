"""Work on many things at once: in threads, in processes, or behind the caller. Nothing else here starts either.

What fails is raised where the work was asked for, with its type, its text and its traceback. Processes are spawned, so
what is handed to them is pickled, and none inherits a lock, an open file or a thread of this one.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from multiprocessing import connection as pipes
from typing import Any, TypeVar

from ckpt_convert.errors import CkptConvertError
from ckpt_convert.tensors.progress import Meter, ProgressCallback, StoppedError, TransferProgress

T = TypeVar("T")
R = TypeVar("R")

Start = Callable[[Meter], Callable[[Any], Any]]
"""Makes what does the work of one worker, with its buffers, from the meter that its bytes are added to."""

_BATCH = 32 << 20
"""Bytes that a worker is given at a time: small tensors go together, so that what is said of them costs little."""

_MOST = 1 << 10
"""Tensors in a batch, however small they are."""

_REPORT = 8 << 20
"""Bytes after which a worker says how far it is."""

_WORTH = 1 << 30
"""Bytes from which on processes are worth their start, which takes about as long as reading so many."""


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


def each(do: Callable[[T], R], items: Iterable[T], workers: int) -> list[R]:
    """``do(item)`` for every item in a few threads, in the order of the items; raises the first error in that order."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(do, items))


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

    One worker is a thread of this process, so that work goes on while the others, which are processes, start. So
    ``start``, items and results have to be picklable. Where there is one worker, or too little to do, all is done
    here. Raises what the work raises, and CkptConvertError where a worker was killed.
    """
    total = sum(nbytes for _, nbytes in items)
    batches = _batches([nbytes for _, nbytes in items])
    count = min(workers, len(batches)) if total >= _WORTH and os.name == "posix" else 1
    meter = Meter(phase, total, progress)
    if count < 2:
        do = start(meter)
        for item, _ in items:
            yield do(item)
        return
    work = [[item for item, _ in items[batch.start : batch.stop]] for batch in batches]
    with contextlib.ExitStack() as stack:
        crew = [_thread(start, phase, stack), *_processes(start, phase, count - 1, stack)]
        yield from _collected(crew, work, meter)


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


def _thread(start: Start, phase: str, stack: contextlib.ExitStack) -> Any:
    """A worker that is a thread; returns the connection to it."""
    ours, theirs = pipes.Pipe()
    said = _Said(theirs)
    meter = Meter(phase, 0, said)
    thread = threading.Thread(target=_work, args=(said, start, meter), name=phase)
    thread.start()

    def end() -> None:
        meter.stop()
        ours.close()
        thread.join()

    stack.callback(end)
    return ours


def _processes(start: Start, phase: str, count: int, stack: contextlib.ExitStack) -> Iterator[Any]:
    """Workers that are processes; yields the connections to them.

    They are no processes of multiprocessing, each of which runs the file that this one was started with once more:
    a recipe without ``if __name__ == "__main__"`` would begin anew in every worker.
    """
    sent = pickle.dumps(start)
    for _ in range(count):
        ours, theirs = pipes.Pipe()
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({theirs.fileno()})"
        with _unheard():
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),)
            )
        theirs.close()  # so that nobody but the worker holds it, and its end is noticed

        def end(process: subprocess.Popen[bytes] = process, ours: Any = ours) -> None:
            process.kill()
            process.wait()
            ours.close()

        stack.callback(end)
        with contextlib.suppress(OSError):  # that it is gone is noticed, and said, where it is given work
            ours.send(phase)
            ours.send_bytes(sent)
        yield ours


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Processes that are started meanwhile do not hear a terminal's Ctrl-C: it is for this one, which ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _collected(crew: Sequence[Any], work: Sequence[list[Any]], meter: Meter) -> Iterator[Any]:
    """Hand out the work, and yield what comes back, in order."""
    queue = deque(enumerate(work))
    killed = CkptConvertError(
        f"{meter.phase}: a worker process was killed, perhaps for lack of memory; try `workers=1`"
    )

    def give(worker: Any) -> None:
        try:
            worker.send(queue.popleft())
        except OSError:
            raise killed from None

    for worker in crew:
        give(worker)
    done: dict[int, list[Any]] = {}
    turn = 0
    while turn < len(work):
        ready: list[Any] = pipes.wait(crew)
        for worker in ready:
            try:
                message: Any = worker.recv()
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
                    give(worker)
        while turn in done:
            yield from done.pop(turn)
            turn += 1


class _Said:
    """Tells how many bytes were worked on since it was last told."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self._done = 0

    def __call__(self, progress: TransferProgress) -> None:
        if progress.done - self._done >= _REPORT:
            self.say(progress.done)

    def say(self, done: int) -> None:
        self.connection.send(done - self._done)
        self._done = done


def serve(descriptor: int) -> None:
    """What a worker does that is a process; ``descriptor`` is that of its connection."""
    connection = pipes.Connection(descriptor)
    with contextlib.suppress(EOFError):  # nobody waits for it any more
        phase = connection.recv()
        said = _Said(connection)

        def start(meter: Meter) -> Callable[[Any], Any]:
            sent: Start = pickle.loads(connection.recv_bytes())
            return sent(meter)

        _work(said, start, Meter(phase, 0, said))


def _work(said: _Said, start: Start, meter: Meter) -> None:
    """Do what comes through the connection, until it is closed at the other end."""
    with said.connection as connection:
        try:
            do = start(meter)
            while True:
                number, batch = connection.recv()
                found = [do(item) for item in batch]
                said.say(meter.done)
                connection.send((number, found))
        except (EOFError, BrokenPipeError, StoppedError):
            return  # nobody waits for it any more
        except BaseException as error:
            with contextlib.suppress(OSError):
                connection.send(_portable(error, meter.phase))


def _portable(error: BaseException, phase: str) -> BaseException:
    """The error with its traceback, as it can be sent: what cannot be pickled, or made again, only by its text."""
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = CkptConvertError(f"{phase}: a worker process failed: {type(error).__name__}: {error}")
    error.add_note(trace)
    return error
