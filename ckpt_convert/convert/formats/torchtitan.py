"""torchtitan's checkpoints: a directory of torch.distributed.checkpoint with the model's keys at the top, no config.

Beside the weights, a checkpoint of a training run holds the state of all else, which is passed over. The names of those
entries are torchtitan 0.3.0's (torchtitan/components/checkpoint.py).
"""

from __future__ import annotations

from pathlib import Path

from ckpt_convert.convert.formats.base import (
    Directory,
    Format,
    WeightName,
    common_names,
    dcp_directory,
    numbered,
    plain_weights,
)


def find(directory: Path) -> Directory | None:
    """The directory of torch.distributed.checkpoint, else every plain torch file."""
    found = dcp_directory(directory)
    if found is not None:
        return found
    names = plain_weights(directory, (".pt",))
    return Directory(tuple(WeightName(name) for name in names)) if names else None


def file_names(count: int, container: str) -> list[str]:
    return common_names(count, container) or numbered(count, "model", ".pt")


FORMAT = Format(
    "torchtitan",
    find,
    file_names,
    ("dcp", "pt"),
    None,
    lambda name: name != "config.json",
    ignores=("optimizer.", "lr_scheduler.", "dataloader.", "train_state."),
)
