"""Jobs in forked children: one child a job, with bounds, and a fault where one is wanted.

A fork starts with everything imported (torch too), so thousands of processes can be killed or let fail in minutes. The
process that forks has the shim preloaded (``preloaded``), which counts and spoils file-system calls.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CPU_SECONDS = 20
"""What a job on tiny files may take: a hundred times what it takes, so that only a loop reaches it."""
MEMORY = 1 << 30
"""Bytes that a job may map beyond what the forking process has."""
DEADLINE = 120
"""Seconds after which a job that neither ends nor computes is one that hangs."""

CUT, SIGNALS = 1, 1000


@dataclass(frozen=True)
class Fault:
    """What is to go wrong below ``root`` at the ``at``-th file-system call: an errno, CUT, or SIGNALS + a signal."""

    root: Path
    at: int = 0
    kind: int = 0
    log: Path | None = None

    def __str__(self) -> str:
        return f"{name_of(self.kind)} at call {self.at}"


def name_of(kind: int) -> str:
    if kind >= SIGNALS:
        return signal.Signals(kind - SIGNALS).name
    return "short" if kind == CUT else errno.errorcode.get(-kind, "none")


@dataclass(frozen=True)
class Ended:
    """How a job ended: its exit code, or minus the signal that ended it; what it printed; what it took."""

    status: int
    out: str
    err: str
    cpu: float
    calls: int

    @property
    def hung(self) -> bool:
        return self.status in (-signal.SIGXCPU, -signal.SIGALRM)


def preloaded() -> None:
    """Start this very command again with the shim preloaded, unless it is; needs a C compiler."""
    if os.environ.get("CKPT_CONVERT_SHIM"):
        return
    folder = Path(tempfile.mkdtemp(prefix="ckpt-convert-shim-"))
    library = folder / "shim.so"
    try:
        compiler = subprocess.check_output([HERE.parent.parent / "tests" / "compiler.sh"], text=True).strip()
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, HERE / "shim.c", "-ldl"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"the library that lets calls fail cannot be built: {error}")
    environment = {**os.environ, "LD_PRELOAD": str(library), "CKPT_CONVERT_SHIM": str(library)}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def tidy() -> None:
    """Remove the shim, once it is loaded."""
    library = Path(os.environ["CKPT_CONVERT_SHIM"])
    library.unlink(missing_ok=True)
    library.parent.rmdir()


def command(*words: object) -> Callable[[], int]:
    """A job: ``python -m ckpt_convert WORDS``, in this very process."""

    def job() -> int:
        sys.argv = ["ckpt-convert", *map(str, words)]
        try:
            runpy.run_module("ckpt_convert", run_name="__main__", alter_sys=True)
        except SystemExit as exit_:
            return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        return 0

    return job


class Child:
    """A job that runs in a child of its own; ``finish`` waits for it. ``bounded``: in memory and time, as all but
    those are that have children of their own.
    """

    def __init__(self, job: Callable[[], int | None], fault: Fault | None = None, *, bounded: bool = True) -> None:
        self._bounded = bounded
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._pipe, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self._pipe)
            os.dup2(self._out.fileno(), 1)
            os.dup2(self._err.fileno(), 2)
            _in_child(job, fault, writing, bounded)
        os.close(writing)

    def stops(self) -> bool:
        """Wait until it is stopped by a SIGSTOP (True) or has ended."""
        status = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        return status is not None and status.si_code == os.CLD_STOPPED

    def goes_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def finish(self) -> Ended:
        status, cpu = _wait(self.pid, DEADLINE if self._bounded else None)
        with os.fdopen(self._pipe, "rb") as pipe:
            calls = int(pipe.read() or b"0")
        said = []
        for file in (self._out, self._err):
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
            file.close()
        return Ended(status, said[0], said[1], cpu, calls)


def run(job: Callable[[], int | None], fault: Fault | None = None) -> Ended:
    """Run a job in a child of its own and wait for it."""
    return Child(job, fault).finish()


def bound() -> None:
    """Bound the memory and the processor time of this process."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    grant()


def grant() -> None:
    """Grant this process another ``CPU_SECONDS`` from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + CPU_SECONDS, -1))


def _in_child(job: Callable[[], int | None], fault: Fault | None, pipe: int, bounded: bool) -> None:
    status = 70
    shim = ctypes.CDLL(None)
    try:
        for stream, fd in (("stdout", 1), ("stderr", 2)):
            setattr(sys, stream, io.TextIOWrapper(io.FileIO(fd, "wb", closefd=False), "utf-8", line_buffering=True))
        if bounded:
            bound()
        if fault is not None:
            log = os.open(fault.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if fault.log else -1
            shim.fault_arm(os.fsencode(fault.root), ctypes.c_long(fault.at), fault.kind, log)
        status = job() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        if fault is not None:
            shim.fault_disarm()
            shim.fault_calls.restype = ctypes.c_long
            os.write(pipe, str(shim.fault_calls()).encode())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, deadline: float | None) -> tuple[int, float]:
    """The status of a child and its processor seconds; one that hangs is ended and counts as SIGALRM."""
    watched = os.pidfd_open(child)
    late = not select.select([watched], [], [], deadline)[0]
    os.close(watched)
    if late:
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    code = -signal.SIGALRM if late else os.waitstatus_to_exitcode(status)
    return code, used.ru_utime + used.ru_stime


def complaint(ended: Ended, allowed: Sequence[int] = (0, 1, 2, 3)) -> str | None:
    """What is wrong with how a command ended, whatever it was given; None where it is as promised."""
    if ended.hung:
        return f"hung: {ended.cpu:.0f} s of the processor"
    if ended.status not in allowed:
        return f"ended with {ended.status}: {ended.err[-600:]}"
    for word in ("Traceback (most recent", "This should not happen", "error: MemoryError", "error: [Errno"):
        if word in ended.err:
            return f"{word!r} in: {ended.err[-1500:]}"
    # verify and diff say with 1, on stdout, what they found.
    if ended.status > 1 and "error:" not in ended.err.lower():
        return f"ended with {ended.status} and no word: {ended.err[-300:]}"
    return None
