"""A look at a checkpoint in a bucket shows what one at a directory does, and takes few requests, which S3 counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import ckpt_convert
from tests.cli.inspecting import run
from tests.helpers import GOLDEN
from tests.servers.s3 import Bucket, S3Server

HF = GOLDEN / "llama" / "hf"
OUTPUTS: dict[str, dict[str, Any]] = {
    "hf": {"to": "hf"},
    "meta": {"to": "meta", "model_parallel": 2},
    "native": {"to": "native"},
    "torchtitan": {"to": "torchtitan"},
}


def upload(bucket: Bucket, directory: Path) -> str:
    """Put the files of a directory into a bucket, the manifest last; the URL."""
    paths = sorted((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stem == "manifest")
    for path in paths:
        bucket.put(f"x/{path.relative_to(directory).as_posix()}", path.read_bytes())
    return f"s3://{bucket.name}/x"


def document(place: object) -> Any:
    """What inspect says as JSON, without the place."""
    return json.loads(run(place, "--json").stdout.replace(str(place), "PLACE"))


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_takes_three_requests(name: str, bucket: Bucket, s3_server: S3Server, tmp_path: Path) -> None:
    far = f"s3://{bucket.name}/out"
    for out in (tmp_path / "out", far):
        ckpt_convert.convert_checkpoint(HF, out, **OUTPUTS[name])
    s3_server.log.clear()
    shown = document(far)
    assert s3_server.log.kinds() == {"list": 1, "get": 1 if name == "native" else 2}
    assert shown == document(tmp_path / "out")


def test_any_other_takes_two_and_one_for_each_shard(bucket: Bucket, s3_server: S3Server) -> None:
    far = upload(bucket, HF)
    shown = document(far)
    assert s3_server.log.kinds() == {"list": 1, "get": 1 + 4}
    assert shown == document(HF)


def test_shards_that_are_not_all_there_are_told_by_the_index(bucket: Bucket, tmp_path: Path) -> None:
    some = shutil.copytree(HF, tmp_path / "some")
    (some / "model-00002-of-00004.safetensors").unlink()
    assert "model-00002-of-00004.safetensors" in str(run(upload(bucket, some), code=1).exception)


def test_statistics_are_of_what_the_headers_say(bucket: Bucket, s3_server: S3Server, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="hf")
    far = upload(bucket, tmp_path / "out")
    assert json.loads(run(far, "--stats", "--json").stdout)["tensors"][0]["stats"]
    asked = {one.name.rpartition("/")[2] for one in s3_server.log.all("get")}
    assert asked >= {f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)}
