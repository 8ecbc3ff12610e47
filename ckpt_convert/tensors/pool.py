"""Runs work in threads, in processes, or in the background. No other module starts threads or processes.

An error is raised in the caller with its type, text and traceback. Processes are spawned, so their arguments are
pickled, and they inherit no lock, open file or thread.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from ckpt_convert.errors import CkptConvertError
from ckpt_convert.tensors.progress import ProgressCallback, ProgressCounter, StoppedError, TransferProgress

T = TypeVar("T")
R = TypeVar("R")

Start = Callable[[ProgressCounter], Callable[[Any], Any]]
"""Makes the function that does one worker's work, with its own buffers, from the counter that its bytes go to."""

_BATCH = 32 << 20
"""Bytes sent to a worker at a time: small tensors are batched to keep the messages few."""

_MOST = 1 << 10
"""Most tensors in a batch, however small they are."""

_REPORT = 8 << 20
"""Bytes after which a worker reports its progress."""

_FAREWELL = 1.0
"""Seconds for which a thread that makes calls is waited for when it is no longer needed."""

_WORTH = 1 << 30
"""Bytes from which starting processes pays off: a start takes about as long as reading this many."""


# Threads


def run_threaded(
    items: Iterable[T], workers: int, counter: ProgressCounter, start: Callable[[], Callable[[T], None]]
) -> None:
    """Call ``start()(item)`` for every item in a few threads, each with its own function (and buffers).

    The first error is raised; the other threads stop when they next add bytes to ``counter``.
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

    with ThreadPoolExecutor(workers, counter.phase) as pool:
        try:
            for future in as_completed([pool.submit(work) for _ in range(workers)]):
                future.result()
        except BaseException:
            queue.clear()
            counter.stop()
            raise


def map_threaded(do: Callable[[T], R], items: Iterable[T], workers: int) -> list[R]:
    """``do(item)`` for every item in a few threads, in item order; raises the first error in that order."""
    if workers == 1:
        return [do(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(do, items))


class Background:
    """One thread that runs tasks in order; an error is raised at the next call."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._running: list[Future[None]] = []

    @property
    def is_busy(self) -> bool:
        return any(not one.done() for one in self._running)

    @property
    def has_failed(self) -> bool:
        """Whether work has failed, or is not done, that nobody has waited for."""
        return any(not one.done() or one.exception() is not None for one in self._running)

    def run(self, work: Callable[[], None]) -> None:
        """Start the work once earlier work is done; raises its errors."""
        self.wait()
        self.enqueue(work)

    def enqueue(self, work: Callable[[], None]) -> None:
        """Run the work after what is running, without waiting."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "ckpt-convert-save")
        self._running.append(self._pool.submit(work))

    def check(self) -> None:
        """Raise the error of finished work, if any; never waits."""
        while self._running and self._running[0].done():
            self._running.pop(0).result()

    def wait(self) -> None:
        """Wait until all work is done, then raise the first error."""
        running, self._running = self._running, []
        wait(running)
        for one in running:
            one.result()

    def settle(self) -> Exception | None:
        """As ``wait``, but returns the first error instead of raising it."""
        try:
            self.wait()
        except Exception as error:
            return error
        return None

    def close(self) -> None:
        """Wait, and end the thread; raises the first error."""
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None


def start_thread(name: str, run: Callable[[], None]) -> threading.Thread:
    """Start a thread that does not keep the interpreter from ending."""
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


class CallThread:
    """One thread that makes calls for others, who wait so long for each and no longer, and one of its own at times.

    It ends with this object, or with the interpreter. A call in which it is stuck is left to itself.
    """

    def __init__(self, name: str, at_times: Callable[[], object] = bool, interval: float = 3600.0) -> None:
        """``at_times`` is called every ``interval`` seconds; it raises nothing."""
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        thread = threading.Thread(target=_make_calls, args=(self._calls, at_times, interval), name=name, daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _end_thread, self._calls, thread)

    def call(self, work: Callable[[], T], seconds: float) -> T:
        """The result of the work, or its error; raises TimeoutError where it has not come after so many seconds."""
        return self.start(work).result(seconds)

    def start(self, work: Callable[[], T]) -> Future[T]:
        """The future of the work, which begins when that before it is done."""
        future: Future[T] = Future()
        self._calls.put((future, work))
        return future

    def close(self) -> None:
        """End the thread."""
        self._end()


def _make_calls(
    calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None], at_times: Callable[[], object], interval: float
) -> None:
    due = time.monotonic() + interval
    while True:
        left = due - time.monotonic()
        if left <= 0:
            at_times()
            due = time.monotonic() + interval
            continue
        try:
            call = calls.get(timeout=left)
        except Empty:
            continue
        if call is None:
            return
        future, work = call
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        del call, future, work  # nothing of a call is kept until the next one


def _end_thread(calls: SimpleQueue[Any], thread: threading.Thread) -> None:
    calls.put(None)
    if thread is not threading.current_thread():  # it may be the one that collects garbage
        thread.join(_FAREWELL)


# Processes
#
# Threads would do if numpy's calls were long. On blocks that fit the cache they take some ten microseconds, and two
# threads that pass the GIL back and forth that often lose more than the second core gains.


def run_in_processes(
    items: Sequence[tuple[T, int]],
    start: Callable[[ProgressCounter], Callable[[T], R]],
    *,
    workers: int,
    phase: str,
    progress: ProgressCallback | None = None,
) -> Iterator[R]:
    """Yield ``start(counter)(item)`` for each (item, bytes), in order; ``start`` is called once per worker.

    One worker is a thread of this process, which works while the others, processes, start. ``start``, items and results
    must be picklable. With one worker, or too little to do, everything runs in the calling thread. Raises the errors of
    the work, and CkptConvertError if a worker was killed.
    """
    total = sum(nbytes for _, nbytes in items)
    batches = _batches([nbytes for _, nbytes in items])
    count = min(workers, len(batches)) if total >= _WORTH and os.name == "posix" else 1
    counter = ProgressCounter(phase, total, progress)
    if count < 2:
        do = start(counter)
        for item, _ in items:
            yield do(item)
        return
    work = [[item for item, _ in items[batch.start : batch.stop]] for batch in batches]
    with contextlib.ExitStack() as stack:
        crew = [_thread(start, phase, stack), *_processes(start, phase, count - 1, stack)]
        yield from _collected(crew, work, counter)


def _batches(sizes: Sequence[int]) -> list[range]:
    """Ranges of adjacent items of about _BATCH bytes each."""
    out: list[range] = []
    first = nbytes = 0
    for at, size in enumerate(sizes):
        nbytes += size
        if nbytes >= _BATCH or at - first + 1 == _MOST or at == len(sizes) - 1:
            out.append(range(first, at + 1))
            first, nbytes = at + 1, 0
    return out


def _thread(start: Start, phase: str, stack: contextlib.ExitStack) -> Any:
    """Start a worker thread; returns the connection to it."""
    from multiprocessing import connection as pipes  # not at module level: it imports much that only workers need

    ours, theirs = pipes.Pipe()
    sender = _ProgressSender(theirs)
    counter = ProgressCounter(phase, 0, sender)
    thread = threading.Thread(target=_work, args=(sender, start, counter), name=phase)
    thread.start()

    def end() -> None:
        counter.stop()
        ours.close()
        thread.join()

    stack.callback(end)
    return ours


def _processes(start: Start, phase: str, count: int, stack: contextlib.ExitStack) -> Iterator[Any]:
    """Start worker processes; yields the connections to them.

    Not multiprocessing's, whose workers import the main script again: a recipe without ``if __name__ == "__main__"``
    would run from the start in every worker.
    """
    import subprocess
    from multiprocessing import connection as pipes

    sent = pickle.dumps(start)
    for _ in range(count):
        ours, theirs = pipes.Pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; import {__name__} as pool; pool.serve_worker({theirs.fileno()})"
        )
        with _sigint_blocked():
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),)
            )
        theirs.close()  # only the worker holds it then, so that its exit closes the pipe

        def end(process: subprocess.Popen[bytes] = process, ours: Any = ours) -> None:
            process.kill()
            process.wait()
            ours.close()

        stack.callback(end)
        with contextlib.suppress(OSError):  # a dead worker is reported when it is given work
            ours.send(phase)
            ours.send_bytes(sent)
        yield ours


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Processes started meanwhile ignore Ctrl-C and hang-up: this process gets the signal, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _collected(crew: Sequence[Any], work: Sequence[list[Any]], counter: ProgressCounter) -> Iterator[Any]:
    """Distribute the work, and yield the results in order."""
    from multiprocessing import connection as pipes

    queue = deque(enumerate(work))
    killed = CkptConvertError(
        f"{counter.phase}: a worker process was killed, perhaps for lack of memory; try `workers=1`"
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
                counter.add(message)
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


class _ProgressSender:
    """Sends the number of bytes done since the last message."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self._done = 0

    def __call__(self, progress: TransferProgress) -> None:
        if progress.done - self._done >= _REPORT:
            self.send(progress.done)

    def send(self, done: int) -> None:
        self.connection.send(done - self._done)
        self._done = done


