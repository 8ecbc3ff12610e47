"""Measures how soon a command answers: `--help`, and `inspect` of a small directory, against an import of click.

It makes an installation of its own, as users have it: starting from a source directory takes longer. The commands take
turns, and the best of all rounds counts: what is measured is the work, not what else the machine does.

python benchmarks/start.py --write
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import run

BEGIN, END = "<!-- start -->", "<!-- end start -->"
SMALL = run.HERE.parent / "fixtures" / "golden" / "llama" / "hf"
BASELINE = "python -c 'import click'"


def install(work: Path) -> Path:
    """A virtual environment with ckpt-convert and what it needs; returns its folder of commands."""
    environment = work / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    source = run.HERE.parent
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(source / "constraints.txt"), str(source)], check=True)
    return environment / "bin"


def jobs(commands: Path) -> dict[str, list[str]]:
    """What is measured, by name; the first is what the others are held against."""
    python, command = str(commands / "python"), str(commands / "ckpt-convert")
    return {
        BASELINE: [python, "-c", "import click"],
        "ckpt-convert --help": [command, "--help"],
        "ckpt-convert inspect": [command, "inspect", str(SMALL)],
        "ckpt-convert inspect --json": [command, "inspect", str(SMALL), "--json"],
        "ckpt-convert verify --quick": [command, "verify", "--quick", str(SMALL)],
        "ckpt-convert hf-to-meta --dry-run": [command, "hf-to-meta", "--dry-run", str(SMALL), "/nowhere/output"],
    }


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds of the wall and of the processor."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime


def measure_all(todo: dict[str, list[str]], rounds: int) -> dict[str, tuple[float, float]]:
    """The best of each job."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in todo}
    for _ in range(rounds):
        for name, command in todo.items():
            found[name].append(measure(command))
    return {name: (min(wall for wall, _ in all_), min(cpu for _, cpu in all_)) for name, all_ in found.items()}


def table(best: dict[str, tuple[float, float]]) -> str:
    """The results as Markdown."""
    rows = ["| command | ms | × click | ms of the processor | × click |", "| --- | ---: | ---: | ---: | ---: |"]
    base = best[BASELINE]
    for name, (wall, cpu) in best.items():
        rows.append(f"| `{name}` | {wall * 1e3:.0f} | {wall / base[0]:.2f} | {cpu * 1e3:.0f} | {cpu / base[1]:.2f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=15, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        best = measure_all(jobs(install(Path(work))), arguments.repeat)
    facts = [
        f"- Rounds: {arguments.repeat}, of which the best counts",
        f"- Processor: {run.processor()}",
        "- Command: `python benchmarks/start.py --write`",
    ]
    text = "\n".join([table(best), "", *facts])
    print(text)
    if arguments.write:
        run.write(text, BEGIN, END)


if __name__ == "__main__":
    main()
