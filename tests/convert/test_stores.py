"""Conversions into a store that renames nothing: the same bytes, what makes them count last, and no half of it ever."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

import ckpt_convert
from ckpt_convert import CkptConvertError
from ckpt_convert.checkpoint.checkpoint import open_checkpoint
from ckpt_convert.convert import partition
from ckpt_convert.errors import InputError, LockedError, OutputExistsError, UnwritableError
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.store_lock import StoreLock, lock_place
from ckpt_convert.tensors import blocks
from tests.helpers import GOLDEN
from tests.storage.failing import FailingStore

HF, META = GOLDEN / "llama" / "hf", GOLDEN / "llama" / "meta-mp2"
WAYS: dict[str, tuple[Path, dict[str, Any]]] = {
    "to meta, two ranks": (HF, {"to": "meta", "model_parallel": 2}),
    "to hf": (META, {"to": "hf"}),
    "to native": (HF, {"to": "native"}),
    "to torchtitan": (HF, {"to": "torchtitan"}),
    "to torch zip files": (HF, {"to": "hf", "container": "bin"}),
    "cast": (HF, {"to": "hf", "dtype": "bfloat16", "allow_overflow": True}),
}


@pytest.fixture
def out() -> Place:
    return Place(FailingStore({"models/other/config.json": b"{}"}), PurePosixPath("models/out"))


@pytest.fixture(params=["memory", "s3", "azure"])
def anywhere(request: pytest.FixtureRequest) -> Place:
    """A store of each kind, which holds something beside the output."""
    store = FailingStore() if request.param == "memory" else request.getfixturevalue(f"{request.param}_store")
    store.put("models/other/config.json", b"{}")
    return Place(store, PurePosixPath("models/out"))


def contents(place: Place) -> dict[str, bytes]:
    """Every file below a place."""
    here = place.without_listing().listed()
    return {file.relative_name(place): file.read(1 << 30) for file in here.entries()} if here.is_folder() else {}


def store_of(place: Place) -> FailingStore:
    assert isinstance(place.store, FailingStore)
    return place.store


def written(place: Place) -> dict[str, bytes]:
    """What lies in the output; no request."""
    start = f"{place.path}/"
    return {n.removeprefix(start): data for n, data in store_of(place).files.items() if n.startswith(start)}


def files(directory: Path) -> dict[str, bytes]:
    return {
        file.relative_to(directory).as_posix(): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def is_accepted(place: Place) -> bool:
    """Whether anything of ours takes it for a checkpoint."""
    with contextlib.suppress(InputError):
        with open_checkpoint(place):
            pass
        return True
    return False


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bytes_as_on_a_disk(way: str, anywhere: Place, tmp_path: Path) -> None:
    source, options = WAYS[way]
    there = ckpt_convert.convert_checkpoint(source, anywhere, verify=True, **options)
    here = ckpt_convert.convert_checkpoint(source, tmp_path / "out", verify=True, **options)
    assert contents(anywhere) == files(tmp_path / "out")
    assert there.verified == here.verified
    names = contents(anywhere.parent).keys()
    assert not [name for name in names if PurePosixPath(name).name.startswith(".ckpt-convert")]
    assert names - {f"out/{name}" for name in files(tmp_path / "out")} == {"other/config.json"}


@pytest.mark.parametrize("way", WAYS)
def test_and_back_from_there(way: str, anywhere: Place, tmp_path: Path) -> None:
    source, options = WAYS[way]
    ckpt_convert.convert_checkpoint(source, anywhere, **options)
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", **options)
    back = "meta" if source == META else "hf"
    ckpt_convert.convert_checkpoint(anywhere, anywhere.parent / "back", to=back)
    ckpt_convert.convert_checkpoint(tmp_path / "out", tmp_path / "back", to=back)
    assert contents(anywhere.parent / "back") == files(tmp_path / "back")


def test_requests(out: Place) -> None:
    """One for each file, three more for what is kept of each weight file, and a handful for the whole."""
    ckpt_convert.convert_checkpoint(HF, out, to="hf", dtype="bfloat16", allow_overflow=True)
    requests = store_of(out).requests
    names = written(out)
    assert len([name for name in names if name.endswith(".safetensors")]) == 4
    # Listed: whether it may be written, what is there when it is locked, whether it is what was written.
    assert requests["list"] == 3
    # Each file once; the lock, and the journal before the first file and after each weight file.
    assert requests["put"] + requests["complete"] == len(names) + 1 + 1 + 4
    assert (requests["delete"], requests["head"], requests["get"]) == (2, 1, 0)


def test_what_is_there_is_replaced_on_request_alone(anywhere: Place) -> None:
    ckpt_convert.convert_checkpoint(HF, anywhere, to="meta")
    with pytest.raises(OutputExistsError, match="exists already; pass `overwrite=True` to replace it"):
        ckpt_convert.convert_checkpoint(HF, anywhere, to="hf")
    assert "params.json" in contents(anywhere)
    ckpt_convert.convert_checkpoint(META, anywhere, to="hf", overwrite=True)
    assert "params.json" not in contents(anywhere)
    anywhere.store.put("models/out/thesis.pdf", b"mine")
    with pytest.raises(OutputExistsError, match=r"holds more than a checkpoint.*thesis\.pdf"):
        ckpt_convert.convert_checkpoint(HF, anywhere, to="meta", overwrite=True)


def test_a_second_writer_is_refused_and_told_of_the_first(anywhere: Place) -> None:
    held = StoreLock(lock := lock_place(anywhere), "in use")
    owner = f"process {os.getpid()} on {re.escape(socket.gethostname())}"
    with pytest.raises(LockedError, match=f"{owner}; if that has ended, delete {lock}"):
        ckpt_convert.convert_checkpoint(HF, anywhere, to="meta")
    held.close()
    assert contents(anywhere) == {}


def test_whatever_request_fails_nothing_half_written_is_accepted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every request of a conversion fails once and for good, refused and unanswered; then the same is run again."""
    caplog.set_level(logging.CRITICAL)
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="native")
    expected = files(tmp_path / "out")
    beside = {"models/other/config.json": b"{}", "models/outside": b"x"}
    for times, lost in ((1, False), (1, True), (None, False)):
        number = 0
        while True:
            out = Place(FailingStore(beside), PurePosixPath("models/out"))
            store = store_of(out)
            store.arm(number, times, lost=lost)
            failed = False
            try:
                ckpt_convert.convert_checkpoint(HF, out, to="native", workers=1)
            except CkptConvertError:
                failed = True
            reached, _ = store.failed, store.arm(None)
            what = f"request {number}, {'lost' if lost else 'refused'}, {times}"
            assert beside.items() <= store.files.items(), what
            if failed:
                assert written(out) == expected or not is_accepted(out), what
            else:
                assert written(out) == expected, what
            store.delete(["models/.out.partial"])  # what a person is told to remove where nobody else could
            if written(out) != expected or is_accepted(out) is False:
                ckpt_convert.convert_checkpoint(HF, out, to="native", workers=1, resume=number % 2 == 0)
            assert written(out) == expected, what
            if not reached:
                break
            number += 1
        assert number > (20 if lost else 40)


