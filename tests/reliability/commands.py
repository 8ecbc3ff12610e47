"""The command line in a process of its own."""

from __future__ import annotations

import subprocess
import sys


def run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run ``ckpt-convert`` with these words; returns its exit code and what it printed."""
    command = [sys.executable, "-m", "ckpt_convert", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]