def serve_worker(descriptor: int) -> None:
    """The main function of a worker process; ``descriptor`` is that of its connection."""
    from multiprocessing import connection as pipes

    connection = pipes.Connection(descriptor)
    with contextlib.suppress(EOFError):  # the parent is gone
        phase = connection.recv()
        sender = _ProgressSender(connection)

        def start(counter: ProgressCounter) -> Callable[[Any], Any]:
            sent: Start = pickle.loads(connection.recv_bytes())
            return sent(counter)

        _work(sender, start, ProgressCounter(phase, 0, sender))


def _work(sender: _ProgressSender, start: Start, counter: ProgressCounter) -> None:
    """Process the batches from the connection until its other end is closed."""
    with sender.connection as connection:
        try:
            do = start(counter)
            while True:
                number, batch = connection.recv()
                found = [do(item) for item in batch]
                sender.send(counter.done)
                connection.send((number, found))
        except (EOFError, BrokenPipeError, StoppedError):
            return  # the parent is gone, or stopped the work
        except BaseException as error:
            with contextlib.suppress(OSError):
                connection.send(_portable(error, counter.phase))


def _portable(error: BaseException, phase: str) -> BaseException:
    """The error with its traceback as a note; one that does not survive pickling is replaced by its text."""
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = CkptConvertError(f"{phase}: a worker process failed: {type(error).__name__}: {error}")
    error.add_note(trace)
    return error
