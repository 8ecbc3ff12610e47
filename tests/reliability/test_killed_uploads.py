"""A run in a bucket, killed at random moments, that goes on elsewhere, with an empty disk or not: the same bits."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_convert.checkpointer.run import saved_steps
from ckpt_convert.storage import pointer
from ckpt_convert.storage.place import checked_place
from tests.checkpointer.training import LLAMA, run
from tests.helpers import assert_same
from tests.servers.s3 import Bucket

pytestmark = pytest.mark.slow

STEPS, KILLS = 24, 6
JOURNAL = ".ckpt-convert-journal"

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.checkpointer.training"])


def options(place: Path, output: str, **checkpointer: Any) -> dict[str, Any]:
    place.mkdir(exist_ok=True)
    return {
        "source": str(LLAMA),
        "output_dir": output,
        "log": str(place / "log"),
        "result": str(place / "result.pt"),
        "steps": STEPS,
        "dtype": "float32",
        "checkpointer": {"save_every": 3, "keep_last": 2, **checkpointer},
    }


def run_in(environment: dict[str, str], chosen: dict[str, Any]) -> None:
    """``run`` with the environment of this test: the server that forks may be that of an earlier one."""
    os.environ.update(environment)
    run(chosen)


def started(chosen: dict[str, Any]) -> Any:
    child = processes.Process(target=run_in, args=(dict(os.environ), chosen))
    child.start()
    return child


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_killed_run_goes_on_bit_for_bit(asynchronous: bool, bucket: Bucket, tmp_path: Path) -> None:
    """Between two kills the machine may change: then nothing is left but what is in the bucket."""
    chance = random.Random(7 + asynchronous)
    whole = options(tmp_path / "whole", str(tmp_path / "whole" / "out"))
    begun = time.monotonic()
    child = started(whole)
    child.join()
    assert child.exitcode == 0
    lasts = time.monotonic() - begun

    output = checked_place(f"s3://{bucket.name}/run")
    local = tmp_path / "disk"
    chosen = options(tmp_path / "killed", str(output), local_dir=str(local), keep_local=1, asynchronous=asynchronous)
    newest = 0
    for _ in range(KILLS):
        child = started(chosen)
        child.join(chance.uniform(0.2, 1.5) * lasts)
        child.kill()
        child.join()
        target = pointer.pointer_target(output, "latest")
        there = saved_steps.scan_steps(output)
        assert target is None or saved_steps.read_step(target) is not None, "the pointer names an incomplete step"
        assert not newest or (there and there[-1].step >= newest), "a step that was complete is lost"
        newest = there[-1].step if there else 0
        if chance.random() < 0.5:
            shutil.rmtree(local, ignore_errors=True)
    child = started(chosen)
    child.join()
    assert child.exitcode == 0
    ours, theirs = (torch.load(one["result"], weights_only=True) for one in (chosen, whole))
    assert_same(ours["weights"], theirs["weights"])
    for number, state in theirs["optimizer"]["state"].items():
        assert_same(ours["optimizer"]["state"][number], state)
    for what in ("lr_scheduler", "drawn", "progress"):
        assert ours[what] == theirs[what], what

    assert bucket.uploads == {}
    names = {name.split("/")[1] for name in bucket.files}
    assert names == {"latest", f"step_{STEPS - 3}", f"step_{STEPS}"}
    assert not [name for name in bucket.files if name.endswith(JOURNAL)]
    for step in (STEPS - 3, STEPS):
        here = tmp_path / "whole" / "out" / f"step_{step}"
        for path in here.rglob("*"):
            if path.is_file() and path.name != "manifest.json":
                assert bucket.files[f"run/step_{step}/{path.relative_to(here).as_posix()}"] == path.read_bytes(), path
