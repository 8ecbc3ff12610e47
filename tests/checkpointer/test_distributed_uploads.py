"""Several ranks whose run is in a bucket: its steps are those of one process, and other ranks go on from it alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ckpt_convert.checkpointer.run import saved_steps
from ckpt_convert.storage.place import checked_place
from tests.checkpointer.pool import Pool, split
from tests.checkpointer.test_distributed_saving import train_full
from tests.checkpointer.training import make_model, trainable
from tests.helpers import assert_same, sums
from tests.servers.s3 import Bucket

STORE = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")


def train(
    here: Path, url: str, environment: dict[str, str], source: Path, until: int, asynchronous: bool
) -> dict[str, torch.Tensor]:
    """Go on in the bucket, with a disk that is empty at first."""
    os.environ.update(environment)
    model = split(make_model(), "fsdp")
    local = here / f"disk_{until}"
    return train_full(url, model, source, until, local_dir=local, asynchronous=asynchronous)  # type: ignore[arg-type]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_other_ranks_go_on_from_the_bucket_alone(
    pool: Pool, bucket: Bucket, asynchronous: bool, tmp_path: Path
) -> None:
    source = trainable(tmp_path / "source")
    expected = train_full(tmp_path / "alone", make_model(), source, 6)
    url = f"s3://{bucket.name}/run"
    environment = {name: os.environ[name] for name in STORE}
    for until, world in ((3, 2), (6, 4)):
        for state in pool.run(train, tmp_path, url, environment, source, until, asynchronous, world=world):
            found = state
    assert_same(found, expected)
    assert [saved.step for saved in saved_steps.scan_steps(checked_place(url))] == [1, 2, 3, 4, 5, 6]
    assert bucket.uploads == {}
    for step in range(1, 7):
        for name in sums(tmp_path / "alone" / f"step_{step}"):
            if not name.startswith(("training_state", "ckpt_convert/manifest")):
                data = (tmp_path / "alone" / f"step_{step}" / name).read_bytes()
                assert bucket.files[f"run/step_{step}/{name}"] == data, (step, name)
