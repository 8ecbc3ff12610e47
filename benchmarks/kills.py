"""What the benchmarks that kill processes have in common: numbered cases, many at a time, and the table of what came of
them in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import run

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.checkpointer.pool import Pool  # noqa: E402

SILENCE = 2.0
"""Seconds after which the others take a rank to be gone: 30 in runs of users."""


@dataclass
class Outcome:
    """What came of one case: the row of the table that it belongs to, how many kills it had, and what was wrong."""

    kind: str
    kills: int = 0
    wrong: str = ""


Attempt = Callable[[int, Pool, Path], Any]
"""Tries the case with a number, on these processes, in this empty folder; returns an Outcome."""

Columns = Mapping[str, Callable[[list[Any]], object]]
"""The heads of a table, and what stands below them for the outcomes of a row."""


def kills(outcomes: list[Any]) -> int:
    return sum(outcome.kills for outcome in outcomes)


def wrong(outcomes: list[Any]) -> int:
    return sum(bool(outcome.wrong) for outcome in outcomes)


def table(rows: Mapping[str, list[Any]], columns: Columns) -> str:
    """The rows, and one for all of them, as Markdown."""
    every = [outcome for outcomes in rows.values() for outcome in outcomes]
    lines = ["| killed | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for kind, outcomes in [*sorted(rows.items()), ("all", every)]:
        lines.append(" | ".join([f"| {kind}", *(str(column(outcomes)) for column in columns.values())]) + " |")
    return "\n".join(lines)


def numbered(attempt: Attempt, place: Path, first: int, jobs: int) -> Generator[Any]:
    """The outcomes of the cases from a number on, so many at a time, without end."""
    idle: SimpleQueue[Pool] = SimpleQueue()
    pools = [Pool() for _ in range(jobs)]
    for pool in pools:
        idle.put(pool)

    def one(number: int) -> Any:
        here, pool = place / f"case_{number}", idle.get()
        here.mkdir()
        try:
            return attempt(number, pool, here)
        finally:
            shutil.rmtree(here)
            idle.put(pool)

    try:
        with ThreadPoolExecutor(jobs) as threads:
            for start in count(first, 2 * jobs):
                yield from threads.map(one, range(start, start + 2 * jobs))
    finally:
        for pool in pools:
            pool.close()


def main(
    description: str | None,
    prepare: Callable[[Path], AbstractContextManager[Attempt]],
    columns: Columns,
    marker: str,
    enough: int,
) -> None:
    """Try cases until there were enough kills; ``prepare`` is given a folder for what all cases need."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=enough, help="how many kills")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--jobs", type=int, default=1, help="how many cases at a time")
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md")
    options = parser.parse_args()
    rows: dict[str, list[Outcome]] = {}
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as name,
        prepare(Path(name)) as attempt,
        closing(numbered(attempt, Path(name), options.first, options.jobs)) as outcomes,
    ):
        for number, outcome in enumerate(outcomes, options.first):
            print(number, outcome, flush=True)
            rows.setdefault(outcome.kind, []).append(outcome)
            if sum(map(kills, rows.values())) >= options.count:
                break
    command = f"python benchmarks/{Path(sys.argv[0]).name} --count {options.count} --jobs {options.jobs} --write"
    minutes = (time.monotonic() - began) / 60
    text = f"{table(rows, columns)}\n\nCommand: `{command}`, {minutes:.0f} minutes."
    print(text)
    if options.write:
        run.write(text, f"<!-- {marker} -->", f"<!-- end {marker} -->", ROOT / "docs" / "reliability.md")
