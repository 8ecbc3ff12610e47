"""One output, written by several processes that have the same plan: it is the one that a single process writes."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

import ckpt_convert
from ckpt_convert.checkpoint.record import MANIFEST, render_manifest
from ckpt_convert.convert import ownership, partition
from ckpt_convert.convert.execute import byte_comparer, settle_originals
from ckpt_convert.convert.output import finish_output
from ckpt_convert.convert.plan import Plan, SourceFile, memory_source
from ckpt_convert.convert.publish import StagedOutput
from ckpt_convert.convert.sources import NumberedTensors, ReopenedSources
from ckpt_convert.errors import SourceChangedError, UsageError
from ckpt_convert.storage import by_rename
from ckpt_convert.storage.place import as_place
from tests.checkpoint.quantizing import fp8_llama
from tests.convert.parts import write_part
from tests.helpers import GOLDEN, sums


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Two processes that have nothing of this one, started once: that costs more than what they do."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


def converted_by_two(plan: Plan, destination: Path, processes: ProcessPoolExecutor) -> None:
    plan = settle_originals(plan, byte_comparer(NumberedTensors(plan, ReopenedSources(plan))))
    with (
        by_rename.stage(as_place(destination), ownership.RULES) as stage,
        StagedOutput(plan, stage, stage.folder) as staged,
    ):
        left = staged.begin(partition.split_into_pieces(plan.files))
        halves = partition.partition_pieces(plan.files, 2)
        assert sorted(left) == sorted(piece for half in halves for piece in half)
        assert all(halves)
        staged.create_files()
        sent = [pickle.dumps((plan, half)) for half in halves]
        done = [one for half in processes.map(write_part, sent, [str(stage.path)] * 2) for one in half]
        for one in done:
            staged.add(one)
        written = finish_output(plan, done, staged, stage.folder, 1, None)
        stage.folder.write(MANIFEST, render_manifest(written.manifest))
        plan.check_sources()
        stage.commit()


def fp8(directory: Path) -> Path:
    fp8_llama(directory)
    return directory


def recorded(directory: Path) -> Path:
    """Native weights with a record, from which Meta's table of frequencies comes back."""
    ckpt_convert.convert_checkpoint(GOLDEN / "llama" / "meta-mp2", directory, to="native")
    return directory


def pieces_of_ranks(directory: Path) -> Path:
    """A directory of torch.distributed.checkpoint."""
    ckpt_convert.convert_checkpoint(GOLDEN / "llama" / "hf", directory, to="torchtitan")
    return directory


def golden(directory: Path) -> Path:
    shutil.copytree(GOLDEN / "llama" / "hf", directory)
    return directory


CASES = {
    "ranks in zip files": (golden, {"to": "meta", "model_parallel": 2}),
    "shards": (golden, {"to": "native", "shards": 3}),
    "cast": (golden, {"to": "hf", "dtype": "bfloat16"}),
    "dequantized": (fp8, {"to": "hf", "dequantize": "bfloat16"}),
    "back from the record": (recorded, {"to": "meta"}),
    "out of torch.distributed.checkpoint": (pieces_of_ranks, {"to": "hf"}),
    "into torch.distributed.checkpoint": (golden, {"to": "torchtitan"}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_write_what_one_does(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: ProcessPoolExecutor
) -> None:
    monkeypatch.setattr(partition, "PIECE", 4096)
    make, options = CASES[case]
    source = make(tmp_path / "source")
    ckpt_convert.convert_checkpoint(source, tmp_path / "one", **options)  # type: ignore[arg-type]
    converted_by_two(ckpt_convert.plan_conversion(source, **options), tmp_path / "two", processes)  # type: ignore[arg-type]
    assert sums(tmp_path / "two") == sums(tmp_path / "one")
    assert not (tmp_path / ".two.partial").exists()


def test_another_process_sees_that_a_source_was_changed(tmp_path: Path) -> None:
    plan = ckpt_convert.plan_conversion(golden(tmp_path / "source"), to="meta")
    again = pickle.loads(pickle.dumps(plan))
    path = next((tmp_path / "source").glob("*.safetensors"))
    path.write_bytes(path.read_bytes() + b" ")
    sources = ReopenedSources(again)
    with pytest.raises(SourceChangedError):
        _ = [sources[source] for source in again.sources]
    sources.close()


def test_tensors_in_memory_are_read_by_the_process_that_has_them(tmp_path: Path) -> None:
    plan = ckpt_convert.plan_conversion(golden(tmp_path / "source"), to="meta")
    key: SourceFile = memory_source("tok.weight")
    assert key.name == "memory:tok.weight"
    with pytest.raises(UsageError, match="memory of another process"):
        _ = ReopenedSources(plan)[key]
    reader = object()
    assert ReopenedSources(plan, {"tok.weight": reader})[key] is reader  # type: ignore[dict-item]
