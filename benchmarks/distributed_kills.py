"""Kills single ranks of runs at random points of their saves, and adds a table to docs/reliability.md.

    python benchmarks/distributed_kills.py --count 200 --jobs 4 --write

A case: two to four processes train a tiny model over gloo, plain (DDP), sharded (FSDP2) or on a mesh (FSDP2 over tensor
parallelism), and save every step, in the training or behind it. One of them is killed before the n-th of its calls that
change files, all others have to raise one error soon. Then what is there has to be whole: each step the one that an
undisturbed process writes, file for file, and the pointer at the newest; and as many other processes have to go on from
it to the files of the undisturbed run. Cases have numbers and can be tried again (--first 17 --count 1).
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.checkpointer.pool import Pool, split  # noqa: E402
from tests.checkpointer.test_distributed_saving import optimize, train_full  # noqa: E402
from tests.checkpointer.training import KillAt, make_model, trainable  # noqa: E402
from tests.helpers import bits, sums  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- kills -->", "<!-- end kills -->"
STEPS = 4
SILENCE = 2.0
"""Seconds after which the others take a rank to be gone: 30 in runs of users."""


class Case(NamedTuple):
    """Who is killed, and before which of its calls; and on how many ranks the run goes on."""

    how: str
    world: int
    asynchronous: bool
    rank: int
    call: int
    then: int

    @property
    def kind(self) -> str:
        """The row of the table."""
        names = {"ddp": "DDP", "fsdp": "FSDP2", "fsdp x tp": "FSDP2 × TP"}
        return f"{names[self.how]}, {'another rank' if self.rank else 'the first rank'}"


class Ended(NamedTuple):
    """What one rank raised, and when."""

    text: str
    at: float


class Outcome(NamedTuple):
    """Whether the rank was killed, how many steps were whole, the seconds to the last error, and what was wrong."""

    killed: bool
    steps: int
    seconds: float
    wrong: str


@dataclass
class Row:
    """What the cases of one kind came to."""

    kills: int = 0
    steps: int = 0
    slowest: float = 0.0
    wrong: int = 0


def case_of(number: int) -> Case:
    """The same in every run of this script."""
    chance = random.Random(number)
    how = ("ddp", "fsdp", "fsdp x tp")[number % 3]
    world = 4 if "x" in how else chance.randrange(2, 5)
    rank = 0 if chance.random() < 0.4 else chance.randrange(1, world)
    call = chance.randrange(1, CALLS[0] if rank == 0 else CALLS[1])
    return Case(how, world, bool(number // 3 % 2), rank, call, chance.randrange(1, 5))


CALLS = (750, 190)
"""About as many calls as the first rank makes in a run, and another one."""


def train_until_killed(here: Path, source: Path, case: Case) -> Ended:
    """Save every step, up to the kill; what this rank raised."""
    import torch
    import torch.distributed as dist

    from ckpt_convert import Checkpointer, CkptConvertError
    from ckpt_convert.checkpointer.distributed import heartbeat, ranks

    killer, kill = None, os.kill

    def stamped(pid: int, number: int) -> None:
        (here / "killed").write_text(str(time.time()))
        kill(pid, number)

    model = split(make_model(), case.how)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    try:
        with (
            mock.patch.multiple(heartbeat, BEAT=0.1, SILENCE=SILENCE),
            mock.patch.object(ranks, "FAREWELL", 0.1),
            mock.patch.object(os, "kill", stamped),
            Checkpointer(source, here / "out", save_every=1, asynchronous=case.asynchronous) as checkpointer,
        ):
            checkpointer.load_model(model)
            checkpointer.resume(model=model, optimizer=optimizer)
            if dist.get_rank() == case.rank:
                killer = KillAt(case.call)
            while checkpointer.progress.step < STEPS:
                optimize(model, optimizer)
                checkpointer.step()
    except CkptConvertError as error:
        return Ended(str(error), time.time())
    finally:
        if killer is not None:
            killer.left = 0
    return Ended("", time.time())


def go_on(here: Path, source: Path, how: str) -> dict[str, Any]:
    """Train to the last step, from what is there."""
    return train_full(here / "out", split(make_model(), how), source, STEPS)


def files_of(step: Path) -> dict[str, str]:
    """The checksums of all but the training state, which several ranks divide."""
    return {name: one for name, one in sums(step).items() if "training_state" not in name}


def wrong_steps(out: Path, alone: Path) -> Iterator[str]:
    """What of the steps that are there is not as an undisturbed process writes it."""
    there = sorted(path.name for path in out.glob("step_*"))
    if there != [f"step_{number}" for number in range(1, len(there) + 1)]:
        yield f"the steps are {there}"
    for name in there:
        if files_of(out / name) != files_of(alone / name):
            yield f"{name} is another than that of a quiet run"
    latest = (out / "latest").resolve().name if (out / "latest").is_symlink() else ""
    if latest not in ["", *there][-2:]:  # it is moved after the step has its name
        yield f"latest is {latest}, and the steps are {there}"


def wrong_errors(ended: list[Ended], case: Case, over: bool) -> Iterator[str]:
    """What of the survivors' errors is not as it should be; ``over``: all steps were whole."""
    said = {one.text for one in ended}
    if over and said == {""}:  # it was killed when it had nothing more to do
        return
    gone = re.compile(
        rf"rank {case.rank} on \S+: has not been heard of for {SILENCE:g} s, while the others waited for it"
    )
    # Without the first rank, there is nobody who says the same to all: they are at different turns then.
    if (len(said) != 1 and case.rank) or not all(map(gone.match, said)):
        yield f"the survivors raised {sorted({one.text for one in ended})}"


