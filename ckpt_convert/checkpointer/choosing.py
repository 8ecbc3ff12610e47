"""Choosing the saved step to continue from: the newest, the best, or one that is asked for, if it is not damaged."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckpt_convert.analysis.check import check_checkpoint as check_weights
from ckpt_convert.analysis.check.spans import Share
from ckpt_convert.checkpoint.record import MANIFEST
from ckpt_convert.checkpointer.distributed.ranks import Ranks, packed, unpacked
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

_CHOOSING = "choosing a checkpoint"
_NOT_GIVEN = "once that is mended run again, or resume from an older step (from_=)"


def choose_together(
    directory: RunDirectory,
    options: Options,
    from_: Any,
    *,
    from_dir: Any = None,
    verify: bool = True,
    policy: retention.RetentionPolicy | None = None,
) -> SavedStep | None:
    """``choose_step``, by the first of several ranks for all of them; they read together what it has checked."""
    ranks, workers, policy = options.ranks, options.workers, policy or directory.policy
    if ranks is not None and not ranks.is_first:
        return _follow(ranks, workers, directory.places)
    found = choose_step(
        directory.places,
        from_,
        policy,
        from_dir=from_dir,
        verify=verify,
        workers=workers,
        ranks=ranks if verify else None,
    )
    if ranks is not None:
        ranks.first(_CHOOSING, lambda: _task(found, is_chosen=True))
    return found


def _task(saved: SavedStep | None, *, is_chosen: bool) -> bytes:
    """What the first rank tells the others to do with a step."""
    return packed([is_chosen, None if saved is None else str(saved.place.absolute())])


def _follow(ranks: Ranks, workers: int, places: Sequence[Place]) -> SavedStep | None:
    """Check what the first rank asks for, until it has chosen."""
    while True:
        is_chosen, place = unpacked(ranks.first(_CHOOSING, lambda: None))
        if place is None:
            return None
        ours = {str(one.absolute()): one for directory in places for one in saved_steps.list_directories(directory)}
        saved = saved_steps.read_step(ours.get(place) or checked_place(place), renamed=True)
        if saved is None:
            raise UnreadableError(f"{place}: is seen by the first rank alone; output_dir has to be one for all of them")
        if is_chosen:
            return saved
        _check_share(saved, ranks, workers)


def _check_share(saved: SavedStep, ranks: Ranks, workers: int) -> list[str]:
    """The problems of a checkpoint that all ranks have found, each in its share of the bytes."""

    def mine() -> bytes:
        rank = f"rank {ranks.rank} on {socket.gethostname()}"
        problems = check_step(saved, verify=True, workers=workers, share=Share(ranks.rank, ranks.count))
        return packed([[problem, rank] for problem in problems])

    found: list[str] = unpacked(ranks.round(f"checking {saved.place}", mine, _all_problems))
    return found


def _all_problems(every: Sequence[bytes]) -> list[bytes]:
    """What the ranks have found, each problem once."""
    found: dict[str, str] = {}
    for one in every:
        for problem, rank in unpacked(one):
            found.setdefault(problem, rank)
    return [packed([f"{problem} (found by {rank})" for problem, rank in found.items()])]


def choose_step(
    places: Sequence[Place],
    from_: Any,
    policy: retention.RetentionPolicy,
    *,
    from_dir: Any = None,
    verify: bool,
    workers: int,
    ranks: Ranks | None = None,
) -> SavedStep | None:
    """The checkpoint that ``from_`` selects in the ``places`` of a run; None if "latest" finds none.

    ``from_dir`` is the directory of another run, in which it is looked for instead.
    "latest" passes over damaged ones with a warning. Raises CheckpointNotFoundError for one that is not there,
    CorruptFileError where what was asked for, or all there is, is damaged, and UnreadableError where the system does
    not give it.
    """
    if from_dir is not None:
        places = [checked_place(from_dir, "from_dir")]
        if not (from_ in ("latest", "best") or isinstance(from_, int)):
            raise UsageError(f'from_dir={str(from_dir)!r}: expected from_="latest", "best" or a step, found {from_!r}')
    if from_ == "latest":
        newest = newest_sound_step(places, verify=verify, workers=workers, ranks=ranks)
        if newest is None and from_dir is not None:
            raise CheckpointNotFoundError(f"{places[-1]}: holds no complete checkpoint of a checkpointer")
        return newest
    there = saved_steps.scan_places(places)
    found: SavedStep | None
    if from_ == "best":
        metric = policy.metric(None)
        if metric is None:
            raise UsageError('from_="best": best by what? Give the checkpointer best=, such as best="val_loss:min"')
        found = retention.best_step(there, metric)
        if found is None:
            raise CheckpointNotFoundError(f"{places[-1]}: no checkpoint has the metric {metric[0]!r}")
    elif isinstance(from_, int) and not isinstance(from_, bool):
        found = next((saved for saved in reversed(there) if saved.step == from_), None)
        if found is None:
            steps = ", ".join(str(saved.step) for saved in there) or "none"
            raise CheckpointNotFoundError(f"{places[-1]}: has no complete checkpoint of step {from_}; it has: {steps}")
    elif isinstance(from_, str | Path | Place):
        place = pointer.follow_pointer(checked_place(from_, "from_"))
        found = saved_steps.read_step(place.real(), renamed=True)
        if found is None:
            found = newest_sound_step([place], verify=verify, workers=workers, ranks=ranks)
        if found is None:
            raise CheckpointNotFoundError(
                f"{from_}: is no complete checkpoint of a checkpointer, nor a directory of them; to start from weights "
                "alone, make it the source"
            )
    else:
        raise UsageError(f'from_={from_!r}: expected "latest", "best", a step, or the path of a checkpoint')
    problems = _problems(found, verify, workers, ranks)
    if problems:
        raise CorruptFileError(f"{found.place}: cannot be resumed from:{indented_list(problems)}")
    return found


def newest_sound_step(
    places: Sequence[Place], *, verify: bool, workers: int, ranks: Ranks | None = None
) -> SavedStep | None:
    """The newest undamaged checkpoint in some directories, the first of equal ones; None if there is none at all."""
    there = [saved for place in reversed(places) for saved in saved_steps.scan_steps(place)]
    there.sort(key=lambda saved: saved.sequence)
    gone = [one for place in places for one in saved_steps.list_directories(place) if saved_steps.is_damaged(one)]
    lacking = [place for place in gone if not (place / MANIFEST).is_regular_file()]  # of others, the scan has warned
    for path in lacking:
        log.warning("%s is damaged and skipped: its manifest is missing", path)
    said = []
    for saved in reversed(there):
        problems = _problems(saved, verify, workers, ranks)
        if not problems:
            return saved
        said += problems
        log.warning("%s is damaged and skipped: %s", saved.place, "; ".join(problems))
    said += [f"{path}: its manifest is damaged or gone" for path in gone]
    if said:
        raise CorruptFileError(
            f"{places[-1]}: holds {len(there) + len(gone)} checkpoints, but none that is sound; move them elsewhere, "
            f"or choose another output_dir, for a new run:{indented_list(said)}"
        )
    return None


def _problems(saved: SavedStep, verify: bool, workers: int, ranks: Ranks | None) -> list[str]:
    """``check_step``, for which the first of several ranks asks the others as well."""
    if ranks is None:
        return check_step(saved, verify=verify, workers=workers)
    ranks.first(_CHOOSING, lambda: _task(saved, is_chosen=False))
    return _check_share(saved, ranks, workers)


def check_step(saved: SavedStep, *, verify: bool, workers: int, share: Share | None = None) -> list[str]:
    """The problems of a checkpoint; ``verify`` reads all of it, else only names, sizes and headers are checked.

    Of several processes, each reads its ``share``.

    Raises UnreadableError where the system does not give a file of it: it may be sound, so no other may take its place.
    """
    here = saved.place.listed()
    # In general an auxiliary file may be deleted, but a step cannot be loaded without its config.
    beside = [here / side["name"] for side in saved.manifest.get("side_files") or ()]
    try:
        with reading(saved.place):
            report = check_weights(here, values=verify, merged=False, workers=workers, share=share)
            missing = [f"{path}: is missing" for path in beside if not path.is_regular_file()]
    except UnreadableError as error:
        raise UnreadableError(f"{error}; {_NOT_GIVEN}") from error
    except CkptConvertError as error:
        return [str(error)]
    found = [finding for finding in report.findings if finding.severity == "error"]
    if unread := [finding.text for finding in found if finding.unreadable]:
        raise UnreadableError(f"{saved.place}: {'; '.join(unread[:3])}; {_NOT_GIVEN}")
    return missing + [finding.text for finding in found]
