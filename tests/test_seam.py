"""Only storage and the command line ask the system for files; everything else asks a store for names."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import seam

PACKAGE = Path(__file__).parent.parent / "ckpt_convert"
ROOMS = ("storage", "cli")

OF_PATHS = frozenset(
    (
        *("exists", "is_file", "is_dir", "is_symlink", "is_mount", "stat", "lstat", "samefile"),
        *("iterdir", "glob", "rglob", "readlink", "expanduser"),
        *("read_text", "read_bytes", "write_text", "write_bytes"),
        *("mkdir", "rmdir", "touch", "unlink", "symlink_to", "hardlink_to", "chmod"),
    )
)
"""Methods of pathlib that ask the system, but for those whose names other methods have (open, resolve, rename)."""

OF_OS = frozenset(
    (
        *("stat", "lstat", "fstat", "access", "listdir", "scandir", "walk", "open", "read", "write", "pread", "pwrite"),
        *("mkdir", "makedirs", "rename", "replace", "remove", "unlink", "rmdir", "link", "symlink", "readlink"),
        *("chmod", "fsync", "ftruncate", "truncate", "statvfs", "utime"),
    )
)
OF_OS_PATH = frozenset(
    (
        *("exists", "lexists", "isfile", "isdir", "islink", "ismount", "getsize", "getmtime", "samefile", "realpath"),
        *("abspath", "expanduser"),
    )
)


@pytest.mark.parametrize("scenario", sorted(seam.SCENARIOS))
def test_nothing_else_opens_lists_or_changes_files(scenario: str, tmp_path: Path) -> None:
    found = watched(scenario, tmp_path)
    assert found == ([] if scenario != "offense" else ["ckpt_convert.x:2 open", "ckpt_convert.x:3 os.listdir"])


def watched(scenario: str, directory: Path) -> list[str]:
    """Who asked for what, without the names of the files."""
    command = [sys.executable, "-m", "tests.seam", str(directory), scenario]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, cwd=PACKAGE.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.rpartition(" ")[0] for line in done.stdout.splitlines()]


def test_nothing_else_has_a_call_that_does() -> None:
    assert [line for path in sorted(PACKAGE.rglob("*.py")) for line in calls(path)] == []


def calls(path: Path) -> Iterator[str]:
    """The calls in a module outside storage and the command line that ask the system for files."""
    module = path.relative_to(PACKAGE).as_posix()
    if module.startswith(tuple(f"{room}/" for room in ROOMS)):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and asks_the_system(node.func):
            yield f"{module}:{node.lineno} {ast.unparse(node)}"


def asks_the_system(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id in ("open", "Path")
    if not isinstance(function, ast.Attribute):
        return False
    owner = ast.unparse(function.value)
    if owner in ("shutil", "tempfile", "glob", "io"):
        return True
    return function.attr in {"os": OF_OS, "os.path": OF_OS_PATH}.get(owner, OF_PATHS)
