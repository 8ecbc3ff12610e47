"""An object store on bad days: every kind of request of every operation meets every fault.

What a retry can heal is healed. What it cannot is one clear error, after which nothing is half there: no upload is left
open, what is accepted as a checkpoint is whole, and the next attempt keeps the files that the first has finished.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, TypeVar

import moto.s3.models
import pytest

import ckpt_convert
from ckpt_convert import CkptConvertError
from ckpt_convert.analysis.check import check_checkpoint
from ckpt_convert.analysis.diff.compare import compare_checkpoints
from ckpt_convert.checkpoint.checkpoint import Checkpoint, open_identified
from ckpt_convert.errors import InputError, OutputExistsError, VerificationError
from ckpt_convert.storage.names import JOURNAL
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.remote import uploads
from ckpt_convert.storage.remote.urls import address_of
from tests.command import Finished, run
from tests.helpers import GOLDEN
from tests.servers import faults, s3
from tests.servers.faults import LASTING, FaultProxy, Forward, Rule
from tests.servers.http import Answer, DroppedError, Request
from tests.servers.s3 import Bucket

HF = GOLDEN / "llama" / "hf"
WAYS: dict[str, dict[str, Any]] = {
    "meta": {"to": "meta", "model_parallel": 2},
    "hf": {"to": "hf", "dtype": "bfloat16", "allow_overflow": True},
}
_T = TypeVar("_T")

KINDS = ("list", "head", "get", "put", "create", "part", "complete", "delete")
"""The kinds of requests of a conversion from the store and into it."""

MIDDLE = {"list": 2, "head": 1, "get": 5, "put": 7, "create": 1, "part": 8, "complete": 1, "delete": 1}
"""The number of a request of each kind that has some before it and after it."""

HEALED = faults.PASSING | {"500": (faults.status(500), 1)}

_MOST = [fault if number < 2 else pytest.param(fault, marks=pytest.mark.slow) for number, fault in enumerate(LASTING)]
"""The first ones are tried at every kind of request, all of them among the slow tests."""


@dataclass(frozen=True)
class World:
    """A source in a bucket behind a proxy, and what an output of it has to be."""

    bucket: Bucket
    proxy: FaultProxy
    options: Mapping[str, Any]
    expected: dict[str, bytes]

    def place(self, name: str, retries: int = 3) -> Place:
        options = {"max_retries": retries, "retry_timeout": 20, "timeout": "2s"}
        address = address_of(f"s3://{self.bucket.name}/{name}", options)
        assert address is not None
        return Place(*address)

    def convert(self, *, retries: int = 3, **options: Any) -> ckpt_convert.Report:
        """The conversion that all tests do, into files of several parts each."""
        given: dict[str, Any] = {**self.options, "workers": 1, **options}
        return ckpt_convert.convert_checkpoint(self.place("in", retries), self.place("runs/out", retries), **given)

    def fail(self, **options: Any) -> CkptConvertError | None:
        """The error of a conversion that a fault befalls for good; None if it ends well all the same."""
        try:
            self.convert(retries=1, **options)
        except CkptConvertError as error:
            assert_clear(error)
            return error
        finally:
            self.proxy.clear()
        return None

    def command(self, *flags: str, retries: int = 1) -> Finished:
        """The same conversion by the command line, with the rules that the proxy has, which are then forgotten."""
        store = (f"max_retries={retries}", "retry_timeout=20", "timeout=2s")
        words = [*("hf-to-meta", *(f"s3://{self.bucket.name}/{name}" for name in ("in", "runs/out")))]
        words += ["--model-parallel", "2", "--workers", "1", "--quiet", *flags]
        done = run(*words, *(word for option in store for word in ("--store-option", option)))
        self.proxy.clear()
        return done

    def output(self) -> dict[str, bytes]:
        return self._below(self.bucket.files)

    def finished(self) -> dict[str, str]:
        """The etags of the weight files that an attempt has finished, as its journal has them."""
        journal = self.output().get(JOURNAL)
        return {} if journal is None else {name: etag for name, (etag, _) in json.loads(journal)["whole"].items()}

    def etags(self) -> dict[str, str]:
        return self._below(self.bucket.etags)

    def _below(self, objects: dict[str, _T]) -> dict[str, _T]:
        start = "runs/out/"
        return {key.removeprefix(start): data for key, data in objects.items() if key.startswith(start)}

    def put_output(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            self.bucket.put(f"runs/out/{name}", data)

    def remove_output(self) -> None:
        for key in self.bucket.files:
            if key.startswith("runs/"):
                self.bucket.backend.delete_object(self.bucket.name, key)

    def is_accepted(self) -> bool:
        """Whether anything of ours takes the output for a checkpoint."""
        with contextlib.suppress(InputError), open_identified(self.place("runs/out")):
            return True
        return False

    def assert_whole(self) -> None:
        assert self.output() == self.expected
        assert self.bucket.uploads == {}
        assert not [key for key in self.bucket.files if PurePosixPath(key).name.startswith(".")]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What the conversions write on a disk."""
    made = {}
    for to, options in WAYS.items():
        out = tmp_path_factory.mktemp("expected") / "out"
        ckpt_convert.convert_checkpoint(HF, out, **options)
        made[to] = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return made


