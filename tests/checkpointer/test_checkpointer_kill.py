"""Killed with SIGKILL at random moments, during saves too, and resumed until done: bitwise the same as never killed."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpointer.training import LLAMA, bfloat16_source, run
from tests.helpers import assert_same

STEPS = 40
processes = multiprocessing.get_context("forkserver")  # each child starts afresh, yet without importing torch anew
processes.set_forkserver_preload(["tests.checkpointer.training"])


def train(options: dict[str, Any], interfere: Callable[[int, Path], bool] | None = None) -> int:
    """Run in a process of its own; ``interfere`` is called over and over and says when to kill. The exit status."""
    child = processes.Process(target=run, args=(options,))
    child.start()
    assert child.pid is not None
    while interfere is not None and child.is_alive():
        if interfere(child.pid, Path(options["output_dir"])):
            child.kill()
            break
    child.join()
    assert child.exitcode is not None
    return child.exitcode


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("kill")
    bfloat16_source(place / "bfloat16")
    return place


def options(place: Path, name: str, source: str, dtype: str, asynchronous: bool) -> dict[str, Any]:
    return {
        "source": str(LLAMA if source == "float32" else place / "bfloat16"),
        "output_dir": str(place / name / "out"),
        "log": str(place / name / "log"),
        "result": str(place / name / "result.pt"),
        "steps": STEPS,
        "dtype": dtype,
        "checkpointer": {
            "save_every": [5, "1 epoch"],  # epochs have 7 batches, so no interval of one fits into the other
            "keep_last": 3,
            "keep_last_training_state": 2,
            "asynchronous": asynchronous,
        },
    }


@cache
def uninterrupted(place: Path, source: str, dtype: str) -> dict[str, Any]:
    chosen = options(place, f"whole-{source}-{dtype}", source, dtype, asynchronous=False)
    Path(chosen["output_dir"]).parent.mkdir()
    assert train(chosen) == 0
    return chosen


def files_of(directory: Path) -> dict[str, str]:
    """The sha256 of the weights and of every file of the training state; only the manifest tells wall times."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def assert_ended_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    # (A random draw each from Python, numpy and torch is among the results.)
    ours, theirs = (torch.load(one["result"], weights_only=True) for one in (found, expected))
    assert_same(ours["weights"], theirs["weights"])
    for number, state in theirs["optimizer"]["state"].items():
        assert_same(ours["optimizer"]["state"][number], state)
    for name in ("lr_scheduler", "drawn", "progress"):
        assert ours[name] == theirs[name], name
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]

    curve = dict(line.split() for line in Path(expected["log"]).read_text().splitlines())
    assert list(map(int, curve)) == list(range(1, STEPS + 1))
    seen = [line.split() for line in Path(found["log"]).read_text().splitlines()]
    assert {step for step, _ in seen} == curve.keys()
    assert all(curve[step] == loss for step, loss in seen), "a step that was repeated had another loss"

    last = f"step_{STEPS}"
    assert files_of(Path(found["output_dir"]) / last) == files_of(Path(expected["output_dir"]) / last)
    kept = [sorted(path.name for path in Path(one["output_dir"]).iterdir()) for one in (found, expected)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("source", "dtype", "asynchronous"),
    [("bfloat16", "float32", True), ("bfloat16", "bfloat16", False)],
    ids=["float32 from bfloat16, asynchronous", "bfloat16, synchronous"],
)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    place: Path, source: str, dtype: str, asynchronous: bool
) -> None:
    expected = uninterrupted(place, source, dtype)
    found = options(place, f"killed-{source}-{dtype}-{asynchronous}", source, dtype, asynchronous)
    Path(found["output_dir"]).parent.mkdir()
    chance = random.Random(f"{source} {dtype} {asynchronous}")
    killed = 0
    while True:
        # A save makes some 60 calls that change files: most children die inside one, at any place of it.
        status = train({**found, "kill_at": chance.randint(1, 250)} if killed < 4 else found)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
    assert killed >= 2
    assert_ended_alike(found, expected)


def test_a_run_that_is_killed_as_a_save_begins_ends_with_the_same_bits(place: Path) -> None:
    expected = uninterrupted(place, "bfloat16", "float32")
    found = options(place, "killed-by-parent", "bfloat16", "float32", asynchronous=True)
    Path(found["output_dir"]).parent.mkdir()
    chance = random.Random(7)
    for _ in range(2):
        saves = chance.randint(1, 4)
        seen: set[str] = set()

        def interfere(pid: int, output_dir: Path, saves: int = saves, seen: set[str] = seen) -> bool:
            seen |= {path.name for path in output_dir.glob(".step_*.partial")}
            return len(seen) >= saves

        assert train(found, interfere) in (0, -signal.SIGKILL)
    assert train(found) == 0
    assert_ended_alike(found, expected)
    assert not list(Path(found["output_dir"]).glob(".step_*"))
    assert os.readlink(Path(found["output_dir"]) / "latest") == f"step_{STEPS}"
