"""The command line, run in this process: its exit code, and what it printed.

A process of its own is for what only that has: signals, imports, limits, closed streams, encodings.
"""

from __future__ import annotations

import contextlib
import io
import traceback
from dataclasses import dataclass

from ckpt_convert.cli import main


@dataclass(frozen=True)
class Finished:
    """What ``subprocess.run`` returns of a command that has ended."""

    returncode: int
    stdout: str
    stderr: str


def run(*words: object, code: int | None = None) -> Finished:
    """Run ``ckpt-convert`` with these words; ``code``, where it is given, is the exit code that it has to have."""
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main([str(word) for word in words])
            returned = 0
        except SystemExit as end:
            returned = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:  # as --debug lets it out
            traceback.print_exc()
            returned = 1
    finished = Finished(returned, _text(stdout), _text(stderr))
    assert code in (None, returned), finished
    return finished


def _text(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()
