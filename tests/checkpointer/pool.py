"""A few processes that have imported torch, for tests of runs of several: each test is a function that all of them do.

They are forked from a server that has imported torch once, and find each other through a file. A function is called
with the directory of the test, and finds its rank in ``torch.distributed``.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ckpt_convert.checkpointer.distributed import heartbeat, ranks
from recipes.native_llama import NativeLlama

SILENCE = 3.0
"""Seconds after which a rank is gone: long for the others, on a machine that does much else."""


class Pool:
    """So many processes, started with the first job; after one died, all are started again, as torchrun does it."""

    def __init__(self) -> None:
        self._jobs = 0
        self._workers: list[tuple[Any, Connection]] = []

    def run(
        self, work: Callable[..., Any], here: Path, *given: Any, world: int = 2, limit: float = 100, tcp: bool = False
    ) -> list[Any]:
        """Do ``work(here, *given)`` on ``world`` ranks; what each returned. Raises AssertionError for what one raised.

        A rank that died has None. ``tcp``: the first rank has the store, as without torchrun; else it is a file.
        """
        self._jobs += 1
        self._start(world)
        store = here / f"{'port' if tcp else 'store'}_{self._jobs}"
        for rank, (_, pipe) in enumerate(self._workers[:world]):
            pipe.send((work.__module__, work.__qualname__, store, rank, world, here, given))
        answers = [self._answer(rank, limit) for rank in range(world)]  # all, or the next job would find what is left
        raised = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text]
        assert not raised, "\n".join(raised)
        return [result for _, result in answers]

    def _start(self, world: int) -> None:
        context = multiprocessing.get_context("forkserver")
        modules = ["torch.distributed.fsdp", "torch._dynamo", "pytest", "tests.checkpointer.training"]
        context.set_forkserver_preload(modules)
        if not all(process.is_alive() for process, _ in self._workers):
            self._kill()  # a thread of one that outlived another may still wait for it in gloo
        for _ in range(len(self._workers), world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _answer(self, rank: int, limit: float) -> tuple[str, Any]:
        """What a rank raised, and what it returned."""
        process, pipe = self._workers[rank]
        if not pipe.poll(limit):
            process.kill()
            return f"no answer in {limit} s", None
        try:
            found: tuple[str, Any] = pipe.recv()
        except (EOFError, ConnectionError):
            process.join()
            return "", None
        return found

    def _kill(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers.clear()

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.join(10)
        self._kill()


@contextmanager
def quick_hearts(silence: float = SILENCE) -> Iterator[None]:
    """Ranks that are found to be gone sooner than those of users, and wait no longer for them at the end."""
    with mock.patch.multiple(heartbeat, BEAT=0.1, SILENCE=silence), mock.patch.object(ranks, "FAREWELL", 0.1):
        yield


def split(model: NativeLlama, how: str) -> NativeLlama:
    """The model over all processes: "ddp", "fsdp", "hsdp", "tp" or "fsdp x tp"."""
    world = dist.get_world_size()
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)  # type: ignore[return-value]
    sizes = {"fsdp": (world,), "tp": (world,)}.get(how, (2, world // 2))
    names = {"fsdp": ("dp",), "tp": ("tp",), "hsdp": ("replicas", "dp")}.get(how, ("dp", "tp"))
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    if "tp" in names:
        for layer in model.layers:
            plan = {"attn.q_proj": ColwiseParallel(), "attn.output_proj": RowwiseParallel()}
            plan |= {"mlp.w1": ColwiseParallel(), "mlp.w3": ColwiseParallel(), "mlp.w2": RowwiseParallel()}
            parallelize_module(layer, mesh["tp"], plan)
    if how != "tp":
        sharded = mesh if how == "hsdp" else mesh["dp"]
        for layer in model.layers:
            fully_shard(layer, mesh=sharded)
        fully_shard(model, mesh=sharded)
    return model


def tree_of(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A module with these parameters, and nothing that computes."""
    root = nn.Module()
    for key, tensor in tensors.items():
        *path, last = key.split(".")
        module = root
        for name in path:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        module.register_parameter(last, nn.Parameter(tensor))
    return root


def _tcp_store(path: Path, rank: int, world: int) -> Any:
    """A store that the first rank serves, to this machine alone; the others learn its port from a file."""
    if rank:
        while not path.exists():
            time.sleep(0.01)
        return dist.TCPStore("127.0.0.1", int(path.read_text()), world, False, wait_for_workers=False)  # type: ignore[attr-defined]
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, world, True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    path.with_suffix(".new").write_text(str(port))
    path.with_suffix(".new").rename(path)
    return store


def _work(pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    gc.freeze()  # no garbage is looked for among what the server has imported
    with suppress(EOFError, ConnectionError):
        while True:
            module, name, path, rank, world, here, given = pipe.recv()
            raised, result = "", None
            store = _tcp_store(path, rank, world) if path.name.startswith("port") else dist.FileStore(str(path), world)  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
            dist.barrier()  # else a rank that has nothing to do may be gone before the others are connected
            try:
                result = getattr(importlib.import_module(module), name)(here, *given)
            except BaseException:
                raised = traceback.format_exc()
            with suppress(RuntimeError):
                dist.destroy_process_group()
            pipe.send((raised, result))
