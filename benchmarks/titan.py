"""Measures conversions to and from torchtitan's layout, and writes their table of docs/benchmarks.md.

As in run.py, every job is a process of its own, the jobs take turns, and the medians over the rounds count. The peer is
torchtitan's own way (by_torchtitan.py), where --peer names a Python that has torchtitan installed.

python benchmarks/titan.py --peer VENV/bin/python --repeat 3 --write
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import run

BEGIN, END = "<!-- titan -->", "<!-- end titan -->"


@dataclass(frozen=True)
class Group:
    """Jobs that move the same bytes: the first of them is cp."""

    title: str
    source: Path
    jobs: tuple[run.Job, ...]


def prepare(work: Path, layers: int = 16) -> dict[str, Path]:
    """The checkpoints that the jobs read, made where they are missing."""
    paths = {"llama": run.prepare(work, layers, ("hf",))["hf"], "moe": work / "qwen3-moe" / "hf"}
    if not paths["moe"].exists():
        paths["moe"].parent.mkdir(parents=True, exist_ok=True)
        maker = (sys.executable, str(run.HERE / "checkpoints.py"), str(paths["moe"]), "--moe")
        subprocess.run(maker, check=True)
    for name in ("llama", "moe"):
        titan = paths[name].parent / "torchtitan"
        if not titan.exists():
            subprocess.run((*run.CONVERT, "hf-to-torchtitan", str(paths[name]), str(titan), "--quiet"), check=True)
        paths[f"{name} in torchtitan"] = titan
    return paths


def groups(paths: dict[str, Path], work: Path, peer: str | None) -> list[Group]:
    out = work / "out"

    def copied(source: Path) -> run.Job:
        return run.Job(run.BASELINE, ("sh", "-c", run.COPY, "sh", str(source), str(out)), source, out)

    def converted(command: str, source: Path) -> run.Job:
        return run.Job(command, (*run.CONVERT, command, str(source), str(out), "--quiet"), source, out)

    def by_peer(direction: str, source: Path) -> tuple[run.Job, ...]:
        words = (str(peer), str(run.HERE / "by_torchtitan.py"), direction, str(source), str(out))
        return (run.Job(f"torchtitan's own way, {direction}", words, source, out),) if peer else ()

    def both_ways(name: str) -> tuple[run.Job, ...]:
        hf, titan = paths[name], paths[f"{name} in torchtitan"]
        return copied(hf), converted("hf-to-torchtitan", hf), converted("torchtitan-to-hf", titan)

    llama, titan = paths["llama"], paths["llama in torchtitan"]
    peers = (*by_peer("from-hf", llama), *by_peer("to-hf", titan))
    return [
        Group(f"Llama, {gigabytes(llama)}", llama, (*both_ways("llama"), *peers)),
        Group(f"Qwen3 MoE of 16 experts, {gigabytes(paths['moe'])}", paths["moe"], both_ways("moe")),
    ]


def gigabytes(directory: Path) -> str:
    return f"{sum(path.stat().st_size for path in directory.iterdir()) / 1e9:.1f} GB"


def table(found: list[tuple[Group, dict[str, run.Result]]]) -> str:
    rows = [
        "| model | job | × cp, median over rounds | median seconds | peak memory |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for group, results in found:
        base = results[run.BASELINE].seconds
        for job in group.jobs:
            result = results[job.name]
            ratio = statistics.median(mine / its for mine, its in zip(result.seconds, base, strict=True))
            peak = "–" if job.name == run.BASELINE else f"{max(result.peaks) / 1e6:.0f} MB"
            median = statistics.median(result.seconds)
            rows.append(f"| {group.title} | {job.name} | {ratio:.2f} | {median:.2f} | {peak} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/ckpt-convert-bench"), help="where checkpoints lie")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python with torchtitan 0.3.0, to be measured beside")
    parser.add_argument("--write", action="store_true", help=f"write the table into {run.PAGE.name}, too")
    arguments = parser.parse_args()
    if arguments.repeat < 1:
        parser.error("--repeat is 1 or more")

    paths = prepare(arguments.work)
    found = []
    for group in groups(paths, arguments.work, arguments.peer):
        run.say(group.title)
        found.append((group, run.measure_all(list(group.jobs), arguments.repeat)))
    command = f"python benchmarks/titan.py{' --peer VENV/bin/python' if arguments.peer else ''}"
    lines = run.facts(arguments.work, paths["llama"], 16, arguments.repeat).splitlines()
    facts = [line for line in lines if not line.startswith(("- Model", "- Command"))]
    text = "\n".join([table(found), "", *facts, f"- Command: `{command} --repeat {arguments.repeat} --write`"])
    print(text)
    if arguments.write:
        run.write(text, BEGIN, END)


if __name__ == "__main__":
    main()
