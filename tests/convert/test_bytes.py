"""A conversion reads every byte of the tensors once, and writes every byte once."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckpt_convert
from tests.convert.test_memory import write_model

COUNTERS = Path("/proc/self/io")
SLACK = 4 << 20
"""Headers, configs and modules that are imported; the tensors have 45 MB."""


def moved() -> tuple[int, int]:
    """The bytes that this process has read and written by system calls, also those of the page cache."""
    lines = dict(line.split(": ") for line in COUNTERS.read_text().splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


@pytest.mark.skipif(not COUNTERS.exists(), reason="the counters of a process are in Linux's /proc")
@pytest.mark.parametrize("target", ["meta", "native", "torchtitan"])
def test_a_conversion_there_or_back_moves_each_byte_once(target: str, tmp_path: Path) -> None:
    size = write_model(tmp_path / "hf", 2)
    for source, output, to in (("hf", "there", target), ("there", "back", "hf")):
        before = moved()
        ckpt_convert.convert_checkpoint(tmp_path / source, tmp_path / output, to=to)
        read, written = (now - then for now, then in zip(moved(), before, strict=True))
        assert size <= read < 1.01 * size + SLACK
        assert size <= written < 1.01 * size + SLACK
