"""Measures what conversions, or merges, cost (seconds of the processor, bytes, flushes) for docs/benchmarks.md.

Every job is a process of its own, and takes turns with cp of its source, so that neither needs memory for the page
cache that the other did not: a virtual machine may be slow to give it. Seconds of the processor (user and system) and
bytes hold on a busy machine too, where those of the wall do not. A first run of each job, which is not timed, compiles
the modules, as installing does, and counts the flushes, with strace where that is installed.

python benchmarks/cost.py --repeat 11 --write            conversions
python benchmarks/cost.py --merge --repeat 11 --write    merges of adapters
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import run
import titan

BEGIN, END = "<!-- cost -->", "<!-- end cost -->"
BEGIN_MERGE, END_MERGE = "<!-- merge -->", "<!-- end merge -->"
ADAPTERS = {
    "r16": ("rank 16, all linear layers", ("16",)),
    "r64": ("rank 64, all linear layers", ("64",)),
    "r8-qv": ("rank 8, q and v", ("8", "--modules", "q_proj", "v_proj")),
}
"""By directory: what an adapter is, and the words that checkpoints.py makes it from."""

FLUSHES = "fsync,fdatasync,sync,syncfs,msync"


@dataclass(frozen=True)
class Cost:
    """One run: seconds of the wall, of the processor and of those in the kernel; bytes of system calls, of memory."""

    wall: float
    processor: float
    system: float
    read: int
    written: int
    peak: int


def environment(work: Path) -> dict[str, str]:
    """The environment of the jobs: compiled modules are kept, whatever was set, but not in this tree."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(work / "pycache")}


def ready(job: run.Job) -> None:
    """Remove the last output, empty the queue of the disk, and bring the source into the page cache."""
    if job.output is not None:
        run.remove(job.output)
    os.sync()
    run.read_through(job.source)


def measure(job: run.Job, work: Path) -> Cost:
    ready(job)
    started = time.perf_counter()
    process = subprocess.Popen(job.command, stdout=subprocess.DEVNULL, env=environment(work))
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its counters last until it is waited for
    wall = time.perf_counter() - started
    lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"ended with code {process.returncode}: {' '.join(job.command)}")
    io = {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}
    processor, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    return Cost(wall, processor, usage.ru_stime, io["rchar"], io["wchar"], peak)


def count_flushes(job: run.Job, work: Path) -> int | None:
    """Run a job once; returns the number of its calls that flush, None without strace."""
    ready(job)
    if shutil.which("strace") is None:
        subprocess.run(job.command, check=True, stdout=subprocess.DEVNULL, env=environment(work))
        return None
    with tempfile.NamedTemporaryFile() as log:
        trace = ("strace", "-f", "-qq", "--seccomp-bpf", "-e", f"trace={FLUSHES}", "-e", "signal=none", "-o", log.name)
        subprocess.run((*trace, *job.command), check=True, stdout=subprocess.DEVNULL, env=environment(work))
        return sum("resumed" not in line for line in Path(log.name).read_text().splitlines())


def groups(work: Path, layers: int) -> list[titan.Group]:
    """The jobs by model."""
    paths = run.prepare(work, layers, ("hf", "meta", "native"))
    both = titan.groups(titan.prepare(work, layers), work, None)
    ways = [job for job in run.jobs(paths, work, layers) if job.compared and job.name.count("-to-")]
    llama, moe = both
    return [titan.Group(llama.title, llama.source, (*ways, *llama.jobs)), moe]


def merges(work: Path, layers: int) -> list[titan.Group]:
    """The merges of adapters into a base; the adapters are made where they are missing."""
    base, out, jobs = run.prepare(work, layers, ("hf",))["hf"], work / "out", []
    for name, (title, words) in ADAPTERS.items():
        adapter = base.parent / f"adapter-{name}"
        if not adapter.exists():
            maker = (sys.executable, str(run.HERE / "checkpoints.py"), str(adapter), "--layers", str(layers))
            subprocess.run((*maker, "--adapter", *words), check=True)
        words = (*run.CONVERT, "merge-adapter", str(base), str(adapter), str(out), "--quiet")
        jobs.append(run.Job(title, words, base, out))
    return [titan.Group(f"Llama, {titan.gigabytes(base)}", base, tuple(jobs))]


