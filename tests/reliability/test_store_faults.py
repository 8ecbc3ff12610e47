"""An object store on bad days: every kind of request of every operation meets every fault.

What a retry can heal is healed. What it cannot is one clear error, after which nothing is half there: no upload is left
open, what is accepted as a checkpoint is whole, and the next attempt keeps the files that the first has finished.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import moto.s3.models
import pytest

import ckpt_convert
from ckpt_convert import CkptConvertError
from ckpt_convert.analysis.check import check_checkpoint
from ckpt_convert.analysis.diff.compare import compare_checkpoints
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.errors import InputError
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.remote import uploads
from ckpt_convert.storage.remote.objects import ObjectStorage
from tests.helpers import GOLDEN
from tests.servers import faults, s3
from tests.servers.faults import Fault, FaultProxy, Rule
from tests.servers.s3 import Bucket

HF = GOLDEN / "llama" / "hf"
OPTIONS = (("max_retries", "3"), ("retry_timeout", "20"), ("timeout", "2s"))
LOCK = ".out.partial"

WRITING = ("list", "head", "get", "put", "create", "part", "complete", "delete")
"""The kinds of requests of a conversion from the store and into it."""

HEALED: dict[str, tuple[Fault, int]] = {
    "503 twice": (faults.status(503), 2),
    "500": (faults.status(500), 1),
    "reset": (faults.reset, 1),
    "answer lost": (faults.lost, 1),
    "body cut": (faults.cut(10), 1),
    "length too large": (faults.wrong_length(5), 1),
}
"""Faults that pass, and how often each befalls every kind of request."""


@dataclass(frozen=True)
class World:
    """A source in a bucket behind a proxy, and what an output of it has to be."""

    bucket: Bucket
    proxy: FaultProxy
    expected: dict[str, bytes]

    def place(self, name: str) -> Place:
        return Place(ObjectStorage("s3", self.bucket.name, OPTIONS), PurePosixPath(name))

    def convert(self, **options: Any) -> ckpt_convert.Report:
        """The conversion that all tests do, into files of several parts each."""
        given: dict[str, Any] = {"to": "meta", "model_parallel": 2, "workers": 1, **options}
        return ckpt_convert.convert_checkpoint(self.place("in"), self.place("runs/out"), **given)

    def output(self) -> dict[str, bytes]:
        start = "runs/out/"
        return {key.removeprefix(start): data for key, data in self.bucket.files.items() if key.startswith(start)}

    def is_accepted(self) -> bool:
        """Whether anything of ours takes the output for a checkpoint."""
        with contextlib.suppress(InputError), open_identified(self.place("runs/out")):
            return True
        return False

    def unlock(self) -> None:
        """What a person is told to do after a writer that could not do it any more."""
        if f"runs/{LOCK}" in self.bucket.files:
            self.place(f"runs/{LOCK}").store.delete([f"runs/{LOCK}"])

    def assert_whole(self) -> None:
        assert self.output() == self.expected
        assert self.bucket.uploads == {}
        assert not [key for key in self.bucket.files if PurePosixPath(key).name.startswith(".")]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the conversion writes on a disk."""
    out = tmp_path_factory.mktemp("expected") / "out"
    ckpt_convert.convert_checkpoint(HF, out, to="meta", model_parallel=2)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture
def world(
    bucket: Bucket, s3_proxy: FaultProxy, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    for name in ("PART", "_MIB"):
        monkeypatch.setattr(uploads, name, 1 << 16)
    monkeypatch.setattr(moto.s3.models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    for path in HF.iterdir():
        bucket.put(f"in/{path.name}", path.read_bytes())
    made = World(bucket, s3_proxy, expected)
    yield made
    assert {f"in/{path.name}": path.read_bytes() for path in HF.iterdir()}.items() <= bucket.files.items()


def paragraph(error: CkptConvertError) -> str:
    """An error's text, which is one paragraph that names the place and holds nothing secret."""
    text = str(error)
    assert "s3://bucket-" in text
    assert "\n\n" not in text
    assert len(text) < 800
    for secret in (s3.SECRET, s3.KEY, "X-Amz", "Signature", "uploadId", "127.0.0.1"):
        assert secret not in text
    return text


def test_the_kinds_of_requests_are_known(world: World) -> None:
    world.convert()
    assert world.proxy.log.kinds().keys() == {*WRITING}
    world.assert_whole()


class TestHealed:
    @pytest.mark.parametrize("fault", HEALED)
    def test_a_conversion_in_which_each_kind_of_request_fails(self, world: World, fault: str) -> None:
        what, times = HEALED[fault]
        rules = [world.proxy.add(Rule(what, kind=kind, times=times)) for kind in WRITING]
        world.convert()
        world.assert_whole()
        assert all(rule.hits == times for rule in rules)

    @pytest.mark.parametrize("fault", HEALED)
    def test_looking_while_each_kind_of_request_fails(self, world: World, fault: str) -> None:
        world.convert()
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


def inspect(world: World) -> None:
    with open_identified(world.place("runs/out")) as opened:
        assert opened.model.family.name == "llama"


def verify(world: World) -> None:
    assert check_checkpoint(world.place("runs/out")).findings == ()


def diff(world: World) -> None:
    with open_identified(world.place("in")) as one, open_identified(world.place("runs/out")) as other:
        assert compare_checkpoints(one, other).same
