"""Kills runs that live in a bucket at random moments, and adds a table to docs/reliability.md.

    python benchmarks/upload_kills.py --count 100 --jobs 2 --write

A run: one, two or four processes train a tiny model (FSDP2 over gloo), save every step, in the training or behind it,
and upload it. All of them, or one, are killed with SIGKILL at a random moment, six times; half of the times their disk
is lost, too. After each kill the pointer has to name a complete step, no step that was complete may be gone, and what
is complete has to have the bytes of a run that is never killed, on one disk. The next start has to go on from the
newest step of disk and bucket, and the end has to be that of the undisturbed run, bit for bit, with nothing left over.
Runs have numbers and can be tried again (--first 17 --count 1). The server is moto, in this process.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import kills
import numpy as np
from kills import SILENCE

from ckpt_convert.checkpointer.run import saved_steps
from ckpt_convert.storage import pointer
from ckpt_convert.storage.names import JOURNAL
from ckpt_convert.storage.place import Place, as_place, checked_place
from tests.checkpointer.pool import Pool, quick_hearts, split
from tests.checkpointer.test_distributed_saving import optimize, whole_state
from tests.checkpointer.training import make_model, trainable
from tests.helpers import bits
from tests.servers import s3
from tests.servers.s3 import Bucket, S3Server

STEPS, KILLS = 24, 6

LONGEST = {1: 1.0, 2: 4.0, 4: 8.0}
"""Seconds after its start, by the number of ranks, before which a run is killed."""


class Run(NamedTuple):
    """How many ranks train, whether they save behind the training, and whether one or all of them are killed."""

    world: int
    asynchronous: bool
    one: bool

    @property
    def kind(self) -> str:
        """The row of the table."""
        if self.world == 1:
            return "one process"
        return f"{self.world} ranks, {'one of them' if self.one else 'all of them'}"


@dataclass
class Outcome(kills.Outcome):
    """How many of the kills came in an upload, and after how many the disk was lost."""

    uploads: int = 0
    disks: int = 0


COLUMNS: kills.Columns = {
    "runs": len,
    "kills": kills.kills,
    "of these in an upload": lambda some: sum(one.uploads for one in some),
    "and the disk lost": lambda some: sum(one.disks for one in some),
    "wrong": kills.wrong,
}


def run_of(number: int) -> Run:
    """The same in every run of this script."""
    world = (1, 2, 4)[number % 3]
    return Run(world, bool(number // 3 % 2), world > 1 and bool(number // 6 % 2))


def train(here: Path, output: str, environment: dict[str, str], source: Path, options: dict[str, Any]) -> Any:
    """Go on to the last step; what the optimizer has then, or what was raised."""
    import torch
    import torch.distributed as dist

    from ckpt_convert import Checkpointer

    os.environ.update(environment)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    model = split(make_model(), "fsdp") if dist.get_world_size() > 1 else make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    try:
        with (
            quick_hearts(SILENCE),
            Checkpointer(source, output, save_every=1, **options) as checkpointer,
        ):
            checkpointer.load_model(model)
            checkpointer.resume(model=model, optimizer=optimizer)
            if dist.get_rank() == 0:
                (here / "resumed").write_text(str(checkpointer.progress.step))
            while checkpointer.progress.step < STEPS:
                optimize(model, optimizer)
                checkpointer.step()
        return whole_state(model, optimizer)
    except Exception as error:  # what a rank raises whose neighbor was killed is not looked at here
        return f"{type(error).__name__}: {error}"


@dataclass
class World:
    """A run that is killed, and what it has to be in the end."""

    run: Run
    pool: Pool
    bucket: Bucket
    environment: dict[str, str]
    source: Path
    alone: Path
    expected: dict[str, Any]
    here: Path
    chance: random.Random

    @property
    def output(self) -> Place:
        return checked_place(f"s3://{self.bucket.name}/run")

    @property
    def resumed(self) -> Path:
        """Has the step that a run went on from, once it has."""
        return self.here / "resumed"

    def start(self, killed_after: float | None) -> list[Any] | None:
        """Train for so many seconds, None for to the end; what the ranks returned, None after a kill."""
        options = {"asynchronous": self.run.asynchronous, "local_dir": str(self.here / "disk"), "keep_last": 2}
        given = (str(self.output), self.environment, self.source, options)
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(self.pool.run, train, self.here, *given, world=self.run.world, limit=300)
            if killed_after is not None and self.chance.random() < 0.9:  # else it may be killed while it starts
                while not self.resumed.exists() and not future.done():
                    time.sleep(0.01)
            done, _ = wait([future], killed_after)
            if not done:
                pids = [process.pid for process, _ in self.pool._workers[: self.run.world]]
                for pid in [self.chance.choice(pids)] if self.run.one else pids:
                    os.kill(pid, signal.SIGKILL)
            result = future.result()
        return result if done else None

    def steps(self) -> dict[int, int]:
        """The complete steps of the bucket, with their places in the order of saving."""
        return {saved.step: saved.sequence for saved in saved_steps.scan_steps(self.output)}

    def newest(self) -> int:
        """The newest complete step, of disk and bucket."""
        places = [self.output, as_place(self.here / "disk")]
        return max((saved.step for saved in saved_steps.scan_places(places)), default=0)

    def wrong_after_kill(self, before: dict[int, int]) -> Iterator[str]:
        there = self.steps()
        target = pointer.pointer_target(self.output, "latest")
        if target is not None and saved_steps.read_step(target) is None:
            yield f"latest names {target.name}, which is not complete"
        if max(before, default=0) > max(there, default=0):
            yield f"complete were {sorted(before)}, and now {sorted(there)}"
        for step in there:
            yield from self.wrong_files(step)

    def wrong_files(self, step: int) -> Iterator[str]:
        """The objects of a complete step that are other bytes than the files of the undisturbed run."""
        files, here = self.bucket.files, self.alone / f"step_{step}"
        for path in here.rglob("*"):
            name = path.relative_to(here).as_posix()
            divided = self.run.world > 1 and name.startswith("training_state")
            if not path.is_file() or path.name == "manifest.json" or divided:
                continue
            if files.get(f"run/step_{step}/{name}") != path.read_bytes():
                yield f"step_{step}/{name} is another than that of a quiet run"

    def wrong_at_end(self, states: list[Any]) -> Iterator[str]:
        for state in states:
            if isinstance(state, str):
                yield f"the last start raised {state}"
            elif any(bits(state[key]) != bits(value) for key, value in self.expected.items()):
                yield "the optimizer is another than that of a quiet run"
        names = {name.split("/")[1] for name in self.bucket.files}
        if names != {"latest", f"step_{STEPS - 1}", f"step_{STEPS}"}:
            yield f"in the bucket are {sorted(names)}"
        if left := [name for name in self.bucket.files if name.endswith(JOURNAL)]:
            yield f"left over: {left}"
        if self.bucket.uploads:
            yield f"open uploads: {self.bucket.uploads}"

    def is_in_upload(self) -> bool:
        """Whether the kill came in an upload."""
        return any(name.endswith(JOURNAL) for name in self.bucket.files)


def kill_often(world: World) -> Outcome:
    """Kill a run six times, and let it come to its end."""
    wrong: list[str] = []
    outcome = Outcome(world.run.kind)
    resumed = world.resumed
    for number in count():
        expected = world.newest()
        resumed.unlink(missing_ok=True)
        before = world.steps()
        last = number == KILLS
        states = world.start(None if last else world.chance.uniform(0.0, LONGEST[world.run.world]))
        if resumed.exists() and int(resumed.read_text()) != expected:
            wrong.append(f"resumed from {resumed.read_text()}, and the newest was {expected}")
        if states is not None:
            break
        outcome.kills += 1
        outcome.uploads += world.is_in_upload()
        wrong += world.wrong_after_kill(before)
        if world.chance.random() < 0.5:
            outcome.disks += 1
            shutil.rmtree(world.here / "disk", ignore_errors=True)
    wrong += world.wrong_at_end(states)
    outcome.wrong = "; ".join(dict.fromkeys(wrong))
    return outcome


@contextmanager
def prepared(place: Path) -> Iterator[kills.Attempt]:
    """The runs, with a server and what an undisturbed process writes."""
    source, alone = trainable(place / "source"), place / "alone"
    with closing(Pool()) as pool:
        (expected,) = pool.run(train, place, str(alone), {}, source, {}, world=1)

    with S3Server() as server:
        environment = {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": s3.KEY,
            "AWS_SECRET_ACCESS_KEY": s3.SECRET,
            "AWS_REGION": s3.REGION,
        }
        os.environ.update(environment)

        def attempt(number: int, pool: Pool, here: Path) -> Outcome:
            bucket, chance = server.bucket(f"run-{number}"), random.Random(number)
            try:
                world = World(run_of(number), pool, bucket, environment, source, alone, expected, here, chance)
                return kill_often(world)
            finally:
                bucket.remove()

        yield attempt


if __name__ == "__main__":
    kills.main(__doc__, prepared, COLUMNS, "upload kills", 100)
