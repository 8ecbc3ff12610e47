"""What tests of several processes share: the processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.checkpointer.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Processes for all tests that want some."""
    pool = Pool()
    yield pool
    pool.close()
