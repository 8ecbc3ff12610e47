"""Several ranks of which one fails: all raise one error, which names it, and nothing half-written is left."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ckpt_convert import AdapterConfig, Checkpointer, CkptConvertError, UsageError
from ckpt_convert.checkpointer.distributed import exchange, ranks
from ckpt_convert.checkpointer.distributed.exchange import Exchange
from ckpt_convert.checkpointer.save import shared
from ckpt_convert.checkpointer.save.run_directory import RunDirectory
from ckpt_convert.convert import partition
from tests.checkpointer.pool import SILENCE, Pool, quick_hearts, split
from tests.checkpointer.test_distributed_saving import optimize, train_full, train_full_split
from tests.checkpointer.training import LLAMA, make_model
from tests.helpers import sums

SOON = 60.0
"""Seconds within which the others know, on a machine that does much else: a rank that is alive is waited for 600."""

SMALL = 1 << 14
"""Bytes of pieces that are small enough for several rounds."""

HOST = socket.gethostname()


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one rank's save, in a function: before it does what it does, or after.

    ``errno`` is what the system says then; without one, the process is killed.
    """

    rank: int
    owner: Any
    name: str
    after: bool = False
    errno: int = 0

    @contextmanager
    def happens(self) -> Iterator[None]:
        """Let it happen in what is done in this block, if this is its rank."""
        real = getattr(self.owner, self.name)

        def wrong(*given: Any, **options: Any) -> Any:
            if self.after:
                real(*given, **options)
            if not self.errno:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.errno, os.strerror(self.errno))

        with mock.patch.object(self.owner, self.name, wrong if dist.get_rank() == self.rank else real):
            yield


KILLED = {
    "before the save begins": Fault(1, shared._Shared, "look"),
    "before it writes": Fault(1, shared._Shared, "write"),
    "between two writes": Fault(1, os, "pwrite", after=True),
    "before it reports what it wrote": Fault(1, shared._Shared, "write", after=True),
    "before the manifest": Fault(0, shared, "complete"),
    "after the manifest": Fault(0, shared, "complete", after=True),
    "before the rename": Fault(0, os, "rename"),
    "before the pointer": Fault(0, RunDirectory, "_published"),
    "before an exchange": Fault(1, Exchange, "swap"),
    "before it sends in an exchange": Fault(1, exchange, "fill_message"),
    "between the rounds of an exchange": Fault(0, Exchange, "swap", after=True),
}
"""When a rank is killed in a save."""

