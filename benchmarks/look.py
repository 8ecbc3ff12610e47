"""Measures what only looks, `inspect`, `inspect --stats`, `diff` and `verify`, for their table of docs/benchmarks.md.

As in run.py, every job is a process of its own, the jobs take turns, and the medians over the rounds count. All that
is read lies in the page cache. Beside the wall's seconds stand those of the processor: bytes by them say what a core
does, however many threads there are.

python benchmarks/look.py --repeat 5 --write
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import run

BEGIN, END = "<!-- look -->", "<!-- end look -->"
MAKE = (sys.executable, str(run.HERE / "checkpoints.py"))
RELEASED = (sys.executable, str(run.HERE / "released.py"))
BY_NUMPY = (sys.executable, str(run.HERE / "by_numpy.py"))


@dataclass(frozen=True)
class Look:
    """A command that reads and writes nothing: ``sources`` are the directories whose bytes it reads, if it does.

    ``baseline`` names the job that does the same with numpy.
    """

    name: str
    command: tuple[str, ...]
    sources: tuple[Path, ...] = ()
    baseline: str = ""


@dataclass
class Result:
    """What was measured, by round: seconds of the wall and of the processor, bytes of peak memory."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)


def prepare(work: Path, layers: int) -> dict[str, Path]:
    """The checkpoints that are looked at, made where they are missing."""
    small = work / f"llama-{layers}-layers"
    paths = {name: small / name for name in ("hf", "copy", "tuned", "ours")} | {"moe": work / "deepseek-v3-sparse"}
    resharded = (*run.CONVERT, "convert", "--to", "hf", "-q", str(paths["hf"]))
    makers: dict[str, Callable[[Path], object]] = {
        "hf": lambda path: subprocess.run([*MAKE, str(path), "--layers", str(layers)], check=True),
        "copy": lambda path: shutil.copytree(paths["hf"], path),
        "tuned": lambda path: subprocess.run([*MAKE, str(path), "--tuned", str(paths["hf"])], check=True),
        "ours": lambda path: subprocess.run([*resharded, str(path)], check=True),
        "moe": lambda path: subprocess.run([*RELEASED, str(path), "deepseek-v3", "--published"], check=True),
    }
    for name, path in paths.items():
        if not path.exists():
            run.say(f"making {path}")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.making")  # the name is given last: what has it is whole
            run.remove(partial)
            makers[name](partial)
            partial.rename(path)
    return paths


def jobs(paths: dict[str, Path]) -> list[Look]:
    """What is measured."""
    hf, copy, tuned, ours, moe = (paths[name] for name in ("hf", "copy", "tuned", "ours", "moe"))

    def inspect(path: Path, *options: str) -> tuple[str, ...]:
        return (*run.CONVERT, "inspect", str(path), *options)

    def diff(a: Path, b: Path, *options: str) -> tuple[str, ...]:
        return (*run.CONVERT, "diff", str(a), str(b), "--json", *options)

    one = ("--workers", "1")
    by_numpy, equal, other = "numpy: statistics", "numpy: differences, equal", "numpy: differences, tuned"
    return [
        Look("inspect", inspect(hf)),
        Look("inspect DeepSeek V3 (91,991 tensors, 163 files)", inspect(moe)),
        Look(by_numpy, (*BY_NUMPY, str(hf)), (hf,)),
        Look("inspect --stats --workers 1", inspect(hf, "--stats", *one), (hf,), by_numpy),
        Look("inspect --stats", inspect(hf, "--stats"), (hf,), by_numpy),
        Look(equal, (*BY_NUMPY, str(hf), str(copy)), (hf, copy)),
        Look("diff --workers 1, equal", diff(hf, copy, *one), (hf, copy), equal),
        Look("diff, equal", diff(hf, copy), (hf, copy), equal),
        Look(other, (*BY_NUMPY, str(hf), str(tuned)), (hf, tuned)),
        Look("diff --workers 1, tuned", diff(hf, tuned, *one), (hf, tuned), other),
        Look("diff, tuned", diff(hf, tuned), (hf, tuned), other),
        Look("verify --workers 1", (*run.CONVERT, "verify", str(ours), *one), (ours,)),
        Look("verify", (*run.CONVERT, "verify", str(ours)), (ours,)),
    ]


def measure(job: Look) -> tuple[float, float, int]:
    """Seconds of the wall and of the processor, and peak bytes, of one run with its sources in the page cache."""
    for source in job.sources:
        run.read_through(source)
    return run.timed(job.command, codes=(0, 1))  # diff ends with 1 where it found a difference


def measure_all(todo: list[Look], repeat: int) -> dict[str, Result]:
    """Every job in every round."""
    results = {job.name: Result() for job in todo}
    for number in range(repeat):
        for job in todo:
            wall, processor, peak = measure(job)
            result = results[job.name]
            result.wall.append(wall)
            result.processor.append(processor)
            result.peaks.append(peak)
            run.say(
                f"round {number + 1} of {repeat}: {wall:7.2f} s {processor:7.2f} s  {peak / 1e6:6.0f} MB  {job.name}"
            )
    return results


def table(todo: list[Look], results: dict[str, Result]) -> str:
    """The results as Markdown."""
    rows = [
        "| job | median seconds | GB/s | GB/s of a core | × numpy, median over rounds | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for job in todo:
        result = results[job.name]
        wall, processor = statistics.median(result.wall), statistics.median(result.processor)
        nbytes = sum(path.stat().st_size for source in job.sources for path in source.glob("*.safetensors")) / 1e9
        speed, core = (f"{nbytes / wall:.2f}", f"{nbytes / processor:.2f}") if nbytes else ("–", "–")
        ratio = "–"
        if job.baseline:
            base = results[job.baseline].wall
            ratio = f"{statistics.median(mine / its for mine, its in zip(result.wall, base, strict=True)):.2f}"
        rows.append(f"| {job.name} | {wall:.2f} | {speed} | {core} | {ratio} | {max(result.peaks) / 1e6:.0f} MB |")
    return "\n".join(rows)


def main() -> None:
    arguments = run.options(__doc__, "--dir")
    paths = prepare(arguments.work, arguments.layers)
    todo = jobs(paths)
    results = measure_all(todo, arguments.repeat)
    facts = run.facts(arguments.work, paths["hf"], arguments.layers, arguments.repeat)
    text = table(todo, results) + "\n\n" + facts.replace("benchmarks/run.py", "benchmarks/look.py")
    print(text)
    if arguments.write:
        run.write(text, BEGIN, END)


if __name__ == "__main__":
    main()
