"""Worlds, meshes, formats and families, in pairs: the files of several processes are those of one, and the source's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import ckpt_convert
from ckpt_convert import Checkpointer, CkptConvertError
from ckpt_convert.checkpoint.record import MANIFEST
from tests.checkpointer.pool import Pool, tree_of
from tests.checkpointer.test_distributed_saving import optimize
from tests.helpers import GOLDEN, bits, read_safetensors, sums

WORLDS = (1, 2, 3, 4)
MESHES = ("ddp", "fsdp", "hsdp", "tp", "fsdp x tp")
FORMATS = ("hf", "meta 1", "meta 2", "meta 4", "native", "torchtitan")

TABLES = {
    ("llama", "hf"): "llama",
    ("llama", "meta 1"): "llama",
    ("llama", "meta 2"): "llama even",
    ("llama", "meta 4"): "llama large",
    ("llama", "native"): "llama",
    ("llama", "torchtitan"): "llama",
    ("moe", "hf"): "gpt_oss",
    ("moe", "meta 1"): "mixtral",
    ("moe", "meta 2"): "llama4",
    ("moe", "meta 4"): "llama4",
    ("moe", "native"): "llama4",
    ("moe", "torchtitan"): "qwen3_moe",
    ("fused", "hf"): "phi3",
    ("fused", "native"): "phi3",
}
"""Which model stands for a family in a format: not every one has all formats."""

MODEL_FORMATS = {
    "llama": "native",
    "llama even": "native",
    "llama large": "native",
    "gpt_oss": "torchtitan",
    "mixtral": "meta",
    "llama4": "native",
    "qwen3_moe": "torchtitan",
    "phi3": "native",
}
"""The layout of the model that is trained: another one than the source's, where there is one."""

REFUSED = {
    ("phi3", "meta 1"): "has no meta column",
    ("phi3", "torchtitan"): "has no torchtitan column",
    ("llama4", "torchtitan"): "has no torchtitan column",
    ("qwen3_moe", "native"): "has no native column",
    ("mixtral", "meta 2"): "mixtral's consolidated layout is one file",
    ("llama", "meta 2"): "vocab_size = 67 is not divisible by 2",
    ("llama even", "meta 4"): "cannot be split across 4 ranks",
}
"""What no number of processes can have, and what is said of it."""


@dataclass(frozen=True)
class Case:
    """A run: ``wide`` has the first axis of a mesh of two hold all processes, where they cannot be on both."""

    world: int
    mesh: str
    format: str
    family: str
    wide: bool

    @property
    def sizes(self) -> tuple[int, int]:
        """The sizes of a mesh of two axes."""
        if self.world % 2 == 0 and self.world > 2:
            return 2, self.world // 2
        return (self.world, 1) if self.wide else (1, self.world)


def cases(turn: int, worlds: tuple[int, ...] = WORLDS) -> Iterator[Case]:
    """Every mesh with every format once, with families and worlds that are others in each ``turn``."""
    for m, mesh in enumerate(MESHES):
        for f, format_name in enumerate(FORMATS):
            families = [family for family in ("llama", "moe") if (family, format_name) in TABLES]
            at = m + turn + f
            if ("fused", format_name) in TABLES:
                families, at = ["fused", families[0], "fused", families[1]], m + turn + 2 * (f > 0)
            world = worlds[(m + f + 2 * turn) % len(worlds)]
            yield Case(world, mesh, format_name, families[at % len(families)], wide=at % 2 == 0)


QUICK, OTHERS, LARGE = [*cases(0)], [*cases(1)], [*cases(2, (8,))][::2]


def test_every_pair_is_there_twice() -> None:
    axes = {"world": WORLDS, "mesh": MESHES, "format": FORMATS, "family": ("llama", "moe", "fused")}
    for one, other in combinations(axes, 2):
        found = Counter((getattr(case, one), getattr(case, other)) for case in [*QUICK, *OTHERS])
        for first in axes[one]:
            for second in axes[other]:
                possible = (one, other) != ("format", "family") or (second, first) in TABLES
                assert not possible or found[first, second] > 1, (first, second)


