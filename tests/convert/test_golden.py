"""Every direction against tensors that other people's converters made (fixtures/golden), bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

import ckpt_convert
from ckpt_convert.convert import partition
from ckpt_convert.storage.base import Store
from ckpt_convert.storage.memory import MemoryStore
from ckpt_convert.storage.place import Place
from ckpt_convert.tensors import blocks, gather
from tests.helpers import CASES, GOLDEN, assert_same, read_meta, read_safetensors, sums

SHARDED = ("llama", "llama2", "llama_tied")
META = [(case, ranks) for case in SHARDED for ranks in (1, 2, 4)] + [("mistral", 1)]


def meta(case: str, ranks: int = 1) -> Path:
    return GOLDEN / case / f"meta-mp{ranks}"


def hf(case: str) -> Path:
    return GOLDEN / case / "hf"


class Convert:
    """``convert_checkpoint`` on a disk, or in a store without rename, whose files are copied to the disk then.

    In the store a conversion reads what one before it has written there.
    """

    def __init__(self, store: Store | None) -> None:
        self._store = store
        self._written: dict[Path, Place] = {}

    def __call__(self, source: Path, destination: Path, **options: Any) -> ckpt_convert.Report:
        if self._store is None:
            return ckpt_convert.convert_checkpoint(source, destination, **options)
        place = Place(self._store, PurePosixPath(destination.name))
        report = ckpt_convert.convert_checkpoint(self._written.get(source, source), place, **options)
        self._written[destination] = place
        for file in place.entries():
            path = destination / file.relative_name(place)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read(1 << 30))
        return report


@pytest.fixture(params=["disk", "store", "s3"])
def convert(request: pytest.FixtureRequest) -> Convert:
    if request.param == "s3":
        return Convert(request.getfixturevalue("s3_store"))
    return Convert(None if request.param == "disk" else MemoryStore())


@pytest.fixture
def native(tmp_path: Path) -> object:
    """The golden native file with its config, as a directory of its own."""

    def make(case: str) -> Path:
        path = tmp_path / f"native-{case}"
        path.mkdir()
        shutil.copy(GOLDEN / case / "native.safetensors", path / "model.safetensors")
        return path

    return make


def without_tables(tensors: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in tensors.items() if not key.endswith("rope.freqs")}


@pytest.mark.parametrize(("case", "ranks"), META)
def test_hf_to_meta(convert: Convert, case: str, ranks: int, tmp_path: Path) -> None:
    style = "llama2" if case == "llama2" else None
    convert(hf(case), tmp_path / "out", to="meta", model_parallel=ranks, meta_style=style, verify=True)
    found = read_meta(tmp_path / "out")
    expected = read_meta(meta(case, ranks))
    assert len(found) == len(expected) == ranks
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, without_tables(theirs))


@pytest.mark.parametrize(("case", "ranks"), META)
def test_meta_to_hf(convert: Convert, case: str, ranks: int, tmp_path: Path) -> None:
    report = convert(meta(case, ranks), tmp_path / "out", to="hf", verify=True)
    assert_same(read_safetensors(tmp_path / "out"), read_safetensors(hf(case)))
    assert len(report.files) == ranks
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = json.loads((hf(case) / "config.json").read_text())
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"):
        assert config[key] == theirs[key], key
    for key in ("vocab_size", "rms_norm_eps", "head_dim", "tie_word_embeddings", "rope_parameters"):
        assert config[key] == theirs[key], key


@pytest.mark.parametrize(("case", "ranks"), META)
def test_meta_to_native(convert: Convert, case: str, ranks: int, tmp_path: Path) -> None:
    convert(meta(case, ranks), tmp_path / "out", to="native", verify=True)
    assert_same(read_safetensors(tmp_path / "out"), read_safetensors(GOLDEN / case / "native.safetensors"))


@pytest.mark.parametrize("case", CASES)
def test_hf_to_native(convert: Convert, case: str, tmp_path: Path) -> None:
    convert(hf(case), tmp_path / "out", to="native", verify=True)
    assert_same(read_safetensors(tmp_path / "out"), read_safetensors(GOLDEN / case / "native.safetensors"))
    names = {file.name for file in (tmp_path / "out").glob("*.safetensors")}
    assert names == {file.name for file in hf(case).glob("*.safetensors")}
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("case", CASES)
def test_native_to_hf(convert: Convert, case: str, tmp_path: Path, native: object) -> None:
    config = hf(case) / "config.json"
    convert(native(case), tmp_path / "out", to="hf", config=config, verify=True)  # type: ignore[operator]
    assert_same(read_safetensors(tmp_path / "out"), read_safetensors(hf(case)))
    assert (tmp_path / "out" / "config.json").read_bytes() == config.read_bytes()


@pytest.mark.parametrize(("case", "ranks"), META)
def test_native_to_meta(convert: Convert, case: str, ranks: int, tmp_path: Path, native: object) -> None:
    source = native(case)  # type: ignore[operator]
    convert(source, tmp_path / "out", to="meta", like=meta(case, ranks), config=meta(case) / "params.json")
    for mine, theirs in zip(read_meta(tmp_path / "out"), read_meta(meta(case, ranks)), strict=True):
        assert_same(mine, theirs)
    assert (tmp_path / "out" / "params.json").read_bytes() == (meta(case, ranks) / "params.json").read_bytes()


@pytest.mark.parametrize("case", SHARDED)
@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 4), (2, 4), (4, 2), (4, 1), (2, 1), (2, 2)])
def test_reshard(convert: Convert, case: str, before: int, after: int, tmp_path: Path) -> None:
    style = "llama2" if case == "llama2" else None
    convert(meta(case, before), tmp_path / "out", to="meta", model_parallel=after, meta_style=style, verify=True)
    for mine, theirs in zip(read_meta(tmp_path / "out"), read_meta(meta(case, after)), strict=True):
        assert_same(mine, theirs)


BUFFERS = {"usual": (1 << 20, 64 << 20), "tiny": (640, 2048), "small": (4096, 4096)}
SCRATCH = (300, 5000, 8 << 20)


def set_buffers(monkeypatch: pytest.MonkeyPatch, buffers: str, scratch: int) -> None:
    """Golden tensors are small: with small buffers, they are moved in many blocks and pieces as large ones are."""
    block, piece = BUFFERS[buffers]
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(partition, "PIECE", piece)
    monkeypatch.setattr(gather, "SCRATCH", scratch)


def pairs() -> Iterator[tuple[str, str, int]]:
    """Each checkpoint with each size of blocks and pieces and with each scratch, and each two of these sizes together.

    A tensor's blocks depend on its own sizes and these two, whichever checkpoint it is of.
    """
    for row, case in enumerate(CASES):
        for column, buffers in enumerate(BUFFERS):
            yield case, buffers, SCRATCH[(row + column) % len(SCRATCH)]


@pytest.mark.parametrize(("case", "buffers", "scratch"), list(pairs()))
@pytest.mark.parametrize("convert", ["disk"], indirect=True)
def test_any_size_of_buffers_gives_the_same(
    convert: Convert, case: str, buffers: str, scratch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_buffers(monkeypatch, buffers, scratch)
    check_all_directions(convert, case, tmp_path)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("convert", ["store"], indirect=True)
def test_small_buffers_give_the_same_in_a_store(
    convert: Convert, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a store does with many small pieces; how they are filled does not depend on where they go."""
    set_buffers(monkeypatch, "tiny", 300)
    check_all_directions(convert, case, tmp_path)


