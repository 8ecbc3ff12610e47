"""Which part of a tensor a process holds, held against what torch has given to it: tensors whose values are indices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from math import prod

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt_convert import UsageError
from ckpt_convert.checkpointer.distributed.slices import Slice, slice_of, whole

MESHES = [(1,), (2,), (3,), (4,), (2, 2), (3, 2), (2, 3)]
SIZES = range(1, 10)


@contextmanager
def as_rank(rank: int, mesh: Sequence[int]) -> Iterator[DeviceMesh]:
    """One process of a group whose others are not there; nothing that talks to them does anything.

    The axes "0_RANK" and "1_RANK" have names of their own: torch remembers what operators make of a mesh, and takes
    those of several processes for one.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=prod(mesh))
    try:
        yield init_device_mesh("cpu", tuple(mesh), mesh_dim_names=tuple(f"{dim}_{rank}" for dim in range(len(mesh))))
    finally:
        dist.destroy_process_group()


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(prod(shape), dtype=torch.float32).reshape(shape)


def taken(tensor: torch.Tensor, part: Slice) -> torch.Tensor:
    """What a slice says that its process has, put together from its boxes."""
    out = torch.full(part.local_shape, -1.0)
    for region in part.regions():
        source, target = tensor, out
        for axis, (start, size, at) in enumerate(zip(region.origin, region.shape, region.local, strict=True)):
            source, target = source.narrow(axis, start, size), target.narrow(axis, at, size)
        target.copy_(source)
    return out


def check(full: torch.Tensor, tensor: torch.Tensor) -> None:
    assert isinstance(tensor, DTensor)
    assert torch.equal(taken(full, slice_of("weight", tensor)), tensor.to_local())


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_what_distribute_tensor_gives_to_each_process(mesh: tuple[int, ...]) -> None:
    kinds = (Replicate(), Shard(0), Shard(1))
    for rank in range(prod(mesh)):
        with as_rank(rank, mesh) as devices:
            for placements in product(kinds, repeat=len(mesh)):
                for rows in SIZES:
                    full = numbered(rows, 5)
                    check(full, distribute_tensor(full, devices, placements, src_data_rank=None))


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if len(mesh) == 2], ids=str)
@pytest.mark.parametrize("tensor_parallel", [Shard(0), Shard(1), Replicate()], ids=str)
def test_what_fully_shard_leaves_of_tensors_that_tensor_parallelism_has_split(
    mesh: tuple[int, int], tensor_parallel: Placement
) -> None:
    """7 rows on 3 x 2, among others: there torch's own offsets are wrong."""
    for rank in range(prod(mesh)):
        with as_rank(rank, mesh) as devices:
            module = nn.Module()
            for rows in SIZES:
                split = distribute_tensor(
                    numbered(rows, 5), devices[f"1_{rank}"], [tensor_parallel], src_data_rank=None
                )
                module.register_parameter(f"rows_{rows}", nn.Parameter(split))
            fully_shard(module, mesh=devices[f"0_{rank}"])
            for rows in SIZES:
                check(numbered(rows, 5), module.get_parameter(f"rows_{rows}").detach())


@pytest.mark.parametrize("dim", [0, 1])
def test_what_fully_shard_leaves_with_replicas(dim: int) -> None:
    for rank in range(6):
        with as_rank(rank, (2, 3)) as devices:
            module = nn.Linear(6, 7 if dim == 0 else 4, bias=False)
            shape = tuple(module.weight.shape)
            module.weight = nn.Parameter(numbered(*shape))
            fully_shard(module, mesh=devices, shard_placement_fn=lambda parameter: Shard(dim))
            check(numbered(*shape), module.weight.detach())


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_a_strided_shard_is_several_boxes(factor: int) -> None:
    for rank, rows in product(range(3), (12, 7, 13)):
        with as_rank(rank, (3,)) as devices:
            full = numbered(rows, 2)
            placements = [_StridedShard(0, split_factor=factor)]
            tensor = distribute_tensor(full, devices, placements, src_data_rank=None)
            check(full, tensor)
            regions = list(slice_of("weight", tensor).regions())
            assert len(regions) <= factor
            assert len(regions) == factor or (rank, rows) != (0, 12)


def test_all_of_what_is_not_sharded() -> None:
    assert slice_of("weight", torch.zeros(3, 4)) == whole((3, 4))
    assert slice_of("count", torch.tensor(1)).is_whole
    assert [region.shape for region in slice_of("count", torch.tensor(1)).regions()] == [()]
    assert not list(slice_of("none", torch.zeros(0, 4)).regions())


def test_nothing_of_what_other_processes_have() -> None:
    with as_rank(3, (4,)):
        others = DeviceMesh("cpu", [0, 1])
        tensor = DTensor.from_local(
            torch.zeros(0), others, [Replicate()], run_check=False, shape=torch.Size([4]), stride=(1,)
        )
        assert not list(slice_of("weight", tensor).regions())


def test_what_no_process_has_the_values_of_is_refused_by_name() -> None:
    with as_rank(0, (2,)) as devices:
        partial = DTensor.from_local(torch.zeros(4), devices, [Partial()], run_check=False)
        with pytest.raises(UsageError, match=r"layers\.0\.weight: has the placement Partial"):
            slice_of("layers.0.weight", partial)


def test_a_local_tensor_that_its_placements_contradict_is_refused() -> None:
    with as_rank(0, (2,)) as devices:
        odd = DTensor.from_local(
            torch.zeros(3), devices, [Shard(0)], run_check=False, shape=torch.Size([8]), stride=(1,)
        )
        with pytest.raises(UsageError, match=r"give \[4\] to the process at \[0\], which has \[3\]"):
            slice_of("weight", odd)


def test_what_zero_3_has_partitioned_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(0))
    parameter.ds_id = 1  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="ZeRO-3"):
        slice_of("weight", parameter)