FAILED = {
    "full": Fault(1, os, "pwrite", errno=errno.ENOSPC),
    "full in the middle": Fault(1, os, "pwrite", after=True, errno=errno.ENOSPC),
    "broken": Fault(1, os, "pwrite", errno=errno.EIO),
    "broken at the end": Fault(1, os, "fsync", errno=errno.EIO),
    "broken for the first rank": Fault(0, os, "pwrite", errno=errno.EIO),
    "full in an exchange": Fault(1, os, "pwrite", errno=errno.ENOSPC),
    "broken between the rounds of an exchange": Fault(0, os, "pwrite", after=True, errno=errno.EIO),
}
"""What goes wrong with the disk of one rank."""


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, in which nothing happens."""
    out = tmp_path_factory.mktemp("faults") / "alone"
    train_full(out, make_model(), source, 3)
    return out


def gone(rank: int, where: str) -> str:
    """What the others raise of a rank that is killed or stopped."""
    return (
        f"rank {rank} on {HOST}: has not been heard of for {SILENCE:g} s, while the others waited for it in {where}; "
        "its process has ended or is stopped, or its machine cannot be reached"
    )


def train_until(here: Path, source: Path, fault: str, asynchronous: bool) -> tuple[str, float]:
    """Save a step, and let something happen in the next; what was raised, and after how many seconds."""
    model = split(make_model(), "fsdp")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    waited = 0.0
    options: dict[str, Any] = {"writers": "exchange" if "exchange" in fault else "direct"}
    try:
        with (
            quick_hearts(),
            mock.patch.object(partition, "PIECE", SMALL if "rounds" in fault else partition.PIECE),
            Checkpointer(source, here / "out", save_every=1, asynchronous=asynchronous, **options) as checkpointer,
        ):
            checkpointer.load_model(model)
            checkpointer.register(model=model, optimizer=optimizer)
            optimize(model, optimizer)
            checkpointer.step()
            checkpointer.wait()
            optimize(model, optimizer)
            began = time.monotonic()
            try:
                with (KILLED | FAILED)[fault].happens():
                    checkpointer.step()
                    checkpointer.wait()
            finally:
                waited = time.monotonic() - began
    except CkptConvertError as error:
        return f"{type(error).__name__}: {error}", waited
    return "", waited


def check_and_resume(pool: Pool, here: Path, source: Path, uninterrupted: Path, *, left: int, pointer: int = 1) -> None:
    """No step is half there, up to the one that is ``left``; another world goes on from it as if nothing had been."""
    out = here / "out"
    assert {path.name for path in out.glob("step_*")} == {f"step_{step}" for step in range(1, left + 1)}
    assert (out / "latest").resolve().name == f"step_{pointer}"
    pool.run(train_full_split, here, "fsdp", source, 3, {}, world=2)
    assert sorted(path.name for path in out.glob("*step_*")) == ["step_1", "step_2", "step_3"]
    for step in (1, 2, 3):
        expected, found = (sums(run / f"step_{step}") for run in (uninterrupted, out))
        assert {name: one for name, one in found.items() if "training_state" not in name} == {
            name: one for name, one in expected.items() if "training_state" not in name
        }


@pytest.mark.parametrize("when", KILLED)
def test_a_rank_that_is_killed_in_a_save(
    pool: Pool, when: str, source: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    fault = KILLED[when]
    ended = pool.run(train_until, tmp_path, source, when, "between" in when, world=3)
    assert ended.pop(fault.rank) is None
    assert {text for text, _ in ended} == {f"CkptConvertError: {gone(fault.rank, 'the save of step_2')}"}
    assert all(SILENCE <= seconds < SOON for _, seconds in ended)
    saved = when == "before the pointer"
    check_and_resume(pool, tmp_path, source, uninterrupted, left=2 if saved else 1)


@pytest.mark.parametrize(("what", "asynchronous"), [("full", False), *((what, "end" not in what) for what in FAILED)])
def test_a_disk_that_fails_on_one_rank(
    pool: Pool, what: str, asynchronous: bool, source: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    fault = FAILED[what]
    ended = pool.run(train_until, tmp_path, source, what, asynchronous, world=3)
    (text,) = {text for text, _ in ended}
    kind = "NotEnoughSpaceError" if fault.errno == errno.ENOSPC else "UnwritableError"
    assert text.startswith(f"{kind}: rank {fault.rank} on {HOST}: {tmp_path / 'out'}/")
    assert os.strerror(fault.errno) in text
    assert "step_2" in text
    assert "the step was not saved, earlier ones are untouched" in text
    assert all(seconds < SOON for _, seconds in ended)
    check_and_resume(pool, tmp_path, source, uninterrupted, left=1)


class Unsaved:
    """State that cannot be saved on one rank."""

    def state_dict(self) -> dict[str, Any]:
        return {"value": object() if dist.get_rank() == 1 else 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: it is never loaded."""


