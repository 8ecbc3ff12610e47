"""Imported or called only by code that does what a pickle says. It leaves a file where the fuzzer looks for one."""

from __future__ import annotations

import os
from pathlib import Path

SEEN = Path(os.environ.get("CKPT_CONVERT_CANARY", "/nonexistent/canary"))


def touch(*arguments: object) -> None:
    SEEN.write_text("code of a file was run\n")


touch()