# Sources

Sources = Callable[[str, str], Path]

SMALL = {72: 36, 104: 56, 56: 67, 24: 12, 208: 112, 120: 60}
SIZES = {
    "llama": SMALL,
    "llama even": SMALL | {56: 66},
    "phi3": SMALL,
    "mixtral": SMALL,
    "llama4": {44: 128},
    "gpt_oss": {5: 7},
}
"""Sizes that are had instead of a golden model's: such that no number of processes divides them."""


def make_hf(into: Path, table: str) -> Path:
    """A checkpoint in files with odd names, whose headers are in no alphabetical order."""
    golden, sizes = GOLDEN / table.split()[0] / "hf", SIZES.get(table, {})
    into.mkdir()
    tensors = {}
    for key, tensor in read_safetensors(golden).items():
        shape = torch.Size([sizes.get(size, size) for size in tensor.shape])
        tensors[key] = torch.sin(torch.arange(shape.numel(), dtype=torch.float32)).reshape(shape)
    config = json.loads((golden / "config.json").read_text())
    if 72 in sizes:
        config |= {"hidden_size": 36, "intermediate_size": 56, "vocab_size": sizes[56]}
        config |= {"num_attention_heads": 6, "num_key_value_heads": 2}
    elif table == "gpt_oss":
        config["num_local_experts"] = 7
    elif table == "llama4":
        config["vision_config"]["intermediate_size"] = 128
    (into / "config.json").write_text(json.dumps(config))
    keys = sorted(tensors, key=lambda key: key[::-1], reverse=True)
    files = {"zz rest.safetensors": keys[::3], "b.safetensors": keys[1::3], "a-2.safetensors": keys[2::3]}
    for name, names in files.items():
        write_safetensors(into / name, {key: tensors[key] for key in names})
    index = {"metadata": {}, "weight_map": {key: name for name, names in files.items() for key in names}}
    (into / "model.safetensors.index.json").write_text(json.dumps(index))
    return into


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors in their order, which the library does not."""
    header, offset = {}, 0
    for key, tensor in tensors.items():
        end = offset + 4 * tensor.numel()
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(map(bits, tensors.values())))


def convert(hf: Path, into: Path, format_name: str) -> Path:
    name, _, ranks = format_name.partition(" ")
    ckpt_convert.convert_checkpoint(hf, into, to=name, model_parallel=int(ranks) if ranks else None)  # type: ignore[arg-type]
    return into


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Gives the source of a table in a format; each is made once."""
    root = tmp_path_factory.mktemp("sources")

    def source_of(table: str, format_name: str) -> Path:
        hf = root / table
        if not hf.exists():
            make_hf(hf, table)
        made = root / f"{table} {format_name}"
        if format_name == "hf":
            return hf
        return made if made.exists() else convert(hf, made, format_name)

    return source_of


@pytest.mark.parametrize(("table", "format_name"), REFUSED)
def test_what_is_refused(table: str, format_name: str, source_of: Sources) -> None:
    with pytest.raises(CkptConvertError, match=REFUSED[table, format_name]):
        source_of(table, format_name)


# Runs


def split(model: nn.Module, case: Case) -> nn.Module:
    """The model over all processes; tensor parallelism splits rows, columns and nothing in turn."""
    if case.mesh == "ddp":
        return model
    two = case.mesh in ("hsdp", "fsdp x tp")
    names = {"fsdp": ("dp",), "tp": ("tp",), "hsdp": ("replicas", "dp")}.get(case.mesh, ("dp", "tp"))
    mesh = init_device_mesh("cpu", case.sizes if two else (case.world,), mesh_dim_names=names)
    if "tp" in names:
        for number, (key, parameter) in enumerate(list(model.named_parameters())):
            kinds = [Shard(dim) for dim in range(parameter.dim()) if parameter.shape[dim] > 1]
            kind = [*kinds, Replicate()][number % (len(kinds) + 1)]
            whole = distribute_tensor(parameter.detach(), mesh["tp"], [kind], src_data_rank=None)
            owner, _, last = key.rpartition(".")
            model.get_submodule(owner).register_parameter(last, nn.Parameter(whole))
    if case.mesh != "tp":
        fully_shard(model, mesh=mesh if case.mesh == "hsdp" else mesh["dp"])
    return model