def try_case(pool: Pool, case: Case, source: Path, alone: Path, expected: dict[str, Any], here: Path) -> Outcome:
    """Kill, look at what is there, and go on."""
    ended = pool.run(train_until_killed, here, source, case, world=case.world)
    stamp = here / "killed"
    survivors = [one for one in ended if one is not None]
    steps = len(list((here / "out").glob("step_*")))
    wrong = list(wrong_steps(here / "out", alone))
    seconds = 0.0
    if stamp.exists():
        seconds = max(one.at for one in survivors) - float(stamp.read_text())
        wrong += wrong_errors(survivors, case, steps == STEPS)
    elif any(one.text for one in survivors):
        wrong.append(f"nobody was killed, and raised was {survivors}")
    for found in pool.run(go_on, here, source, case.how if case.then == 4 else "fsdp", world=case.then):
        same = found.keys() == expected.keys() and all(bits(found[key]) == bits(expected[key]) for key in expected)
        wrong += [] if same else ["the optimizer that goes on is another than that of a quiet run"]
    wrong += wrong_steps(here / "out", alone)
    wrong += [] if (here / "out" / "latest").resolve().name == f"step_{STEPS}" else ["latest is not at the last step"]
    left = sorted(path.name for path in (here / "out").iterdir() if "partial" in path.name)
    wrong += [f"left over: {left}"] if left else []
    return Outcome(stamp.exists(), steps, seconds, "; ".join(dict.fromkeys(wrong)))


def table(rows: dict[str, Row], command: str, minutes: float) -> str:
    """The rows as Markdown."""
    lines = ["| killed | kills | steps that were whole | slowest error | wrong |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {kind} | {row.kills} | {row.steps} | {row.slowest:.1f} s | {row.wrong} |"
        for kind, row in sorted(rows.items())
    ]
    kills, wrong = sum(row.kills for row in rows.values()), sum(row.wrong for row in rows.values())
    lines += [f"| all | {kills} | {sum(row.steps for row in rows.values())} | | {wrong} |", ""]
    return "\n".join([*lines, f"Command: `{command}`, {minutes:.0f} minutes."])


def outcomes(place: Path, first: int, jobs: int) -> Generator[tuple[Case, Outcome]]:
    """The cases from a number on, so many at a time, without end."""
    source, alone = trainable(place / "source"), place / "alone"
    expected = train_full(alone, make_model(), source, STEPS)
    idle: SimpleQueue[Pool] = SimpleQueue()
    pools = [Pool() for _ in range(jobs)]
    for pool in pools:
        idle.put(pool)

    def attempt(number: int) -> tuple[Case, Outcome]:
        case, here, pool = case_of(number), place / f"case_{number}", idle.get()
        here.mkdir()
        try:
            return case, try_case(pool, case, source, alone, expected, here)
        finally:
            shutil.rmtree(here)
            idle.put(pool)

    try:
        with ThreadPoolExecutor(jobs) as threads:
            for start in count(first, 2 * jobs):
                yield from threads.map(attempt, range(start, start + 2 * jobs))
    finally:
        for pool in pools:
            pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many kills")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--jobs", type=int, default=1, help="how many cases at a time")
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md")
    options = parser.parse_args()
    rows: dict[str, Row] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        cases = outcomes(Path(place), options.first, options.jobs)
        for number, (case, outcome) in enumerate(cases, options.first):
            row = rows.setdefault(case.kind, Row())
            row.kills += outcome.killed
            row.steps += outcome.steps if outcome.killed else 0
            row.slowest = max(row.slowest, outcome.seconds)
            row.wrong += bool(outcome.wrong)
            print(number, case, outcome, flush=True)
            if sum(row.kills for row in rows.values()) >= options.count:
                cases.close()
                break
    command = f"python benchmarks/distributed_kills.py --count {options.count} --jobs {options.jobs} --write"
    text = table(rows, command, (time.monotonic() - began) / 60)
    print(text)
    if options.write:
        page = PAGE.read_text()
        head, rest = page.split(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
