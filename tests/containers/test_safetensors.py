"""The safetensors container, against the safetensors library and against headers that no writer would write."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.torch import save

from ckpt_convert import containers
from ckpt_convert.containers.safetensors import MAX_HEADER, build, parse, serialized_order
from ckpt_convert.dtypes import DTYPES, FROM_TORCH, nbytes
from ckpt_convert.errors import CkptConvertError, CorruptFileError, KeyMismatchError, UsageError
from ckpt_convert.storage.base import read_range
from ckpt_convert.storage.reader import LocalFile
from ckpt_convert.tensors.header import FileLayout, StoredTensor

KNOWN = [name for name, dtype in DTYPES.items() if dtype.torch and name != "C128"]


class Bytes:
    name = "model.safetensors"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]


class Huge(Bytes):
    """A file of which only the start is there."""

    def __init__(self, data: bytes, size: int) -> None:
        super().__init__(data)
        self.size = size


def file(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(begin: int, end: int, dtype: object = "U8", shape: object = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def coded(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of any dtype whose bytes all come from a counter."""
    size = nbytes(dtype, shape)
    data = torch.arange(seed, seed + size, dtype=torch.int64).remainder(2 if dtype == "BOOL" else 251).to(torch.uint8)
    return data.view(getattr(torch, DTYPES[dtype].torch)).reshape(torch.Size(packed(dtype, shape)))


