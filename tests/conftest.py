"""Gives every test its kind, one of the markers in pyproject.toml: by its file, unless the test itself is marked.

``make test-fast`` imports no file of another kind: collecting all of them takes half a minute.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.checkpointer.pool import Pool

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Before torch is imported, here or in a process that a test starts: threads of tiny models wait for each other."""

pytest_plugins = ["tests.servers.fixtures"]

ROOT = Path(__file__).parent
SERVERS = ("s3", "azure")
"""Parameters of tests that run on a store in memory and on a server's: there, all cases but the first are slow."""

KINDS = ("fast", "cli", "train", "browser", "slow")

FOLDERS = {
    ".": "cli",
    "adapters": "train",
    "analysis": "cli",
    "checkpoint": "cli",
    "checkpointer": "train",
    "cli": "cli",
    "containers": "fast",
    "convert": "cli",
    "models": "cli",
    "models/core": "fast",
    "models/llama": "fast",
    "models/llama4": "cli",
    "models/mistral": "fast",
    "models/mllama": "cli",
    "reliability": "cli",
    "servers": "cli",
    "storage": "fast",
    "storage/remote": "cli",
    "tensors": "fast",
    "tokenizer": "cli",
}
"""The kind of the files of each folder, but for those of FILES."""

FILES = {
    "fast": (
        "analysis/test_alignment.py",
        "checkpoint/test_checklist.py",
        "checkpoint/test_identify.py",
        "checkpointer/test_claims.py",
        "checkpointer/test_heartbeat.py",
        "checkpointer/test_naming.py",
        "checkpointer/test_serialize.py",
        "checkpointer/test_progress.py",
        "checkpointer/test_retention.py",
        "checkpointer/test_rng.py",
        "checkpointer/test_schedule.py",
        "checkpointer/test_slices.py",
        "checkpointer/test_tiles.py",
        "cli/test_formats.py",
        "cli/test_modules.py",
        "cli/test_text.py",
        "cli/test_tree.py",
        "convert/test_planning.py",
        "convert/test_runs.py",
        "convert/test_translate.py",
        "models/test_families.py",
        "models/test_names.py",
        "models/test_tables.py",
        "test_project.py",
        "test_promises.py",
        "test_values.py",
    ),
    "train": (
        "reliability/test_adapter_base.py",
        "reliability/test_copies.py",
        "reliability/test_data_identity.py",
        "reliability/test_final.py",
        "reliability/test_lost_source.py",
        "reliability/test_metrics.py",
        "reliability/test_options.py",
        "reliability/test_processes.py",
        "reliability/test_restarts.py",
        "reliability/test_resume_choices.py",
        "reliability/test_schedules.py",
        "reliability/test_trainer.py",
        "reliability/test_training_state.py",
        "reliability/test_unreadable_steps.py",
        "reliability/test_wrappers.py",
        "test_recipes.py",
    ),
    "browser": ("cli/test_html.py",),
}
_KIND_OF = {name: kind for kind, names in FILES.items() for name in names}


def kind(path: Path) -> str:
    """The kind of the tests of a file; a folder that FOLDERS lacks is an error."""
    name = path.relative_to(ROOT)
    folder = name.parent.as_posix()
    if folder not in FOLDERS:
        raise pytest.UsageError(
            f"tests/{folder}: add the folder to FOLDERS in tests/conftest.py, with the kind of its tests"
        )
    return _KIND_OF.get(name.as_posix(), FOLDERS[folder])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    fast_alone = config.getoption("markexpr") == "fast"
    return (fast_alone and collection_path.match("test_*.py") and kind(collection_path) != "fast") or None


def server_of(item: pytest.Item) -> str | None:
    """The server whose store a test runs on that other stores have too: one of its parameters."""
    parameters = (
        item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
    )
    return next((value for value in parameters if isinstance(value, str) and value in SERVERS), None)


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_servers: set[tuple[str, str]] = set()
    for item in items:
        of_file = kind(item.path)
        marked = {mark.name for mark in item.iter_markers() if mark.name in KINDS}
        if len(marked) > 1 or ("fast" in marked and of_file != "fast"):
            raise pytest.UsageError(f"{item.nodeid}: has one kind, and a fast test is in a file of fast tests")
        if not marked and (server := server_of(item)) is not None:  # all cases of a test would take long there
            function = item.nodeid.partition("[")[0], server
            item.add_marker("slow" if function in on_servers else "cli")
            on_servers.add(function)
        elif not marked:
            item.add_marker(of_file)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays to the end: a million objects, among which no garbage is looked for."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Processes for all tests that want some."""
    from tests.checkpointer.pool import Pool

    pool = Pool()
    yield pool
    pool.close()
