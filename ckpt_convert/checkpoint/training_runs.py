"""The weights of a training run: the newest step in a directory of steps, and the model's part of a step.

torchtitan saves ``checkpoint/step-N``, Trainer ``checkpoint-N``; with FSDP's sharded state dicts, accelerate and
Trainer save the model as ``pytorch_model_fsdp_0``, a directory of torch.distributed.checkpoint (accelerate 1.15,
``save_fsdp_model``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ckpt_convert.checkpoint.opening import all_weight_files
from ckpt_convert.containers.dcp import DCP_INDEX
from ckpt_convert.errors import KeyMismatchError
from ckpt_convert.formats.names import TRAINING_PREFIXES
from ckpt_convert.storage.place import Place
from ckpt_convert.wording import first_few

_STEP = re.compile(r"(?:step|checkpoint)[-_](\d{1,18})")
_TITAN, _FSDP, _LATEST = "checkpoint", "pytorch_model_fsdp_0", "latest"
_ZERO = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_(?:optim|model)_states\.pt")


@dataclass(frozen=True)
class RunWeights:
    """Where the weights of a run are, the run's config.json for them, if any, and what to say about the choice."""

    place: Place
    config: Place | None
    notices: tuple[str, ...] = ()


def find_run_weights(path: Place) -> RunWeights | None:
    """The weights in a training run's directory; None for a path with weights of its own, and for one without any.

    Raises KeyMismatchError for the partitions of DeepSpeed's ZeRO, which only its own tool merges.
    """
    if not path.is_folder() or _has_weights(path):
        return None
    for folder in (path, path / _TITAN):
        if (found := _in_folder(folder)) is not None:
            return RunWeights(found[0], _config_above(found[0], path), found[1])
    _refuse_zero(path)
    return None


def _in_folder(folder: Place) -> tuple[Place, tuple[str, ...]] | None:
    """The weights of a step, or of the newest complete step in a folder of steps, with notices."""
    if not folder.is_folder():
        return None
    if (part := _of_step(folder)) is not None:
        return part, (f"took {part.name}, which holds the model of {folder}",)
    if (latest := _of_step(folder / _LATEST)) is not None:
        return latest, (f"took {_LATEST}, the newest step of {folder}",)
    skipped: list[str] = []
    for step in _newest_first(folder):
        if (weights := _of_step(step)) is not None:
            left = f"; skipped, as without complete weights: {first_few(skipped, 4)}" if skipped else ""
            return weights, (f"took {step.name}, the newest step of {folder}{left}",)
        _refuse_zero(step)
        skipped.append(step.name)
    return None


def _of_step(step: Place) -> Place | None:
    """The weights of one step: the directory itself, or the model's part of it."""
    if not step.is_folder():
        return None
    return next((place for place in (step, step / _FSDP) if place.is_folder() and _has_weights(place)), None)


def _newest_first(folder: Place) -> Iterator[Place]:
    steps = [(int(match[1]), one) for one in folder.folders() if (match := _STEP.fullmatch(one.name))]
    yield from (step for _, step in sorted(steps, key=lambda numbered: numbered[0], reverse=True))


def _has_weights(folder: Place) -> bool:
    """Whether a folder has weights at its root; torch.distributed.checkpoint writes its index last."""
    if (folder / DCP_INDEX).is_regular_file():
        return True
    return any(
        not name.startswith(TRAINING_PREFIXES) and not _ZERO.fullmatch(name) for name in all_weight_files(folder)
    )


def _config_above(place: Place, top: Place) -> Place | None:
    """The config.json of the weights, or the next one above them in the run's directory."""
    here = place
    while True:
        if (here / "config.json").is_regular_file():
            return here / "config.json" if here != place else None
        if here == top or not here.is_inside(top):
            return None
        here = here.parent


def _refuse_zero(path: Place) -> None:
    """Raise KeyMismatchError where a path is, or a step in it has, what DeepSpeed's ranks save under ZeRO."""
    for folder in (path, *path.folders()):
        names = [one.name for one in folder.files() if _ZERO.fullmatch(one.name)]
        if names:
            run = folder.parent if folder.name.startswith("global_step") else folder
            raise KeyMismatchError(
                f"{folder}: has the partitions of DeepSpeed's ZeRO, one a rank ({min(names)}), which are no tensors of "
                f"the model; merge them with `python zero_to_fp32.py {run} OUT`, the script that DeepSpeed puts there, "
                "and convert what it writes"
            )
