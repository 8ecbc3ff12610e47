"""Fuzzes, kills, fails, interrupts and damages for as long as it is told, and adds to a table in docs/reliability.md.

    python benchmarks/endurance.py --minutes 60 --write

Every case has a number and is the same in every run; a run goes on with the numbers after those that the table has.
What is wrong is printed, and counts in the table's last column. Linux only, with a C compiler (the calls of the system
are made to fail by a library that is preloaded).

    python benchmarks/endurance.py --only "fuzz index" --first 1521 --count 1      # one case again
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.faults import forked  # noqa: E402

if __name__ == "__main__":
    forked.preloaded()

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import dataclass  # noqa: E402

from benchmarks.faults import conversions, corpus, fuzz, training  # noqa: E402
from tests.checkpointer.training import trainable  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- endurance -->", "<!-- end endurance -->"
Case = tuple[bool, str | None]
"""Whether it ended in success (not refused), and what was wrong."""


@dataclass(frozen=True)
class Job:
    """A row of the table: ``cases(place, first, count)``; ``goal`` of them are enough, None has no end."""

    name: str
    cases: Callable[[Path, int, int], Iterator[Case]]
    goal: int | None
    chunk: int


@dataclass
class Row:
    """What a job came to."""

    runs: int = 0
    accepted: int = 0
    wrong: int = 0


def on(function: Callable[..., Iterator[str | None]], *given: object) -> Callable[[Path, int, int], Iterator[Case]]:
    """The cases of a function that yields what was wrong with each, or None."""
    return lambda place, first, count: (
        (True, wrong) for wrong in function(*given, place=place, first=first, count=count)
    )


def jobs(place: Path) -> list[Job]:
    """Everything that is done, on checkpoints that are made below ``place``."""
    warnings.filterwarnings("ignore", category=UserWarning)
    subjects = corpus.build(place / "corpus")
    made = conversions.conversions(place, place / "corpus")
    others = conversions.other_models(place / "others")
    source = trainable(place / "source")
    runs, behind = (training.runs(source, asynchronous) for asynchronous in (False, True))
    one, over = made[0], made[1]
    save = training.Run("weights and state", False, source, steps=3)
    # Counted once, for threads do not always make their calls in the same order.
    failing = conversions.cases(conversions.calls_of(one, place / "count"), conversions.FAILING)
    signals = conversions.cases(conversions.calls_of(over, place / "count"), conversions.SIGNALLED)
    save_failing, save_signals = (
        conversions.cases(training.calls_of(save, place), kinds)
        for kinds in (conversions.FAILING, conversions.SIGNALLED)
    )
    out = [Job(f"fuzz {kind}", _fuzzing(subjects, kind), None, 1000) for kind in fuzz.kinds(subjects)]
    out += [
        Job("kill -9 of a conversion", on(conversions.kills, made), 1000, 25),
        Job("a call of a conversion fails", on(conversions.faults, one, failing), len(failing), 50),
        Job("a signal at a call that overwrites", on(conversions.faults, over, signals), len(signals), 20),
        Job("a source is exchanged meanwhile", on(conversions.replaced, made, others), 500, 25),
        Job("three writers on one DST", on(conversions.writers, made), 200, 10),
        Job("kill -9 of a run that saves", on(training.kills, runs), 150, 12),
        Job("kill -9 of a run that saves behind the training", on(training.kills, behind), 150, 12),
        Job("a call of a save fails", on(training.faults, save, save_failing), len(save_failing), 20),
        Job("a signal at a call of a save", on(training.faults, save, save_signals), len(save_signals), 8),
    ]
    step = training.expected(save, place) / "out" / "step_3"
    bits: dict[str, list[conversions.Bits]] = {}
    for directory in (place / "corpus" / "meta", place / "corpus" / "titan", step, _hf(place)):
        for kind, found in conversions.bits_of(directory).items():
            bits.setdefault(kind, []).extend(found)
    for kind, where in bits.items():
        out.append(Job(f"a bit flips: {kind}", on(conversions.flips, where), 1000 if kind == "weights" else 300, 50))
    return out


def _hf(place: Path) -> Path:
    corpus.make("meta-to-hf", place / "corpus" / "plain-meta", place / "hf-output")
    return place / "hf-output"


def _fuzzing(subjects: list[corpus.Subject], kind: str) -> Callable[[Path, int, int], Iterator[Case]]:
    chosen = [subject for subject in subjects if subject.kind == kind]

    def cases(place: Path, first: int, count: int) -> Iterator[Case]:
        yield from fuzz.Fuzzer(chosen, place / f"fuzz-{first}").run(first, count)

    return cases


def chunk(job: Job, place: Path, first: int, count: int) -> Callable[[], int]:
    """Some cases of a job, in a child."""
    return lambda: tell(job.cases(Path(tempfile.mkdtemp(dir=place)), first, count))


def spread(job: Job, place: Path, share: float) -> Callable[[], int]:
    """A share of a chunk, from all over the cases of a job."""
    count = math.ceil(job.chunk * share)
    own = Path(tempfile.mkdtemp(dir=place))
    if job.goal is None:  # inputs, of which each is as good as any other
        return lambda: tell(job.cases(own, 0, 3 * count))
    step = job.goal // count
    return lambda: tell(case for at in range(count) for case in job.cases(own, at * step, 1))


def tell(cases: Iterator[Case]) -> int:
    """Go through cases, and print what came of them as JSON."""
    found = list(cases)
    wrongs = [wrong for _, wrong in found if wrong]
    print("\n" + json.dumps([len(found), sum(accepted for accepted, _ in found), wrongs]))
    return 0


class Runner:
    """Gives chunks of jobs to children until the time is over or all is done; keeps the rows of the table."""

    def __init__(self, jobs: list[Job], place: Path, rows: dict[str, Row], workers: int) -> None:
        self.jobs = jobs
        self.place = place
        self.rows = rows
        self.workers = workers
        self.given = {job.name: rows.setdefault(job.name, Row()).runs for job in jobs}

    def run(self, seconds: float) -> None:
        """One child fuzzes, the others do all else, and fuzz too when nothing else is left."""
        until = time.monotonic() + seconds
        endless = [job for job in self.jobs if job.goal is None]
        others = self._turns([job for job in self.jobs if job.goal is not None])
        turns = [self._turns(endless), *[others] * (self.workers - 1)]
        busy: list[tuple[Job, forked.Child] | None] = [None] * self.workers
        idle = False
        while any(busy) or (time.monotonic() < until and not idle):
            idle = True
            for slot, entry in enumerate(busy):
                if entry is not None and entry[1].has_ended():
                    self.take(entry[0], entry[1].finish())
                    entry = busy[slot] = None
                idle = idle and entry is None
                if entry is not None or time.monotonic() >= until:
                    continue
                turn = next(turns[slot], None) or next(turns[0], None)
                if turn is not None:
                    idle = False
                    job, first, count = turn
                    busy[slot] = (job, forked.Child(chunk(job, self.place, first, count), bounded=False))
            time.sleep(0.05)

    def take(self, job: Job, ended: forked.Ended) -> None:
        row = self.rows[job.name]
        if ended.status:
            row.wrong += 1
            print(f"{job.name}: the runner ended with {ended.status}: {ended.err[-2000:]}", flush=True)
            return
        runs, accepted, wrongs = json.loads(ended.out.splitlines()[-1])
        row.runs += runs
        row.accepted += accepted
        row.wrong += len(wrongs)
        for wrong in wrongs:
            print(f"{job.name}: {wrong}", flush=True)

    def _turns(self, jobs: list[Job]) -> Iterator[tuple[Job, int, int]]:
        """Chunks of these jobs in turn, until every goal is reached."""
        left = True
        while left:
            left = False
            for job in jobs:
                first = self.given[job.name]
                count = job.chunk if job.goal is None else min(job.chunk, job.goal - first)
                if count > 0:
                    left = True
                    self.given[job.name] += count
                    yield job, first, count


# The table


def read_rows(page: str) -> dict[str, Row]:
    """The rows of the table, by name."""
    _, _, rest = page.partition(BEGIN)
    rows = {}
    for line in rest.partition(END)[0].splitlines():
        cells = [cell.strip().replace(",", "") for cell in line.strip("|").split("|")]
        if len(cells) == 4 and re.fullmatch(r"\d+( of \d+)?", cells[1]):
            runs = int(cells[1].split()[0])
            rows[line.strip("|").split("|")[0].strip()] = Row(runs, int(cells[2].replace("–", "0")), int(cells[3]))
    return rows


def read_minutes(page: str) -> float:
    found = re.search(r"All rows took ([\d,]+) minutes", page)
    return float(found[1].replace(",", "")) if found else 0


def table(jobs: list[Job], rows: dict[str, Row], minutes: float) -> str:
    lines = ["| what is done | cases | read all the same | wrong |", "|---|---:|---:|---:|"]
    for job in jobs:
        row = rows[job.name]
        exhaustive = f" of {job.goal:,}" if job.goal is not None and "call" in job.name else ""
        accepted = f"{row.accepted:,}" if job.goal is None else "–"
        lines.append(f"| {job.name} | {row.runs:,}{exhaustive} | {accepted} | {row.wrong:,} |")
    fuzzed = sum(row.runs for name, row in rows.items() if name.startswith("fuzz "))
    lines.append(f"\nFuzzed inputs in all: {fuzzed:,}. All rows took {minutes:,.0f} minutes.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument(
        "--write", action="store_true", help="add to the table of docs/reliability.md, and go on after it"
    )
    parser.add_argument("--only", help="the rows whose name matches this regular expression")
    parser.add_argument("--first", type=int, default=0, help="with --count: these cases of each row, and no table")
    parser.add_argument("--count", type=int)
    parser.add_argument("--share", type=float, help="so much of a chunk of each row, spread over its cases; no table")
    parser.add_argument("--workers", type=int, default=1 + (os.cpu_count() or 1))
    arguments = parser.parse_args()
    forked.tidy()
    begun = time.monotonic()
    rows = read_rows(PAGE.read_text()) if arguments.write else {}
    place = Path(tempfile.mkdtemp(prefix="endurance-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        every = jobs(place)
        chosen = [job for job in every if not arguments.only or re.search(arguments.only, job.name)]
        for job in every:
            rows.setdefault(job.name, Row())
        runner = Runner(chosen, place, rows, arguments.workers)
        before = sum(row.wrong for row in rows.values())
        if arguments.share is not None:
            for job in chosen:
                runner.take(job, forked.Child(spread(job, place, arguments.share), bounded=False).finish())
        elif arguments.count is not None:
            for job in chosen:
                count = arguments.count if job.goal is None else min(arguments.count, job.goal - arguments.first)
                runner.take(job, forked.Child(chunk(job, place, arguments.first, count), bounded=False).finish())
        else:
            runner.run(arguments.minutes * 60)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    minutes = (time.monotonic() - begun) / 60 + (read_minutes(PAGE.read_text()) if arguments.write else 0)
    print(table(chosen, rows, minutes))
    if arguments.write:
        page = PAGE.read_text()
        start, rest = page.split(BEGIN)
        PAGE.write_text(f"{start}{BEGIN}\n{table(every, rows, minutes)}\n{END}{rest.split(END)[1]}")
    sys.exit(sum(row.wrong for row in rows.values()) > before)


if __name__ == "__main__":
    main()
