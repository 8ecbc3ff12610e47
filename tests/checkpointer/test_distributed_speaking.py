"""What several ranks log: the first one what one process would, and the others nothing, but what they alone know."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ckpt_convert import Checkpointer, TransferProgress
from ckpt_convert.checkpointer.distributed import ranks
from ckpt_convert.checkpointer.distributed.speaking import OWN
from tests.checkpointer.pool import Pool, split
from tests.checkpointer.test_distributed_saving import stop, train_full
from tests.checkpointer.training import LLAMA, make_model, trainable

log = logging.getLogger("ckpt_convert")


class Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line, without how long something took."""
        self.lines.append(re.sub(r"in [\d.]+ s", "in T s", f"{record.levelname} {record.getMessage()}"))


def lines_of(do: Callable[[], object]) -> list[str]:
    """What is logged while something is done."""
    said, level = Said(), log.level
    log.addHandler(said)
    log.setLevel(logging.INFO)
    try:
        do()
    finally:
        log.removeHandler(said)
        log.setLevel(level)
    return said.lines


def two_runs(out: Path, source: Path, how: str) -> list[str]:
    """Train two steps, and two more in another run that has an epoch that is never saved."""

    def model() -> torch.nn.Module:
        return split(make_model(), how) if how else make_model()

    def run() -> None:
        train_full(out, model(), source, 2)
        train_full(out, model(), source, 4, keep_last=2, asynchronous=True)
        with Checkpointer(source, out, save_every="1 epoch") as checkpointer:
            checkpointer.resume(model=model(), weights_only=True)
            checkpointer.report(loss=float("nan"))
            checkpointer.step()

    return lines_of(run)


def two_runs_of_ranks(here: Path, source: Path) -> list[str]:
    return two_runs(here / "out", source, "ddp")


def test_the_first_rank_says_what_one_process_would_and_the_others_nothing(pool: Pool, tmp_path: Path) -> None:
    source = trainable(tmp_path / "source")
    first, *others = pool.run(two_runs_of_ranks, tmp_path, source, world=3)
    assert others == [[], []]

    def plain(lines: list[str]) -> list[str]:
        return [re.sub(r"[\d.]+ [kM]B", "SIZE", line) for line in lines]

    expected = [line.replace("/out1", "/out") for line in two_runs(tmp_path / "out1", source, "")]
    assert plain(first) == plain(expected)
    assert any(line.startswith("WARNING") for line in first)


def say_things(here: Path) -> list[str]:
    """Log what one, some and all ranks have to say, in a call of all."""
    together = ranks.of_group(None)
    assert together is not None
    rank = together.rank

    def act() -> None:
        log.info("told by all")
        log.warning("all warn")
        if rank:
            log.warning("some warn of %d", 7)
        if rank == 2:
            log.info("nobody wants to know")
            log.error("one fails")
        log.warning("%d of its own", 10 + rank, extra=OWN)

    found = lines_of(lambda: together.together("talking", act))
    together.leave()
    return found


def test_what_other_ranks_alone_warn_of_is_said_by_the_first_one_at_the_end(pool: Pool, tmp_path: Path) -> None:
    first, second, third = pool.run(say_things, tmp_path, world=3)
    assert first == [
        "INFO told by all",
        "WARNING all warn",
        "WARNING rank 0: 10 of its own",
        "WARNING rank 1, 2: some warn of 7",
        "WARNING rank 1: 11 of its own",
        "ERROR rank 2: one fails",
        "WARNING rank 2: 12 of its own",
    ]
    assert second == third == []


def load_too_much(here: Path) -> list[str]:
    """Load a model in a dtype that is too narrow for a value in the last row of a tensor, which the last rank has."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    checkpointer = Checkpointer(here / "source", here / "out")
    whole = checkpointer.load_state_dict("native")
    model = {
        key: distribute_tensor(one.half(), mesh, [Shard(0)], src_data_rank=None) if "norm" not in key else one
        for key, one in whole.items()
    }
    with checkpointer:
        return lines_of(lambda: checkpointer.load_model(model))


def test_values_that_one_rank_alone_cannot_hold(pool: Pool, tmp_path: Path) -> None:
    source = trainable(tmp_path / "source")
    with Checkpointer(source, tmp_path / "changed", contents="weights") as checkpointer:
        model = checkpointer.load_state_dict("native")
        model["tok_embeddings.weight"][-1, -1] = 1e6
        checkpointer.register(model=model)
        checkpointer.save()
    (tmp_path / "changed" / "step_0").rename(tmp_path / "source2")
    source.rename(tmp_path / "before")
    (tmp_path / "source2").rename(source)
    first, second = pool.run(load_too_much, tmp_path, world=2)
    assert second == []
    (line,) = [line for line in first if line.startswith("WARNING")]
    assert line.startswith(f"WARNING rank 1: {source}: ")
    assert "1 finite value becomes infinite, of tok_embeddings.weight (1), in the model" in line


def stop_one(here: Path) -> list[str]:
    """A signal reaches one rank."""
    return [line for line in lines_of(lambda: stop(here, (1,))) if "WARNING" in line]


def test_the_first_rank_says_which_one_a_signal_has_reached(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(stop_one, tmp_path)
    (saved,) = (tmp_path / "out").glob("step_*")
    assert first == [
        "WARNING rank 1 received a signal to stop: all save this step",
        f"WARNING saved step {saved.name.removeprefix('step_')}; end the loop where checkpointer.should_stop says so",
    ]
    assert second == []


def progress_of_a_save(here: Path) -> list[TransferProgress]:
    seen: list[TransferProgress] = []
    with Checkpointer(LLAMA, here / "out", contents="weights", progress=seen.append) as checkpointer:
        checkpointer.register(model=split(make_model(), "fsdp"))
        checkpointer.save()
    return seen


def test_the_first_rank_tells_the_progress_of_what_it_writes(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(progress_of_a_save, tmp_path)
    assert {one.phase for one in first} == {"saving"}
    assert first[-1].done == first[-1].total > 0
    assert second == []
