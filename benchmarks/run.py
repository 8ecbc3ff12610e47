"""Measures the conversions against `cp` and writes the table of docs/benchmarks.md.

Every job is a process of its own, timed by the wall, with the peak memory that the system saw (wait4). The jobs take
turns, round by round, so that a slow minute of the machine falls on all of them; the medians over the rounds count.
This process stays small and imports nothing large: a child's peak is never below its parent's size when it forked.

python benchmarks/run.py --repeat 5 --write
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- table -->", "<!-- end -->"
CONVERT = (sys.executable, "-m", "ckpt_convert")
COPY = 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +'
BASELINE = "cp -r, then sync of each file"


@dataclass(frozen=True)
class Job:
    """A command to measure; ``source`` is what it reads, ``output`` what it writes, if it does.

    ``once`` is for jobs of which only the memory is wanted; ``compared`` for those that move the same bytes as cp.
    """

    name: str
    command: tuple[str, ...]
    source: Path
    output: Path | None = None
    once: bool = False
    compared: bool = True
    warm: bool = True


@dataclass
class Result:
    """What was measured of a job: seconds by round, bytes of peak memory by round."""

    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)


# -- checkpoints


def prepare(work: Path, layers: int, only: tuple[str, ...] = ()) -> dict[str, Path]:
    """The checkpoints that the jobs read, made where they are missing: all of them, or ``only`` these."""
    small, large = work / f"llama-{layers}-layers", work / f"llama-{3 * layers}-layers"
    paths = {
        "hf": small / "hf",
        "meta": small / "meta",
        "native": small / "native",
        "large": large / "hf",
        "405b": work / "llama-405b-sparse",
    }
    maker = (sys.executable, str(HERE / "checkpoints.py"))
    commands: dict[str, Callable[[Path], tuple[str, ...]]] = {
        "hf": lambda path: (*maker, str(path), "--layers", str(layers)),
        "meta": lambda path: (*CONVERT, "hf-to-meta", str(paths["hf"]), str(path), "--quiet"),
        "native": lambda path: (*CONVERT, "hf-to-native", str(paths["hf"]), str(path), "--quiet"),
        "large": lambda path: (*maker, str(path), "--layers", str(3 * layers)),
        "405b": lambda path: (*maker, str(path), "--sparse-405b"),
    }
    for name, path in paths.items():
        if path.exists() or (only and name not in only):
            continue
        say(f"making {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.making")  # the name is given last: what has it is whole
        remove(partial)
        subprocess.run(commands[name](partial), check=True)
        partial.rename(path)
    return paths


def jobs(paths: dict[str, Path], work: Path, layers: int) -> list[Job]:
    """What is measured, cp first."""
    out = work / "out"

    def conversion(command: str, source: str, label: str = "", *, once: bool = False) -> Job:
        words = (*CONVERT, command, str(paths[source]), str(out), "--quiet")
        return Job(label or command, words, paths[source], out, once=once, compared=not once)

    return [
        Job(BASELINE, ("sh", "-c", COPY, "sh", str(paths["hf"]), str(out)), paths["hf"], out),
        conversion("hf-to-meta", "hf"),
        conversion("meta-to-hf", "meta"),
        conversion("hf-to-native", "hf"),
        conversion("native-to-hf", "native"),
        Job(
            "by hand: load all, permute, torch.save, fsync",
            (sys.executable, str(HERE / "by_hand.py"), str(paths["hf"]), str(out)),
            paths["hf"],
            out,
        ),
        Job("inspect", (*CONVERT, "inspect", str(paths["hf"])), paths["hf"], compared=False, warm=False),
        Job(
            "hf-to-meta --model-parallel 8 --dry-run of Llama 3.1 405B",
            (*CONVERT, "hf-to-meta", str(paths["405b"]), str(out), "--model-parallel", "8", "--dry-run"),
            paths["405b"],
            compared=False,
            warm=False,
        ),
        conversion("hf-to-native", "large", "hf-to-native, three times the layers", once=True),
    ]


# -- measuring


def measure(job: Job) -> tuple[float, int]:
    """Seconds and peak bytes of one run, from a state that is the same before each."""
    if job.output is not None:
        remove(job.output)
    os.sync()
    if job.warm:
        read_through(job.source)
    seconds, _, peak = timed(job.command)
    return seconds, peak


def timed(command: Sequence[str], codes: Container[int] = (0,)) -> tuple[float, float, int]:
    """Seconds of the wall and of the processor, and peak bytes, of a command that ends with one of these codes."""
    with tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in codes:
            said.seek(0)
            say(said.read().decode("utf-8", "replace"))
            sys.exit(f"ended with code {process.returncode}: {shlex.join(command)}")
    scale = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * scale


def measure_all(todo: list[Job], repeat: int) -> dict[str, Result]:
    """Every job in every round; those of which only the memory is wanted in the first one."""
    results = {job.name: Result() for job in todo}
    for number in range(repeat):
        for job in todo:
            if job.once and number > 0:
                continue
            seconds, peak = measure(job)
            results[job.name].seconds.append(seconds)
            results[job.name].peaks.append(peak)
            say(f"round {number + 1} of {repeat}: {seconds:7.2f} s  {peak / 1e6:6.0f} MB  {job.name}")
    for output in {job.output for job in todo if job.output is not None}:
        remove(output)
    return results


def read_through(directory: Path) -> None:
    """Read every file once, so that each job finds its source in the page cache; into one small buffer."""
    buffer = bytearray(1 << 20)
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


# -- showing


def table(todo: list[Job], results: dict[str, Result]) -> str:
    """The results as Markdown."""
    base = results[BASELINE].seconds
    rows = [
        "| job | × cp, of the medians | × cp, median over rounds | median seconds | peak memory |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for job in todo:
        result = results[job.name]
        median = statistics.median(result.seconds)
        overall = per_round = "–"
        if job.compared:
            overall = f"{median / statistics.median(base):.2f}"
            ratios = [mine / its for mine, its in zip(result.seconds, base, strict=True)]
            per_round = f"{statistics.median(ratios):.2f}"
        # The memory of a conversion is what was most in any round; its time would depend on the size, so is left out.
        seconds = "–" if job.once else f"{median:.2f}"
        peak = "–" if job.name == BASELINE else f"{max(result.peaks) / 1e6:.0f} MB"
        rows.append(f"| {job.name} | {overall} | {per_round} | {seconds} | {peak} |")
    return "\n".join(rows)


def facts(work: Path, source: Path, layers: int, repeat: int) -> str:
    """The machine and the versions, and the command that makes the table."""
    total = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ckpt-convert", "numpy", "torch"))
    command = "python benchmarks/run.py" + (f" --layers {layers}" if layers != 16 else "") + f" --repeat {repeat}"
    lines = {
        "Model": f"Llama in bfloat16, {total / 1e9:.2f} GB, layers: {layers}",
        "Rounds": str(repeat),
        "Processor": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "Memory": f"{memory / 1e9:.0f} GB",
        "File system": file_system(work),
        "Kernel": f"{platform.system()} {platform.release()}",
        "Versions": f"Python {platform.python_version()}, {versions}",
        "Command": f"`{command} --write`",
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def file_system(path: Path) -> str:
    """The type of the file system that ``path`` lies on."""

    def mounts() -> Iterator[tuple[int, str]]:
        for line in Path("/proc/mounts").read_text().splitlines():
            _, where, kind, *_ = line.split()
            if path.resolve().is_relative_to(where):
                yield len(where), kind

    try:
        return max(mounts())[1]
    except (OSError, ValueError):
        return "unknown"


def write(text: str, begin: str = BEGIN, end: str = END, page: Path = PAGE) -> None:
    """Put the text between two markers of a page."""
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        sys.exit(f"{page}: has no {begin} … {end} to write between")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def options(description: str | None, place: str = "--work", **flags: str) -> argparse.Namespace:
    """What is typed to take a table's measurements: where, how often, of how large a model; flags by their help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    at = Path("/tmp/ckpt-convert-bench")
    parser.add_argument(place, dest="work", type=Path, default=at, help="where checkpoints lie")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds (default: 5)")
    parser.add_argument("--layers", type=int, default=16, metavar="N", help="layers of the model (default: 16, 3.0 GB)")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}, too")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    given = parser.parse_args()
    if given.repeat < 1 or given.layers < 1:
        parser.error("--repeat and --layers are 1 or more")
    return given


def main() -> None:
    arguments = options(__doc__)
    paths = prepare(arguments.work, arguments.layers)
    todo = jobs(paths, arguments.work, arguments.layers)
    results = measure_all(todo, arguments.repeat)
    text = table(todo, results) + "\n\n" + facts(arguments.work, paths["hf"], arguments.layers, arguments.repeat)
    print(text)
    if arguments.write:
        write(text)


if __name__ == "__main__":
    main()
