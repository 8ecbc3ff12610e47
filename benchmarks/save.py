"""Measures saving from a training run against `cp` and `clone`, and writes its table of docs/benchmarks.md.

As in run.py, every job is a process of its own, the jobs take turns, and the medians over the rounds count. A job
times its saves itself (save_once.py): starting Python and loading the model are no part of a save.

python benchmarks/save.py --repeat 5 --write
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import run

BEGIN, END = "<!-- save -->", "<!-- end save -->"
MAKE = (sys.executable, str(run.HERE / "checkpoints.py"))
ONCE = (sys.executable, str(run.HERE / "save_once.py"))


@dataclass(frozen=True)
class Job:
    """A save, by words of save_once.py; or without words, the copy of as many bytes that others are held against."""

    name: str
    words: tuple[str, ...] = ()
    full: bool = False

    @property
    def asynchronous(self) -> bool:
        return "--asynchronous" in self.words


JOBS = (
    Job("cp -r, then sync of each file"),
    Job("Checkpointer", ("ours",)),
    Job("torch.save, fsync", ("torch.save",)),
    Job("save_pretrained, fsync", ("save_pretrained",)),
    Job("torch.distributed.checkpoint.save", ("dcp",)),
    Job("Checkpointer, asynchronous", ("ours", "--asynchronous")),
    Job("torch.distributed.checkpoint.async_save", ("dcp", "--asynchronous")),
    Job("cp -r, then sync of each file: three times the bytes", full=True),
    Job("Checkpointer, with AdamW's state", ("ours", "--full"), full=True),
    Job("torch.save, fsync, with AdamW's state", ("torch.save", "--full"), full=True),
    Job("torch.distributed.checkpoint.save, with AdamW's state", ("dcp", "--full"), full=True),
)

Found = dict[str, float]
"""What save_once.py prints."""


def prepare(work: Path, layers: int) -> dict[bool, Path]:
    """The source, and what has the size of a full save: three of it, as hard links, so the room of one."""
    source, full = (work / f"llama-{layers}-layers" / name for name in ("hf", "full"))
    if not source.exists():
        run.say(f"making {source}")
        source.parent.mkdir(parents=True, exist_ok=True)
        partial = source.with_name("hf.making")  # the name is given last: what has it is whole
        run.remove(partial)
        subprocess.run([*MAKE, str(partial), "--layers", str(layers)], check=True)
        partial.rename(source)
    run.remove(full)
    for part in ("model", "exp_avg", "exp_avg_sq"):
        shutil.copytree(source, full / part, copy_function=os.link)
    return {False: source, True: full}


def measure(job: Job, sources: dict[bool, Path], work: Path) -> Found:
    """One run, from a state that is the same before each; nothing of what it wrote is left."""
    out = work / "saves"
    run.remove(out)
    out.mkdir(parents=True)
    run.read_through(sources[False])
    os.sync()
    command = (*ONCE, job.words[0], str(sources[False]), str(out / "saved"), *job.words[1:]) if job.words else ()
    source = sources[job.full]
    if not command:
        command = ("sh", "-c", run.COPY, "sh", str(source), str(out / "saved"))
    started, before = time.perf_counter(), os.times()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    seconds, after = time.perf_counter() - started, os.times()
    if done.returncode:
        run.say(done.stderr)
        sys.exit(f"ended with code {done.returncode}: {shlex.join(command)}")
    run.remove(out)
    if job.words:
        return dict(json.loads(done.stdout))
    written = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "processor": processor, "bytes": written}


def measure_all(sources: dict[bool, Path], work: Path, repeat: int) -> dict[Job, list[Found]]:
    """Every job in every round, each round beginning with another: a virtual machine may be slow to give memory that
    the job before did not use, so none is always to come after the same one.
    """
    results: dict[Job, list[Found]] = {job: [] for job in JOBS}
    for number in range(repeat):
        start = 3 * number % len(JOBS)
        for job in JOBS[start:] + JOBS[:start]:
            found = measure(job, sources, work)
            results[job].append(found)
            told = "  ".join(
                f"{name} {value / 1e6:.0f} MB" if name in ("memory", "bytes") else f"{name} {value:.2f} s"
                for name, value in found.items()
            )
            run.say(f"round {number + 1} of {repeat}: {job.name}: {told}")
    return results


def table(results: dict[Job, list[Found]]) -> str:
    """The results as Markdown."""
    rows = [
        "| job | written | CPU seconds | × cp | median seconds | × cp, over rounds "
        "| median stall, s | × clone, over rounds | memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for job, found in results.items():
        base = next(its for other, its in results.items() if not other.words and other.full == job.full)
        seconds, stall, memory = f"{_median(found, 'seconds'):.2f}", "–", "–"
        processor = _median(found, "processor")
        costs = f"{processor:.2f} | {processor / _median(base, 'processor'):.2f}"
        copied = cloned = "–"
        if job.asynchronous:
            stall = f"{_median(found, 'stall'):.2f}"
            cloned = f"{statistics.median(one['stall'] / one['clone'] for one in found):.2f}"
        else:
            ratios = [one["seconds"] / its["seconds"] for one, its in zip(found, base, strict=True)]
            copied = f"{statistics.median(ratios):.2f}"
        if job.words:
            memory = f"{max(one['memory'] for one in found) / 1e6:.0f} MB"
        written = f"{_median(found, 'bytes') / 1e9:.2f} GB"
        rows.append(f"| {job.name} | {written} | {costs} | {seconds} | {copied} | {stall} | {cloned} | {memory} |")
    return "\n".join(rows)


def _median(found: list[Found], name: str) -> float:
    return statistics.median(one[name] for one in found)


def first_and_clone(results: dict[Job, list[Found]]) -> str:
    """What stands behind the ratios of asynchronous saves, as lines of a list."""
    lines = []
    for job, found in results.items():
        if job.asynchronous:
            clone, first = _median(found, "clone"), _median(found, "first")
            lines.append(
                f"- {job.name}: a clone took {clone:.2f} s, the stall of the process's first save {first:.2f} s"
            )
    return "\n".join(lines)


def main() -> None:
    arguments = run.options(__doc__)
    sources = prepare(arguments.work, arguments.layers)
    results = measure_all(sources, arguments.work, arguments.repeat)
    run.remove(sources[True])
    facts = run.facts(arguments.work, sources[False], arguments.layers, arguments.repeat)
    facts = facts.replace("benchmarks/run.py", "benchmarks/save.py")
    text = "\n\n".join((table(results), f"{first_and_clone(results)}\n{facts}"))
    print(text)
    if arguments.write:
        run.write(text, BEGIN, END)


if __name__ == "__main__":
    main()