def raise_in_loop(here: Path, source: Path, asynchronous: bool) -> tuple[str, float]:
    """Save two steps, and fail in the training of the third on one rank; what was raised, and after how long."""
    model = split(make_model(), "fsdp")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    began = 0.0
    try:
        with Checkpointer(source, here / "out", save_every=1, asynchronous=asynchronous) as checkpointer:
            checkpointer.load_model(model)
            checkpointer.register(model=model, optimizer=optimizer)
            for _ in range(2):
                optimize(model, optimizer)
                checkpointer.step()
            began = time.monotonic()
            if dist.get_rank() == 1:
                raise RuntimeError("the training failed")
            checkpointer.step()
            checkpointer.wait()
    except (CkptConvertError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "", 0.0


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_rank_that_raises_in_the_loop(
    pool: Pool, asynchronous: bool, source: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """The others hear of it at once; a save that was under way is finished."""
    ended = pool.run(raise_in_loop, tmp_path, source, asynchronous, world=3)
    (text, _) = ended.pop(1)
    assert text == "RuntimeError: the training failed"
    (text,) = {text for text, _ in ended}
    assert text == (
        f"CkptConvertError: rank 1 on {HOST}: took no part in comparing who holds what in save(): its checkpointer is "
        "closed, most likely after an error"
    )
    assert all(seconds < SOON for _, seconds in ended)
    check_and_resume(pool, tmp_path, source, uninterrupted, left=2, pointer=2)


def fail(here: Path) -> str:
    """Save state that one rank cannot save; what was raised."""
    model = split(make_model(), "fsdp")
    try:
        with Checkpointer(LLAMA, here / "out", save_every=1) as checkpointer:
            checkpointer.load_model(model)
            checkpointer.register(model=model, extra=Unsaved())
    except CkptConvertError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_state_that_one_rank_cannot_save(pool: Pool, tmp_path: Path) -> None:
    raised = pool.run(fail, tmp_path, world=3)
    assert len(set(raised)) == 1
    assert raised[0].startswith("UsageError: rank 1 on ")
    assert "extra/value: is a builtins.object" in raised[0]
    assert not list((tmp_path / "out").glob("*step*"))


def alone(here: Path) -> str:
    """One rank of two makes a checkpointer for both."""
    if dist.get_rank() == 1:
        return ""
    with (
        quick_hearts(),
        Checkpointer(LLAMA, here / "out") as checkpointer,
        mock.patch.object(ranks, "DEADLINE", 1.0),
        pytest.raises(CkptConvertError) as raised,
    ):
        checkpointer.register(model=make_model())
    return str(raised.value)


def test_a_rank_that_makes_no_checkpointer(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(alone, tmp_path)[0] == (
        f"rank 1: took no part in opening {tmp_path / 'out'} within 1 s; every process makes the same calls of the "
        "checkpointer, so it waits elsewhere, or makes no checkpointer"
    )


def partial(here: Path) -> str:
    """A model with partial sums, on one rank alone."""
    from torch.distributed.tensor import DTensor, Partial

    model = dict(split(make_model(), "fsdp").state_dict())
    if dist.get_rank() == 1:
        key, tensor = next(iter(model.items()))
        model[key] = DTensor.from_local(torch.zeros(tensor.shape), tensor.device_mesh, [Partial()], run_check=False)
    with Checkpointer(LLAMA, here / "out", contents="weights") as checkpointer, pytest.raises(UsageError) as raised:
        checkpointer.register(model=model)
    return str(raised.value)


def test_placements_without_values_are_refused_on_all_ranks_before_the_first_step(pool: Pool, tmp_path: Path) -> None:
    raised = pool.run(partial, tmp_path)
    assert len(set(raised)) == 1
    assert "rank 1 on " in raised[0]
    assert "has the placement Partial" in raised[0]


def differ(here: Path) -> str:
    """Each rank saves as often, and keeps as many, as its number says."""
    model, rank = split(make_model(), "ddp"), dist.get_rank()
    options: dict[str, Any] = {
        "save_every": 2 + rank,
        "save_first": bool(rank),
        "keep_last": 1 + rank,
        "best": f"loss:{'max' if rank else 'min'}",
        "final": {"contents": "weights" if rank else "full"},
        "save_on_signal": "USR1" if rank else False,
    }
    with Checkpointer(LLAMA, here / "out", **options) as checkpointer, pytest.raises(UsageError) as raised:
        checkpointer.register(model=model)
    return str(raised.value)


def test_options_that_differ_between_ranks(pool: Pool, tmp_path: Path) -> None:
    (text,) = set(pool.run(differ, tmp_path))
    assert text == (
        f"rank 0 on {HOST}: the ranks were given different options:\n"
        "    rank 1: save_every is every 3 steps, on rank 0 every 2 steps\n"
        "    rank 1: save_first is True, on rank 0 False\n"
        "    rank 1: keep_last is 2, on rank 0 1\n"
        "    rank 1: best is ['loss:max'], on rank 0 ['loss:min']\n"
        "    rank 1: save_on_signal is ['SIGUSR1'], on rank 0 []\n"
        "    rank 1: final is {'contents': 'weights'}, on rank 0 {}"
    )


def differ_in_the_adapter(here: Path) -> str:
    """One rank has another alpha, with which it would merge its slices."""
    adapter = AdapterConfig(rank=4, alpha=8.0 + dist.get_rank())
    with Checkpointer(LLAMA, here / "out", adapter=adapter) as checkpointer, pytest.raises(UsageError) as raised:
        checkpointer.register(model=make_model())
    return str(raised.value)


def test_adapters_that_differ_between_ranks(pool: Pool, tmp_path: Path) -> None:
    (text,) = set(pool.run(differ_in_the_adapter, tmp_path))
    assert "rank 1: adapter is AdapterConfig(rank=4, alpha=9.0" in text


def differ_in_a_save(here: Path) -> str:
    """Save a step, after which the model of one rank is another."""
    model = split(make_model(), "ddp")
    with Checkpointer(LLAMA, here / "out", contents="weights", save_every=1, save_last=False) as checkpointer:
        checkpointer.register(model=model)
        checkpointer.step()
        if dist.get_rank() == 1:
            model.double()
        with pytest.raises(UsageError) as raised:
            checkpointer.step()
    return str(raised.value)


def test_layouts_that_differ_between_ranks_at_a_later_save(pool: Pool, tmp_path: Path) -> None:
    (text,) = set(pool.run(differ_in_a_save, tmp_path, world=3))
    first, second, *_ = text.splitlines()
    assert first == f"rank 0 on {HOST}: the ranks do not hold one model together:"
    assert second == (
        "    tok_embeddings.weight, and 1 more that are held alike: rank 1 has float64 [56, 72], ranks before it "
        "float32 [56, 72]"
    )
    assert sorted(path.name for path in (tmp_path / "out").glob("*step_*")) == ["step_1"]
