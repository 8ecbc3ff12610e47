"""What users mistype, and terminals that can say little."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.command import run
from tests.helpers import GOLDEN


def encoded(encoding: str) -> str:
    """What ``inspect`` prints where the streams of its process have this encoding."""
    command = [sys.executable, "-m", "ckpt_convert", "inspect", str(GOLDEN / "llama/hf")]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_a_page_does_not_replace_a_config(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "llama/hf", path)
    config = path / "config.json"
    before = config.read_bytes()
    done = run("inspect", str(path), "--html", str(config))
    assert done.returncode == 2
    assert "is there and is no page" in done.stderr
    assert config.read_bytes() == before


def test_a_page_replaces_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for _ in range(2):
        assert run("inspect", str(GOLDEN / "llama/hf"), "--html", str(page)).returncode == 0
    assert page.read_bytes().lower().startswith(b"<!doctype html")


def test_columns_stay_in_line_in_ascii(tmp_path: Path) -> None:
    plain = encoded("ascii")
    assert plain.isascii()
    assert "\\x" not in plain
    assert list(map(len, plain.splitlines())) == list(map(len, encoded("utf-8").splitlines()))


def test_a_link_that_leads_nowhere_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    done = run("inspect", str(tmp_path / "model.safetensors"))
    assert done.returncode == 3
    assert "leads nowhere" in done.stderr


def test_a_missing_shard_is_called_missing(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "llama/hf", path)
    (path / "model-00002-of-00004.safetensors").unlink()
    assert "model-00002-of-00004.safetensors: is not there" in run("diff", str(path), str(path)).stderr
