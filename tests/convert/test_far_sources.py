"""What lies in a store without folders, links or rename is read as what lies in a directory is, and in few requests."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import safetensors.torch
import torch

import ckpt_convert
from ckpt_convert.analysis.check import check_checkpoint
from ckpt_convert.analysis.diff.compare import compare_checkpoints
from ckpt_convert.analysis.stats.stats import tensor_statistics
from ckpt_convert.checkpoint.checkpoint import Checkpoint, open_identified
from ckpt_convert.cli import facts
from ckpt_convert.errors import CheckpointNotFoundError, CorruptFileError, SourceChangedError
from ckpt_convert.storage.memory import MemoryStore
from ckpt_convert.storage.place import Place
from tests.checkpoint.quantizing import fp8_llama
from tests.helpers import GOLDEN

HF = GOLDEN / "llama" / "hf"
META = GOLDEN / "llama" / "meta-mp2"
WHERE = PurePosixPath("models/x")


Stored = Callable[[Path], Place]
Requests = Callable[[Place], dict[str, int]]


@pytest.fixture(params=["memory", "s3"])
def stored(request: pytest.FixtureRequest) -> Stored:
    """Puts the files of a directory into a store."""
    bucket = request.getfixturevalue("bucket") if request.param == "s3" else None

    def put(directory: Path) -> Place:
        files = {f"{WHERE}/{name}": data for name, data in contents(directory).items()}
        if bucket is None:
            return Place(MemoryStore(files), WHERE)
        for name, data in files.items():
            bucket.put(name, data)
        return Place(request.getfixturevalue("s3_store"), WHERE)

    return put


@pytest.fixture
def requests(request: pytest.FixtureRequest) -> Requests:
    """Counts the requests to the store of a place by their kinds."""

    def count(place: Place) -> dict[str, int]:
        if isinstance(place.store, MemoryStore):
            return dict(place.store.requests)
        return dict(request.getfixturevalue("s3_server").log.kinds())

    return count


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def made(directory: Path, source: Path, **options: Any) -> Path:
    ckpt_convert.convert_checkpoint(source, directory, **options)
    return directory


def quantized(directory: Path) -> Path:
    fp8_llama(directory)
    return directory


SOURCES: dict[str, Callable[[Path], Path]] = {
    "hf": lambda tmp: HF,
    "hf, tied": lambda tmp: GOLDEN / "llama_tied" / "hf",
    "meta of two ranks": lambda tmp: META,
    "meta with a record": lambda tmp: made(tmp / "meta", HF, to="meta"),
    "native": lambda tmp: made(tmp / "native", HF, to="native"),
    "torchtitan, which is DCP": lambda tmp: made(tmp / "titan", HF, to="torchtitan"),
    "bin": lambda tmp: made(tmp / "bin", HF, to="hf", container="bin"),
    "quantized": lambda tmp: quantized(tmp / "fp8"),
}


@pytest.fixture(params=SOURCES, ids=str)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return SOURCES[request.param](tmp_path / "made")


class TestConversions:
    @pytest.mark.parametrize("to", ["hf", "meta", "torchtitan"])
    def test_the_output_is_that_of_a_directory(
        self, stored: Stored, requests: Requests, source: Path, to: str, tmp_path: Path
    ) -> None:
        place = stored(source)
        options: dict[str, Any] = {"dequantize": "float32"} if "fp8" in source.name else {}
        ckpt_convert.convert_checkpoint(source, tmp_path / "from_directory", to=to, **options)
        report = ckpt_convert.convert_checkpoint(place, tmp_path / "from_store", to=to, verify=True, **options)
        assert contents(tmp_path / "from_store") == contents(tmp_path / "from_directory")
        assert report.source == str(place)
        # All that is there, and again at the end; the folder above Meta's files, where their tokenizer may lie, twice.
        assert requests(place)["list"] == (4 if source.name.startswith("meta") else 2)
        assert requests(place).get("head", 0) == 0

    def test_pieces_are_read_as_ranges(self, stored: Stored, requests: Requests, tmp_path: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(4096, 2048, generator=generator)
        (tmp_path / "model").mkdir()
        safetensors.torch.save_file(
            {"a.weight": weight, "b.weight": weight + 1}, tmp_path / "model" / "model.safetensors"
        )
        place = stored(tmp_path / "model")
        (tmp_path / "model" / "config.json").write_text("{}")
        with ckpt_convert.open_checkpoint(place) as opened:
            before = requests(place)["get"]
            opened["b.weight"].torch()
        mebibytes = weight.nbytes >> 20
        assert 1 <= requests(place)["get"] - before <= mebibytes + 1

    def test_from_store_to_store(self, stored: Stored, tmp_path: Path) -> None:
        place = stored(HF)
        there, back = place.parent / "meta", place.parent / "back"
        ckpt_convert.convert_checkpoint(place, there, to="meta")
        ckpt_convert.convert_checkpoint(there, back, to="hf")
        with_record = {file.relative_name(back): file.read(1 << 24) for file in back.entries()}
        assert {name: data for name, data in with_record.items() if not name.startswith("ckpt_convert/")} == contents(
            HF
        )

    def test_a_config_and_a_checkpoint_to_imitate_may_lie_there_too(self, stored: Stored, tmp_path: Path) -> None:
        place = stored(HF)
        ckpt_convert.convert_checkpoint(META, tmp_path / "directory", to="hf", like=HF)
        ckpt_convert.convert_checkpoint(META, tmp_path / "store", to="hf", like=place)
        assert contents(tmp_path / "store") == contents(tmp_path / "directory")
        with ckpt_convert.open_checkpoint(
            place / "model-00001-of-00004.safetensors", config=place / "config.json"
        ) as one:
            assert one.family == "llama"

    def test_what_changes_meanwhile_is_told(self, stored: Stored, tmp_path: Path) -> None:
        place = stored(HF)

        def touch(progress: Any) -> None:
            place.store.put(f"{WHERE}/generation_config.json", b"{}")

        with pytest.raises(SourceChangedError, match=r"generation_config\.json: the source changed while it was read"):
            ckpt_convert.convert_checkpoint(place, tmp_path / "out", to="meta", progress=touch)
        assert not (tmp_path / "out").exists()

    def test_an_old_torch_file_is_read_by_ranges(self, stored: Stored, tmp_path: Path) -> None:
        torch.save({"a": torch.arange(6.0)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
        with ckpt_convert.open_checkpoint(stored(tmp_path) / "old.bin") as checkpoint:
            assert checkpoint["a"][2:4].torch().tolist() == [2.0, 3.0]


class TestOpening:
    def test_few_requests(self, stored: Stored, requests: Requests, source: Path) -> None:
        place = stored(source)
        with open_identified(place) as opened:
            small = {"config.json", "params.json", "manifest.json", "model.safetensors.index.json", ".metadata"}
            read = [
                name for name in contents(source) if PurePosixPath(name).name in small or name.endswith(".index.json")
            ]
            assert requests(place)["list"] == 1
            assert requests(place).get("head", 0) == 0
            assert requests(place)["get"] <= 2 * len(opened.files) + len(read)

    def test_it_is_what_a_directory_is(self, stored: Stored, source: Path) -> None:
        with open_identified(stored(source)) as far, open_identified(source) as near:
            assert document(far) == document(near)
            for key in list(near.tensors)[:4]:
                assert Checkpoint(far)[key].tobytes() == Checkpoint(near)[key].tobytes()

    def test_an_index_a_file_and_a_pointer(self, stored: Stored) -> None:
        place = stored(HF)
        with open_identified(place / "model.safetensors.index.json") as opened:
            assert len(opened.files) == 4
        with open_identified(place / "model-00001-of-00004.safetensors") as opened:
            assert len(opened.files) == 1
        place.store.put(str(WHERE.parent / "latest"), b"x\n")
        with open_identified(place.parent / "latest") as opened:
            assert len(opened.files) == 4

    def test_nothing_is_there(self, stored: Stored) -> None:
        place = stored(HF).parent / "y"
        with pytest.raises(CheckpointNotFoundError, match=f"{place}: no such file or directory; look at"):
            ckpt_convert.open_checkpoint(place)

    def test_statistics(self, stored: Stored) -> None:
        def all_of(place: Any) -> list[Any]:
            with open_identified(place) as opened:
                return list(tensor_statistics(opened, opened.tensors, workers=2))

        assert all_of(stored(HF)) == all_of(HF)


def document(checkpoint: ckpt_convert.Checkpoint) -> Any:
    """What inspect says as JSON, without the place."""
    gathered = facts.gather(checkpoint)
    text = json.dumps(facts.document(gathered, list(checkpoint.tensors.values()), None))
    return json.loads(text.replace(str(checkpoint.root), "PLACE"))


def damage(directory: Path) -> Iterator[tuple[str, bytes | None]]:
    """What may befall a checkpoint: files that are changed, or gone."""
    shard = (directory / "model-00002-of-00004.safetensors").read_bytes()
    yield "model-00002-of-00004.safetensors", None
    yield "model-00002-of-00004.safetensors", shard[:-10]
    yield "model-00002-of-00004.safetensors", shard[:200] + b"xx" + shard[202:]
    yield "model.safetensors.index.json", b"{"
    yield "model.safetensors.index.json", None
    yield "config.json", None
    yield "config.json", (directory / "config.json").read_bytes().replace(b"8", b"9")
    yield "generation_config.json", b""
    yield "model.bin", b"left over"
    yield "x.partial", b""


class TestVerify:
    def test_it_is_what_a_directory_is(self, stored: Stored, requests: Requests, source: Path) -> None:
        place = stored(source)
        far, near = check_checkpoint(place), check_checkpoint(source)
        assert replace(far, path="") == replace(near, path="")
        assert requests(place)["list"] <= 3, "all that is there, and twice what a writer may have left beside it"

    @pytest.mark.parametrize("number", range(10))
    def test_the_findings_are_the_same(self, stored: Stored, number: int, tmp_path: Path) -> None:
        broken = shutil.copytree(HF, tmp_path / "broken")
        name, data = [*damage(HF)][number]
        (broken / name).unlink(missing_ok=True)
        if data is not None:
            (broken / name).write_bytes(data)
        place = stored(broken)
        far, near = check_checkpoint(place), check_checkpoint(broken)
        assert said(far, str(place)) == said(near, str(broken))
        assert [one.check for one in far.skipped] == [one.check for one in near.skipped]

    def test_what_is_not_as_it_was_written(self, stored: Stored, tmp_path: Path) -> None:
        directory = made(tmp_path / "meta", HF, to="meta")
        place = stored(directory)
        for name in ("params.json", "ckpt_convert/manifest.json"):
            data = (directory / name).read_bytes().replace(b"4", b"5")
            place.store.put(f"{WHERE}/{name}", data)
            (directory / name).write_bytes(data)
            assert said(check_checkpoint(place), str(place)) == said(check_checkpoint(directory), str(directory))
        with pytest.raises(CorruptFileError, match="was edited or damaged"):
            ckpt_convert.open_checkpoint(place)


def said(report: Any, place: str) -> list[str]:
    return [finding.text.replace(place, "PLACE") for finding in report.findings]


def test_diff(stored: Stored, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with open_identified(stored(HF)) as far, open_identified(META) as near:
        assert compare_checkpoints(far, near).same
