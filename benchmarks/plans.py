"""Measures plans of released models, from headers alone, and writes their table of docs/benchmarks.md.

Each model is a sparse checkpoint (released.py), and is planned into every other layout of its family: Meta's with as
many ranks as it was released in. Every plan is a process of its own; its wall and its peak memory count, and what it
says has to be what transformers says of the model: each key claimed, each parameter written once.

python benchmarks/plans.py --repeat 3 --write
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import released
import run

BEGIN, END = "<!-- plans -->", "<!-- end plans -->"
MAKE = (sys.executable, str(run.HERE / "released.py"))
TARGETS = {
    "llama": ("meta", "native", "torchtitan"),
    "llama4": ("meta", "native"),
    "deepseek_v3": ("torchtitan",),
    "mixtral": ("meta",),
    "gpt_oss": ("torchtitan",),
    "qwen3_moe": ("torchtitan",),
}


@dataclass(frozen=True)
class Planned:
    """A plan to be measured: of the checkpoint ``source``, with these options."""

    model: str
    what: str
    source: Path
    options: tuple[str, ...]

    @property
    def command(self) -> tuple[str, ...]:
        destination = self.source.parent / "never-written"
        return (*run.CONVERT, "convert", str(self.source), str(destination), *self.options, "--dry-run", "--json")


def prepare(work: Path, names: list[str]) -> dict[str, Path]:
    """The sparse checkpoints, made where they are missing: NAME, and NAME-published for what is quantised."""
    paths = {}
    for name in names:
        kinds = {name: ()} | ({f"{name}-published": ("--published",)} if released.RELEASES[name].quantized else {})
        for kind, flags in kinds.items():
            path = paths[kind] = work / "released" / kind
            if path.exists():
                continue
            run.say(f"making {path}")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{kind}.making")  # the name is given last: what has it is whole
            run.remove(partial)
            subprocess.run([*MAKE, str(partial), name, *flags], check=True)
            partial.rename(path)
    return paths


def plans(paths: dict[str, Path], names: list[str]) -> Iterator[Planned]:
    """Every plan: of the weights in bfloat16, and of those that are published in fewer bits as they are."""
    for name in names:
        release, path = released.RELEASES[name], paths[name]
        for target in TARGETS[release.config["model_type"]]:
            ranks = ("--model-parallel", str(release.ranks)) if target == "meta" and release.ranks > 1 else ()
            what = f"hf → {target}" + (f", {release.ranks} ranks" if ranks else "")
            yield Planned(release.title, what, path, ("--to", target, *ranks))
        if release.quantized is not None:
            title, path, files = f"{release.title}, as published", paths[f"{name}-published"], str(release.files // 2)
            yield Planned(title, f"hf → hf, {files} files", path, ("--to", "hf", "--shards", files))
            dequantized = ("--to", "torchtitan", "--dequantize", "bfloat16")
            yield Planned(title, "hf → torchtitan, dequantized", path, dequantized)


def headers(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every stored tensor."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        found |= {key: tuple(entry["shape"]) for key, entry in header.items() if key != "__metadata__"}
    return found


def check(planned: Planned) -> None:
    """Hold what a plan says against the headers: it has to move every number that they have, once."""
    said = json.loads(subprocess.run(planned.command, check=True, capture_output=True).stdout)
    made = "zeros, as the source has none"
    groups = [group for group in said["groups"] if made not in group["steps"]]
    moved = sum(math.prod(group["shape"]) * group["count"] for group in groups)
    there = 0
    for key, shape in headers(planned.source).items():
        if "--dequantize" not in planned.options:
            there += math.prod(shape)
        elif not key.endswith(("_scale_inv", "_scales")):
            there += math.prod(shape) * (2 if key.endswith("_blocks") else 1)  # two numbers of MXFP4 are a byte
    if moved != there:
        sys.exit(f"{planned.model}, {planned.what}: {moved} numbers are moved, but the headers have {there}")


def table(found: list[tuple[Planned, list[tuple[float, int]]]]) -> str:
    """The results as Markdown."""
    rows = ["| model | tensors | plan | median seconds | peak memory |", "| --- | ---: | --- | ---: | ---: |"]
    for planned, results in found:
        tensors = len(headers(planned.source))
        seconds, peak = statistics.median(wall for wall, _ in results), max(peak for _, peak in results)
        rows.append(f"| {planned.model} | {tensors:,} | {planned.what} | {seconds:.2f} | {peak / 1e6:.0f} MB |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/ckpt-convert-bench"), help="where checkpoints lie")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument("--only", choices=sorted(released.RELEASES), help="one model")
    parser.add_argument("--write", action="store_true", help=f"write the table into {run.PAGE.name}, too")
    arguments = parser.parse_args()
    if arguments.repeat < 1:
        parser.error("--repeat is 1 or more")

    names = [arguments.only] if arguments.only else list(released.RELEASES)
    todo = list(plans(prepare(arguments.work, names), names))
    results: dict[Planned, list[tuple[float, int]]] = {planned: [] for planned in todo}
    for number in range(arguments.repeat):
        for planned in todo:
            seconds, peak = run.measure(run.Job(planned.what, planned.command, planned.source, warm=False))
            results[planned].append((seconds, peak))
            where = f"round {number + 1} of {arguments.repeat}"
            run.say(f"{where}: {seconds:7.2f} s  {peak / 1e6:6.0f} MB  {planned.model}, {planned.what}")
    for planned in todo:
        check(planned)
    facts = run.facts(arguments.work, arguments.work / "released", 0, arguments.repeat).splitlines()
    kept = [line for line in facts if not line.startswith(("- Model", "- Command"))]
    command = f"- Command: `python benchmarks/plans.py --repeat {arguments.repeat} --write`"
    text = "\n".join([table(list(results.items())), "", *kept, command])
    print(text)
    if arguments.write:
        run.write(text, BEGIN, END)


if __name__ == "__main__":
    main()
