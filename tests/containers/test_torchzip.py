"""torch's zip container, against torch itself and against files made to harm or to lie."""

import collections
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_convert import containers
from ckpt_convert.containers.torch_zip.torchzip import build, is_zip, parse
from ckpt_convert.dtypes import DTYPES, FROM_TORCH, nbytes
from ckpt_convert.errors import (
    CkptConvertError,
    CorruptFileError,
    InputError,
    KeyMismatchError,
    UnsafeFileError,
    UsageError,
)
from ckpt_convert.storage.base import read_range
from ckpt_convert.storage.reader import LocalFile
from ckpt_convert.tensors.header import FileLayout, Header

KNOWN = [name for name, dtype in DTYPES.items() if dtype.torch]


class Bytes:
    name = "model.pth"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]


def saved(value: object, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def values(reader: Any, header: Header) -> dict[str, bytes]:
    """The bytes of every tensor, gathered element by element where it is strided."""
    found = {}
    for tensor in header.tensors:
        item = max(DTYPES[tensor.dtype].bits // 8, 1)
        if tensor.strides is None:
            found[tensor.key] = read_range(reader, tensor.offset, tensor.nbytes)
            continue
        places = [tensor.offset]
        for size, stride in zip(tensor.shape, tensor.strides, strict=True):
            places = [place + n * stride * item for place in places for n in range(size)]
        found[tensor.key] = b"".join(read_range(reader, place, item) for place in places)
    return found


def assert_reads_as(data: bytes, expected: dict[str, torch.Tensor]) -> Header:
    reader = Bytes(data)
    header = parse(reader)
    assert list(values(reader, header).items()) == [(key, raw(tensor)) for key, tensor in expected.items()]
    for tensor in header.tensors:
        shape = tuple(expected[tensor.key].shape)
        assert tensor.shape == ((*shape[:-1], shape[-1] * 2) if tensor.dtype == "F4" else shape)
        assert DTYPES[tensor.dtype].torch == str(expected[tensor.key].dtype).removeprefix("torch.")
    return header


def zipped(members: dict[str, bytes], root: str = "archive", method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(f"{root}/{name}", data)
    return out.getvalue()


def pickled(body: bytes, protocol: int = 2) -> bytes:
    """A zip file whose data.pkl is ``body``, with one storage of 24 bytes."""
    return zipped({"data.pkl": b"\x80" + bytes([protocol]) + body + b".", "byteorder": b"little", "data/0": bytes(24)})


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def storage(numel: int = 6, kind: bytes = b"ctorch\nFloatStorage\n", key: str = "0") -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + integer(numel) + b"tQ"


def tensor(
    offset: int = 0, shape: tuple[int, ...] = (2, 3), strides: tuple[int, ...] = (3, 1), held: bytes | None = None
) -> bytes:
    sizes = [b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (shape, strides)]
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    rest = b"\x89ccollections\nOrderedDict\n)R"
    return rebuild + b"(" + (held or storage()) + integer(offset) + b"".join(sizes) + rest + b"tR"


def one(value: bytes) -> bytes:
    return b"}" + text("w") + value + b"s"


# --- reading what torch wrote ---------------------------------------------------------------------------------------


def test_reads_every_dtype() -> None:
    state = {}
    for name in KNOWN:
        data = torch.arange(96, dtype=torch.int64).remainder(2 if name == "BOOL" else 251).to(torch.uint8)
        state[name] = data.view(getattr(torch, DTYPES[name].torch)).reshape(3, -1)
    header = assert_reads_as(saved(state), state)
    assert [tensor.dtype for tensor in header.tensors] == KNOWN


def test_reads_views_that_share_a_storage() -> None:
    base = torch.arange(60, dtype=torch.float32)
    state = {
        "whole": base,
        "part": base[7:31],
        "rows": base.reshape(6, 10)[2:4],
        "columns": base.reshape(6, 10)[:, 3:5],
        "transposed": base.reshape(6, 10).T,
        "every third": base[1::3],
        "permuted": base.reshape(3, 4, 5).permute(2, 0, 1),
        "expanded": base[5].expand(2, 3),
        "one": base[59],
        "long one": base[58:59].reshape(1, 1),
        "none": base[60:],
    }
    header = assert_reads_as(saved(state), state)
    strided = {tensor.key for tensor in header.tensors if tensor.strides is not None}
    assert strided == {"columns", "transposed", "every third", "permuted", "expanded"}
    assert [run.nbytes for run in header.checksummed] == [240]


def test_size_1_dimensions_with_odd_strides_are_dense() -> None:
    state = {"w": torch.arange(12.0).as_strided((1, 4, 1, 3), (77, 3, 50, 1))}
    assert assert_reads_as(saved(state), state).tensors[0].strides is None


def test_reads_scalars_empty_tensors_and_nan_payloads() -> None:
    state = {
        "scalar": torch.tensor(3, dtype=torch.int16),
        "empty": torch.zeros(0, 5),
        "empty too": torch.zeros(2, 0, 3, dtype=torch.float8_e5m2),
        "nan": torch.tensor([0x7FA00001, -1], dtype=torch.int32).view(torch.float32),
    }
    assert_reads_as(saved(state), state)


def test_reads_a_module_with_its_metadata() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    header = assert_reads_as(saved(module.state_dict()), module.state_dict())
    assert header.objects == {}


def test_reads_parameters_even_with_attributes() -> None:
    plain = torch.nn.Parameter(torch.arange(4.0))
    marked = torch.nn.Parameter(torch.arange(3.0))
    marked.note = "kept elsewhere"  # type: ignore[attr-defined]
    assert_reads_as(saved({"a": plain, "b": marked}), {"a": plain, "b": marked})


def test_flattens_nested_states_and_names_what_is_no_tensor() -> None:
    module = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint = {
        "model": module.state_dict(),
        "optim": optimizer.state_dict(),
        "step": 5,
        "more": [torch.ones(2), (None, "x"), {}, [], 1 << 70, 1.5, True, b"raw"],
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "storage": torch.ones(2).untyped_storage(),
    }
    header = parse(Bytes(saved(checkpoint, pickle_protocol=4)))
    assert parse(Bytes(saved(checkpoint))).objects == header.objects  # bytes take a call in protocol 2
    state = optimizer.state_dict()["state"]
    expected = {
        "model.weight": module.weight,
        "model.bias": module.bias,
        **{f"optim.state.{n}.{key}": value for n in (0, 1) for key, value in state[n].items()},
        "more.0": torch.ones(2),
    }
    assert list(values(Bytes(saved(checkpoint, pickle_protocol=4)), header)) == list(expected)
    assert_reads_as(
        saved({"model": checkpoint["model"], "optim": checkpoint["optim"], "more": [torch.ones(2)]}), expected
    )
    assert {key: kind for key, kind in header.objects.items() if not key.startswith("optim.")} == {
        "step": "int",
        "more.1.0": "NoneType",
        "more.1.1": "str",
        "more.2": "dict",
        "more.3": "list",
        "more.4": "int",
        "more.5": "float",
        "more.6": "bool",
        "more.7": "bytes",
        "size": "Size",
        "dtype": "dtype",
        "device": "device",
        "storage": "UntypedStorage",
    }
    assert header.objects["optim.param_groups.0.lr"] == "float"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_every_protocol_that_torch_can_load(protocol: int) -> None:
    state = collections.OrderedDict(a=torch.arange(300.0), b=torch.arange(7).to(torch.uint16))
    assert_reads_as(saved(state, pickle_protocol=protocol), dict(state))


def test_a_conjugated_view_is_refused() -> None:
    with pytest.raises(InputError, match="resolve_conj"):
        parse(Bytes(saved({"w": torch.ones(2, dtype=torch.complex64).conj()})))


def test_what_is_no_dict_is_read_as_well() -> None:
    assert_reads_as(saved(torch.arange(3.0)), {"tensor": torch.arange(3.0)})
    assert_reads_as(saved([torch.ones(2), (torch.zeros(1),)]), {"0": torch.ones(2), "1.0": torch.zeros(1)})
    assert_reads_as(saved({"": torch.ones(2)}), {"": torch.ones(2)})
    assert parse(Bytes(saved(7))).objects == {"(all)": "int"}


def test_a_long_list_of_plain_values_counts_as_one_thing() -> None:
    header = parse(Bytes(saved({"long": list(range(9)), "short": [1, 2], "mixed": [torch.ones(1), *range(9)]})))
    assert {key: kind for key, kind in header.objects.items() if not key.startswith("mixed")} == {
        "long": "list of 9",
        "short.0": "int",
        "short.1": "int",
    }
    assert [tensor.key for tensor in header.tensors] == ["mixed.0"]


def test_keys_that_collide_when_joined_are_refused() -> None:
    with pytest.raises(KeyMismatchError, match=r"'a\.b'"):
        parse(Bytes(saved({"a": {"b": torch.ones(2)}, "a.b": torch.ones(2)})))


def test_the_checksum_and_its_places_are_what_torch_wrote() -> None:
    state = {"a": torch.arange(5.0), "b": torch.arange(9), "e": torch.zeros(0)}
    data = saved(state)
    header = parse(Bytes(data))
    assert [run.nbytes for run in header.checksummed] == [20, 72, 0]
    for run in header.checksummed:
        assert run.crc == zlib.crc32(data[run.offset : run.offset + run.nbytes])
        assert len(run.crc_offsets) == 2  # directory, and descriptor or (for no bytes at all) local header
        assert {struct.unpack_from("<I", data, place)[0] for place in run.crc_offsets} == {run.crc}
    copy = bytearray(data)
    first = header.checksummed[0]
    copy[first.offset] ^= 1
    crc = zlib.crc32(copy[first.offset : first.offset + first.nbytes])
    for place in first.crc_offsets:
        struct.pack_into("<I", copy, place, crc)
    assert zipfile.ZipFile(io.BytesIO(copy)).testzip() is None
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None


def test_reads_an_archive_that_was_repacked_without_compression() -> None:
    state = {"a": torch.arange(5.0)}
    original = zipfile.ZipFile(io.BytesIO(saved(state)))
    members = {name.partition("/")[2]: original.read(name) for name in original.namelist()}
    header = assert_reads_as(zipped(members), state)
    assert len(header.checksummed[0].crc_offsets) == 2  # directory and local header: nothing is deferred


# --- building -------------------------------------------------------------------------------------------------------


def spec(state: dict[str, torch.Tensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    found = []
    for key, value in state.items():
        dtype = FROM_TORCH[str(value.dtype).removeprefix("torch.")].name
        shape = tuple(value.shape)
        found.append((key, dtype, (*shape[:-1], shape[-1] * 2) if dtype == "F4" else shape))
    return found


def filled(layout: FileLayout, contents: dict[str, bytes]) -> bytes:
    data = bytearray(layout.header.size)
    for offset, literal in layout.literals:
        data[offset : offset + len(literal)] = literal
    for stored in layout.header.tensors:
        data[stored.offset : stored.offset + stored.nbytes] = contents[stored.key]
    for run in layout.header.checksummed:
        crc = zlib.crc32(data[run.offset : run.offset + run.nbytes])
        for place in run.crc_offsets:
            struct.pack_into("<I", data, place, crc)
    return bytes(data)


def without_id(data: bytes) -> bytes:
    """The file with its serialization id, and that id's CRC-32, blanked."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    info = next(info for info in archive.infolist() if info.filename.endswith("/.data/serialization_id"))
    content = archive.read(info)
    crc = struct.pack("<I", info.CRC)
    assert data.count(content) == 1
    assert data.count(crc) == 2
    return data.replace(content, bytes(len(content))).replace(crc, bytes(4))


def assert_same_as_torch(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, path)
    expected = path.read_bytes()
    ours = filled(build(spec(state), root=path.stem), {key: raw(value) for key, value in state.items()})
    assert without_id(ours) == without_id(expected)


def test_writes_what_torch_writes_for_every_dtype(tmp_path: Path) -> None:
    state = {}
    for number in range(2):
        for name in KNOWN:
            data = torch.arange(96, dtype=torch.int64).remainder(2 if name == "BOOL" else 251).to(torch.uint8)
            state[f"{name}.{number}"] = data.view(getattr(torch, DTYPES[name].torch)).reshape(3, -1)
    assert_same_as_torch(tmp_path / "every.pth", state)


def test_writes_what_torch_writes_for_every_shape(tmp_path: Path) -> None:
    shapes = [(), (0,), (0, 3), (3, 0, 2), (1,), (300,), (70_000,), (2, 3, 4, 5), (1, 1, 1, 1, 2), (2, 3, 4)]
    state = {str(shape): torch.zeros(shape, dtype=torch.int8) for shape in shapes}
    assert_same_as_torch(tmp_path / "shapes.pth", state)


@pytest.mark.parametrize("count", [0, 1, 2, 21, 22, 999, 1000, 1001, 2000])
def test_writes_what_torch_writes_for_any_number_of_tensors(tmp_path: Path, count: int) -> None:
    state = {f"layers.{n}.é": torch.full((n % 3 + 1,), n, dtype=torch.int32) for n in range(count)}
    assert_same_as_torch(tmp_path / f"many{count}.pth", state)


def test_torch_loads_what_is_written_and_python_finds_it_sound(tmp_path: Path) -> None:
    state = {
        "a.weight": torch.arange(12.0).reshape(3, 4),
        "b": torch.tensor(5),
        "e": torch.zeros(0),
        "h": torch.ones(3).half(),
    }
    data = filled(build(spec(state), root="consolidated"), {key: raw(value) for key, value in state.items()})
    path = tmp_path / "other.pth"
    path.write_bytes(data)
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert list(loaded) == list(state)
        assert all(torch.equal(loaded[key], state[key]) for key in state)
        assert not any(value.requires_grad for value in loaded.values())
    assert zipfile.ZipFile(path).testzip() is None


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
        st.tuples(st.sampled_from(sorted(set(KNOWN) - {"F4"})), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
        max_size=6,
    ),
    st.sampled_from(["archive", "consolidated.00", "é"]),
    st.sampled_from([1, 64, 4096]),
)
def test_what_is_built_reads_back(tensors: dict[str, tuple[str, tuple[int, ...]]], root: str, alignment: int) -> None:
    layout = build([(key, *value) for key, value in tensors.items()], root=root, alignment=alignment)
    assert containers.parse_layout("record", layout.header.size, layout.literals) == layout
    contents = {key: bytes(n % 251 for n in range(nbytes(*value))) for key, value in tensors.items()}
    data = filled(layout, contents)
    reader, header = containers.parse_header(Bytes(data))
    assert values(reader, header) == contents
    assert all(stored.offset % alignment == 0 for stored in header.tensors)
    captured = containers.capture_layout(reader, header)
    assert captured is not None
    assert filled(captured, contents) == data
    assert containers.parse_layout("record", len(data), captured.literals) == captured


def test_the_serialization_id_depends_on_names_and_sizes_alone() -> None:
    specs = [("a", "F32", (2, 3)), ("b", "BF16", (4,))]
    assert build(specs, root="r") == build(specs, root="r")
    other = build([("a", "F32", (2, 3)), ("c", "BF16", (4,))], root="r")
    assert build(specs, root="r").literals[-1] != other.literals[-1]


@pytest.mark.parametrize(
    ("tensors", "root", "error"),
    [
        ([("a", "U8", (1,)), ("a", "U8", (1,))], "r", KeyMismatchError),
        ([("a", "F6_E2M3", (4,))], "r", UsageError),
        ([("a", "F4", (4, 3))], "r", UsageError),
        ([("a", "F4", ())], "r", UsageError),
        ([("\ud800", "U8", (1,))], "r", UsageError),
        ([("a", "U8", (1,))], "a/b", UsageError),
        ([("a", "U8", (1,))], "", UsageError),
    ],
)
def test_build_refuses(tensors: list[tuple[str, str, tuple[int, ...]]], root: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        build(tensors, root=root)


BIG = [
    ("a", "U8", ((1 << 32) + 5,)),
    ("b", "F32", (3,)),
    ("m", "U8", ((1 << 32) - 1,)),
    ("c", "BF16", (5,)),
    ("z", "F32", (0,)),
]


def sparse(path: Path, layout: FileLayout) -> None:
    with path.open("wb") as out:
        for offset, literal in layout.literals:
            out.seek(offset)
            out.write(literal)
        out.truncate(layout.header.size)


def test_more_than_4_gib_are_written_as_torch_writes_them(tmp_path: Path) -> None:
    layout = build(BIG, root="big")
    state = {key: torch.empty(shape, dtype=getattr(torch, DTYPES[dtype].torch)) for key, dtype, shape in BIG}
    with torch.serialization.skip_data():  # leaves the tensors' bytes out, and their CRC-32 at 0
        torch.save(state, tmp_path / "big.pth")
    with LocalFile(tmp_path / "big.pth") as reader:
        assert parse(reader) == layout.header
        theirs = containers.capture_layout(reader, layout.header)
        assert theirs is not None
        assert theirs.literals[:-1] == layout.literals[:-1]
        assert len(theirs.literals[-1][1]) == len(layout.literals[-1][1])


def test_more_than_4_gib_read_back(tmp_path: Path) -> None:
    layout = build(BIG, root="big")
    sparse(tmp_path / "big.pth", layout)
    with LocalFile(tmp_path / "big.pth") as reader:
        assert parse(reader) == layout.header
        assert containers.capture_layout(reader, layout.header) == layout
    with zipfile.ZipFile(tmp_path / "big.pth") as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        assert sizes["big/data/0"] == (1 << 32) + 5
    loaded = torch.load(tmp_path / "big.pth", weights_only=True, mmap=True)
    assert {key: tuple(value.shape) for key, value in loaded.items()} == {key: shape for key, _, shape in BIG}


@pytest.mark.cli
def test_more_than_65535_tensors_read_back() -> None:
    layout = build([(f"w{n}", "U8", (1,)) for n in range(66_000)], root="r")
    data = filled(layout, {stored.key: b"x" for stored in layout.header.tensors})
    assert [stored.offset for stored in parse(Bytes(data)).tensors] == [s.offset for s in layout.header.tensors]
    assert len(zipfile.ZipFile(io.BytesIO(data)).namelist()) == 66_006


# --- capture --------------------------------------------------------------------------------------------------------


def captured(state: object) -> FileLayout | None:
    return containers.capture_layout(*containers.parse_header(Bytes(saved(state))))


def test_capture_covers_transposed_tensors_and_shared_ones_once() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    data = saved({"t": base.T, "tied": base, "again": base})
    layout = captured({"t": base.T, "tied": base, "again": base})
    assert layout is not None
    assert sum(len(literal) for _, literal in layout.literals) == len(data) - 48
    assert containers.parse_layout("record", len(data), layout.literals) == layout


def test_capture_keeps_the_unused_part_of_a_storage() -> None:
    layout = captured({"w": torch.arange(12.0)[3:5]})
    assert layout is not None
    (run,) = layout.header.checksummed
    assert run.nbytes == 48
    literals = b"".join(literal for _, literal in layout.literals)
    assert struct.pack("<3f", 0, 1, 2) in literals
    assert struct.pack("<7f", *range(5, 12)) in literals


@pytest.mark.parametrize(
    "state",
    [
        {"a": torch.arange(12.0).reshape(3, 4)[:, :2]},
        {"a": torch.arange(12.0)[0].expand(3)},
        {"a": torch.arange(12.0)[::2]},
    ],
    ids=["columns", "expanded", "steps"],
)
def test_capture_gives_up_on_views_that_do_not_fill_their_extent(state: object) -> None:
    assert captured(state) is None


def test_capture_gives_up_on_tensors_that_overlap_in_part() -> None:
    base = torch.arange(12.0)
    assert captured({"a": base[:8], "b": base[4:]}) is None
    assert captured({"a": base, "b": base[4:]}) is None
    assert captured({"a": base[:8], "b": base[8:]}) is not None


# --- hostile pickles ------------------------------------------------------------------------------------------------


class Runs:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_no_command_is_ever_run(tmp_path: Path, protocol: int) -> None:
    sentinel = tmp_path / "sentinel"
    payload = pickle.dumps({"w": Runs(os.system, f"touch {sentinel}")}, protocol)
    pickle.loads(payload)
    assert sentinel.exists()  # the payload works
    sentinel.unlink()
    with pytest.raises(CkptConvertError) as caught:
        parse(Bytes(zipped({"data.pkl": payload})))
    assert not sentinel.exists()
    if protocol >= 2:
        assert isinstance(caught.value, UnsafeFileError)
        assert "system" in str(caught.value)
        assert "model.pth" in str(caught.value)


GLOBALS = {
    "builtins.eval": b"cbuiltins\neval\n" + b"(" + text("1/0") + b"tR",
    "__builtin__.eval": b"c__builtin__\neval\n" + b"(" + text("1/0") + b"tR",
    "posix.system": text("posix") + text("system") + b"\x93" + text("true") + b"\x85R",
    "os.system": b"(" + text("true") + b"ios\nsystem\n",
    "torch.load": b"ctorch\nload\n" + text("x") + b"\x85R",
    "torch._utils.os.system": text("torch._utils") + text("os.system") + b"\x93" + text("true") + b"\x85R",
    "torch.storage._load_from_bytes": b"ctorch.storage\n_load_from_bytes\n" + text("x") + b"\x85R",
    "collections.OrderedDict.__init__.__globals__": text("collections")
    + text("OrderedDict.__init__.__globals__")
    + b"\x93",
    "torch.QInt8Storage": b"ctorch\nQInt8Storage\n",
}


@pytest.mark.parametrize("name", GLOBALS)
def test_a_global_that_is_not_on_the_list_is_named(name: str) -> None:
    with pytest.raises(UnsafeFileError) as caught:
        parse(Bytes(pickled(one(GLOBALS[name]), 4)))
    assert repr(name) in str(caught.value)
    assert "nothing was executed" in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        b"(ccollections\nOrderedDict\no",  # OBJ
        b"\x82\x01",  # EXT1
        b"I5\n",  # INT: torch.save writes binary
        b"P5\n",  # PERSID
        b"\x97",  # NEXT_BUFFER
    ],
)
@pytest.mark.parametrize("foreign", [False, True])
def test_an_opcode_that_is_not_on_the_list_is_refused(body: bytes, foreign: bool) -> None:
    with pytest.raises(UnsafeFileError, match="opcode"):
        parse(Bytes(pickled(one(body), 4)), foreign=foreign)


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STATE = b"}" + text("__class__") + b"Ns"
DEEP = b")" + b"\x85" * 100_000

MALFORMED = {
    "state for a tensor": tensor() + STATE + b"b",
    "state for a function": REBUILD + STATE + b"b",
    "state for a storage": storage() + STATE + b"b",
    "slots for a storage": storage() + b"(N" + STATE + b"tb",
    "state for a dtype": b"ctorch\nfloat16\n" + STATE + b"b",
    "state for a dict": b"}" + STATE + b"b",
    "state for a list": b"]" + STATE + b"b",
    "no arguments": REBUILD + b")R",
    "too many arguments": REBUILD + b"(" + b"N" * 30 + b"tR",
    "arguments of other types": REBUILD + b"(NNNNNNtR",
    "arguments that are no tuple": REBUILD + b"]R",
    "a tensor called": tensor() + b")R",
    "a text called": text("os.system") + b")R",
    "a storage type called": b"ctorch\nFloatStorage\n)R",
    "a dtype called": b"ctorch\nfloat16\n)R",
    "an ordered dict of something": b"ccollections\nOrderedDict\n]\x85R",
    "a parameter of nothing": b"ctorch._utils\n_rebuild_parameter\n(N\x88NtR",
    "a parameter of a storage": b"ctorch._utils\n_rebuild_parameter\n(" + storage() + b"\x88NtR",
    "a typed tensor without dtype": b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage() + b"K\0))\x89NNtR",
    "a persistent id of text": text("0") + b"Q",
    "a persistent id of another kind": b"(" + text("module") + b"NNNNtQ",
    "a storage of text": storage(kind=text("FloatStorage")),
    "a storage called by a truth value": b"(" + text("storage") + b"ctorch\nFloatStorage\n\x88NK\6tQ",
    "sizes that are bool": REBUILD + b"(" + storage() + b"K\0\x88\x85K\1\x85\x89NtR",
    "an offset that is bool": REBUILD + b"(" + storage() + b"\x89))\x89NtR",
    "too many sizes": tensor(shape=(1,) * 65, strides=(1,) * 65),
    "a key that is a deep tuple": b"}" + DEEP + b"Ns",
    "a key that is a tensor": b"}" + tensor() + b"Ns",
    "a key that is a huge number": b"}" + integer(1 << 200) + b"Ns",
    "a key without a value": b"}(Nu",
    "a dict item for a list": b"](" + text("a") + b"Nu",
    "a list item for a dict": b"}Na",
    "a list item for a tuple": b")Na",
    "an empty stack": b"\x87\x87",
    "no mark": b"tt",
    "a mark that is left": b"(",
    "a memo that is not there": b"h\x05",
    "a name that is no text": b"NN\x93",
    "a name that is no UTF-8": b"c\xff\n\xff\n",
    "a text that is no UTF-8": b"X\1\0\0\0\xff",
    "a text with half a surrogate": b"X\3\0\0\0\xed\xa0\x80",
    "a text that ends after the file": b"X\xff\xff\xff\xff",
    "a frame that ends after the file": b"\x95" + b"\xff" * 8,
    "a number that ends after the file": b"\x8b\xff\xff\xff\x7f",
    "bytes that end after the file": b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f",
    "no opcode": b"\xf7",
    "another protocol": b"\x80\x09",
    "two values": b"NN",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_pickle_is_refused(case: str) -> None:
    with pytest.raises(CorruptFileError, match=r"model\.pth: data\.pkl should rebuild"):
        parse(Bytes(pickled(one(MALFORMED[case]), 4)))


def test_the_hand_written_pickle_is_sound_otherwise() -> None:
    expected = {"w": torch.zeros(2, 3)}
    assert_reads_as(pickled(one(tensor())), expected)
    assert_reads_as(pickled(one(b"r\xff\xff\xff\xff".join([tensor(), b"j\xff\xff\xff\xff\x86"]))), {
        "w.0": torch.zeros(2, 3), "w.1": torch.zeros(2, 3),
    })  # fmt: skip


def test_a_pickle_cut_anywhere_is_refused() -> None:
    whole = b"\x80\x02" + one(tensor()) + b"."
    for length in range(len(whole)):
        with pytest.raises(CorruptFileError):
            parse(Bytes(zipped({"data.pkl": whole[:length], "data/0": bytes(24)})))
    with pytest.raises(CorruptFileError):
        parse(Bytes(zipped({"data.pkl": whole + b".", "data/0": bytes(24)})))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_make_the_pickle_reader_do_anything_else_than_refuse_or_find_no_tensor(data: bytes) -> None:
    for foreign in (False, True):
        try:
            header = parse(Bytes(zipped({"data.pkl": b"\x80\x02" + data, "data/0": bytes(24)})), foreign=foreign)
        except CkptConvertError:
            continue
        assert not header.tensors


def test_a_dict_that_contains_itself_is_refused() -> None:
    for body in (b"}q\0" + text("a") + b"h\0s", b"}" + text("a") + b"]q\0h\0as"):
        with pytest.raises(CorruptFileError, match="contains itself"):
            parse(Bytes(pickled(body)))


def test_dicts_that_unfold_exponentially_are_refused() -> None:
    dicts = b"}"
    for level in range(60):
        again = b"h" + bytes([level])
        dicts = b"}" + text("a") + dicts + b"q" + bytes([level]) + b"s" + text("b") + again + b"s"
    with pytest.raises(CorruptFileError, match="repeat each other"):
        parse(Bytes(pickled(dicts)))
    lists = b"N"
    for level in range(60):
        lists = lists + b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86"
    with pytest.raises(CorruptFileError, match="repeat each other"):
        parse(Bytes(pickled(one(lists))))


def test_nesting_too_deep_for_recursion_is_refused() -> None:
    with pytest.raises(CorruptFileError, match="nested deeper"):
        parse(Bytes(pickled(one(b"N" + b"\x85" * 50_000))))
    with pytest.raises(CorruptFileError, match="nested deeper"):
        parse(Bytes(pickled((b"}" + text("a")) * 50_000 + b"N" + b"s" * 50_000)))


def test_stand_ins_are_made_anew_for_every_file() -> None:
    with pytest.raises(CorruptFileError):
        parse(Bytes(pickled(one(REBUILD + STATE + b"b"))))
    assert_reads_as(pickled(one(tensor())), {"w": torch.zeros(2, 3)})


# --- lying sizes ----------------------------------------------------------------------------------------------------

LIES = {
    "a storage larger than its member": tensor(held=storage(7)),
    "a storage smaller than its member": tensor(held=storage(5), shape=(5,), strides=(1,)),
    "a storage of negative size": tensor(held=storage(-6)),
    "a storage of another type": tensor(held=storage(6, b"ctorch\nDoubleStorage\n")),
    "an untyped storage of elements": tensor(held=storage(6, b"ctorch.storage\nUntypedStorage\n")),
    "no such member": tensor(held=storage(key="1")),
    "a member outside its folder": tensor(held=storage(key="../data.pkl")),
    "a tensor larger than its storage": tensor(shape=(7,), strides=(1,)),
    "an offset past the end": tensor(offset=1),
    "an offset far past the end": tensor(offset=1 << 62),
    "an offset of astronomic size": tensor(offset=1 << 900),
    "a negative offset": tensor(offset=-1),
    "an empty tensor past the end": tensor(offset=7, shape=(0,), strides=(1,)),
    "a stride past the end": tensor(shape=(2, 3), strides=(4, 1)),
    "a stride of astronomic size": tensor(shape=(2, 3), strides=(1 << 900, 1)),
    "a negative stride": tensor(offset=5, shape=(6,), strides=(-1,)),
    "a negative stride of one element": tensor(shape=(1,), strides=(-1,)),
    "a negative size": tensor(shape=(-2,), strides=(1,)),
    "two negative sizes": tensor(shape=(-2, -3), strides=(3, 1)),
    "a negative size beside none": tensor(shape=(-2, 0), strides=(3, 1)),
    "more sizes than strides": tensor(shape=(2, 3), strides=(1,)),
    "more strides than sizes": tensor(shape=(2,), strides=(1, 1)),
    "more elements than there are bytes in the world": tensor(shape=(1 << 62,), strides=(0,)),
}


@pytest.mark.parametrize("case", LIES)
def test_a_size_that_is_not_true_is_refused(case: str) -> None:
    with pytest.raises(CorruptFileError, match=r"model\.pth: 'w'"):
        parse(Bytes(pickled(one(LIES[case]))))


# --- hostile archives -----------------------------------------------------------------------------------------------

PICKLE = b"\x80\x02" + one(tensor()) + b"."
SOUND = {"data.pkl": PICKLE, "byteorder": b"little", "data/0": bytes(24)}


def test_the_archive_of_these_tests_is_sound() -> None:
    assert_reads_as(zipped(SOUND), {"w": torch.zeros(2, 3)})
    assert is_zip(Bytes(zipped(SOUND)))
    assert not is_zip(Bytes(b"PK"))


def test_a_compressed_archive_is_refused_with_the_way_out() -> None:
    with pytest.raises(CorruptFileError, match=r"compressed.*torch\.save"):
        parse(Bytes(zipped(SOUND, method=zipfile.ZIP_DEFLATED)))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in ("data.pkl", "data/0", "data/0"):
            archive.writestr(f"a/{name}", SOUND[name])
    with pytest.raises(CorruptFileError, match="unique"):
        parse(Bytes(out.getvalue()))


@pytest.mark.parametrize("order", [b"big", b"", b"littlebig", bytes(1000)])
def test_another_byte_order_is_refused(order: bytes) -> None:
    with pytest.raises(CorruptFileError, match="byte order"):
        parse(Bytes(zipped({**SOUND, "byteorder": order})))


def test_no_byte_order_is_little_endian() -> None:
    assert_reads_as(zipped({name: SOUND[name] for name in ("data.pkl", "data/0")}), {"w": torch.zeros(2, 3)})


@pytest.mark.parametrize(
    "members",
    [
        {"data/0": bytes(24)},
        {**SOUND, "deep/data.pkl": PICKLE},
        {"deep/data.pkl": PICKLE, "deep/data/0": bytes(24)},
        {**SOUND, "../b/data.pkl": PICKLE},
    ],
)
def test_another_number_of_pickles_is_refused(members: dict[str, bytes]) -> None:
    with pytest.raises(CorruptFileError, match=r"data\.pkl"):
        parse(Bytes(zipped(members)))


def test_two_folders_are_refused() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", PICKLE)
        archive.writestr("b/data/0", bytes(24))
    with pytest.raises(CorruptFileError, match="folder"):
        parse(Bytes(out.getvalue()))


def patched(data: bytes, magic: bytes, which: int, offset: int, value: bytes) -> bytes:
    """Overwrite bytes at ``offset`` within the ``which``-th structure that starts with ``magic``."""
    place = -1
    for _ in range(which + 1):
        place = data.index(magic, place + 1)
    copy = bytearray(data)
    copy[place + offset : place + offset + len(value)] = value
    assert copy != data
    return bytes(copy)


LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"
ARCHIVES = {
    "a comment": (zipped(SOUND) + b"x", CorruptFileError),
    "bytes before the archive": (b"x" + zipped(SOUND), CorruptFileError),
    "a declared comment": (patched(zipped(SOUND), END, 0, 20, b"\1\0") + b"x", CorruptFileError),
    "several parts": (patched(zipped(SOUND), END, 0, 4, b"\1\0"), CorruptFileError),
    "fewer members than listed": (patched(zipped(SOUND), END, 0, 8, b"\2\0\2\0"), CorruptFileError),
    "a directory elsewhere": (patched(zipped(SOUND), END, 0, 16, b"\1\0\0\0"), CorruptFileError),
    "a directory of another size": (patched(zipped(SOUND), END, 0, 12, b"\xff\xff\xff\x7f"), CorruptFileError),
    "no entry": (patched(zipped(SOUND), CENTRAL, 1, 0, b"XX"), CorruptFileError),
    "an entry cut short": (patched(zipped(SOUND), CENTRAL, 2, 28, b"\xff\xff"), CorruptFileError),
    "encryption": (patched(zipped(SOUND), CENTRAL, 2, 8, b"\1\0"), UnsafeFileError),
    "encryption in the local header": (patched(zipped(SOUND), LOCAL, 2, 6, b"\1\0"), CorruptFileError),
    "a compressed member": (patched(zipped(SOUND), CENTRAL, 2, 10, b"\x08\0"), CorruptFileError),
    "a compressed local header": (patched(zipped(SOUND), LOCAL, 2, 8, b"\x08\0"), CorruptFileError),
    "another packed size": (patched(zipped(SOUND), CENTRAL, 2, 20, b"\5"), CorruptFileError),
    "a larger member": (patched(zipped(SOUND), CENTRAL, 2, 20, b"\xff\0\0\0\xff\0\0\0"), CorruptFileError),
    "a smaller member": (patched(zipped(SOUND), CENTRAL, 2, 20, b"\x10\0\0\0\x10\0\0\0"), CorruptFileError),
    "a zip64 size without a field": (patched(zipped(SOUND), CENTRAL, 2, 24, b"\xff\xff\xff\xff"), CorruptFileError),
    "a member at another's place": (patched(zipped(SOUND), CENTRAL, 2, 42, bytes(4)), CorruptFileError),
    "a member past the end": (patched(zipped(SOUND), CENTRAL, 2, 42, b"\xff\xff\xff\x7f"), CorruptFileError),
    "no local header": (patched(zipped(SOUND), LOCAL, 1, 0, b"XX"), CorruptFileError),
    "another local name": (patched(zipped(SOUND), LOCAL, 1, 30, b"X"), CorruptFileError),
    "a local name of another length": (patched(zipped(SOUND), LOCAL, 1, 26, b"\1\0"), CorruptFileError),
    "a local field of more bytes": (patched(zipped(SOUND), LOCAL, 1, 28, b"\xff\xff"), CorruptFileError),
    "another local size": (patched(zipped(SOUND), LOCAL, 2, 18, b"\5\0\0\0\5"), CorruptFileError),
    "another local CRC-32": (patched(zipped(SOUND), LOCAL, 2, 14, b"\5\5\5\5"), CorruptFileError),
    "a name that is no text": (
        patched(patched(zipped(SOUND), CENTRAL, 2, 46, b"\xff"), LOCAL, 2, 30, b"\xff"),
        CorruptFileError,
    ),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_odd_archive_is_refused(case: str) -> None:
    data, error = ARCHIVES[case]
    with pytest.raises(error, match=r"model\.pth"):
        parse(Bytes(data))


def test_zip64_records_that_disagree_are_refused() -> None:
    data = saved({"a": torch.ones(3)})
    for magic, offset, value in [
        (b"PK\6\6", 24, b"\x63"),
        (b"PK\6\6", 40, b"\x63"),
        (b"PK\6\6", 48, b"\x01"),
        (b"PK\6\6", 4, b"\x30"),
        (b"PK\6\7", 8, b"\x01"),
        (b"PK\6\7", 16, b"\x09"),
    ]:
        with pytest.raises(CorruptFileError):
            parse(Bytes(patched(data, magic, 0, offset, value)))


def test_a_file_cut_anywhere_is_refused() -> None:
    whole = saved({"a": torch.arange(100.0), "b": torch.ones(3)})
    for length in range(len(whole)):
        with pytest.raises(CorruptFileError, match=r"model\.pth"):
            containers.parse_header(Bytes(whole[:length]))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_flipped_byte_is_refused_or_read_within_the_file(data: st.DataObject) -> None:
    whole = bytearray(saved({"a": torch.arange(10.0), "b": {"c": torch.ones(3, dtype=torch.float8_e5m2)}}))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    reader = Bytes(bytes(whole))
    try:
        header = containers.parse_header(reader)[1]
    except CkptConvertError:
        return
    values(reader, header)