def packed(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape


def spec(state: dict[str, torch.Tensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    found = []
    for key, tensor in state.items():
        dtype = FROM_TORCH[str(tensor.dtype).removeprefix("torch.")].name
        shape = tuple(tensor.shape)
        found.append((key, dtype, (*shape[:-1], shape[-1] * 2) if dtype == "F4" else shape))
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def filled(layout: FileLayout, values: dict[str, bytes]) -> bytes:
    data = bytearray(layout.header.size)
    for offset, literal in layout.literals:
        data[offset : offset + len(literal)] = literal
    for tensor in layout.header.tensors:
        data[tensor.offset : tensor.offset + tensor.nbytes] = values[tensor.key]
    return bytes(data)


STATE = {
    "z.int": torch.arange(6, dtype=torch.int64).reshape(2, 3),
    "a.bf16": torch.arange(8, dtype=torch.float32).to(torch.bfloat16).reshape(4, 2),
    "scalar": torch.tensor(7.5),
    "empty": torch.zeros(0, 3),
    "flags": torch.tensor([True, False, True]),
    "nan": torch.tensor([0x7FA00001, 1], dtype=torch.int32).view(torch.float32),
    "fp8": torch.arange(5, dtype=torch.float32).to(torch.float8_e4m3fn),
}


def test_reads_what_the_library_wrote() -> None:
    data = save(STATE, {"format": "pt"})
    header = parse(Bytes(data))
    assert header.kind == "safetensors"
    assert header.size == len(data)
    assert header.metadata == {"format": "pt"}
    assert {t.key: read_range(Bytes(data), t.offset, t.nbytes) for t in header.tensors} == {
        k: raw(v) for k, v in STATE.items()
    }
    assert {t.key: (t.dtype, t.shape) for t in header.tensors} == {k: (d, s) for k, d, s in spec(STATE)}


def test_tensors_come_in_offset_order_and_empty_ones_in_header_order() -> None:
    header = {"late": entry(4, 6), "empty2": entry(4, 4), "first": entry(0, 4), "empty1": entry(4, 4)}
    found = parse(Bytes(file(header, bytes(6))))
    assert [t.key for t in found.tensors] == ["first", "empty2", "empty1", "late"]


def test_writes_what_the_library_writes() -> None:
    for metadata in ({}, {"format": "pt"}, {"a\n": 'é"\x1f'}):
        expected = save(STATE, metadata or None)
        layout = build(serialized_order(spec(STATE)), metadata)
        assert filled(layout, {k: raw(v) for k, v in STATE.items()}) == expected


@pytest.mark.parametrize("name", ["a\x01\x7f\t\b", 'qu"ote\\/', "é\u2028\U0001f600", "", "../up", " "])
def test_escapes_names_as_the_library_does(name: str) -> None:
    layout = build([(name, "U8", (1,))], {})
    data = filled(layout, {name: b"\5"})
    assert data == save({name: torch.tensor([5], dtype=torch.uint8)})
    assert parse(Bytes(data)).tensors == layout.header.tensors


def test_orders_every_dtype_as_the_library_does() -> None:
    state = {f"{name}.{n}": coded(name, (3, 2), n) for n in (10, 9) for name in KNOWN}
    expected = save(state)
    assert filled(build(serialized_order(spec(state)), {}), {k: raw(v) for k, v in state.items()}) == expected
    assert parse(Bytes(expected)).size == len(expected)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs",)), max_size=8).filter(lambda key: key != "__metadata__"),
        st.tuples(st.sampled_from(sorted(set(KNOWN) - {"F4"})), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
        max_size=6,
    ),
    st.dictionaries(st.text("ab\n", max_size=3), st.text("é\x00", max_size=3), max_size=2),
    st.sampled_from([8, 64, 4096]),
)
def test_what_is_built_reads_back(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str], alignment: int
) -> None:
    layout = build([(key, *value) for key, value in tensors.items()], metadata, alignment=alignment)
    values = {key: raw(coded(*value)) for key, value in tensors.items()}
    data = filled(layout, values)
    reader, header = containers.parse_header(Bytes(data))
    assert header == layout.header
    assert containers.capture_layout(reader, header) == layout
    assert containers.parse_layout("record", len(data), layout.literals) == layout
    assert (8 + int.from_bytes(data[:8], "little")) % alignment == 0
    assert {key: bytes(found["data"]) for key, found in deserialize(data)} == values


def test_reads_a_local_file(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(save(STATE))
    with LocalFile(tmp_path / "m.safetensors") as reader:
        assert {t.key for t in parse(reader).tensors} == set(STATE)


def test_capture_and_parse_layout_keep_a_foreign_header_byte_for_byte() -> None:
    text = (
        b'{ "b":{"shape":[2],"dtype":"U8","data_offsets":[0,2]},\n"a":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}} '
    )
    data = file(text, b"xyz")
    layout = containers.capture_layout(*containers.parse_header(Bytes(data)))
    assert layout is not None
    assert layout.literals == ((0, data[:-3]),)
    assert filled(layout, {"a": b"z", "b": b"xy"}) == data
    assert containers.parse_layout("record", len(data), layout.literals) == layout


def test_parse_layout_refuses_what_is_not_exactly_the_rest_of_the_file() -> None:
    layout = build([("a", "U8", (4,))], {})
    ((_, text),) = layout.literals
    size = layout.header.size
    for wrong in (
        [(0, text + b"x")],
        [(0, text[:-1])],
        [(0, text), (size - 1, b"x")],
        [(0, text), (size, b"x")],
        [(1, text)],
        [(0, text), (0, text)],
        [],
    ):
        with pytest.raises(CorruptFileError):
            containers.parse_layout("record", size, wrong)


REFUSED = {
    "not a brace first": (file(b' {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "start with"),
    "a list": (file([]), "start with"),
    "an empty header": (file(b""), "start with"),
    "not UTF-8": (file(b'{"\xff":1}'), "UTF-8"),
    "not JSON": (file(b'{"a":}'), "JSON"),
    "two documents": (file(b"{}{}"), "JSON"),
    "NaN": (file(b'{"a":NaN}'), "NaN"),
    "deep": (file(b'{"a":' * 100_000), "nested"),
    "half a surrogate": (file(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "Unicode"),
    "duplicate keys": (
        file(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
        ),
        "twice",
    ),
    "duplicate fields": (file(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "twice"),
    "one tensor's entry": (file(entry(0, 1), b"x"), "single tensor"),
    "an extra field": (file({"a": entry(0, 1) | {"more": 1}}, b"x"), "'a'"),
    "a missing field": (file({"a": {"dtype": "U8", "shape": [1]}}, b"x"), "'a'"),
    "no dict": (file({"a": 5}, b"x"), "'a'"),
    "an unknown dtype": (file({"a": entry(0, 1, "Q9")}, b"x"), "Q9"),
    "a dtype safetensors lacks": (file({"a": entry(0, 16, "C128", [1])}, bytes(16)), "C128"),
    "a dtype that is a number": (file({"a": entry(0, 1, 5)}, b"x"), "dtype"),
    "a bool size": (file({"a": entry(0, 1, "U8", [True])}, b"x"), "integers"),
    "a float size": (file({"a": entry(0, 1, "U8", [1.0])}, b"x"), "integers"),
    "a negative size": (file({"a": entry(0, 1, "U8", [-1])}, b"x"), "integers"),
    "two negative sizes": (file({"a": entry(0, 1, "U8", [-1, -1])}, b"x"), "integers"),
    "a huge size": (file({"a": entry(0, 0, "U8", [2**63, 0])}), "integers"),
    "too many dimensions": (file({"a": entry(0, 1, "U8", [1] * 65)}, b"x"), "64"),
    "a shape that is no list": (file({"a": entry(0, 1, "U8", "1")}, b"x"), "'a'"),
    "a bool offset": (file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [False, 1]}}, b"x"), "data_offsets"),
    "three offsets": (file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 1]}}, b"x"), "data_offsets"),
    "descending offsets": (file({"a": {"dtype": "U8", "shape": [0], "data_offsets": [1, 0]}}, b"x"), "data_offsets"),
    "offsets of another size": (file({"a": entry(0, 2, "U8", [3])}, b"xy"), "bits"),
    "half a byte": (file({"a": entry(0, 1, "F4", [1])}, b"x"), "bits"),
    "a hole at the start": (file({"a": entry(1, 2)}, b"xy"), "hole"),
    "a hole between": (file({"a": entry(0, 1), "b": entry(2, 3)}, b"xyz"), "hole"),
    "an overlap": (file({"a": entry(0, 2), "b": entry(1, 3)}, b"xyz"), "overlaps"),
    "the same bytes twice": (file({"a": entry(0, 2), "b": entry(0, 2)}, b"xy"), "overlaps"),
    "an empty tensor within another": (file({"a": entry(0, 2), "b": entry(1, 1)}, b"xy"), "overlaps"),
    "bytes after the last tensor": (file({"a": entry(0, 1)}, b"xy"), "after the last"),
    "a truncated body": (file({"a": entry(0, 3)}, b"xy"), "truncated"),
    "bytes after no tensor": (file({}, b"x"), "after the last"),
    "metadata of numbers": (file({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata that is a tensor": (file({"__metadata__": entry(0, 1)}, b"x"), "__metadata__"),
    "metadata that is text": (file({"__metadata__": "a"}), "__metadata__"),
    "less than a length": (b"\1\0\0", "truncated"),
    "a header past the end": ((100).to_bytes(8, "little") + b"{}", "truncated"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    data, word = REFUSED[case]
    with pytest.raises(CorruptFileError, match=word) as caught:
        parse(Bytes(data))
    assert "model.safetensors" in str(caught.value)


def test_a_header_of_more_than_100_mb_is_refused_unread() -> None:
    with pytest.raises(CorruptFileError, match=str(MAX_HEADER)):
        parse(Huge((MAX_HEADER + 1).to_bytes(8, "little") + b"{", 1 << 40))


def test_a_truncated_file_names_both_sizes() -> None:
    data = save(STATE)
    with pytest.raises(CorruptFileError, match=rf"{len(data)} bytes, but the file has {len(data) - 5}"):
        parse(Bytes(data[:-5]))


@given(st.data())
def test_no_truncation_is_ever_read(data: st.DataObject) -> None:
    whole = save(STATE)
    length = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(CorruptFileError):
        containers.parse_header(Bytes(whole[:length]))


@given(st.integers(0, 400), st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_read_within_the_file(position: int, value: int) -> None:
    data = bytearray(save(STATE))
    data[position] = value
    try:
        header = containers.parse_header(Bytes(bytes(data)))[1]
    except CkptConvertError:
        return
    assert sum(t.nbytes for t in header.tensors) == sum(len(raw(v)) for v in STATE.values())


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ([("a", "U8", (1,)), ("a", "U8", (1,))], KeyMismatchError),
        ([("__metadata__", "U8", (1,))], UsageError),
        ([("a", "C128", (1,))], UsageError),
        ([("\ud800", "U8", (1,))], UsageError),
        ([("a", "F4", (1,))], CorruptFileError),
    ],
)
def test_build_refuses(tensors: list[tuple[str, str, tuple[int, ...]]], error: type[Exception]) -> None:
    with pytest.raises(error):
        build(tensors, {})


@pytest.mark.cli
def test_91000_tensors_read_back() -> None:
    layout = build([(f"model.layers.{n}.weight", "BF16", (n % 3, 2)) for n in range(91_000)], {"format": "pt"})
    assert parse(Huge(layout.literals[0][1], layout.header.size)) == layout.header


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"<html><body>", "web page"),
        (b"what is this?", "what is this"),
    ],
)
def test_says_what_a_file_of_no_known_kind_is(data: bytes, word: str) -> None:
    with pytest.raises(CorruptFileError, match=word):
        containers.parse_header(Bytes(data))


def test_a_header_length_that_looks_like_a_pickle_is_still_safetensors() -> None:
    for length in (0x0280, 0x0480):  # the bytes 80 02 and 80 04, as a pickle starts
        text = json.dumps({"a": entry(0, 1)}).encode().ljust(length)
        assert containers.parse_header(Bytes(file(text, b"x")))[1].tensors == (
            StoredTensor("a", "U8", (1,), 8 + length),
        )