def lower_quartile(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 4]


@dataclass(frozen=True)
class Measured:
    """A job, how often it flushes (None without strace), its runs, and those of cp that were made in turn with them."""

    job: run.Job
    flushes: int | None
    mine: list[Cost]
    copies: list[Cost]

    @property
    def cells(self) -> str:
        """Seconds of the processor, those of cp, and both ratios: lower quartiles over the rounds."""
        mine, copy = (lower_quartile([cost.processor for cost in costs]) for costs in (self.mine, self.copies))
        wall = lower_quartile([cost.wall / its.wall for cost, its in zip(self.mine, self.copies, strict=True)])
        return f"{mine:.2f} | {copy:.2f} | {mine / copy:.2f} | {wall:.2f}"


def copy_of(source: Path, work: Path) -> run.Job:
    out = work / "out"
    return run.Job(run.BASELINE, ("sh", "-c", run.COPY, "sh", str(source), str(out)), source, out)


def forget(work: Path) -> None:
    """Drop what other jobs have left in the page cache, where that is possible, so that memory is at hand for each."""
    for path in (path for path in work.rglob("*") if path.is_file() and hasattr(os, "posix_fadvise")):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_in_turns(job: run.Job, work: Path, rounds: int) -> Measured:
    forget(work)
    copy, flushes = copy_of(job.source, work), count_flushes(job, work)
    found = Measured(job, flushes, [], [])
    for number in range(rounds):
        found.copies.append(measure(copy, work))
        found.mine.append(measure(job, work))
        for name, cost in (("cp", found.copies[-1]), (job.name, found.mine[-1])):
            run.say(f"{number + 1} of {rounds}: {cost.processor:5.2f} CPU s {cost.wall:5.2f} s  {name}")
    return found


def row(group: titan.Group, found: Measured) -> str:
    """The line of a conversion."""
    tensors = sum(path.stat().st_size for path in group.source.rglob("*.safetensors"))
    read, written = (statistics.median([getattr(cost, name) for cost in found.mine]) for name in ("read", "written"))
    moved = f"{read / tensors:.3f} | {written / tensors:.3f}"
    count = "–" if found.flushes is None else found.flushes
    return f"| {group.title} | {found.job.name} | {found.cells} | {moved} | {count} |"


def merge_row(group: titan.Group, found: Measured) -> str:
    """The line of a merge."""
    system = lower_quartile([cost.system for cost in found.mine])
    peak = max(cost.peak for cost in found.mine) / 1e6
    return f"| {group.title} | {found.job.name} | {found.cells} | {system:.2f} | {peak:.0f} MB |"


def main() -> None:
    arguments = run.options(__doc__, merge="measure merges of adapters instead of conversions")
    columns = "| model | job | CPU seconds | cp's | × cp | wall × cp |"
    out = [columns + (" of them system | peak memory |" if arguments.merge else " read | written | flushes |")]
    out.append("| --- | --- " + "| ---: " * (out[0].count("|") - 3) + "|")
    for group in (merges if arguments.merge else groups)(arguments.work, arguments.layers):
        for job in group.jobs:
            if job.name != run.BASELINE:
                found = measure_in_turns(job, arguments.work, arguments.repeat)
                out.append((merge_row if arguments.merge else row)(group, found))
    run.remove(arguments.work / "out")
    lines = run.facts(arguments.work, group.source, arguments.layers, arguments.repeat).splitlines()
    facts = [line for line in lines if not line.startswith(("- Model", "- Command"))]
    words = (" --merge" if arguments.merge else "") + f" --repeat {arguments.repeat}"
    words += f" --layers {arguments.layers}" if arguments.layers != 16 else ""
    command = f"- Command: `python benchmarks/cost.py{words} --write`"
    text = "\n".join([*out, "", *facts, command])
    print(text)
    if arguments.write:
        run.write(text, *((BEGIN_MERGE, END_MERGE) if arguments.merge else (BEGIN, END)))


if __name__ == "__main__":
    main()
