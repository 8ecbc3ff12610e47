"""Choosing the saved step to continue from: the newest, the best, or one that is asked for, if it is not damaged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ckpt_convert.analysis.check import check_checkpoint as check_weights
from ckpt_convert.checkpoint.record import MANIFEST
from ckpt_convert.checkpointer.run import retention, saved_steps
from ckpt_convert.checkpointer.run.saved_steps import SavedStep
from ckpt_convert.checkpointer.save.options import Options
from ckpt_convert.checkpointer.save.run_directory import RunDirectory
from ckpt_convert.errors import (
    CheckpointNotFoundError,
    CkptConvertError,
    CorruptFileError,
    UnreadableError,
    UsageError,
)
from ckpt_convert.storage import pointer
from ckpt_convert.storage.place import Place, checked_place
from ckpt_convert.storage.reader import reading
from ckpt_convert.wording import indented_list

log = logging.getLogger("ckpt_convert")

_NOT_GIVEN = "once that is mended run again, or resume from an older step (from_=)"


def choose_together(
    directory: RunDirectory, options: Options, from_: Any, *, from_dir: Any, verify: bool
) -> SavedStep | None:
    """``choose_step``, by the first of several ranks for all of them."""
    ranks, workers = options.ranks, options.workers

    def chosen() -> SavedStep | None:
        return choose_step(directory.path, from_, directory.policy, from_dir=from_dir, verify=verify, workers=workers)

    if ranks is None:
        return chosen()
    answer = ranks.first(
        "choosing a checkpoint", lambda: str(found.place.absolute()).encode() if (found := chosen()) else None
    )
    return saved_steps.read_step(checked_place(answer.decode()), renamed=True) if answer else None


def choose_step(
    output_dir: Place,
    from_: Any,
    policy: retention.RetentionPolicy,
    *,
    from_dir: Any = None,
    verify: bool,
    workers: int,
) -> SavedStep | None:
    """The checkpoint that ``from_`` selects; None if "latest" finds an empty ``output_dir``.

    ``from_dir`` is the directory of another run, in which it is looked for instead.
    "latest" passes over damaged ones with a warning. Raises CheckpointNotFoundError for one that is not there,
    CorruptFileError where what was asked for, or all there is, is damaged, and UnreadableError where the system does
    not give it.
    """
    if from_dir is not None:
        output_dir = checked_place(from_dir, "from_dir")
        if not (from_ in ("latest", "best") or isinstance(from_, int)):
            raise UsageError(f'from_dir={str(from_dir)!r}: expected from_="latest", "best" or a step, found {from_!r}')
    if from_ == "latest":
        newest = newest_sound_step(output_dir, verify=verify, workers=workers)
        if newest is None and from_dir is not None:
            raise CheckpointNotFoundError(f"{output_dir}: holds no complete checkpoint of a checkpointer")
        return newest
    there = saved_steps.scan_steps(output_dir)
    found: SavedStep | None
    if from_ == "best":
        metric = policy.metric(None)
        if metric is None:
            raise UsageError('from_="best": best by what? Give the checkpointer best=, such as best="val_loss:min"')
        found = retention.best_step(there, metric)
        if found is None:
            raise CheckpointNotFoundError(f"{output_dir}: no checkpoint has the metric {metric[0]!r}")
    elif isinstance(from_, int) and not isinstance(from_, bool):
        found = next((saved for saved in reversed(there) if saved.step == from_), None)
        if found is None:
            steps = ", ".join(str(saved.step) for saved in there) or "none"
            raise CheckpointNotFoundError(f"{output_dir}: has no complete checkpoint of step {from_}; it has: {steps}")
    elif isinstance(from_, str | Path | Place):
        place = pointer.follow_pointer(checked_place(from_, "from_"))
        found = saved_steps.read_step(place.real(), renamed=True)
        if found is None:
            found = newest_sound_step(place, verify=verify, workers=workers)
        if found is None:
            raise CheckpointNotFoundError(
                f"{from_}: is no complete checkpoint of a checkpointer, nor a directory of them; to start from weights "
                "alone, make it the source"
            )
    else:
        raise UsageError(f'from_={from_!r}: expected "latest", "best", a step, or the path of a checkpoint')
    problems = check_step(found, verify=verify, workers=workers)
    if problems:
        raise CorruptFileError(f"{found.place}: cannot be resumed from:{indented_list(problems)}")
    return found


def newest_sound_step(output_dir: Place, *, verify: bool, workers: int) -> SavedStep | None:
    """The newest undamaged checkpoint; None if there is no checkpoint at all."""
    there = saved_steps.scan_steps(output_dir)
    gone = [place for place in saved_steps.list_directories(output_dir) if saved_steps.is_damaged(place)]
    lacking = [place for place in gone if not (place / MANIFEST).is_regular_file()]  # of others, the scan has warned
    for path in lacking:
        log.warning("%s is damaged and skipped: its manifest is missing", path)
    said = []
    for saved in reversed(there):
        problems = check_step(saved, verify=verify, workers=workers)
        if not problems:
            return saved
        said += problems
        log.warning("%s is damaged and skipped: %s", saved.place, "; ".join(problems))
    said += [f"{path}: its manifest is damaged or gone" for path in gone]
    if said:
        raise CorruptFileError(
            f"{output_dir}: holds {len(there) + len(gone)} checkpoints, but none that is sound; move them elsewhere, "
            f"or choose another output_dir, for a new run:{indented_list(said)}"
        )
    return None


def check_step(saved: SavedStep, *, verify: bool, workers: int) -> list[str]:
    """The problems of a checkpoint; ``verify`` reads all of it, else only names, sizes and headers are checked.

    Raises UnreadableError where the system does not give a file of it: it may be sound, so no other may take its place.
    """
    here = saved.place.listed()
    # In general an auxiliary file may be deleted, but a step cannot be loaded without its config.
    beside = [here / side["name"] for side in saved.manifest.get("side_files") or ()]
    try:
        with reading(saved.place):
            report = check_weights(here, values=verify, merged=False, workers=workers)
            missing = [f"{path}: is missing" for path in beside if not path.is_regular_file()]
    except UnreadableError as error:
        raise UnreadableError(f"{error}; {_NOT_GIVEN}") from error
    except CkptConvertError as error:
        return [str(error)]
    found = [finding for finding in report.findings if finding.severity == "error"]
    if unread := [finding.text for finding in found if finding.unreadable]:
        raise UnreadableError(f"{saved.place}: {'; '.join(unread[:3])}; {_NOT_GIVEN}")
    return missing + [finding.text for finding in found]
