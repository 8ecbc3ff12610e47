"""Several ranks whose run is in a bucket: its steps are those of one process, and other ranks go on from it alone.

They divide the files of a step, and upload them behind the training; where one of them fails, or is killed, all hear
of it, and no step that was complete is lost.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ckpt_convert import Checkpointer, CkptConvertError
from ckpt_convert.checkpointer.run import saved_steps
from ckpt_convert.checkpointer.save import step_upload, upload
from ckpt_convert.errors import UnwritableError, UsageError
from ckpt_convert.storage.place import checked_place
from tests.checkpointer.pool import Pool, quick_hearts, split
from tests.checkpointer.test_distributed_saving import optimize, train_full
from tests.checkpointer.training import make_model
from tests.helpers import assert_same, sums
from tests.servers.s3 import Bucket

STORE = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
HOST = socket.gethostname()
Sent = list[tuple[str, int]]
"""The files that one rank has uploaded, and their sizes."""


@pytest.fixture
def environment(bucket: Bucket) -> dict[str, str]:
    """What the ranks need to find the bucket."""
    return {name: os.environ[name] for name in STORE}


def train(
    here: Path, url: str, environment: dict[str, str], source: Path, until: int, asynchronous: bool
) -> dict[str, torch.Tensor]:
    """Go on in the bucket, with a disk that is empty at first."""
    os.environ.update(environment)
    model = split(make_model(), "fsdp")
    local = here / f"disk_{until}"
    return train_full(url, model, source, until, local_dir=local, asynchronous=asynchronous)  # type: ignore[arg-type]


def assert_as_alone(bucket: Bucket, alone: Path, steps: range) -> None:
    """The weights and all that belongs to them are those of the run of one process."""
    assert bucket.uploads == {}
    for step in steps:
        for name in sums(alone / f"step_{step}"):
            if not name.startswith(("training_state", "ckpt_convert/manifest")):
                data = (alone / f"step_{step}" / name).read_bytes()
                assert bucket.files[f"run/step_{step}/{name}"] == data, (step, name)


def steps_of(url: str) -> list[int]:
    return [saved.step for saved in saved_steps.scan_steps(checked_place(url))]


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.slow), True], ids=["sync", "async"])
def test_other_ranks_go_on_from_the_bucket_alone(
    pool: Pool, bucket: Bucket, environment: dict[str, str], asynchronous: bool, source: Path, tmp_path: Path
) -> None:
    expected = train_full(tmp_path / "alone", make_model(), source, 6)
    url = f"s3://{bucket.name}/run"
    for until, world in ((3, 2), (6, 4)):
        for state in pool.run(train, tmp_path, url, environment, source, until, asynchronous, world=world):
            found = state
    assert_same(found, expected)
    assert steps_of(url) == [1, 2, 3, 4, 5, 6]
    assert_as_alone(bucket, tmp_path / "alone", range(1, 7))


# Who uploads what


def test_files_are_divided_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_upload, "TURN", 100)
    sizes = {"a": 300, "b": 250, "c": 90, "d": 60, "e": 50, "f": 1, "empty": 0}
    assert list(step_upload.divide(sizes, 2)) == [
        [{"a": 300}, {"b": 250}],
        [{"c": 90}, {"d": 60}],
        [{"e": 50}, {"f": 1, "empty": 0}],
    ]
    assert list(step_upload.divide({}, 4)) == []
    assert list(step_upload.divide({"a": 1, "b": 1}, 1)) == [[{"a": 1, "b": 1}]]


@contextmanager
def sending(wrong: Any = None) -> Iterator[Sent]:
    """Notes what this rank uploads, in turns of a file each; ``wrong`` is called with each name before that."""
    true, sent = step_upload._copy, Sent()

    def noted(opened: Any, file: Any) -> None:
        if wrong is not None:
            wrong(file.name)
        true(opened, file)
        sent.append((file.name, opened.size))

    with mock.patch.multiple(step_upload, _copy=noted, TURN=1), mock.patch.object(upload, "_PAUSE", 0.001):
        yield sent


def save_some(checkpointer: Checkpointer, until: int) -> None:
    model = split(make_model(), "fsdp")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    checkpointer.load_model(model)
    checkpointer.resume(model=model, optimizer=optimizer)
    while checkpointer.progress.step < until:
        optimize(model, optimizer)
        checkpointer.step()


def save_one(here: Path, url: str, environment: dict[str, str], source: Path) -> Sent:
    os.environ.update(environment)
    with sending() as sent, Checkpointer(source, url, local_dir=here / "disk", save_every=1) as checkpointer:
        save_some(checkpointer, 1)
    return sent


@pytest.mark.parametrize("world", [2, 4])
def test_each_byte_is_uploaded_once_by_one_of_the_ranks(
    pool: Pool, bucket: Bucket, environment: dict[str, str], world: int, source: Path, tmp_path: Path
) -> None:
    url = f"s3://{bucket.name}/run"
    every = pool.run(save_one, tmp_path, url, environment, source, world=world)
    assert all(every)
    names = [name for sent in every for name, _ in sent]
    assert len(names) == len({*names})
    assert steps_of(url) == [1]
    assert bucket.uploads == {}


# Failures of one rank


def fail_once(
    here: Path, url: str, environment: dict[str, str], source: Path, rank: int, deadline: float
) -> tuple[str, Sent]:
    """A rank cannot upload its second file: once, or for as long as a deadline lasts."""
    os.environ.update(environment)
    failed: list[str] = []

    def wrong(name: str) -> None:
        if dist.get_rank() == rank and len(sent) >= 1 and (deadline < 60 or not failed):
            failed.append(name)
            raise UnwritableError(f"{name}: cannot be written")

    text = ""
    with sending(wrong) as sent, quick_hearts():
        options: dict[str, Any] = {"save_every": 1, "upload_deadline": deadline}
        try:
            with Checkpointer(source, url, local_dir=here / "disk", **options) as checkpointer:
                save_some(checkpointer, 1)
        except CkptConvertError as error:
            text = f"{type(error).__name__}: {error}"
    return text, sent


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_on_one_rank_is_tried_again_by_all_and_nothing_is_sent_twice(
    pool: Pool, bucket: Bucket, environment: dict[str, str], rank: int, source: Path, tmp_path: Path
) -> None:
    url = f"s3://{bucket.name}/run"
    every = pool.run(fail_once, tmp_path, url, environment, source, rank, 3600.0)
    assert [text for text, _ in every] == ["", ""]
    assert steps_of(url) == [1]
    names = [name for _, sent in every for name, _ in sent]
    again = len(names) - len({*names})
    assert again <= 1  # what the other rank has sent in the very turn in which this one failed


def test_what_fails_on_one_rank_for_too_long_is_one_error_on_all(
    pool: Pool, bucket: Bucket, environment: dict[str, str], source: Path, tmp_path: Path
) -> None:
    url = f"s3://{bucket.name}/run"
    every = pool.run(fail_once, tmp_path, url, environment, source, 1, 0.2)
    (text,) = {text for text, _ in every}
    found = re.fullmatch(
        rf"UnwritableError: rank 0 on {HOST}: uploading {url}/step_1 has failed for \d+ s, and is tried again as long "
        rf"as the run lasts: rank 1 on {HOST}: (.*): cannot be written",
        text,
    )
    assert found is not None, text
    assert steps_of(url) == []
    assert [saved.step for saved in saved_steps.scan_steps(checked_place(str(tmp_path / "disk")))] == [1]


def killed(here: Path, url: str, environment: dict[str, str], source: Path, rank: int) -> str:
    """A rank is killed before its second file; what the others raise."""
    os.environ.update(environment)

    def wrong(name: str) -> None:
        if dist.get_rank() == rank and len(sent) >= 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with sending(wrong) as sent, quick_hearts():
        try:
            with Checkpointer(source, url, local_dir=here / "disk", save_every=1) as checkpointer:
                save_some(checkpointer, 1)
        except CkptConvertError as error:
            return str(error)
    return ""


def go_on(here: Path, url: str, environment: dict[str, str], source: Path) -> Sent:
    """Go on from what is on the disk, once what had not arrived has."""
    os.environ.update(environment)
    with sending() as sent, Checkpointer(source, url, local_dir=here / "disk", save_every=1) as checkpointer:
        save_some(checkpointer, 1)
        checkpointer.wait()
        arrived = list(sent)
        save_some(checkpointer, 2)
    return arrived


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_in_an_upload(
    pool: Pool, bucket: Bucket, environment: dict[str, str], rank: int, source: Path, tmp_path: Path
) -> None:
    """The others hear of it; the step is on the disk, and other ranks upload what is left of it, and go on."""
    url = f"s3://{bucket.name}/run"
    (text,) = {text for text in pool.run(killed, tmp_path, url, environment, source, rank, world=3) if text is not None}
    assert re.match(rf"rank {rank} on {HOST}: has not been heard of for 3 s, while the others waited for it in", text)
    assert steps_of(url) == []
    before = {key: etag for key, etag in bucket.etags.items() if "/step_1/" in key and "journal" not in key}
    assert before
    begun = time.monotonic()
    every = pool.run(go_on, tmp_path, url, environment, source, world=2)
    assert time.monotonic() - begun < 60  # the lock of a process that has ended on this machine is not waited for
    assert steps_of(url) == [1, 2]
    again = {f"run/step_1/{name}" for sent in every for name, _ in sent}
    kept = before.keys() - again
    assert kept
    assert all(bucket.etags[key] == before[key] for key in kept)
    train_full(tmp_path / "alone", make_model(), source, 2)
    assert_as_alone(bucket, tmp_path / "alone", range(1, 3))


# A disk that is not the same for all


def open_directly(here: Path, url: str, environment: dict[str, str], source: Path) -> str:
    os.environ.update(environment)
    with pytest.raises(UsageError) as raised:
        Checkpointer(source, url, upload="direct")
    return str(raised.value)


def test_what_one_process_writes_is_refused_for_several(
    pool: Pool, bucket: Bucket, environment: dict[str, str], source: Path, tmp_path: Path
) -> None:
    texts = pool.run(open_directly, tmp_path, f"s3://{bucket.name}/run", environment, source)
    assert {text[:70] for text in texts} == {'upload="direct": one process writes a step, and here 2 ranks save toge'}


def open_elsewhere(here: Path, url: str, environment: dict[str, str], source: Path) -> str:
    """Each rank has another directory of the same name."""
    os.environ.update(environment)
    own = here / f"machine_{dist.get_rank()}"
    (own / "disk").mkdir(parents=True)
    before = os.getcwd()
    os.chdir(own)
    try:
        with Checkpointer(source, url, local_dir="disk") as checkpointer:
            save_some(checkpointer, 1)
    except CkptConvertError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.chdir(before)
    return ""


def test_a_disk_that_is_not_the_same_for_all_ranks_is_refused_at_the_start(
    pool: Pool, bucket: Bucket, environment: dict[str, str], source: Path, tmp_path: Path
) -> None:
    texts = pool.run(open_elsewhere, tmp_path, f"s3://{bucket.name}/run", environment, source)
    expected = (
        f"UsageError: rank 1 on {HOST}: local_dir='disk': is not the directory that the first rank has there; steps "
        "are put together in it before they are uploaded, so give one on a file system that all machines see"
    )
    assert texts == [expected, expected]
    left = [path.name for path in (tmp_path / "machine_0" / "disk").iterdir()]
    assert left == [".ckpt-convert-lock"]
    assert bucket.files == {}
