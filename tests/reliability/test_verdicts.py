"""The exit code of a command says what was found, or done, whatever happens to those who read its output."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import GOLDEN, edit_json, sums

HF = GOLDEN / "llama" / "hf"
QUALIFIED = f"{sys.executable} -m ckpt_convert"

READERS = ("{} | true", "{} >&-", "{} > /dev/full", "{} 2>&1 | true")


def shell(line: str) -> tuple[int, str]:
    """The exit code of the first command of a pipe, and what the line said on standard error."""
    run = ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"})
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with errors and NaN."""
    path = tmp_path_factory.mktemp("source") / "damaged"
    shutil.copytree(HF, path)
    edit_json(path / "config.json", vocab_size=57)
    shard = path / "model-00001-of-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-4096:] = b"\xff" * 4096
    shard.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize("reader", READERS)
def test_verify(damaged: Path, reader: str) -> None:
    code, said = shell(reader.format(f"{QUALIFIED} verify --quick {damaged}"))
    assert code == 1, said
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert ("standard output: cannot be written: No space left on device" in said) == ("/dev/full" in reader)


@pytest.mark.parametrize(("options", "reader"), [("--quiet", "{} | true"), ("--json", "{} > /dev/full")])
def test_verify_with_options(damaged: Path, options: str, reader: str) -> None:
    code, said = shell(reader.format(f"{QUALIFIED} verify {damaged} {options}"))
    assert code == 1, said


@pytest.mark.parametrize(
    ("options", "reader"), [("", "{} | true"), ("--json", "{} > /dev/full"), ("--html -", "{} | head -1")]
)
def test_diff(damaged: Path, options: str, reader: str) -> None:
    code, said = shell(reader.format(f"{QUALIFIED} diff {HF} {damaged} {options}"))
    assert code == 1, said


def test_a_sound_checkpoint_stays_sound(damaged: Path) -> None:
    assert shell(f"{QUALIFIED} verify {HF} | true")[0] == 0
    assert shell(f"{QUALIFIED} diff {HF} {HF} > /dev/full")[0] == 0
    assert shell(f"{QUALIFIED} --help | true")[0] == 0
    assert shell(f"{QUALIFIED} verify /nowhere/at/all 2>&1 | true")[0] == 3
    assert shell(f"{QUALIFIED} inspect {HF} | true")[0] == 0
    assert shell(f"{QUALIFIED} inspect {damaged} --fail-on-nan | true")[0] == 1


def test_a_command_that_only_prints_fails_where_it_cannot() -> None:
    """Half a page of JSON is no success."""
    for command in (f"inspect {HF} --json", f"hf-to-meta {HF} /nowhere/at/all --dry-run"):
        code, said = shell(f"{QUALIFIED} {command} > /dev/full")
        assert (command, code) == (command, 1)
        assert "standard output: cannot be written: No space left on device" in said


def test_a_conversion_is_done_whoever_listens(tmp_path: Path) -> None:
    for number, reader in enumerate(("{} 2>&1 | true", "{} > /dev/full")):
        code, said = shell(reader.format(f"{QUALIFIED} hf-to-meta {HF} {tmp_path / str(number)}"))
        assert code == 0, said
        assert len(sums(tmp_path / str(number))) == 2


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "full.html").symlink_to("/dev/full")
    code, said = shell(f"{QUALIFIED} diff {HF} {HF} --html {tmp_path / 'full.html'}")
    assert code == 1
    assert f"--html {tmp_path / 'full.html'}: cannot be written: No space left on device" in said
