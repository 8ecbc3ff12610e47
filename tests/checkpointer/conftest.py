"""What tests of the checkpointer share: a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to train from, which no test changes."""
    from tests.checkpointer.training import trainable  # imports torch

    return trainable(tmp_path_factory.mktemp("source") / "hf")
