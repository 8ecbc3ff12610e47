"""Measures what conversions, or merges, cost (seconds of the processor, bytes, flushes) for docs/benchmarks.md.

As in run.py, every job is a process of its own, and the jobs take turns. Seconds of the processor (user and system) and
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
    """The jobs by model, cp first."""
    paths = run.prepare(work, layers, ("hf", "meta", "native"))
    both = titan.groups(titan.prepare(work, layers), work, None)
    ways = [job for job in run.jobs(paths, work, layers) if job.compared and job.name.count("-to-")]
    llama, moe = both
    jobs = (llama.jobs[0], *ways, *llama.jobs[1:])
    return [titan.Group(llama.title, llama.source, jobs), moe]


def merges(work: Path, layers: int) -> list[titan.Group]:
    """cp of a base, and the merges of adapters into it; the adapters are made where they are missing."""
    base, out = run.prepare(work, layers, ("hf",))["hf"], work / "out"
    jobs = [run.Job(run.BASELINE, ("sh", "-c", run.COPY, "sh", str(base), str(out)), base, out)]
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


def rows(group: titan.Group, costs: dict[str, list[Cost]], flushes: dict[str, int | None]) -> list[str]:
    """The lines of one model."""
    tensors = sum(path.stat().st_size for path in group.source.rglob("*.safetensors"))
    out = []
    for job in group.jobs:
        mine = costs[job.name]
        read, written = (statistics.median([getattr(cost, name) for cost in mine]) for name in ("read", "written"))
        count = "–" if flushes[job.name] is None else flushes[job.name]
        processor, ratio, wall = ratios(mine, costs[run.BASELINE])
        out.append(
            f"| {group.title} | {job.name} | {processor:.2f} | {ratio:.2f} | {wall:.2f} "
            f"| {read / tensors:.3f} | {written / tensors:.3f} | {count} |"
        )
    return out


def merge_rows(group: titan.Group, costs: dict[str, list[Cost]]) -> list[str]:
    """The lines of the merges into one base."""
    out = []
    for job in group.jobs:
        mine = costs[job.name]
        processor, ratio, wall = ratios(mine, costs[run.BASELINE])
        system = lower_quartile([cost.system for cost in mine])
        peak = "–" if job.name == run.BASELINE else f"{max(cost.peak for cost in mine) / 1e6:.0f} MB"
        out.append(
            f"| {group.title} | {job.name} | {processor:.2f} | {system:.2f} | {ratio:.2f} | {wall:.2f} | {peak} |"
        )
    return out


def ratios(mine: list[Cost], base: list[Cost]) -> tuple[float, float, float]:
    """Seconds of the processor, and in copies: of the processor, of the wall. Lower quartiles over the rounds."""
    processor, cost_of_cp = (lower_quartile([cost.processor for cost in costs]) for costs in (mine, base))
    wall = lower_quartile([cost.wall / its.wall for cost, its in zip(mine, base, strict=True)])
    return processor, processor / cost_of_cp, wall


def main() -> None:
    arguments = run.options(__doc__, merge="measure merges of adapters instead of conversions")
    if arguments.merge:
        out = ["| base | job | CPU seconds | of them system | × cp | wall × cp | peak memory |"]
    else:
        out = ["| model | job | CPU seconds | × cp | wall × cp | read | written | flushes |"]
    out.append("| --- | --- " + "| ---: " * (out[0].count("|") - 3) + "|")
    for group in (merges if arguments.merge else groups)(arguments.work, arguments.layers):
        run.say(group.title)
        flushes = {job.name: count_flushes(job, arguments.work) for job in group.jobs}
        costs: dict[str, list[Cost]] = {job.name: [] for job in group.jobs}
        for number in range(arguments.repeat):
            for job in group.jobs:
                cost = measure(job, arguments.work)
                costs[job.name].append(cost)
                run.say(
                    f"{number + 1} of {arguments.repeat}: {cost.processor:5.2f} CPU s {cost.wall:5.2f} s  {job.name}"
                )
        out += merge_rows(group, costs) if arguments.merge else rows(group, costs, flushes)
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
