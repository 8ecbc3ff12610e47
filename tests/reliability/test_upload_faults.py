"""A run in a bucket on bad days: every kind of request meets every fault, for a moment, for a while, and for good.

At no request does the pointer name a step that is not complete. What passes is waited for, and the objects of a step
are the files of a run on a disk. What does not pass is one error; then the steps are on the disk, and the next run
brings them into the bucket.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import moto.s3.models
import pytest

from ckpt_convert import Checkpointer, CkptConvertError
from ckpt_convert.checkpointer.run import saved_steps
from ckpt_convert.checkpointer.save import step_upload, upload
from ckpt_convert.storage import ordered
from ckpt_convert.storage.place import as_place
from ckpt_convert.storage.remote import uploads
from tests.checkpointer.training import Trained, trainable
from tests.servers import faults, s3
from tests.servers.faults import LASTING, FaultProxy, Rule
from tests.servers.http import Request
from tests.servers.s3 import Bucket

STEPS = 2
KINDS = ("list", "head", "put", "create", "part", "complete", "delete", "get")
"""The kinds of requests of a run that begins in a bucket."""

PASSES = faults.PASSING | {"too late": (faults.slow(3), 1)}

OF_ALL = [
    pytest.param(kind, fault, marks=() if fault == "503" and kind in ("put", "complete") else pytest.mark.slow)
    for kind in KINDS
    for fault in LASTING
]
"""Each of them at each kind of request; most among the slow tests."""

PASSING = [one for one in OF_ALL if "another etag" not in one.values]
"""Without one that nothing distinguishes from an object that something else has replaced."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainable(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on a disk."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(source, str(out))
    return out


def train(source: Path, output: str, before: Callable[[Checkpointer], object] = lambda _: None, **options: Any) -> None:
    """Go on to the last step; ``before`` is called before the first one."""
    trained = Trained(source)
    with Checkpointer(source, output, save_every=1, **options) as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        before(checkpointer)
        trained.go(checkpointer, STEPS)


@cache
def files_below(folder: Path) -> dict[str, bytes]:
    """The files of a folder that nothing changes, but for the manifest, which says how long the run took."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


@dataclass
class World:
    """A run in a bucket behind a proxy, which looks at the bucket at each request."""

    bucket: Bucket
    proxy: FaultProxy
    source: Path
    alone: Path
    disk: Path
    wrong: list[str] = field(default_factory=list)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def run(self, arm: Callable[[], object] = lambda: None, retries: int = 3, **options: Any) -> None:
        """``arm`` is called once the run has begun."""
        stores = {"max_retries": retries, "retry_timeout": 20, "timeout": "2s"}
        train(
            self.source,
            f"s3://{self.bucket.name}/run",
            lambda _: arm(),
            local_dir=self.disk,
            keep_last=1,
            storage_options=stores,
            **options,
        )

    def classify(self, request: Request) -> tuple[str, str]:
        with self.guard:
            self.look()
        return s3.classify(request)

    def look(self) -> None:
        """Note where the pointer names a step that is not complete."""
        files = self.bucket.files
        target = files.get("run/latest", b"").decode().strip()
        lacking = [name for name, data in self.files_of(target).items() if files.get(f"run/{target}/{name}") != data]
        if target and (lacking or f"run/{target}/ckpt_convert/manifest.json" not in files):
            self.wrong.append(f"{target} lacks {lacking}")

    def files_of(self, step: str) -> dict[str, bytes]:
        """The files of a step of the run on a disk."""
        return files_below(self.alone / step) if step else {}

    def assert_whole(self) -> None:
        assert self.wrong == []
        assert self.bucket.uploads == {}
        last = f"run/step_{STEPS}"
        expected = {f"{last}/{name}": data for name, data in self.files_of(f"step_{STEPS}").items()}
        found = self.bucket.files
        assert {name: data for name, data in found.items() if not name.endswith("manifest.json")} == {
            **expected,
            "run/latest": f"step_{STEPS}\n".encode(),
        }
        assert f"{last}/ckpt_convert/manifest.json" in found


@pytest.fixture
def world(
    bucket: Bucket,
    s3_proxy: FaultProxy,
    source: Path,
    alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    """Files of several parts, each a turn of its own; what fails is tried again soon."""
    for module in (uploads, ordered, step_upload):
        monkeypatch.setattr(module, "PART", 1 << 15)
    monkeypatch.setattr(uploads, "_MIB", 1 << 15)
    monkeypatch.setattr(step_upload, "TURN", 1)
    monkeypatch.setattr(upload, "_PAUSE", 0.01)
    monkeypatch.setattr(upload, "_LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(moto.s3.models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    made = World(bucket, s3_proxy, source, alone, tmp_path / "disk")
    monkeypatch.setattr(s3_proxy, "_classify", made.classify)
    yield made
    assert made.wrong == []


def assert_clear(error: CkptConvertError) -> None:
    """An error is one paragraph that names a place."""
    assert "s3://bucket-" in str(error)
    assert "\n\n" not in str(error)


def test_the_kinds_of_requests_are_known(world: World) -> None:
    world.run()
    assert world.proxy.log.kinds().keys() == {*KINDS}
    world.assert_whole()


@pytest.mark.parametrize(
    "fault", [pytest.param(one, marks=pytest.mark.slow if one == "too late" else ()) for one in PASSES]
)
def test_a_run_in_which_each_kind_of_request_fails(world: World, fault: str) -> None:
    what, times = PASSES[fault]
    rules = [Rule(what, kind=kind, times=times) for kind in KINDS]
    world.run(lambda: [world.proxy.add(rule) for rule in rules])
    world.assert_whole()
    assert all(rule.hits == times for rule in rules if rule.matched)


@pytest.mark.parametrize(("kind", "fault"), PASSING)
def test_what_fails_for_longer_than_a_request_is_tried_is_tried_again(world: World, kind: str, fault: str) -> None:
    rule = Rule(LASTING[fault], kind=kind, first=1, times=4)
    world.run(lambda: world.proxy.add(rule), retries=1)
    world.assert_whole()


@pytest.mark.parametrize(("kind", "fault"), OF_ALL)
def test_what_fails_for_good_is_one_error_and_the_next_run_brings_it_there(world: World, kind: str, fault: str) -> None:
    rule = Rule(LASTING[fault], kind=kind, first=2, times=None)
    try:
        world.run(lambda: world.proxy.add(rule), retries=1, upload_deadline=0.3)
    except CkptConvertError as error:
        assert_clear(error)
    world.proxy.clear()
    assert saved_steps.scan_steps(as_place(world.disk))
    world.run()
    world.assert_whole()


def test_a_network_that_is_gone_for_a_while_is_waited_for(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.ExitStack() as gone:

        def arm() -> None:
            gone.enter_context(world.proxy.down())
            threading.Thread(target=come_back).start()

        def come_back() -> None:
            while "failed, and is tried again" not in caplog.text:
                time.sleep(0.01)
            gone.close()

        world.run(arm, retries=1)
    world.assert_whole()
