"""Measures a save of a model that is sharded over processes against torch's own; writes a table of docs/benchmarks.md.

The processes talk over gloo through a file, and shard the model as FSDP2 does, on dimension 0. In every round each job
saves the same tensors from the same processes, one job after another; what counts is the time until every process is
back and all is on disk, the seconds of the processor, and what each process wrote and read, as the kernel counts it.
Removing what was written is no part of a save, of none of them.

- Checkpointer: Hugging Face's files, those of the source, by all processes
- Checkpointer, one process: the same from one process that has the whole model
- torch.distributed.checkpoint.save: one file a process, in a format of its own
- HuggingFaceStorageWriter, consolidated: Hugging Face's files, written twice
- cp -r, then sync of each file: the bytes themselves, by one process

python benchmarks/distributed.py --write
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import run
import save

BEGIN, END = "<!-- distributed -->", "<!-- end distributed -->"
OURS, ALONE, DCP, HF, COPY = (
    "Checkpointer",
    "Checkpointer, one process",
    "`torch.distributed.checkpoint.save`",
    "`HuggingFaceStorageWriter`, consolidated",
    "`cp -r`, then sync of each file",
)


@dataclass
class Sample:
    """One save: seconds, those of the processor, and for each process bytes written, bytes read, and anonymous memory
    above the state."""

    seconds: float
    processor: float
    written: list[int]
    read: list[int]
    memory: list[int]


class Memory(threading.Thread):
    """The most anonymous memory that this process has, looked at every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_at = self.most = anonymous()
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, anonymous())

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.most - self.start_at


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def counted() -> tuple[int, int]:
    """Bytes that this process has written to and read from the disk, of what it asked the system for."""
    with open("/proc/self/io") as file:
        io = dict(line.split(": ") for line in file)
    return int(io["write_bytes"]), int(io["rchar"])


def jobs(source: Path, state: Any) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Each way to save the same tensors into a directory; what is prepared here is no part of a save."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    from ckpt_convert import Checkpointer

    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    files = {key: int(name.split("-")[1]) for key, name in index.items()}
    made: list[Checkpointer] = []

    def ours(out: Path) -> None:
        if not made:
            made.append(Checkpointer(source, out.parent.parent / "run", model_format="hf", contents="weights"))
            made[0].register(model=state)
        norm = state["model.norm.weight"]
        (norm.to_local() if hasattr(norm, "to_local") else norm).add_(1)  # a run in which nothing changes is refused
        made[0].step()
        made[0].save()

    yield OURS, ours

    def torchs(out: Path) -> None:
        dcp.save(state, checkpoint_id=out)

    def hugging_face(out: Path) -> None:
        writer = HuggingFaceStorageWriter(str(out), files, save_distributed=True, enable_consolidation=True)
        dcp.save(state, storage_writer=writer)

    yield DCP, torchs
    yield HF, hugging_face


def tensors(source: Path, world: int) -> dict[str, Any]:
    """The model's tensors, filled from the source: sharded over the processes on dimension 0, or whole in one."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from ckpt_convert import Checkpointer, open_checkpoint

    mesh = init_device_mesh("cpu", (world,)) if world > 1 else None
    state: dict[str, Any] = {}
    with open_checkpoint(source) as checkpoint:
        for key in checkpoint:
            shape = torch.Size(checkpoint[key].shape)
            if mesh is None:
                state[key] = torch.empty(shape, dtype=torch.bfloat16)
                continue
            size = -(-shape[0] // world)
            start = min(mesh.get_rank() * size, shape[0])
            rows = min(size, shape[0] - start)
            local = torch.empty(rows, *shape[1:], dtype=torch.bfloat16)
            stride = torch.empty(shape, device="meta").stride()
            state[key] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
    with Checkpointer(source, model_format="hf") as checkpointer:
        checkpointer.load_model(state)
    return state


def work(rank: int, world: int, source: Path, place: Path, repeat: int, pipe: Any) -> None:
    """What one process does: every job, in turn, so many times."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(str(place / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    state = tensors(source, world)
    todo = dict(jobs(source, state))
    if world == 1:
        todo = {ALONE: todo[OURS]}
    for number in range(repeat + 1):  # the first round is a rehearsal: plans are made, files are laid out
        for name, act in todo.items():
            out = place / f"{number}_{world}" / name.strip("`").replace(" ", "_")
            if rank == 0:
                os.sync()
                out.parent.mkdir(parents=True, exist_ok=True)
            barrier(world)
            memory = Memory()
            memory.start()
            (written, read), used, before = counted(), time.process_time(), time.perf_counter()
            act(out)
            barrier(world)
            if rank == 0:
                os.sync()  # of those that do not flush what they write
            barrier(world)
            seconds = time.perf_counter() - before
            used, now = time.process_time() - used, counted()
            pipe.send((name, number, seconds, used, now[0] - written, now[1] - read, memory.stop()))
            if rank == 0:
                for path in (out, *(place / "run").glob("step_*")):
                    run.remove(path)
            barrier(world)
    pipe.send(None)
    if world > 1:
        dist.destroy_process_group()
    os._exit(0)  # without closing the run: its last step is saved


