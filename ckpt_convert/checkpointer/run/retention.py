"""Which checkpoints to keep: the newest, the best by a metric, and how many with their training state."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ckpt_convert.checkpoint.record import TRAINING_STATE
from ckpt_convert.checkpointer.run import saved_steps
from ckpt_convert.checkpointer.run.saved_steps import SavedStep
from ckpt_convert.errors import CkptConvertError, UsageError
from ckpt_convert.storage import workspace
from ckpt_convert.storage.place import Place

log = logging.getLogger("ckpt_convert")

BestMetric: TypeAlias = tuple[str, Literal["min", "max"]]


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """How many checkpoints to keep; None is no limit.

    ``keep_last``: the newest ones; the newest is always kept. ``best``: metrics, and of each whether small or large is
    better; the ``keep_best`` best ones by each (default 1) are kept in addition. ``keep_last_training_state``: the
    newest that keep their training state; older ones lose it and keep their weights. Raises UsageError for numbers
    below 1, for ``keep_best`` without ``best``, and for a metric that is named twice.
    """

    keep_last: int | None = None
    best: tuple[BestMetric, ...] = ()
    keep_best: int | None = None
    keep_last_training_state: int | None = None

    def __post_init__(self) -> None:
        for name, way_out in (
            ("keep_last", "the newest checkpoint is always kept"),
            ("keep_best", "leave out best= to keep none for their metric"),
            ("keep_last_training_state", 'contents="weights" saves without a training state'),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UsageError(
                    f"{name}={value!r}: expected a whole number from 1 on, or None for no limit; {way_out}"
                )
        if self.keep_best is not None and not self.best:
            raise UsageError(f'keep_best={self.keep_best}: best by what? Give best= too, such as best="val_loss:min"')
        names = self.metrics
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"best: names {twice!r} twice; leave one of them out")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics of ``best``."""
        return tuple(name for name, _ in self.best)

    def metric(self, name: str | None) -> BestMetric | None:
        """The metric of this name, or the first one; None where there is none. Raises UsageError for another name."""
        if name is None:
            return next(iter(self.best), None)
        found = next((metric for metric in self.best if metric[0] == name), None)
        if found is None:
            raise UsageError(f"metric={name!r}: is not in best=, which names {', '.join(self.metrics) or 'none'}")
        return found


@dataclass(frozen=True, slots=True)
class RetentionDecision:
    """The checkpoints to delete, and those whose training state is removed; oldest first."""

    delete: tuple[SavedStep, ...] = ()
    drop_state: tuple[SavedStep, ...] = ()


def parse_best(text: str) -> BestMetric:
    """The metric and the direction of a text such as "val_loss:min"; raises UsageError for any other."""
    metric, _, mode = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    if metric.strip() != metric or not metric or mode not in ("min", "max"):
        raise UsageError(
            f'best={text!r}: expected a metric and what is good of it, such as "val_loss:min" or "accuracy:max"'
        )
    return metric, "min" if mode == "min" else "max"


def parse_best_metrics(given: str | Sequence[str] | None) -> tuple[BestMetric, ...]:
    """The metrics of ``best=``: none, one, or a sequence of them; raises UsageError as ``parse_best``."""
    if given is None or isinstance(given, str) or not isinstance(given, Sequence):
        return () if given is None else (parse_best(given),)
    if not given:
        raise UsageError("best=[]: names no metric; leave it out to keep none as the best")
    return tuple(parse_best(text) for text in given)


def improves(metric: BestMetric, value: float, before: float | None) -> bool:
    """Whether a value is better than the best one so far."""
    return before is None or (value < before if metric[1] == "min" else value > before)


def decide_retention(
    saved: Sequence[SavedStep], policy: RetentionPolicy, needed: Collection[Place | None] = ()
) -> RetentionDecision:
    """What a policy removes of these complete checkpoints; those that are ``needed`` stay unchanged."""
    newest = sorted(saved, key=lambda one: one.sequence, reverse=True)
    kept = {one.place for one in (*newest[: policy.keep_last], *_best_steps(saved, policy))}
    staying = [one for one in newest if one.place in kept]
    heavy = [one for one in staying if one.has_training_state]
    too_many = heavy[policy.keep_last_training_state :] if policy.keep_last_training_state else []
    gone = [one for one in newest if one.place not in kept]
    return RetentionDecision(
        *(tuple(one for one in reversed(found) if one.place not in needed) for found in (gone, too_many))
    )


def best_step(saved: Sequence[SavedStep], metric: BestMetric) -> SavedStep | None:
    """The best checkpoint by a metric, the newer of equal ones; None if none has the metric."""
    return next(iter(_ranked(saved, metric)), None)


def _best_steps(saved: Sequence[SavedStep], policy: RetentionPolicy) -> Iterator[SavedStep]:
    """The best checkpoints that are kept, by each metric."""
    for metric in policy.best:
        yield from _ranked(saved, metric)[: policy.keep_best or 1]


def _ranked(saved: Sequence[SavedStep], metric: BestMetric) -> list[SavedStep]:
    """The checkpoints that have a metric, the best first."""
    name, mode = metric
    sign = 1 if mode == "min" else -1
    candidates = [one for one in saved if math.isfinite(one.metrics.get(name, math.nan))]
    return sorted(candidates, key=lambda one: (sign * one.metrics[name], -one.sequence))


def apply_retention(decision: RetentionDecision, *, raises: bool = False) -> None:
    """Delete checkpoints and training states; failures are warnings, and retried by ``saved_steps.clean_up``.

    With ``raises`` they are errors.

    An interruption never leaves an incomplete checkpoint that looks complete: the manifest is changed before a training
    state is removed, and a directory is renamed before it is deleted. A directory that is no longer the checkpoint of
    the decision is not touched.
    """
    for saved in decision.delete:
        if _is_there(saved):
            _delete(saved, raises)
    for saved in decision.drop_state:
        if _is_there(saved):
            _thin(saved, raises)


def _is_there(saved: SavedStep) -> bool:
    """Whether the directory is still the checkpoint of the decision."""
    if saved.place.link() is not None:
        return False
    found = saved_steps.read_step(saved.place, saved.saver)
    return found is not None and found.sequence == saved.sequence


def _delete(saved: SavedStep, raises: bool) -> None:
    try:
        workspace.workspace_of(saved.place).withdraw(saved.place, saved_steps.RULES)
    except (OSError, CkptConvertError) as error:
        if raises:
            raise
        said = error.strerror if isinstance(error, OSError) else error
        log.warning("%s is to be kept no longer, but cannot be removed: %s", saved.place, said)
    else:
        log.info("%s removed: not among those to keep", saved.place)


def _thin(saved: SavedStep, raises: bool) -> None:
    try:
        saved_steps.amend_step(saved, **{TRAINING_STATE: saved_steps.REMOVED})
    except (OSError, CkptConvertError) as error:
        if raises:
            raise
        log.warning("%s: its training state cannot be removed: %s", saved.place, error)
        return
    saved_steps.finish_state_removal(saved.place)
    log.info("%s: training state removed, the weights are kept", saved.place)
