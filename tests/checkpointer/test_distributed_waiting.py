"""Several ranks of which one is slow, stopped, or has the store and ends: whom the others wait for, and how long."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch.distributed as dist

from ckpt_convert import Checkpointer, CkptConvertError
from ckpt_convert.checkpointer.distributed import exchange, heartbeat, ranks
from ckpt_convert.checkpointer.save import shared
from ckpt_convert.convert import partition
from tests.checkpointer.pool import SILENCE, Pool, quick_hearts, split
from tests.checkpointer.test_distributed_faults import HOST, SOON, gone
from tests.checkpointer.training import LLAMA, make_model
from tests.helpers import sums


def until(there: Path) -> None:
    """Wait for a file, for a time that is ample."""
    end = time.monotonic() + 60
    while not there.exists() and time.monotonic() < end:
        time.sleep(0.01)


class Said(logging.Handler):
    """Keeps what is logged on a rank, and makes a file when the first wait is said."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(f"{record.levelname} {record.getMessage()}")
        if "has waited" in self.lines[-1]:
            self.file.touch()


def straggle(here: Path, where: str) -> list[str]:
    """Save a step for which rank 1 comes late, or writes slowly, until rank 0 has said so; what is logged."""
    said = Said(here / "said")
    log = logging.getLogger("ckpt_convert")
    log.addHandler(said)
    log.setLevel(logging.INFO)
    slow = dist.get_rank() == 1
    write = shared._Shared.write

    def write_slowly(self: shared._Shared, begun: bytes) -> bytes:
        until(said.file)
        return write(self, begun)

    try:
        with (
            mock.patch.multiple(heartbeat, BEAT=0.05, PATIENCE=0.5),
            mock.patch.object(ranks, "DEADLINE", 0.2 if where == "writing" else 60),
            mock.patch.object(shared._Shared, "write", write_slowly if slow and where == "writing" else write),
            Checkpointer(LLAMA, here / "out", contents="weights", save_every=1) as checkpointer,
        ):
            model = split(make_model(), "ddp")
            checkpointer.load_model(model)
            checkpointer.register(model=model)
            if slow and where == "training":
                until(said.file)
            checkpointer.step()
    finally:
        log.removeHandler(said)
    return [line for line in said.lines if "has waited" in line]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("writing", "INFO the save of step_1: has waited T s so far for rank 1 on HOST, which is at work on it"),
        (
            "training",
            "WARNING comparing who holds what in save(): has waited T s so far for rank 1 on HOST, which has not come "
            "to it yet",
        ),
    ],
)
def test_a_straggler_is_waited_for_and_named_on_the_first_rank(
    pool: Pool, where: str, expected: str, tmp_path: Path
) -> None:
    """One that writes is waited for longer than any deadline."""
    first, *others = pool.run(straggle, tmp_path, where, world=3)
    (line,) = first[:1]
    assert re.sub(r"\d+ s so", "T s so", line.replace(HOST, "HOST")) == expected
    assert others == [[], []]
    assert sums(LLAMA).items() <= sums(tmp_path / "out" / "step_1").items()


def skip_a_call(here: Path) -> str:
    """Rank 1 does not make the call of the others, until they have given up."""
    with (
        mock.patch.multiple(heartbeat, BEAT=0.05),
        mock.patch.object(ranks, "DEADLINE", 1.0),
        Checkpointer(LLAMA, here / "out", contents="weights", save_every=1, save_last=False) as checkpointer,
    ):
        checkpointer.register(model=split(make_model(), "ddp"))
        if dist.get_rank() == 1:
            until(here / "given up")
        with pytest.raises(CkptConvertError) as raised:
            checkpointer.step()
        (here / "given up").touch()
    return str(raised.value)


def test_a_rank_that_is_alive_and_makes_another_call_is_waited_for_until_the_deadline(
    pool: Pool, tmp_path: Path
) -> None:
    assert set(pool.run(skip_a_call, tmp_path, world=3)) == {
        f"rank 1 on {HOST}: took no part in comparing who holds what in save() within 1 s; every process makes the "
        "same calls of the checkpointer, so it waits elsewhere, or makes no checkpointer"
    }


