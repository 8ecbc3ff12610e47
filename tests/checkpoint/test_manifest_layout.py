"""What a manifest says of the weight files is what they say themselves, and is believed only where that is sure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

import ckpt_convert
from ckpt_convert.analysis.check import check_checkpoint
from ckpt_convert.checkpoint import record
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.checkpoint.manifest_layout import described_headers
from ckpt_convert.storage.memory import MemoryStore
from ckpt_convert.storage.place import Place
from tests.helpers import GOLDEN

HF = GOLDEN / "llama" / "hf"
WHERE = PurePosixPath("x")
MANIFEST = "ckpt_convert/manifest.json"
OUTPUTS: dict[str, dict[str, Any]] = {
    "hf": {"to": "hf"},
    "one file": {"to": "hf", "shards": 1},
    "bin": {"to": "hf", "container": "bin"},
    "bfloat16": {"to": "hf", "dtype": "bfloat16", "allow_overflow": True},
    "meta": {"to": "meta"},
    "meta of two ranks": {"to": "meta", "model_parallel": 2},
    "native": {"to": "native"},
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("outputs")
    for name, options in OUTPUTS.items():
        ckpt_convert.convert_checkpoint(HF, made / name, **options)
    return made


def stored(directory: Path) -> MemoryStore:
    """A store in which the manifest was written last."""
    paths = sorted(
        (path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.name == "manifest.json"
    )
    return MemoryStore({str(WHERE / path.relative_to(directory)): path.read_bytes() for path in paths})


def looked_at(store: MemoryStore) -> list[str]:
    """The weight files and indexes that a glance reads."""
    names: list[str] = []
    opened = store.open

    def noted(name: str, *rest: Any) -> Any:
        file = opened(name, *rest)
        fetch = file._fetch

        def fetched(offset: int, nbytes: int) -> Any:
            names.append(name.removeprefix(f"{WHERE}/"))
            return fetch(offset, nbytes)

        file._fetch = fetched
        return file

    store.open = noted  # type: ignore[method-assign]
    with open_identified(Place(store, WHERE), glance=True) as found:
        assert found.family == "llama"
    return [name for name in names if name.startswith(("model", "pytorch_model", "consolidated"))]


@pytest.mark.parametrize("name", OUTPUTS)
def test_it_says_what_the_headers_say(outputs: Path, name: str) -> None:
    manifest = json.loads((outputs / name / MANIFEST).read_text())
    with open_identified(outputs / name) as found:
        assert found.files
        described = {weight.name: (weight.rank, header) for weight, header in described_headers(manifest).items()}
        for file in found.files:
            rank, header = described.pop(file.name)
            assert (rank, header.kind, header.size) == (file.rank, file.header.kind, file.header.size)
            assert (header.tensors, header.metadata) == (file.header.tensors, file.header.metadata)
        assert not described


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_glance_reads_no_weight_file_and_sees_what_is_there(outputs: Path, name: str) -> None:
    store = stored(outputs / name)
    assert looked_at(store) == []
    store.requests.clear()
    with (
        open_identified(Place(stored(outputs / name), WHERE), glance=True) as far,
        open_identified(outputs / name) as near,
    ):
        assert far.tensors == near.tensors
        assert far.config == near.config
        assert (far.format, far.why, far.family, far.notices) == (near.format, near.why, near.family, near.notices)
        assert far.directory == near.directory


SHARD = "model-00002-of-00004.safetensors"


def rewritten(store: MemoryStore, name: str) -> None:
    store.put(str(WHERE / name), store._objects[str(WHERE / name)].data)


CHANGES: dict[str, Callable[[MemoryStore], object]] = {
    "a shard is written again": lambda store: rewritten(store, SHARD),
    "the index is written again": lambda store: rewritten(store, "model.safetensors.index.json"),
    "weights are added": lambda store: store.put(str(WHERE / "model-extra.safetensors"), b"x"),
    "an index is added": lambda store: store.put(str(WHERE / "other.safetensors.index.json"), b"{}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_were_written_later_are_read(outputs: Path, change: str) -> None:
    store = stored(outputs / "hf")
    CHANGES[change](store)
    assert SHARD in looked_at(store)


def test_a_file_that_is_gone_is_missed(outputs: Path) -> None:
    store = stored(outputs / "hf")
    store.delete([str(WHERE / SHARD)])
    with pytest.raises(ckpt_convert.CkptConvertError, match=SHARD):
        looked_at(store)


def test_another_file_of_the_same_size_is_not_overlooked(outputs: Path) -> None:
    store = stored(outputs / "hf")
    data = store._objects[str(WHERE / SHARD)].data
    store.put(str(WHERE / SHARD), data.replace(b'"F32"', b'"I32"'))
    with open_identified(Place(store, WHERE), glance=True) as found:
        assert {file.header.tensors[0].dtype for file in found.files} == {"F32", "I32"}


def test_a_config_of_the_record_that_was_written_later_is_read(outputs: Path) -> None:
    store = stored(outputs / "native")
    name = str(WHERE / record.CONFIG)
    store.put(name, store._objects[name].data.replace(b"1e-05", b"1e-06"))
    with open_identified(Place(store, WHERE), glance=True) as found:
        assert found.config is not None
        assert found.config["rms_norm_eps"] == 1e-6


def test_a_store_without_times_is_asked_for_headers(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(outputs / "hf")
    for name, found in store._objects.items():
        store._objects[name] = found._replace(version=type(found.version)(found.version.size, found.version.etag))
    assert sorted({*looked_at(store)}) == [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]


def of_an_earlier_version(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name not in ("layout", "config")}


def test_a_manifest_without_it_counts_as_before(outputs: Path, tmp_path: Path) -> None:
    for name in ("hf", "meta", "native"):
        directory = shutil.copytree(outputs / name, tmp_path / name)
        manifest = of_an_earlier_version(json.loads((directory / MANIFEST).read_text()))
        (directory / MANIFEST).write_bytes(record.render_manifest(manifest))
        assert looked_at(stored(directory))
        assert check_checkpoint(directory).ok
        back = {"to": "hf"} if name != "hf" else {"to": "meta"}
        ckpt_convert.convert_checkpoint(directory, tmp_path / f"{name}-on", **back)


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        {"index": None, "files": {}},
        {"index": None, "files": {"model.safetensors": {}}},
        {"index": None, "files": {"model.safetensors": {"rank": 0, "kind": "safetensors", "tensors": ["F32 2 @0"]}}},
        {"index": None, "files": {"model.safetensors": {"rank": 0, "kind": "gguf", "tensors": []}}},
        {"index": None, "files": {"../model.safetensors": {"rank": 0, "kind": "safetensors", "tensors": []}}},
        {"index": None, "files": {"model.safetensors": {"rank": 1, "kind": "safetensors", "tensors": []}}},
        {
            "index": None,
            "files": {"model.safetensors": {"rank": 0, "kind": "safetensors", "tensors": ["F32 999999999 @8 x"]}},
        },
    ],
)
def test_a_description_that_cannot_be_true_is_none(outputs: Path, tmp_path: Path, broken: Any) -> None:
    directory = shutil.copytree(outputs / "one file", tmp_path / "x")
    manifest = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_bytes(record.render_manifest({**manifest, "layout": broken}))
    assert looked_at(stored(directory)) == ["model.safetensors"]


def test_verify_compares_it_with_the_headers(outputs: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(outputs / "one file", tmp_path / "x")
    manifest = json.loads((directory / MANIFEST).read_text())
    lines = manifest["layout"]["files"]["model.safetensors"]["tensors"]
    lines[0] = lines[0].replace("F32", "I32")
    (directory / MANIFEST).write_bytes(record.render_manifest(manifest))
    (finding,) = check_checkpoint(directory).findings
    assert (finding.check, finding.file) == ("record", "model.safetensors")
    assert "describes other tensors than its header does" in finding.text
