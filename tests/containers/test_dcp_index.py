"""``.metadata`` written without torch, against what torch's planner and Python's pickler make of the same tensors."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from math import prod

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ckpt_convert.containers.dcp import dcp_index
from ckpt_convert.containers.dcp.dcp_index import PlacedTensor
from ckpt_convert.dtypes import DTYPES

OF_TORCH = [name for name, dtype in DTYPES.items() if dtype.torch and dtype.bits >= 8]


def planned(tensors: Sequence[PlacedTensor]) -> Metadata:
    """What torch makes of them."""
    planner = DefaultSavePlanner()
    state = {
        one.key: torch.empty(one.shape, dtype=getattr(torch, DTYPES[one.dtype].torch), device="meta") for one in tensors
    }
    planner.set_up_planner(state, None, True)
    (plan,), found = planner.create_global_plan([planner.create_local_plan()])
    files = {one.file: one.file for one in tensors}  # one string for each file
    places = {one.key: _StorageInfo(files[one.file], one.offset, one.length) for one in tensors}
    found.storage_data = {item.index: places[item.index.fqn] for item in plan.items}
    return found


def assert_same(data: bytes, expected: Metadata) -> None:
    found = pickle.loads(data)
    assert found == expected
    for name in ("state_dict_metadata", "planner_data", "storage_data"):
        assert list(getattr(found, name)) == list(getattr(expected, name))
    assert [index.index for index in found.storage_data] == [index.index for index in expected.storage_data]
    for key, wanted in expected.state_dict_metadata.items():
        entry = found.state_dict_metadata[key]
        assert isinstance(wanted, TensorStorageMetadata)
        assert vars(entry.properties) == vars(wanted.properties)
        assert type(entry.size) is torch.Size
        assert [vars(chunk) for chunk in entry.chunks] == [vars(chunk) for chunk in wanted.chunks]
        assert all(type(chunk.offsets) is type(chunk.sizes) is torch.Size for chunk in entry.chunks)
    for index, place in expected.storage_data.items():
        assert vars(found.storage_data[index]) == place.__getstate__()


shapes = st.lists(
    st.one_of(st.integers(0, 70_000), st.sampled_from([0, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, 1 << 40])),
    max_size=5,
).map(tuple).filter(lambda shape: prod(max(size, 1) for size in shape) < 1 << 58)  # fmt: skip
sizes = st.one_of(st.integers(0, 1 << 17), st.integers(0, (1 << 63) - 1))
keys = st.one_of(st.text(max_size=12), st.sampled_from(["offset", "torch", "Size", "ключ.вес", "k" * 255, "k" * 300]))
tensors = st.builds(
    PlacedTensor,
    keys,
    st.sampled_from(OF_TORCH),
    shapes,
    st.sampled_from(["__0_0.distcp", "__1_0.distcp"]),
    sizes,
    sizes,
)


def many(count: int) -> list[PlacedTensor]:
    """Tensors of a model of so many, in files of 100."""
    return [
        PlacedTensor(
            f"layers.{n}.weight", OF_TORCH[n % 3], (n, n % 7), f"__{n // 100}_0.distcp", 1 << (n % 50), 1500 + n
        )
        for n in range(count)
    ]


@pytest.mark.cli
@settings(max_examples=150, deadline=None)
@given(st.lists(tensors, max_size=30, unique_by=lambda one: one.key))
@example(
    [
        PlacedTensor("k" * 70_000, "BF16", (2,), "__0_0.distcp", 0, 5),
        PlacedTensor("norm", "F32", (), "__0_0.distcp", 5, 5),
    ]
)
def test_what_torch_reads_is_what_its_planner_makes(placed: list[PlacedTensor]) -> None:
    expected = planned(placed)
    data = dcp_index.render_metadata(placed)
    assert_same(data, expected)
    if not {one.key for one in placed} & {"offset", "torch", "Size"}:  # whether these are one object is Python's choice
        assert data == pickle.dumps(expected, protocol=4)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 255, 256, 999, 1000, 1001, 2000, 2500])
def test_any_number_of_tensors(count: int) -> None:
    expected = planned(many(count))
    data = dcp_index.render_metadata(many(count))
    assert_same(data, expected)
    assert data == pickle.dumps(expected, protocol=4)


@pytest.mark.parametrize("dtype", OF_TORCH)
def test_every_dtype(dtype: str) -> None:
    placed = [
        PlacedTensor("one", dtype, (3, 4), "__0_0.distcp", 0, 1200),
        PlacedTensor("other", dtype, (), "__0_0.distcp", 1200, 9),
    ]
    assert_same(dcp_index.render_metadata(placed), planned(placed))
