"""What planning a save costs one rank of a large run, and rank 0; writes the table of docs/benchmarks.md.

The model is Llama 3.1 405B or DeepSeek-V3, its headers those of a sparse checkpoint (released.py), its tensors DTensors
over a fake process group, which sends nothing: a rank's slices are real tensors that nobody has touched, so they take
address space and no memory. One rank of the run is measured, the middle one, as it plans its first and second save; and
rank 0, which divides what all ranks say they hold and proves that every element is written once. What the other ranks
say is worked out from their coordinates. Which tensors are exchanged is decided as if all ranks had the short runs that
this one has.

python benchmarks/scale.py --write
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import plans
import released
import run

BEGIN, END = "<!-- scale -->", "<!-- end scale -->"
MODELS = ("llama-3.1-405b", "deepseek-v3")
MESHES = {
    64: ((64,), (8, 8)),
    1024: ((1024,), (128, 8), (4, 32, 8)),
    16384: ((16384,), (2048, 8), (8, 256, 8)),
}
NAMES = {1: ("shard",), 2: ("shard", "tp"), 3: ("replicate", "shard", "tp")}
KINDS = {1: "FSDP2", 2: "FSDP2 × TP", 3: "HSDP × TP"}
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "q_b_proj", "kv_b_proj", "embed_tokens", "lm_head")
"""Layers whose rows tensor parallelism splits, as torchtitan's and transformers' plans do."""
ROWS = ("o_proj", "down_proj")
"""Layers whose columns it splits."""


def placements(key: str, sizes: Sequence[int]) -> tuple[tuple[int, ...], list[Any]]:
    """The mesh dimensions that a parameter lives on, and how it is placed on them, as ``fully_shard`` does it."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    layer = key.split(".")[-2]
    dims = tuple(range(len(sizes)))
    head: list[Any] = [Replicate()] * (len(sizes) == 3)
    if len(sizes) == 1:
        return dims, [Shard(0)]
    if layer in COLUMNS:
        return dims, [*head, _StridedShard(0, split_factor=sizes[-1]), Shard(0)]
    if layer in ROWS:
        return dims, [*head, Shard(0), Shard(1)]
    return dims[:-1], [*head, Shard(0)]


class Talk:
    """The ranks as ``Claims`` sees them: ``others`` gives what all of them say, from what this one says.

    ``sent`` are the bytes of this rank, ``decided`` the seconds of rank 0, ``simulated`` those of ``others``.
    """

    def __init__(self, rank: int, count: int, others: Callable[[bytes], list[bytes]]) -> None:
        self.rank, self.count, self.is_first = rank, count, rank == 0
        self.others = others
        self.sent = 0
        self.decided = self.simulated = 0.0

    def round(self, what: str, mine: Callable[[], bytes], decide: Callable[[list[bytes]], list[bytes]]) -> bytes:
        said = mine()
        self.sent += len(said)
        start = time.process_time()
        every = self.others(said) if what.startswith("dividing") else [said] * self.count
        middle = time.process_time()
        answers = decide(every)
        self.simulated += middle - start
        self.decided += time.process_time() - middle
        return answers[self.rank if len(answers) > 1 else 0]


