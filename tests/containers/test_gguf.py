"""GGUF files, against the gguf package's reader and writer, and against files that lie."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpt_convert
from ckpt_convert import containers
from ckpt_convert.checkpoint.checkpoint import Checkpoint, open_identified
from ckpt_convert.errors import AmbiguousFormatError, CkptConvertError, CorruptFileError, InputError

KINDS = gguf.GGMLQuantizationType


def write(path: Path, alignment: int | None = None) -> Path:
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_name("Tiny Llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_block_count(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_array("tokenizer.ggml.tokens", ["a", "βγ", ""] * 1000)
    writer.add_array("tokenizer.ggml.scores", [0.5] * 3000)
    writer.add_chat_template("x" * 10_000)
    writer.add_tensor("token_embd.weight", random.standard_normal((5, 256)).astype(np.float32))
    writer.add_tensor("norm", random.standard_normal(7).astype(np.float16))
    for name, kind in (("q8", KINDS.Q8_0), ("q4", KINDS.Q4_0), ("bf", KINDS.BF16)):
        data = gguf.quants.quantize(random.standard_normal((2, 3, 256)).astype(np.float32), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    packed = random.integers(0, 255, (3, gguf.GGML_QUANT_SIZES[KINDS.Q4_K][1] * 2), np.uint8)
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=KINDS.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 64])
def test_keys_shapes_types_and_bytes_are_those_of_the_package(tmp_path: Path, alignment: int | None) -> None:
    theirs = gguf.GGUFReader(write(tmp_path / "m.gguf", alignment))
    with open_identified(tmp_path / "m.gguf") as checkpoint:
        assert list(checkpoint.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            info = checkpoint.tensors[tensor.name]
            assert info.shape == tuple(reversed(tensor.shape.tolist()))
            assert info.dtype == tensor.tensor_type.name
            assert info.nbytes == tensor.n_bytes
            assert info.parts[0].offset == tensor.data_offset
            assert Checkpoint(checkpoint)[tensor.name].tobytes() == tensor.data.tobytes()
        assert (Checkpoint(checkpoint)["token_embd.weight"].torch().numpy() == theirs.tensors[0].data).all()
        assert checkpoint.files[0].header.metadata["llama.rope.freq_base"] == "10000.0"


def test_what_the_file_says_of_itself(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    with open_identified(tmp_path / "m.gguf") as checkpoint:
        assert (checkpoint.format, checkpoint.family) == (None, None)
        assert "GGUF" in checkpoint.why
        facts = dict(checkpoint.facts)
        assert facts["architecture"] == "llama (GGUF)"
        assert facts["name"] == "Tiny Llama"
        assert facts["quantised"].startswith("Q4_K_M ")
        with pytest.raises(InputError, match="Q4_K"):
            Checkpoint(checkpoint)["blk.0.ffn_up.weight"].torch()
        with pytest.raises(AmbiguousFormatError, match="original checkpoint"):
            _ = checkpoint.model
    with open_identified(tmp_path / "m.gguf", format="hf") as checkpoint:
        assert checkpoint.format is None


def test_a_directory_of_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "m-Q4.gguf")
    write(tmp_path / "m-Q8.gguf")
    with open_identified(tmp_path) as checkpoint:
        assert len(checkpoint.files) == 2
        assert {"m-Q4.gguf:norm", "m-Q8.gguf:norm"} <= set(checkpoint.tensors)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(InputError, match=r"m\.gguf.*ckpt-convert\[gguf\]"):
        ckpt_convert.open_checkpoint(tmp_path / "m.gguf")


class Bytes:
    name = "m.gguf"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes = b"w", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(*infos: bytes, keys: tuple[bytes, ...] = (), version: int = 3, counts: tuple[int, int] | None = None) -> bytes:
    tensors, values = counts or (len(infos), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, values) + b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % 32) + bytes(64)


def test_the_file_of_these_tests_is_sound() -> None:
    header = containers.parse_header(Bytes(file(tensor(), keys=(text(b"a") + struct.pack("<II", 4, 5),))))[1]
    assert [(t.key, t.dtype, t.shape) for t in header.tensors] == [("w", "F32", (4,))]
    assert header.metadata == {"a": "5"}


HUGE = 1 << 62
LIES = {
    "more tensors than bytes": file(tensor(), counts=(HUGE, 0)),
    "more keys than bytes": file(tensor(), counts=(1, HUGE)),
    "a huge name": file(struct.pack("<Q", HUGE)),
    "a long name": file(text(b"x" * 5000) + tensor()[9:]),
    "a name that is no text": file(tensor(b"\xff")),
    "many dimensions": file(text(b"w") + struct.pack("<I", 1 << 31)),
    "a huge tensor": file(tensor(dims=(HUGE, HUGE))),
    "a tensor past the end": file(tensor(dims=(1000,))),
    "an offset past the end": file(tensor(offset=HUGE)),
    "an offset that is not aligned": file(tensor(offset=4)),
    "half a block": file(tensor(dims=(31,), kind=8)),
    "a key twice": file(tensor(), tensor()),
    "an unknown kind of value": file(keys=(text(b"a") + struct.pack("<I", 13),)),
    "a huge text": file(keys=(text(b"a") + struct.pack("<IQ", 8, HUGE),)),
    "a huge list": file(keys=(text(b"a") + struct.pack("<IIQ", 9, 4, HUGE),)),
    "a huge list of texts": file(keys=(text(b"a") + struct.pack("<IIQ", 9, 8, HUGE),)),
    "lists in lists": file(keys=(text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100,)),
    "no alignment": file(tensor(), keys=(text(b"general.alignment") + struct.pack("<II", 4, 0),)),
    "an odd alignment": file(tensor(), keys=(text(b"general.alignment") + struct.pack("<II", 4, 24),)),
    "an alignment that is a text": file(
        tensor(), keys=(text(b"general.alignment") + struct.pack("<I", 8) + text(b"x"),)
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie: str) -> None:
    with pytest.raises(CorruptFileError, match=r"m\.gguf"):
        containers.parse_header(Bytes(LIES[lie]))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (file(tensor(), version=1), "version 1"),
        (file(tensor(), version=3 << 24), "big-endian"),
        (file(tensor(kind=4)), "type 4"),  # Q4_2, which was taken out
    ],
)
def test_what_the_package_does_not_know(data: bytes, word: str) -> None:
    with pytest.raises(InputError, match=word):
        containers.parse_header(Bytes(data))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf").read_bytes()
    for length in [*range(4, 200), *range(200, len(whole) - 31, 997)]:
        with pytest.raises(CorruptFileError, match=r"m\.gguf"):
            containers.parse_header(Bytes(whole[:length]))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_flipped_byte_is_refused_or_read_within_the_file(data: st.DataObject) -> None:
    whole = bytearray(file(tensor(), tensor(b"v", offset=32), keys=(text(b"a") + struct.pack("<IIQI", 9, 4, 1, 7),)))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = containers.parse_header(Bytes(bytes(whole)))[1]
    except CkptConvertError:
        return
    assert all(tensor.offset + tensor.nbytes <= len(whole) for tensor in header.tensors)
