"""A little of everything that benchmarks/endurance.py does: fuzzing, kills, failing calls, signals, flipped bits."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt_convert import InputError

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="calls of the system are made to fail by preloading a library")
def test_no_half_output_no_untrue_success_no_code_run_no_hang() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "endurance.py", "--share", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = re.findall(r"^\| (.+?) \| ([\d,]+)(?: of [\d,]+)? \| [\d,–]+ \| (\d+) \|$", done.stdout, re.MULTILINE)
    assert {name: int(wrong) for name, _, wrong in rows if int(wrong)} == {}, done.stdout
    assert done.returncode == 0, done.stderr
    assert len(rows) == 30
    assert sum(int(cases.replace(",", "")) for name, cases, _ in rows if name.startswith("fuzz")) >= 400
    assert all(int(cases.replace(",", "")) for _, cases, _ in rows)


def test_a_nested_key_of_an_old_torch_file_is_refused_in_one_line(tmp_path: Path) -> None:
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    nested = b"\x80\x02}" + b")" + b"\x85" * 3000 + b"K\x01s."  # {((((…),),),): 1}
    whole = [pickle.dumps(one, 2) for one in head] + [nested, pickle.dumps([], 2)]
    (tmp_path / "old.bin").write_bytes(b"".join(whole))
    command = [sys.executable, "-m", "ckpt_convert", "inspect", tmp_path / "old.bin"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == InputError.exit_code
    assert "a dict key should be a string or a small number, not tuple" in done.stderr
    assert max(map(len, done.stderr.splitlines())) < 500