def check_all_directions(convert: Convert, case: str, tmp_path: Path) -> None:
    ranks = 1 if case == "mistral" else 4
    like = meta(case, ranks)
    convert(hf(case), tmp_path / "meta", to="meta", like=like, verify=True)
    for mine, theirs in zip(read_meta(tmp_path / "meta"), read_meta(like), strict=True):
        assert_same(mine, theirs)
    convert(tmp_path / "meta", tmp_path / "native", to="native", verify=True)
    assert_same(read_safetensors(tmp_path / "native"), read_safetensors(GOLDEN / case / "native.safetensors"))
    convert(tmp_path / "native", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(hf(case))
    convert(hf(case), tmp_path / "cast", to="native", dtype="bfloat16", verify=True)


def trip(convert: Convert, start: Path, steps: tuple[str, ...], folder: Path) -> Path:
    here = start
    for number, step in enumerate(steps):
        there = folder / f"{number}-{step}"
        convert(here, there, to=step)
        here = there
    return here


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "steps", [("hf",), ("meta", "hf"), ("native", "hf"), ("meta", "native", "hf"), ("native", "meta", "hf")]
)
def test_hf_comes_back_file_for_file(convert: Convert, case: str, steps: tuple[str, ...], tmp_path: Path) -> None:
    assert sums(trip(convert, hf(case), steps, tmp_path)) == sums(hf(case))


@pytest.mark.parametrize(("case", "ranks"), META)
@pytest.mark.parametrize("steps", [("meta",), ("hf", "meta"), ("native", "meta"), ("hf", "native", "meta")])
def test_meta_comes_back_file_for_file(
    convert: Convert, case: str, ranks: int, steps: tuple[str, ...], tmp_path: Path
) -> None:
    assert sums(trip(convert, meta(case, ranks), steps, tmp_path)) == sums(meta(case, ranks))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [("meta", "native"), ("hf", "native"), ("hf", "meta", "native"), ("native",)])
def test_native_comes_back_file_for_file(convert: Convert, case: str, steps: tuple[str, ...], tmp_path: Path) -> None:
    start = tmp_path / "start"
    convert(hf(case), start, to="native")
    assert sums(trip(convert, start, steps, tmp_path)) == sums(start)


def test_the_same_conversion_gives_the_same_record(convert: Convert, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(hf("llama"), tmp_path / name, to="meta", workers=2 if name == "one" else 1)
    first, second = (tmp_path / name / "ckpt_convert" for name in ("one", "two"))
    files = sorted(file.relative_to(first) for file in first.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(second) for file in second.rglob("*") if file.is_file())
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
