"""torch.distributed.checkpoint's directories, against those that torch writes, and against ones that lie."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

import ckpt_convert
from ckpt_convert.checkpoint.checkpoint import Checkpoint, open_identified
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.errors import (
    AmbiguousFormatError,
    CheckpointNotFoundError,
    CkptConvertError,
    CorruptFileError,
    InputError,
    UnsafeFileError,
)
from tests.checkpointer.pool import Pool
from tests.containers.cut_tensors import save_cut_tensors
from tests.helpers import bits

Box = tuple[tuple[int, ...], tuple[int, ...]]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def state() -> dict[str, Any]:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    return {"model": module.state_dict(), "optim": optimizer.state_dict(), "step": 3, "empty": torch.zeros(0, 4)}


def flattened(value: object, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, child in items for k, v in flattened(child, f"{prefix}.{key}".lstrip(".")).items()}


def boxed(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    origin, sizes = box
    return tensor[tuple(slice(at, at + size) for at, size in zip(origin, sizes, strict=True))]


class _Planner(DefaultSavePlanner):
    def __init__(self, pieces: dict[tuple[str, tuple[int, ...]], torch.Tensor]) -> None:
        super().__init__()
        self.pieces = pieces

    def resolve_data(self, item: WriteItem) -> torch.Tensor:
        assert item.index.offset is not None
        return self.pieces[item.index.fqn, tuple(item.index.offset)]


def written(
    directory: Path,
    tensors: dict[str, tuple[torch.Tensor, Sequence[tuple[int, Box]]]],
    serialization: SerializationFormat = SerializationFormat.TORCH_SAVE,
    clone: bool = True,
) -> Path:
    """What several ranks would write: for each tensor, which rank holds which box of it."""
    writer = dcp.FileSystemWriter(directory, serialization_format=serialization)
    items: dict[int, list[WriteItem]] = {}
    metadata = Metadata({})
    pieces = {}
    for key, (tensor, boxes) in tensors.items():
        chunks = []
        for number, (rank, (origin, sizes)) in enumerate(boxes):
            chunk = ChunkStorageMetadata(torch.Size(origin), torch.Size(sizes))
            data = TensorWriteData(chunk, TensorProperties(tensor.dtype), tensor.size())
            index = MetadataIndex(key, origin, number)
            items.setdefault(rank, []).append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
            piece = boxed(tensor, (origin, sizes))
            pieces[key, tuple(origin)] = piece.clone() if clone else piece
            chunks.append(chunk)
        metadata.state_dict_metadata[key] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.size(), chunks)
    writer.set_up_storage_writer(True)
    plans = [SavePlan(items.get(rank, [])) for rank in range(max(items) + 1)]
    writer.prepare_local_plan(plans[0])
    results = [writer.write_data(plan, _Planner(pieces)).wait() for plan in writer.prepare_global_plan(plans)]
    writer.finish(metadata, results)
    return directory


def assert_holds(checkpoint: Identified, expected: dict[str, torch.Tensor]) -> None:
    assert {key: info.shape for key, info in checkpoint.tensors.items()} == {
        key: tuple(tensor.shape) for key, tensor in expected.items()
    }
    for key, tensor in expected.items():
        info = checkpoint.tensors[key]
        assert info.nbytes == tensor.nbytes, key
        assert Checkpoint(checkpoint)[key].tobytes() == bits(tensor), key
        assert Checkpoint(checkpoint)[key].torch().dtype == tensor.dtype, key
        assert sum(part.nbytes for part in info.parts) == info.nbytes
        assert checkpoint.joined(key)[0].shape == info.shape


def columns(total: int, width: int, rows: int) -> Iterable[Box]:
    return (((0, at), (rows, min(width, total - at))) for at in range(0, total, width))


def test_a_model_and_its_optimizer(tmp_path: Path) -> None:
    saved = state()
    dcp.save(saved, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with open_identified(tmp_path / "dcp") as checkpoint:
        assert checkpoint.format is None
        assert checkpoint.family is None
        assert "torch.distributed.checkpoint" in checkpoint.why
        assert "17 tensors in 17 pieces" in dict(checkpoint.facts)["container"]
        assert_holds(checkpoint, flattened(saved))
        assert [file.header.kind for file in checkpoint.files] == ["dcp"]
        objects = checkpoint.files[0].header.objects
        assert {"step", "optim.param_groups.0.lr"} <= set(objects)
        assert checkpoint.contradictions == []
        with pytest.raises(AmbiguousFormatError, match="say which format it is with `from_format=`"):
            _ = checkpoint.model


def test_the_metadata_file_stands_for_its_directory(tmp_path: Path) -> None:
    dcp.save({"w": torch.arange(6.0)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with open_identified(tmp_path / "dcp" / ".metadata") as checkpoint:
        assert_holds(checkpoint, {"w": torch.arange(6.0)})


def test_every_dtype(tmp_path: Path) -> None:
    names = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 complex64 int64 int32 int16 int8 uint8 bool"
    saved = {name: torch.arange(5).to(torch.float32).to(getattr(torch, name)) for name in names.split()}
    dcp.save({**saved, "scalar": torch.tensor(2.5)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with open_identified(tmp_path / "dcp") as checkpoint:
        assert_holds(checkpoint, {**saved, "scalar": torch.tensor(2.5)})


LAYOUTS: dict[str, list[tuple[int, Box]]] = {
    "rows over two ranks": [(0, ((0, 0), (3, 7))), (1, ((3, 0), (2, 7)))],
    "columns over two ranks": [(0, ((0, 0), (5, 4))), (1, ((0, 4), (5, 3)))],
    "boxes over four ranks": [
        (0, ((0, 0), (3, 4))), (1, ((0, 4), (3, 3))), (2, ((3, 0), (2, 4))), (3, ((3, 4), (2, 3))),
    ],
    "boxes of all sizes": [
        (0, ((0, 0), (1, 7))), (1, ((1, 0), (4, 2))), (0, ((1, 2), (2, 5))), (1, ((3, 2), (2, 1))),
        (0, ((3, 3), (2, 4))),
    ],
    "a pinwheel, which no cut goes through": [
        (0, ((0, 0), (2, 5))), (1, ((2, 0), (3, 3))), (0, ((0, 5), (4, 2))), (1, ((4, 3), (1, 4))),
        (0, ((2, 3), (2, 2))),
    ],
    "in no order": [(1, ((4, 0), (1, 7))), (0, ((0, 0), (4, 7)))],
}  # fmt: skip


@pytest.mark.parametrize("serialization", list(SerializationFormat))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_are_joined(tmp_path: Path, layout: str, serialization: SerializationFormat) -> None:
    boxes = LAYOUTS[layout]
    if serialization == SerializationFormat.SAFETENSORS and len({rank for rank, _ in boxes}) < len(boxes):
        boxes = [(number, box) for number, (_, box) in enumerate(boxes)]  # it keeps one piece of a key in a file
    tensors = {
        "w": (torch.arange(35.0).reshape(5, 7), boxes),
        "b": (torch.arange(4, dtype=torch.int16), [(0, ((0,), (4,)))]),
    }
    written(tmp_path / "dcp", tensors, serialization)
    with open_identified(tmp_path / "dcp") as checkpoint:
        assert_holds(checkpoint, {key: tensor for key, (tensor, _) in tensors.items()})
        parts = checkpoint.tensors["w"].parts
        assert [(part.origin, part.shape) for part in parts] == sorted(box for _, box in boxes)
        assert len({part.file for part in parts}) == len({rank for rank, _ in boxes})
        assert checkpoint.tensors["b"].parts[0].origin is None
        assert [set(rank) for rank in checkpoint.ranks] == [{"w", "b"}]


def test_pieces_that_were_saved_in_another_order(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).reshape(4, 6).T  # its strides are kept: the archive holds the columns
    cube = torch.arange(60.0).reshape(3, 4, 5).permute(2, 0, 1)
    written(
        tmp_path / "dcp",
        {"t": (tensor, [(0, ((0, 0), (6, 4)))]), "c": (cube, [(1, ((0, 0, 0), (5, 3, 4)))])},
        clone=False,
    )
    with open_identified(tmp_path / "dcp") as checkpoint:
        assert_holds(checkpoint, {"t": tensor, "c": cube})
        file, stored = next(piece for piece in checkpoint.stored if piece[1].key == "c")
        whole = bits(cube)
        for start in range(0, len(whole), 9):
            buffer = bytearray(min(17, len(whole) - start))
            file.reader.readinto(stored.offset + start, memoryview(buffer))
            assert bytes(buffer) == whole[start : start + len(buffer)]


@pytest.mark.cli
def test_two_processes_with_tensors_that_are_cut(pool: Pool, tmp_path: Path) -> None:
    pool.run(save_cut_tensors, tmp_path)
    expected = {
        "model.rows": torch.arange(35.0).reshape(5, 7),
        "model.columns": torch.arange(20).reshape(4, 5).bfloat16(),
        "model.few": torch.arange(3.0).reshape(1, 3),
        "model.copied": torch.arange(6.0),
    }
    for name in ("together", "apart"):  # "apart" has metadata for each rank
        with open_identified(tmp_path / name) as checkpoint:
            assert_holds(checkpoint, expected)
            assert len(checkpoint.tensors["model.rows"].parts) == 2
            assert len(checkpoint.tensors["model.few"].parts) == 1
            assert "written by 2 ranks" in dict(checkpoint.facts)["container"]


# --- damage and lies ------------------------------------------------------------------------------------------------


def two_ranks(directory: Path) -> Path:
    tensors = {"w": (torch.arange(35.0).reshape(5, 7), LAYOUTS["rows over two ranks"])}
    return written(directory, tensors)


def edited(directory: Path, change: Any) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def moved(metadata: Metadata, number: int, **changes: Any) -> None:
    index = list(metadata.storage_data)[number]
    metadata.storage_data[index] = replace(metadata.storage_data[index], **changes)


def refused(directory: Path, error: type[CkptConvertError]) -> str:
    with pytest.raises(error) as caught:
        ckpt_convert.open_checkpoint(directory)
    return str(caught.value)


def test_files_without_metadata(tmp_path: Path) -> None:
    (two_ranks(tmp_path) / ".metadata").unlink()
    message = refused(tmp_path, CheckpointNotFoundError)
    assert ".metadata" in message
    assert "cut short" in message


def test_a_file_that_is_missing_or_truncated(tmp_path: Path) -> None:
    file = two_ranks(tmp_path) / "__1_0.distcp"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    message = refused(tmp_path, CorruptFileError)
    assert "__1_0.distcp" in message
    assert "truncated" in message
    file.unlink()
    assert "__1_0.distcp" in refused(tmp_path, CheckpointNotFoundError)


@pytest.mark.parametrize("name", ["../x.distcp", "/etc/passwd", "a/../../x", "a\nb"])
def test_a_name_that_leaves_the_directory(tmp_path: Path, name: str) -> None:
    edited(two_ranks(tmp_path), lambda metadata: moved(metadata, 0, relative_path=name))
    assert "no plain name inside the directory" in refused(tmp_path, UnsafeFileError)


def chunks(metadata: Metadata) -> list[ChunkStorageMetadata]:
    entry = metadata.state_dict_metadata["w"]
    assert isinstance(entry, TensorStorageMetadata)
    return entry.chunks


LIES = {
    "a piece too few": lambda m: chunks(m).pop(),
    "a piece outside": lambda m: setattr(chunks(m)[1], "offsets", torch.Size([4, 0])),
    "pieces that overlap": lambda m: (
        setattr(chunks(m)[1], "offsets", torch.Size([2, 0])), setattr(chunks(m)[1], "sizes", torch.Size([2, 7])),
        m.storage_data.update({MetadataIndex("w", [2, 0]): m.storage_data[MetadataIndex("w", [3, 0])]}),
    ),
    "a piece of other dimensions": lambda m: setattr(chunks(m)[0], "sizes", torch.Size([21])),
    "a huge tensor": lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size([1 << 40, 1 << 40])),
    "a piece that lies nowhere": lambda m: m.storage_data.pop(MetadataIndex("w", [0, 0])),
    "a record before the file": lambda m: moved(m, 0, offset=-1),
    "a record past the end": lambda m: moved(m, 0, offset=1 << 60),
    "two records in one place": lambda m: moved(m, 1, relative_path="__0_0.distcp"),
    "a record too short": lambda m: moved(m, 0, length=10),
    "an offset that is none": lambda m: moved(m, 0, offset="0"),
    "no tensors": lambda m: setattr(m, "state_dict_metadata", None),
    "no places": lambda m: setattr(m, "storage_data", None),
    "a tensor that is none": lambda m: m.state_dict_metadata.update(w=m),
    "a key that is none": lambda m: m.state_dict_metadata.update({3: m.state_dict_metadata["w"]}),
    "chunks that are none": lambda m: setattr(m.state_dict_metadata["w"], "chunks", 5),
    "no properties": lambda m: setattr(m.state_dict_metadata["w"], "properties", None),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lies(tmp_path: Path, lie: str) -> None:
    edited(two_ranks(tmp_path), LIES[lie])
    assert ".metadata" in refused(tmp_path, CorruptFileError) or "__0_0.distcp" in refused(tmp_path, CorruptFileError)


def test_other_pickles_as_metadata(tmp_path: Path) -> None:
    for value in (5, {"state_dict_metadata": {}}, [torch.Size([1])]):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
        assert ".metadata" in refused(tmp_path, CorruptFileError)
    (tmp_path / ".metadata").write_bytes(b"")
    refused(tmp_path, CorruptFileError)


class Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def test_metadata_never_runs_anything(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    edited(two_ranks(tmp_path / "dcp"), lambda m: setattr(m, "planner_data", Runs(f"touch {sentinel}")))
    with ckpt_convert.open_checkpoint(tmp_path / "dcp") as checkpoint:
        assert checkpoint["w"].torch().sum() == 595
        assert any("system" in notice for notice in checkpoint.notices)
    assert not sentinel.exists()


def test_a_record_that_holds_something_else(tmp_path: Path) -> None:
    directory = two_ranks(tmp_path)
    edited(directory, lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.int32))
    with open_identified(directory) as checkpoint:
        assert checkpoint.tensors["w"].dtype == "I32"  # a listing reads no more than the metadata
        with pytest.raises(CorruptFileError, match=r"__0_0\.distcp.*'w'.*I32.*F32"):
            Checkpoint(checkpoint)["w"].torch()


def test_records_that_were_transformed_are_listed_but_not_read(tmp_path: Path) -> None:
    directory = two_ranks(tmp_path)
    edited(directory, lambda m: moved(m, 0, transform_descriptors=["stream.zstd"]))
    with open_identified(directory) as checkpoint:
        assert checkpoint.tensors["w"].shape == (5, 7)
        with pytest.raises(InputError, match="compressed"):
            Checkpoint(checkpoint)["w"].torch()


def test_many_pieces_are_checked_quickly(tmp_path: Path) -> None:
    """20,000 boxes in a checkerboard: comparing each with each would take minutes."""
    boxes = {(row, 2 * column): (1, 2) for row in range(200) for column in range(100)}
    from ckpt_convert.containers.dcp.dcp_metadata import DcpTensor, Extent, check_cover

    place = Extent("__0_0.distcp", 0, 8, True)
    check_cover("w", DcpTensor("F32", (200, 200), {origin: (sizes, place) for origin, sizes in boxes.items()}))
    boxes[199, 197] = boxes.pop((199, 198))
    with pytest.raises(CorruptFileError, match="overlap"):
        check_cover("w", DcpTensor("F32", (200, 200), {origin: (sizes, place) for origin, sizes in boxes.items()}))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_flipped_byte_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.getbasetemp() / "flipped"
    if not directory.exists():
        two_ranks(directory)
        (directory / "whole").write_bytes((directory / ".metadata").read_bytes())
    whole = bytearray((directory / "whole").read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(whole)] * 5 + [len(whole) // 2, len(whole) - 1]))
    (directory / ".metadata").write_bytes(whole[:cut])
    try:
        with open_identified(directory) as checkpoint:
            for key, info in checkpoint.tensors.items():
                assert len(Checkpoint(checkpoint)[key].tobytes()) == info.nbytes
    except CkptConvertError:
        return
