"""Runs that nobody closes: at the end of the program a warning says what that has lost, if anything."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_program_says_at_its_end_what_is_not_closed(tmp_path: Path) -> None:
    code = f"""
    from ckpt_convert import Checkpointer
    from tests.checkpointer.training import LLAMA, make_model

    def train(name, steps, **options):
        checkpointer = Checkpointer(LLAMA, {str(tmp_path)!r} + "/" + name, contents="weights", **options)
        checkpointer.resume(model=make_model())
        for _ in range(steps):
            checkpointer.step()
        return checkpointer

    train("lost", 3, save_every=2)
    train("unlocked", 1)  # a directory that nothing refers to is free again
    train("unlocked", 1).close()
    train("complete", 2, save_every=2)
    train("not-wanted", 3, save_every=2, save_last=False)
    train("untrained", 0)
    kept = train("closed", 1)
    kept.close()
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lost = [line for line in done.stderr.splitlines() if "without close()" in line]
    assert [line.split(":")[0] for line in lost] == [str(tmp_path / "unlocked"), str(tmp_path / "lost")]
    assert "the program ends at step 3 without close()" in lost[1]