def interrupt(
    here: Path, rank: int, act: Callable[[], None], writers: Literal["auto", "exchange"] = "auto"
) -> tuple[str, float]:
    """Save a step, in which something happens to a rank while it writes; what is raised, and how soon."""
    write = shared._Shared.write

    def interrupted(self: shared._Shared, begun: bytes) -> bytes:
        (here / f"pid_{rank}").write_text(str(os.getpid()))
        act()
        return write(self, begun)

    began = time.monotonic()
    try:
        with (
            quick_hearts(),
            mock.patch.object(shared._Shared, "write", interrupted if dist.get_rank() == rank else write),
            Checkpointer(LLAMA, here / "out", contents="weights", save_every=1, writers=writers) as checkpointer,
        ):
            checkpointer.register(model=split(make_model(), "ddp"))
            began = time.monotonic()
            checkpointer.step()
    except CkptConvertError as error:
        return str(error), time.monotonic() - began
    finally:
        (here / f"raised_{dist.get_rank()}").touch()
        with suppress(ProcessLookupError):  # one that is killed
            if dist.get_rank() == 2:
                until(here / f"raised_{1 - rank}")
                os.kill(int((here / f"pid_{rank}").read_text()), signal.SIGCONT)
    return "", 0.0


def stop_in_a_save(here: Path, rank: int) -> tuple[str, float]:
    """A rank stops itself, and continues once the last one has raised."""
    return interrupt(here, rank, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def test_a_rank_that_is_stopped_counts_as_gone_and_hears_so_when_it_goes_on(pool: Pool, tmp_path: Path) -> None:
    ended = pool.run(stop_in_a_save, tmp_path, 1, world=3, tcp=True)
    assert {text for text, _ in ended} == {gone(1, "the save of step_1")}
    assert all(SILENCE <= seconds < SOON for _, seconds in ended)
    assert not list((tmp_path / "out").glob("*step*"))


def stop_in_an_exchange(here: Path, rank: int) -> tuple[str, float]:
    """A rank stops itself in a round of an exchange, and continues once the last one has raised."""
    swap, rounds = exchange.Exchange.swap, iter(range(1000))

    def stopped(self: exchange.Exchange, *given: Any) -> None:
        if next(rounds) == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        swap(self, *given)

    with (
        mock.patch.object(partition, "PIECE", 1 << 13),
        mock.patch.object(exchange.Exchange, "swap", stopped if dist.get_rank() == rank else swap),
    ):
        return interrupt(here, rank, lambda: None, writers="exchange")


def test_a_rank_that_is_stopped_in_an_exchange_counts_as_gone(pool: Pool, tmp_path: Path) -> None:
    ended = pool.run(stop_in_an_exchange, tmp_path, 1, world=3, tcp=True)
    assert {text for text, _ in ended} == {gone(1, "the save of step_1")}
    assert not list((tmp_path / "out").glob("*step*"))


def test_a_store_whose_process_is_stopped_is_given_up(pool: Pool, tmp_path: Path) -> None:
    (first, _), *ended = pool.run(stop_in_a_save, tmp_path, 0, world=3, tcp=True)
    assert {text for text, _ in ended} == {
        f"the store of torch.distributed has not answered for {SILENCE:g} s: the process that has it, rank 0's or "
        "torchrun's, has ended, or is stopped; look for its error first"
    }
    assert all(SILENCE <= seconds < SOON for _, seconds in ended)
    assert first
    assert not list((tmp_path / "out").glob("step*"))


def die_in_a_save(here: Path) -> tuple[str, float]:
    """The rank that has the store is killed."""
    return interrupt(here, 0, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_store_whose_process_is_killed_is_one_error_at_once(pool: Pool, tmp_path: Path) -> None:
    first, *ended = pool.run(die_in_a_save, tmp_path, world=3, tcp=True)
    assert first is None
    assert {text for text, _ in ended} == {
        "the store of torch.distributed does not answer any more: the process that has it, rank 0's or torchrun's, has "
        "ended; look for its error first"
    }
    assert all(seconds < SOON for _, seconds in ended)
    assert not list((tmp_path / "out").glob("step*"))