def barrier(world: int) -> None:
    if world > 1:
        import torch.distributed as dist

        dist.barrier()


def measure(source: Path, place: Path, world: int, repeat: int) -> dict[str, list[Sample]]:
    """The samples of every job, of so many processes."""
    run.remove(place)
    place.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(rank, world, source, place, repeat, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    found: dict[str, list[Sample]] = {}
    while True:
        said = [pipe.recv() for pipe in pipes]
        if said[0] is None:
            break
        name, number = said[0][:2]
        if number:
            seconds = max(one[2] for one in said)
            used = sum(one[3] for one in said)
            sample = Sample(seconds, used, *([one[at] for one in said] for at in (4, 5, 6)))  # type: ignore[arg-type]
            found.setdefault(name, []).append(sample)
            run.say(f"{world} processes, round {number} of {repeat}: {seconds:6.2f} s  {name}")
    for process in processes:
        process.join()
    run.remove(place)
    return found


def copied(source: Path, place: Path, repeat: int) -> list[Sample]:
    """The bytes themselves, copied by one process."""
    out = []
    for _ in range(repeat):
        run.remove(place)
        place.mkdir(parents=True)
        os.sync()
        before, used = time.perf_counter(), sum(os.times()[2:4])
        subprocess.run(["cp", "-r", str(source), str(place / "copy")], check=True)
        subprocess.run(["sync", *map(str, sorted((place / "copy").iterdir()))], check=True)
        out.append(Sample(time.perf_counter() - before, sum(os.times()[2:4]) - used, [], [], []))
    run.remove(place)
    return out


def table(found: dict[str, list[Sample]], size: int) -> str:
    """The results as Markdown: medians."""
    middle = {name: statistics.median(one.seconds for one in samples) for name, samples in found.items()}
    rows = [
        "| save | × ours | processor, s | written | by each process | read | memory above the state |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, samples in found.items():
        one = samples[len(samples) // 2]
        written = f"{sum(one.written) / size:.2f} ×" if one.written else ""
        each = ", ".join(f"{part / size:.2f}" for part in one.written)
        read = f"{sum(one.read) / size:.2f} ×" if one.read else ""
        memory = f"{max(max(s.memory) for s in samples) / 1e6:.0f} MB" if one.memory else ""
        used = f"{statistics.median(one.processor for one in samples):.2f}"
        rows.append(f"| {name} | {middle[name] / middle[OURS]:.2f} | {used} | {written} | {each} | {read} | {memory} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/ckpt-convert-bench"), help="where checkpoints are")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="layers of the model (default: 4)")
    parser.add_argument("--write", action="store_true", help=f"write the table into {run.PAGE.name}, too")
    arguments = parser.parse_args()
    source = save.prepare(arguments.work, arguments.layers)[False]
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    place = arguments.work / "distributed"
    found = measure(source, place, arguments.processes, arguments.repeat)
    found |= measure(source, place, 1, arguments.repeat)
    found[COPY] = copied(source, place, arguments.repeat)
    lines = run.facts(arguments.work, source, arguments.layers, arguments.repeat).splitlines()
    kept = [line for line in lines if not line.startswith("- Command")]
    text = "\n".join([table(found, size), "", f"- Processes: {arguments.processes}", *kept])
    text += f"\n- Command: `python benchmarks/distributed.py --repeat {arguments.repeat} --write`"
    print(text)
    if arguments.write:
        run.write(text, BEGIN, END)


if __name__ == "__main__":
    sys.exit(main())
