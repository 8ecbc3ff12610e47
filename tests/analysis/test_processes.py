"""Work in several processes says what work in one does, whatever container the tensors lie in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ckpt_convert
from ckpt_convert.analysis.diff.compare import compare_checkpoints
from ckpt_convert.analysis.stats.stats import tensor_statistics
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.tensors import pool
from tests.checkpoint import quantizing
from tests.helpers import GOLDEN, read_safetensors

ROOT = Path(__file__).parent.parent.parent
LLAMA = GOLDEN / "llama" / "hf"


def dcp(path: Path) -> Path:
    ckpt_convert.convert_checkpoint(LLAMA, path, to="torchtitan")
    return path


def quantized(path: Path) -> Path:
    quantizing.fp8_llama(path)
    return path


def mxfp4(path: Path) -> Path:
    quantizing.gpt_oss(path)
    return path


def old_torch(path: Path) -> Path:
    torch.save(read_safetensors(LLAMA), path.with_suffix(".pt"), _use_new_zipfile_serialization=False)
    return path.with_suffix(".pt")


KINDS: dict[str, Callable[[Path], Path]] = {
    "safetensors": lambda _: LLAMA,
    "torch zip, four ranks": lambda _: GOLDEN / "llama" / "meta-mp4",
    "DCP": dcp,
    "quantized": quantized,
    "MXFP4": mxfp4,
    "torch without zip": old_torch,
}


@pytest.fixture(autouse=True)
def _everything_is_worth_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_WORTH", 0)
    monkeypatch.setattr(pool, "_BATCH", 1)
    monkeypatch.setattr(pool, "_MOST", 4)


@pytest.mark.parametrize("kind", KINDS)
def test_processes_say_what_one_does(kind: str, tmp_path: Path) -> None:
    with open_identified(KINDS[kind](tmp_path / "made")) as checkpoint:
        one, several = (dict(tensor_statistics(checkpoint, checkpoint.tensors, workers=number)) for number in (1, 3))
        assert one == several
        with open_identified(LLAMA) as other:
            alone, together = (compare_checkpoints(checkpoint, other, workers=number).as_dict() for number in (1, 3))
            assert alone == together


def test_what_a_process_was_started_with_is_not_run_again_in_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "recipe.py"
    script.write_text(f"""
from ckpt_convert.analysis.stats.stats import tensor_statistics
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.tensors import pool

print("begun")
pool._WORTH, pool._BATCH, pool._MOST = 0, 1, 4
checkpoint = open_identified({str(LLAMA)!r})
found = dict(tensor_statistics(checkpoint, checkpoint.tensors, workers=3))
print(len(found) == len(checkpoint.tensors))
""")
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=path, check=True)
    assert (done.stdout, done.stderr) == ("begun\nTrue\n", "")