@pytest.fixture
def world(
    bucket: Bucket, s3_proxy: FaultProxy, expected: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    """A conversion into two torch files, whose headers are known last."""
    for name in ("PART", "_MIB"):
        monkeypatch.setattr(uploads, name, 1 << 15)
    monkeypatch.setattr(moto.s3.models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    source = {f"in/{path.name}": path.read_bytes() for path in HF.iterdir()}
    for key, data in source.items():
        bucket.put(key, data)
    yield World(bucket, s3_proxy, WAYS["meta"], expected["meta"])
    assert source.items() <= bucket.files.items()


@pytest.fixture
def shards(world: World, expected: dict[str, dict[str, bytes]]) -> World:
    """A conversion into four safetensors files, each finished before the next begins."""
    return replace(world, options=WAYS["hf"], expected=expected["hf"])


def assert_clear(error: CkptConvertError) -> None:
    """An error is one paragraph that names a place and holds nothing secret."""
    text = str(error)
    assert "s3://bucket-" in text
    assert "\n\n" not in text
    assert len(text) < 800
    for secret in (s3.SECRET, s3.KEY, "X-Amz", "Signature", "uploadId", "127.0.0.1"):
        assert secret not in text


def test_the_kinds_of_requests_are_known(world: World) -> None:
    world.convert()
    assert world.proxy.log.kinds().keys() == {*KINDS}
    world.assert_whole()


class TestHealed:
    @pytest.mark.parametrize("fault", HEALED)
    def test_a_conversion_in_which_each_kind_of_request_fails(self, world: World, fault: str) -> None:
        what, times = HEALED[fault]
        rules = [world.proxy.add(Rule(what, kind=kind, times=times)) for kind in KINDS]
        world.convert()
        world.assert_whole()
        assert all(rule.hits == times for rule in rules)

    @pytest.mark.parametrize("fault", HEALED)
    def test_looking_while_each_kind_of_request_fails(self, world: World, fault: str) -> None:
        world.put_output(world.expected)
        what, times = HEALED[fault]
        for look in (inspect, verify, diff):
            world.proxy.clear()
            rules = [world.proxy.add(Rule(what, kind=kind, times=times)) for kind in ("list", "get")]
            look(world)
            assert all(rule.hits == times for rule in rules)

    def test_answers_that_come_too_late(self, world: World) -> None:
        rules = [world.proxy.add(Rule(faults.slow(3), kind=kind)) for kind in ("get", "put", "part", "complete")]
        world.convert()
        world.assert_whole()
        assert all(rule.hits == 1 for rule in rules)


def inspect(world: World, retries: int = 3) -> None:
    with open_identified(world.place("runs/out", retries)) as opened:
        assert opened.model.family.name == "llama"
        Checkpoint(opened)[next(iter(opened.tensors))].tobytes()


def verify(world: World, retries: int = 3) -> None:
    assert check_checkpoint(world.place("runs/out", retries)).findings == ()


def diff(world: World, retries: int = 3) -> None:
    with (
        open_identified(world.place("in", retries)) as one,
        open_identified(world.place("runs/out", retries)) as other,
    ):
        assert compare_checkpoints(one, other).same


class TestErrors:
    @pytest.mark.parametrize("fault", _MOST)
    @pytest.mark.parametrize("kind", KINDS)
    def test_an_attempt_ends_and_the_next_goes_on(self, world: World, kind: str, fault: str) -> None:
        rule = world.proxy.add(Rule(LASTING[fault], kind=kind, first=MIDDLE[kind], times=None))
        error = world.fail()
        assert rule.hits
        kept = world.finished()
        assert not world.is_accepted() or world.output() == world.expected
        if error is None:
            return
        if fault == "another etag" and kind == "put":  # nothing of what was written is recognized, nor removed
            assert isinstance(error, VerificationError)
            return
        report = world.convert(resume=True)
        world.assert_whole()
        assert report.resumed_bytes or not kept
        assert kept.items() <= world.etags().items()

    @pytest.mark.parametrize("kind", ["list", "get"])
    @pytest.mark.parametrize("fault", LASTING)
    def test_a_look_that_cannot_be_taken(self, world: World, kind: str, fault: str) -> None:
        world.put_output(world.expected)
        for look in (inspect, verify, diff):
            world.proxy.clear()
            rule = world.proxy.add(Rule(LASTING[fault], kind=kind, first=1 if kind == "get" else 0, times=None))
            try:
                look(world, retries=1)
            except CkptConvertError as error:
                assert_clear(error)
            else:
                assert (kind, fault) == ("list", "another etag"), "which is of the listing, not of what is listed"
            assert rule.hits

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_checkpoint_is_replaced_or_gone_or_as_it_was(
        self, world: World, kind: str, expected: dict[str, dict[str, bytes]]
    ) -> None:
        old = expected["hf"]
        world.put_output(old)
        world.proxy.add(Rule(faults.status(503), kind=kind, first=MIDDLE[kind], times=None))
        error = world.fail(overwrite=True)
        assert not world.is_accepted() or world.output() in (old, world.expected)
        if error is not None:
            world.convert(overwrite=True, resume=True)
        world.assert_whole()

    @pytest.mark.parametrize("fault", ["503", "reset", "answer lost"])
    def test_what_continues_is_interrupted_again(self, shards: World, fault: str) -> None:
        world = shards
        world.proxy.add(Rule(faults.status(503), kind="part", name="model-00003", times=None))
        assert world.fail() is not None
        kept = world.finished()
        assert len(kept) == 2
        for kind in ("part", "put", "complete", "list"):
            world.proxy.add(Rule(LASTING[fault], kind=kind, times=None))
            assert world.fail(resume=True) is not None
        world.convert(resume=True)
        world.assert_whole()
        assert kept.items() <= world.etags().items()


class TestCommandLine:
    """``--resume`` after each kind of fault, and ``--overwrite`` of a checkpoint that is there."""

    @pytest.mark.parametrize("fault", _MOST)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("replaces", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["new", "overwrite"])
    def test_the_command_line_ends_right_or_with_one_error(
        self, world: World, kind: str, fault: str, replaces: bool, expected: dict[str, dict[str, bytes]]
    ) -> None:
        if (kind, fault) == ("put", "another etag"):
            return  # what was written is recognized by nobody then, see above
        flags = ["--overwrite"] if replaces else []
        world.put_output(expected["hf"] if replaces else {})
        rule = world.proxy.add(Rule(LASTING[fault], kind=kind, first=MIDDLE[kind], times=None))
        done = world.command(*flags)
        assert rule.hits or replaces
        kept = world.finished()
        assert not world.is_accepted() or world.output() in (world.expected, expected["hf"])
        # All is there; the lock, which cannot be deleted, or looks like somebody else's, is left to whoever comes next.
        if not done.returncode and (kind == "delete" or (kind, fault) == ("head", "another etag")):
            assert (world.output(), world.bucket.uploads) == (world.expected, {})
            return
        if done.returncode:
            assert_one_error(done)
            world.proxy.log.clear()
            assert world.command(*flags, "--resume", retries=3).stderr == ""
            assert not {one.name.rpartition("/")[2] for one in world.proxy.log.all("create")} & kept.keys()
        world.assert_whole()
        assert kept.items() <= world.etags().items()


def assert_one_error(done: Finished) -> None:
    """One paragraph that says what to do, no traceback, and the exit code of a conversion that failed."""
    assert done.returncode in (1, 3, 4, 5), done
    assert done.stdout == ""
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "s3://bucket-" in line
    assert "Traceback" not in done.stderr
    for secret in (s3.SECRET, s3.KEY, "X-Amz", "Signature", "uploadId", "127.0.0.1"):
        assert secret not in done.stderr


class TestOutages:
    def test_a_short_one_is_waited_for(self, world: World) -> None:
        def outage(request: Request, forward: Forward) -> Answer:
            world.proxy.drop_connections()
            raise DroppedError

        for kind in KINDS:
            world.proxy.add(Rule(outage, kind=kind, first=1, times=1))
        world.convert()
        world.assert_whole()

    def test_a_long_one_ends_the_attempt_and_nothing_is_half_there(self, world: World) -> None:
        """All connections are dropped from the middle on, also those that would clean up."""

        def pull_the_plug(request: Request, forward: Forward) -> Answer:
            world.proxy.add(Rule(faults.reset, times=None))
            raise DroppedError

        world.proxy.add(Rule(pull_the_plug, kind="part", first=2))
        error = world.fail()
        assert error is not None
        assert not world.is_accepted()
        assert world.bucket.uploads
        world.convert(resume=True)
        world.assert_whole()


@pytest.mark.slow
@pytest.mark.parametrize("times", [2, None], ids=["once", "for good"])
@pytest.mark.parametrize("fault", LASTING)
@pytest.mark.parametrize("way", WAYS)
def test_whatever_request_fails(
    world: World, way: str, fault: str, times: int | None, expected: dict[str, dict[str, bytes]]
) -> None:
    """Every request of a conversion fails as often as it is sent, and that one alone or all that come after it, too.

    Of another etag only what reads is told: what was written under another etag than its own is somebody else's file.
    """
    method = "GET" if fault == "another etag" else None
    world = replace(world, options=WAYS[way], expected=expected[way])
    for number in itertools.count():
        world.remove_output()
        rule = world.proxy.add(Rule(LASTING[fault], method, first=number, times=times))
        error = world.fail()
        if not rule.hits:
            assert error is None
            break
        kept = world.finished()
        assert not world.is_accepted() or world.output() == world.expected, number
        try:
            world.convert(resume=True)
        except OutputExistsError:
            assert world.output() == world.expected, f"{number}: complete, and then an error"
        else:
            world.assert_whole()
            assert kept.items() <= world.etags().items(), number
    assert number > (40 if method is None else 10)
