"""Kills single ranks of runs at random points of their saves, and adds a table to docs/reliability.md.

    python benchmarks/distributed_kills.py --count 200 --jobs 4 --write

A case: two to four processes train a tiny model over gloo, plain (DDP), sharded (FSDP2) or on a mesh (FSDP2 over tensor
parallelism), and save every step, in the training or behind it. One of them is killed before the n-th of its calls that
change files, all others have to raise one error soon. Then what is there has to be whole: each step the one that an
undisturbed process writes, file for file, and the pointer at the newest; and as many other processes have to go on from
it to the files of the undisturbed run. Cases have numbers and can be tried again (--first 17 --count 1).
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import kills
from kills import SILENCE

from tests.checkpointer.pool import Pool, quick_hearts, split
from tests.checkpointer.test_distributed_saving import optimize, train_full
from tests.checkpointer.training import KillAt, make_model, trainable
from tests.helpers import bits, sums

STEPS = 4


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


@dataclass
class Outcome(kills.Outcome):
    """How many steps were whole at the kill, and the seconds from it to the last error."""

    steps: int = 0
    seconds: float = 0.0


COLUMNS: kills.Columns = {
    "kills": kills.kills,
    "steps that were whole": lambda some: sum(one.steps for one in some if one.kills),
    "slowest error": lambda some: f"{max(one.seconds for one in some):.1f} s",
    "wrong": kills.wrong,
}


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

    killer, kill = None, os.kill

    def stamped(pid: int, number: int) -> None:
        (here / "killed").write_text(str(time.time()))
        kill(pid, number)

    model = split(make_model(), case.how)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    try:
        with (
            quick_hearts(SILENCE),
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
    return Outcome(case.kind, int(stamp.exists()), "; ".join(dict.fromkeys(wrong)), steps, seconds)


@contextmanager
def prepared(place: Path) -> Iterator[kills.Attempt]:
    """The cases, with what an undisturbed process writes."""
    source, alone = trainable(place / "source"), place / "alone"
    expected = train_full(alone, make_model(), source, STEPS)
    yield lambda number, pool, here: try_case(pool, case_of(number), source, alone, expected, here)


if __name__ == "__main__":
    kills.main(__doc__, prepared, COLUMNS, "kills", 200)
