"""A conversion between buckets is killed at any of its requests; the next one ends what it left open, and goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import moto.s3.models
import pytest

import ckpt_convert
from ckpt_convert.storage.names import JOURNAL
from ckpt_convert.storage.remote import uploads
from tests.helpers import GOLDEN
from tests.servers.faults import FaultProxy, Forward, Rule
from tests.servers.http import Answer, DroppedError, Request
from tests.servers.s3 import Bucket

HF = GOLDEN / "llama" / "hf"
ROOT = Path(__file__).parent.parent.parent
PART = 1 << 15
WAYS: dict[str, dict[str, Any]] = {
    "two torch files": {"to": "meta", "model_parallel": 2},
    "four safetensors files": {"to": "hf", "dtype": "bfloat16", "allow_overflow": True},
}
CONVERT = f"""
import json, sys
import ckpt_convert
from ckpt_convert.storage.remote import uploads
uploads.PART = uploads._MIB = {PART}
source, destination, options = sys.argv[1:]
ckpt_convert.convert_checkpoint(source, destination, **json.loads(options))
"""


def killed_at(number: int, proxy: FaultProxy, source: str, destination: str, options: dict[str, Any]) -> bool:
    """Convert in a process that is killed at this request, before or after the store has carried it out.

    Returns False if the process came to its end before.
    """
    children: list[subprocess.Popen[bytes]] = []

    def kill(request: Request, forward: Forward) -> Answer:
        if number % 2:
            forward()
        os.kill(children[0].pid, signal.SIGKILL)
        children[0].wait()
        raise DroppedError

    proxy.clear()
    proxy.add(Rule(kill, first=number))
    child = subprocess.Popen([sys.executable, "-c", CONVERT, source, destination, json.dumps(options)], cwd=ROOT)
    children.append(child)
    child.wait()
    proxy.clear()
    assert child.returncode in (0, -signal.SIGKILL)
    return child.returncode != 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.slow if seed else pytest.mark.cli) for seed in range(5)]
)
def test_the_next_attempt_is_as_the_only_one(
    bucket: Bucket,
    s3_proxy: FaultProxy,
    way: str,
    seed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploads, "PART", PART)
    monkeypatch.setattr(uploads, "_MIB", PART)
    monkeypatch.setattr(moto.s3.models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    for path in HF.iterdir():
        bucket.put(f"in/{path.name}", path.read_bytes())
    source, destination = f"s3://{bucket.name}/in", f"s3://{bucket.name}/runs/out"
    numbers = random.Random(seed)
    resume = seed % 2 == 0
    killed = 0
    while killed_at(numbers.randrange(12, 45), s3_proxy, source, destination, {**WAYS[way], "resume": resume}):
        killed += 1
        if killed == (4 if seed else 1):
            break
    finished = finished_files(bucket)
    if finished is not None:
        ckpt_convert.convert_checkpoint(source, destination, **WAYS[way], resume=resume)
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", **WAYS[way])
    expected = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*")}
    assert output(bucket) == {name: path.read_bytes() for name, path in expected.items() if path.is_file()}
    assert bucket.uploads == {}
    assert not [key for key in bucket.files if "/." in key]
    if resume and finished:
        etags = {name: bucket.etags[f"runs/out/{name}"] for name in finished}
        assert etags == finished
        assert not [one for one in s3_proxy.log.all("create") if one.name.rpartition("/")[2] in finished]


def output(bucket: Bucket) -> dict[str, bytes]:
    start = "runs/out/"
    return {key.removeprefix(start): data for key, data in bucket.files.items() if key.startswith(start)}


def finished_files(bucket: Bucket) -> dict[str, str] | None:
    """The etags of the weight files that the last attempt has finished; None if it has finished all."""
    files = output(bucket)
    if JOURNAL in files:
        return {name: etag for name, (etag, _) in json.loads(files[JOURNAL])["whole"].items()}
    return {} if "ckpt_convert/manifest.json" not in files else None