def test_an_attempt_is_continued_with_the_files_that_it_finished(
    out: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "PIECE", 4096)
    monkeypatch.setattr(blocks, "BLOCK", 1024)
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="hf", container="bin")
    store = store_of(out)
    number = 0
    # Parts of the third file: two are finished by then.
    while store.requests["complete"] < 2:
        store.arm(None)
        number += 20
        store.requests.clear()
        store.delete([name for name in store.files if name.startswith("models/out/")])
        store.arm(number, 1)
        with contextlib.suppress(UnwritableError):
            ckpt_convert.convert_checkpoint(HF, out, to="hf", container="bin", workers=1)
    store.arm(None)
    finished = {name for name in written(out) if name.endswith(".bin")}
    assert finished
    assert not is_accepted(out)
    store.requests.clear()
    report = ckpt_convert.convert_checkpoint(HF, out, to="hf", container="bin", resume=True, verify=True)
    assert written(out) == files(tmp_path / "out")
    assert report.resumed_bytes > 0
    assert store.requests["complete"] == 5 - len(finished)  # four files and tokenizer.json


def test_an_attempt_with_other_options_begins_anew(out: Place, caplog: pytest.LogCaptureFixture) -> None:
    store = store_of(out)
    store.arm(44, None)
    with pytest.raises(UnwritableError):
        ckpt_convert.convert_checkpoint(HF, out, to="hf", dtype="bfloat16", allow_overflow=True, workers=1)
    store.arm(None)
    store.delete(["models/.out.partial"])
    assert [name for name in written(out) if name.endswith(".safetensors")]
    report = ckpt_convert.convert_checkpoint(HF, out, to="hf", dtype="float16", allow_overflow=True, resume=True)
    assert report.resumed_bytes == 0
    assert "the partial output is of another source or other options" in caplog.text


def test_the_errors_say_how_to_go_on(out: Place) -> None:
    store_of(out).arm(8, None)
    with pytest.raises(UnwritableError, match="when that is fixed, run again with `resume=True`"):
        ckpt_convert.convert_checkpoint(HF, out, to="meta", workers=1)
