"""A run of several processes that find each other through a file.

They are forked from a server that has imported torch once, and has no threads of its own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

COUNT = 2


def run(work: Callable[[Path, int], None], here: Path) -> list[str]:
    """Do ``work(here, rank)``, a function of a module, on ``COUNT`` processes; what each raised, "" for nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", work.__module__])
    started = [context.Process(target=_process, args=(work, here, rank)) for rank in range(COUNT)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
    return [(here / f"{rank}.txt").read_text() for rank in range(COUNT)]


def _process(work: Callable[[Path, int], None], here: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{here}/store", rank=rank, world_size=COUNT, timeout=timedelta(seconds=100))
    raised = ""
    try:
        work(here, rank)
    except Exception:
        raised = traceback.format_exc()
    (here / f"{rank}.txt").write_text(raised)
    if not raised:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