def train(
    out: Path, source: Path, config: Path, table: str, split: Callable[[nn.Module], nn.Module], writers: str = "auto"
) -> None:
    """Load, and save two steps: what was loaded, and what an optimizer has made of it."""
    options: dict[str, Any] = {"model_format": MODEL_FORMATS[table], "save_every": 1, "writers": writers}
    with Checkpointer(
        source, out, config=config if source.name.endswith("native") else None, **options
    ) as checkpointer:
        whole = checkpointer.load_state_dict()
        model = split(tree_of({key: torch.full_like(tensor, float("nan")) for key, tensor in whole.items()}))
        optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
        checkpointer.load_model(model)
        checkpointer.register(model=model, optimizer=optimizer)
        checkpointer.step()
        optimize(model, optimizer)
        checkpointer.step()


def train_split(here: Path, source: Path, config: Path, case: Case, writers: str) -> None:
    train(here / "out", source, config, TABLES[case.family, case.format], lambda model: split(model, case), writers)


def files_of(step: Path) -> tuple[dict[str, str], Any]:
    """The sums of a step's files without the training state, and what the manifest says of them."""
    found = {name: one for name, one in sums(step).items() if not name.startswith("training_state/")}
    return found, json.loads((step / MANIFEST).read_text())["files"]


Alone = Callable[[str, str], list[Any]]


@pytest.fixture(scope="module")
def alone(source_of: Sources, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Gives the files of the steps of one process; each run is made once."""
    known: dict[tuple[str, str], list[Any]] = {}

    def files(table: str, format_name: str) -> list[Any]:
        if (table, format_name) not in known:
            out = tmp_path_factory.mktemp("alone") / "out"
            train(
                out, source_of(table, format_name), source_of(table, "hf") / "config.json", table, lambda model: model
            )
            known[table, format_name] = [files_of(out / f"step_{step}") for step in (1, 2)]
            assert known[table, format_name][0] != known[table, format_name][1]
        return known[table, format_name]

    return files


def chosen(quick: list[Case], slow: list[Case]) -> pytest.MarkDecorator:
    cases = [*quick, *(pytest.param(case, marks=pytest.mark.slow) for case in slow)]
    return pytest.mark.parametrize(
        "case", cases, ids=lambda case: f"{case.world}-{case.mesh}-{case.format}-{case.family}"
    )


@chosen(QUICK, [*OTHERS, *LARGE])
def test_the_files_are_those_of_one_process(
    pool: Pool, case: Case, source_of: Sources, alone: Alone, tmp_path: Path
) -> None:
    check(pool, case, source_of, alone, tmp_path, "direct")


@chosen([case for case in QUICK if case.world == 4], [case for case in [*QUICK, *OTHERS, *LARGE] if case.world > 1])
def test_the_files_are_the_same_where_slices_are_exchanged(
    pool: Pool, case: Case, source_of: Sources, alone: Alone, tmp_path: Path
) -> None:
    check(pool, case, source_of, alone, tmp_path, "exchange")


def check(pool: Pool, case: Case, source_of: Sources, alone: Alone, tmp_path: Path, writers: str) -> None:
    table = TABLES[case.family, case.format]
    source, config = source_of(table, case.format), source_of(table, "hf") / "config.json"
    pool.run(train_split, tmp_path, source, config, case, writers, world=case.world)
    found = [files_of(tmp_path / "out" / f"step_{step}") for step in (1, 2)]
    assert found == alone(table, case.format)
    assert sums(source).items() <= found[0][0].items()
