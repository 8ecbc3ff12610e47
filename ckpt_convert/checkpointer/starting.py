"""Starting a run: opening its source, loading a model from it, and what a fresh start may replace."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpointer.distributed.ranks import rank_of
from ckpt_convert.checkpointer.distributed.speaking import speaking
from ckpt_convert.checkpointer.live.loading import LoadReport
from ckpt_convert.checkpointer.live.tensors import Model
from ckpt_convert.checkpointer.run.counters import RunCounters
from ckpt_convert.checkpointer.run.metrics import StepMetrics
from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.checkpointer.run.saved_steps import SavedStep
from ckpt_convert.checkpointer.run.source import missing_source_error, open_source, open_without_source
from ckpt_convert.checkpointer.save.options import Arguments, Options, SourceOptions
from ckpt_convert.checkpointer.save.planner import SavePlanner
from ckpt_convert.checkpointer.save.run_directory import RunDirectory
from ckpt_convert.checkpointer.save.saver import Saver
from ckpt_convert.errors import CheckpointNotFoundError, OutputExistsError, UsageError

log = logging.getLogger("ckpt_convert")


def open_run(arguments: Arguments, options: Options) -> Saver:
    """Open the source of a run, from headers alone; nothing is written.

    Raises what ``open_source`` and ``open_without_source`` do, and OutputExistsError where steps would go into it.
    """
    with speaking(rank_of(options.ranks)):
        run = options.run_directory()
        opened = _open_run_source(arguments.source, options, run)
        if run is not None:
            run.check(opened)
    counts = RunCounters(
        options.schedule,
        options.policy,
        save_first=options.save_first,
        save_best=options.save_best,
        several_clocks=options.ranks is not None,
    )
    planner = SavePlanner(opened, options.settings, options.adapter, options.ranks)
    return Saver(options, planner, run, counts)


def _open_run_source(given: SourceOptions, options: Options, run: RunDirectory | None) -> Identified:
    """The source as it was given; for None, the newest step of the run or its config."""
    if given.source is None:
        return open_template(run.saved if run is not None and not options.overwrite else [], options, run)
    try:
        return open_source(given.source, format=given.source_format, family=options.family, config=options.config)
    except CheckpointNotFoundError as error:
        raise missing_source_error(error, run.saved if run is not None else []) from error


def open_template(there: Sequence[SavedStep], options: Options, run: RunDirectory | None) -> Identified:
    """What the steps of a run without a source are like: the newest of ``there``, or the config."""
    opened, step = open_without_source(there, options.config, options.family)
    if step is not None and run is not None:
        log.info("there is no source: files, dtypes and config are those of %s", step)
        run.stand_in = step
    return opened


def load_model(
    model: Model,
    saver: Saver,
    options: Options,
    *,
    strict: bool,
    include: Sequence[str] | str | None,
    exclude: Sequence[str] | str | None,
) -> LoadReport:
    """Fill a model from the source; see ``Checkpointer.load_model``."""
    if not options.has_source:
        raise UsageError("source=None: there are no weights to load; initialize the model, then register() it")
    planner = saver.planner
    report = planner.load_source(
        model, options.workers, options.progress, strict=strict, include=include, exclude=exclude
    )
    unfit = len(report.left_out) > len(report.excluded)
    log.log(logging.WARNING if unfit else logging.INFO, "%s: %s", planner.source.place, report)
    return report


def existing_steps(saver: Saver, options: Options, progress: Progress | None) -> list[SavedStep]:
    """The checkpoints where a run is to start; raises OutputExistsError if they may not be replaced."""
    there = saver.directory.saved
    if there and progress is None and not options.overwrite:
        raise OutputExistsError(
            f"{saver.directory.path}: holds {len(there)} checkpoints, up to step {there[-1].step}; resume() "
            "from it, pass overwrite=True to replace it with a new run, or choose another output_dir"
        )
    return there


def start_from(progress: Progress | None, saver: Saver, options: Options, there: Sequence[SavedStep]) -> None:
    """Count from a given progress, or from 0; ``there`` are the checkpoints of the directory so far."""
    counts = saver.counts
    counts.progress = progress or Progress()
    counts.step_metrics = StepMetrics(counts.progress.evals)
    counts.started_from = None if progress is None else progress.step
    saver.directory.replace_later(there if progress is None or options.overwrite else ())
    plan_saves(saver, counts.progress.step, [] if progress is None else there)


def plan_saves(saver: Saver, step: int, there: Sequence[SavedStep]) -> None:
    """Plan the saves after this step; ``there`` are the checkpoints of the run so far."""
    saver.plan_ahead()
    saver.directory.warn_of_obstacles(step)
    saver.counts.begin_watch(there)