class Model:
    """A model of DTensors on a fake mesh of these sizes: one rank's slices, and where those of all others would be."""

    def __init__(self, path: Path, sizes: tuple[int, ...], rank: int) -> None:
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor

        from ckpt_convert.checkpointer.distributed.slices import Slice

        self.sizes = sizes
        names = NAMES[len(sizes)]
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        self.tensors: dict[str, Any] = {}
        self.kinds: dict[tuple[tuple[int, ...], tuple[Any, ...]], tuple[int, ...]] = {}
        """The dimensions of the mesh that tensors of this shape and placements live on, in the order of the model."""
        for key, shape in plans.headers(path).items():
            dims, placed = placements(key, sizes)
            self.kinds.setdefault((shape, tuple(placed)), dims)
            local = Slice(shape, self.axes(shape, placed, dims, rank)).local_shape
            stride = tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))
            values = torch.empty(local, dtype=torch.bfloat16)
            where = mesh[tuple(names[dim] for dim in dims)]
            size = torch.Size(shape)
            self.tensors[key] = DTensor.from_local(values, where, placed, run_check=False, shape=size, stride=stride)

    def axes(self, shape: tuple[int, ...], placed: Sequence[Any], dims: Sequence[int], rank: int) -> Any:
        """What a rank holds of a tensor, on each axis."""
        from ckpt_convert.checkpointer.distributed import slices

        at = [rank // math.prod(self.sizes[dim + 1 :]) % self.sizes[dim] for dim in dims]
        return slices._axes("", shape, placed, [self.sizes[dim] for dim in dims], at)

    def said(self, mine: bytes) -> list[bytes]:
        """What every rank says it holds, from what this one says: the same kinds, each at its own coordinates."""
        from ckpt_convert.checkpointer.distributed import ranks

        listed, kinds, which = ranks.unpacked(mine)
        out = []
        for rank in range(math.prod(self.sizes)):
            there = [
                [dtype, shape, self.axes(shape, placed, dims, rank)]
                for (dtype, _, _), ((shape, placed), dims) in zip(kinds, self.kinds.items(), strict=True)
            ]
            out.append(ranks.packed([listed, there, which]))
        return out


def measure(path: Path, sizes: tuple[int, ...]) -> dict[str, Any]:
    """One rank's planning, in a process that is new."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ckpt_convert.checkpoint.checkpoint import identified_of, open_checkpoint
    from ckpt_convert.checkpointer.distributed.claims import Claims
    from ckpt_convert.checkpointer.distributed.ranks import packed
    from ckpt_convert.checkpointer.save.planner import SavePlanner, Settings
    from ckpt_convert.convert.sharing import exchanged_tensors, tensors_of_bits

    world = math.prod(sizes)
    rank = world // 2
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    model = Model(path, sizes, rank)
    resident = peak()
    talk = Talk(rank, world, model.said)
    settings = Settings("weights", None, None, "hf")
    planner = SavePlanner(identified_of(open_checkpoint(path)), settings)
    planner.ranks, planner._claims = talk, Claims(talk)  # type: ignore[assignment, arg-type]
    found: dict[str, Any] = {"tensors": len(model.tensors)}
    for name in ("first", "second"):
        gc.collect()  # what came before is not counted: with a model of 45,000 tensors there are 1.8 million objects
        talk.decided = talk.simulated = 0.0
        talk.sent = 0
        before = time.process_time()
        step = planner.prepare_save(model.tensors, None, settings, None)(dict, {})
        assert step.weights is not None
        assert step.own is not None
        files = step.weights.plan.files
        short = step.own.short_runs(files)
        exchanged = tensors_of_bits(files, exchanged_tensors([short]))
        mine = step.own.runs(files, exchanged)
        owned = step.own.ranges(files, exchanged, world)[rank]
        found[f"{name} seconds"] = time.process_time() - before - talk.decided - talk.simulated
        found[f"{name} sent"] = talk.sent + len(packed([hex(short.tensors), short.runs]))
        if name == "first":
            found |= {"decided": talk.decided, "memory": peak() - resident, "runs": len(mine) + len(owned)}
            found["exchanged"] = len(exchanged)
    return found


def peak() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rows(work: Path, worlds: Sequence[int], names: Sequence[str]) -> Iterator[str]:
    """The table, line by line."""
    yield (
        "| model | ranks | mesh | first plan | its memory | second plan | sent, first | sent, then | exchanged "
        "| runs of bytes | rank 0 divides |"
    )
    yield "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    paths = {name: plans.prepare(work, [name])[name] for name in names}
    for name in names:
        for world in worlds:
            for sizes in MESHES[world]:
                command = [sys.executable, __file__, "--measure", str(paths[name]), *map(str, sizes)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                one = json.loads(done.stdout.splitlines()[-1])
                run.say(f"{name} {sizes}: {one}")
                yield (
                    f"| {released.RELEASES[name].title} ({one['tensors']:,} tensors) | {world:,} "
                    f"| {KINDS[len(sizes)]}, {' × '.join(map(str, sizes))} | {one['first seconds']:.1f} s "
                    f"| {one['memory'] / 1e6:.0f} MB | {one['second seconds']:.2f} s | {one['first sent']} B "
                    f"| {one['second sent']} B | {one['exchanged']:,} | {one['runs']:,} | {one['decided']:.1f} s |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/ckpt-convert-bench"), help="where checkpoints lie")
    parser.add_argument("--worlds", type=int, nargs="+", choices=sorted(MESHES), default=sorted(MESHES))
    parser.add_argument("--only", choices=MODELS, help="one model")
    parser.add_argument("--write", action="store_true", help=f"write the table into {run.PAGE.name}, too")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        path, *sizes = arguments.measure
        print(json.dumps(measure(Path(path), tuple(map(int, sizes)))))
        return
    text = "\n".join(rows(arguments.work, arguments.worlds, [arguments.only] if arguments.only else MODELS))
    text += f"\n\n- Processor: {run.processor()}\n- Command: `python benchmarks/scale.py --write`"
    print(text)
    if arguments.write:
        run.write(text, BEGIN, END)


if __name__ == "__main__":
    main()
