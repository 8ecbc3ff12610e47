"""``verify`` reads what the record carries as well: tensors that the format has no place for."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt_convert import convert_checkpoint
from ckpt_convert.analysis.check import check_checkpoint
from tests.helpers import GOLDEN

CARRIED = "ckpt_convert/layouts/meta/carried.safetensors"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Hugging Face's layout of a Llama 2, which has no place for Meta's rope.freqs."""
    convert_checkpoint(GOLDEN / "llama2" / "meta-mp1", tmp_path / "hf", to="hf")
    assert (tmp_path / "hf" / CARRIED).is_file()
    return tmp_path / "hf"


def problems(path: Path) -> list[tuple[str, str]]:
    return [(finding.check, finding.text) for finding in check_checkpoint(path).findings if finding.severity == "error"]


def test_what_is_carried_is_found_and_read(output: Path) -> None:
    assert problems(output) == []


def test_a_bit_that_flipped_is_found(output: Path) -> None:
    data = bytearray((output / CARRIED).read_bytes())
    data[-1] ^= 1
    (output / CARRIED).write_bytes(data)
    ((kind, text),) = problems(output)
    assert kind == "checksum"
    assert text.startswith(f"rope.freqs in {CARRIED} was changed: checksum ")


def test_a_file_that_is_none_any_more_is_named(output: Path) -> None:
    (output / CARRIED).write_bytes(b"none")
    ((kind, text),) = problems(output)
    assert kind == "record"
    assert text.startswith(f"{CARRIED}: ")


def test_a_file_that_is_gone_is_named(output: Path) -> None:
    (output / CARRIED).unlink()
    ((kind, text),) = problems(output)
    assert kind == "record"
    assert text.startswith(f"{CARRIED}: is not there, though ckpt_convert/manifest.json needs it")
