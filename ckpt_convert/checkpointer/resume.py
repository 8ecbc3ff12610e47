"""Continuing a run from a saved step: what is loaded of it, and where the counters go on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.checkpoint.record import MANIFEST
from ckpt_convert.checkpointer import choosing, starting
from ckpt_convert.checkpointer.distributed.claims import names_elsewhere
from ckpt_convert.checkpointer.live import adapter_base, fsdp1, loading
from ckpt_convert.checkpointer.live.adapter_base import AdapterBase
from ckpt_convert.checkpointer.live.selection import ADAPTER, MODEL, PROGRESS, Selection
from ckpt_convert.checkpointer.live.tensors import Model, model_tensors
from ckpt_convert.checkpointer.run import retention, saved_steps
from ckpt_convert.checkpointer.run.metrics import StepMetrics
from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.checkpointer.run.saved_steps import SavedStep
from ckpt_convert.checkpointer.save.adapters import TrainedAdapter
from ckpt_convert.checkpointer.save.options import Options
from ckpt_convert.checkpointer.save.planner import SavePlanner
from ckpt_convert.checkpointer.save.saver import Saver
from ckpt_convert.checkpointer.state import optimizers, shared_state, training_state
from ckpt_convert.checkpointer.state.group_options import GroupOptions
from ckpt_convert.checkpointer.state.parts import TrainingParts
from ckpt_convert.checkpointer.state.serialize import path_segment
from ckpt_convert.checkpointer.state.sharding import DataPolicy
from ckpt_convert.errors import InputError, KeyMismatchError, OutputExistsError, UsageError, option_error
from ckpt_convert.storage.place import Place
from ckpt_convert.tensors.progress import ProgressCallback
from ckpt_convert.wording import indented_list

log = logging.getLogger("ckpt_convert")

_PREFIX = f"{MODEL}/"


def check_options(
    selection: Selection, data: DataPolicy, keep: Sequence[str], optimizer: Any, saver: Saver, options: Options
) -> None:
    """Raise UsageError for an unknown data= or keep= and for overwrite=, OutputExistsError for counting from 0 over
    steps."""
    GroupOptions(optimizer).check(keep)
    if data not in get_args(DataPolicy):
        raise option_error("data", data, f"expected {', '.join(get_args(DataPolicy))}")
    if options.overwrite:
        raise UsageError(
            "overwrite=True is for register(), which replaces existing checkpoints with a new run; resume() continues "
            "from them: leave it out"
        )
    if not selection.progress and (there := saver.directory.saved):
        raise OutputExistsError(
            f"{options.output_dir}: holds {len(there)} checkpoints, up to step {there[-1].step}, which a run that "
            f"counts from 0 (exclude={PROGRESS!r}) would replace; choose another output_dir, or leave it out"
        )


def start_fresh(saver: Saver, parts: TrainingParts, selection: Selection) -> None:
    """Start a run in a directory that holds no checkpoint; raises UsageError for a glob that matches nothing."""
    selection.check([*parts.entries(), *saver.planner.loadable_names(parts.model)])
    log.info("%s: holds no checkpoint: fresh start", saver.directory.path)
    starting.plan_saves(saver, 0, [])


def continue_from(
    saved: SavedStep,
    saver: Saver,
    parts: TrainingParts,
    options: Options,
    selection: Selection,
    *,
    strict: bool,
    base_loaded: bool,
    keep: Sequence[str] = (),
) -> None:
    """Continue a run from a checkpoint: load it, restore the counters, and plan the next saves.

    Raises what ``load_step`` does, and UsageError for what could not be saved.
    """
    counts, directory = saver.counts, saver.directory
    parts.start_at(saved.step)
    _take_layout_of(saved, saver, options)
    load_step(
        saved,
        parts,
        saver.planner,
        selection=selection,
        strict=strict,
        workers=options.workers,
        progress=options.progress,
        base_loaded=base_loaded,
        keep=keep,
    )
    counts.progress, counts.step_metrics = Progress(), StepMetrics()
    if selection.progress:
        counts.progress, counts.step_metrics = saved.progress, StepMetrics(saved.progress.evals, saved.metrics)
        if any(one.place.real() == saved.place.real() for one in directory.saved):
            saver.saved_step, saver.saved_at = saved.step, saved.place
            saver.lacks_final = not saved.manifest["training"].get("final")
    counts.started_from = counts.progress.step
    if parts.epoch_is_over:  # its last batch was saved, but a kill came before its end was counted
        parts.end_epoch()
        if selection.progress:
            counts.end_epoch()
    saver.plan_ahead()
    if selection.progress:
        directory.after_resume(saved)
    directory.warn_of_obstacles(counts.progress.step)
    counts.begin_watch(directory.saved)
    offer = f"; exclude=[{PROGRESS!r}] counts from 0" if selection.weights_only and selection.progress else ""
    log.info("resumed from %s, at step %d%s", saved.place, counts.progress.step, offer)


def _take_layout_of(saved: SavedStep, saver: Saver, options: Options) -> None:
    """Let a run without a source keep the file layout of the step that it resumes from, if that is its own."""
    source, directory = saver.planner.source, saver.directory
    if not options.has_source and saved.place.parent in directory.places and saved.place != source.place:
        source.close()
        template = starting.open_template([saved], options, directory)
        saver.planner = SavePlanner(template, options.settings, None, options.ranks)


def load_step(
    saved: SavedStep,
    parts: TrainingParts,
    planner: SavePlanner,
    *,
    selection: Selection,
    strict: bool,
    workers: int,
    progress: ProgressCallback | None,
    base_loaded: bool,
    keep: Sequence[str] = (),
) -> None:
    """Load everything that is selected; raises KeyMismatchError for mismatches before anything is loaded.

    ``base_loaded`` says that the base weights of an adapter are in the model already; ``keep`` names options of the
    optimizer that stay as they are. Raises UsageError for a choice that names nothing.
    """
    options = GroupOptions(parts.optimizer)
    wanted = selection.without(names_elsewhere(parts.names(), planner.ranks))
    state = shared_state.open_for(saved.place, planner.ranks, wanted.elsewhere) if saved.has_training_state else None
    names = [name for name in (state.parts or () if state is not None else ()) if name != MODEL and selection(name)]
    trees = state.read(names, optimizers.split_as(parts.parameters())) if state is not None else {}
    if state is not None and shared_state.is_of_others(state, planner.ranks) and selection("rng"):
        trees["rng"] = shared_state.derived_rng(state, planner.ranks)
    if state is None:
        _report_missing_state(saved, [name for name in parts.required_entries if selection(name)], strict)
    problems = parts.compare_state(trees, selection) if state is not None else []
    with contextlib.ExitStack() as stack:
        load_weights: Callable[[], str]
        if planner.adapter is not None:
            keys = [ADAPTER]
            found, load_weights = _adapter(
                saved, parts, planner, planner.adapter, strict, workers, progress, base_loaded
            )
        else:
            keys, found, load_weights = _weights(saved, parts, planner, state, wanted, workers, progress, stack)
        selection.check([*parts.entries(), *(state.parts or () if state is not None else ()), *keys])
        problems = [*found, *problems]
        if problems and strict:
            raise KeyMismatchError(
                f"{saved.place}: does not fit what it is loaded into (strict=False loads what does, exclude= leaves "
                f"parts out):{indented_list(problems)}"
            )
        said = load_weights() if planner.adapter is None or selection(ADAPTER) else "nothing of the model"
    problems += parts.set_state(trees, selection)
    if changed := options.differences(keep):
        log.warning(
            "the optimizer goes on with the options of the checkpoint, not with the recipe's (keep=[...] keeps the "
            "recipe's):%s",
            indented_list(changed),
        )
    options.restore(keep, parts.lr_scheduler)
    fsdp1.put(parts.model, parts.optimizer)
    if problems:
        log.warning("%s: what does not fit was left unchanged:%s", saved.place, indented_list(problems))
    log.info("loaded %s", said)


def load_best(saver: Saver, model: Model, options: Options, name: str | None = None) -> SavedStep | None:
    """Load the weights of the best checkpoint by a metric into a model; None if no checkpoint has it."""
    metric = options.policy.metric(name)
    if metric is None or not _has_best(metric, saver, options):
        return None
    policy = replace(options.policy, best=(metric,))
    found = choosing.choose_together(saver.directory, options, "best", policy=policy)
    assert found is not None
    load_step(
        found,
        TrainingParts(fsdp1.as_model(model, options.ranks)),
        saver.planner,
        selection=Selection(weights_only=True),
        strict=True,
        workers=options.workers,
        progress=options.progress,
        base_loaded=True,
    )
    log.info("loaded the best checkpoint, %s", found.place)
    return found


def _has_best(metric: retention.BestMetric, saver: Saver, options: Options) -> bool:
    """Whether a checkpoint has a metric; of several ranks, the first one writes it and says so."""

    def found() -> bool:
        return retention.best_step(saver.directory.saved, metric) is not None

    ranks = options.ranks
    return found() if ranks is None else bool(ranks.first("load_best()", lambda: b"yes" if found() else b""))


def _report_missing_state(saved: SavedStep, names: list[str], strict: bool) -> None:
    """Warn of the parts that a checkpoint without training state cannot restore.

    Raises KeyMismatchError if its state was removed, as the run could not continue exactly. Step 0 is a fresh start.
    """
    if not names or saved.step == 0:
        return
    there = [one for one in saved_steps.scan_steps(saved.place.parent) if one.has_training_state]
    hint = f", and from_={there[-1].step} is a step with a training state" if there else ""
    if saved.contents == "full":
        text = (
            f"{saved.place}: its training state was removed to save space, so {', '.join(names)} cannot be restored; "
            "weights_only=True takes the weights alone, exclude= leaves out what is to keep its initial state"
            f"{hint}"
        )
        if strict:
            raise KeyMismatchError(text)
        log.warning("%s", text)
        return
    # A second checkpointer that saves weights only has no state but the random numbers: that needs no warning.
    log.log(
        logging.WARNING if names != ["rng"] else logging.INFO,
        "%s: was saved with contents=%r, without a training state: %s keep their initial state, at step %d%s",
        saved.place,
        saved.contents,
        ", ".join(names),
        saved.step,
        hint,
    )


def _weights(
    saved: SavedStep,
    parts: TrainingParts,
    planner: SavePlanner,
    state: training_state.StateReader | None,
    wanted: Selection,
    workers: int,
    progress: ProgressCallback | None,
    stack: contextlib.ExitStack,
) -> tuple[list[str], list[str], Callable[[], str]]:
    """The names of the weights on both sides, the mismatches, and a function that loads them, exact values if kept."""
    tensors = planner.split(model_tensors(parts.model)).base
    if wanted.weights_only and saved.manifest["training"].get(saved_steps.EMITTED):
        state = None  # the files hold other weights than the state, and it is these that are asked for
    kept = {at for at in state.tensors if at.startswith(_PREFIX)} if state is not None else set()
    exact = {key: at for key in tensors if (at := f"{_PREFIX}{path_segment(key)}") in kept}
    layout = saved.manifest["training"].get("model_format")
    if kept - set(exact.values()) and layout != planner.settings.model_format:
        raise UsageError(
            f"{saved.place}: holds tensors as a model in the {layout} layout has them; resume with "
            f"model_format={layout!r}, or make the checkpoint the source of a new run"
        )
    checkpoint = stack.enter_context(open_identified(saved.place, family=planner.source.hints.family))
    whole = loading.match_model(checkpoint, tensors, planner.settings.model_format)
    fit = whole.select(lambda key: wanted(_PREFIX + key))

    def load_them() -> str:
        files = loading.load_tensors(
            checkpoint,
            tensors,
            fit.select(lambda key: key not in exact),
            workers=workers,
            progress=progress,
        )
        taken = {key: at for key, at in exact.items() if wanted(_PREFIX + key)}
        for key, at in taken.items():
            if state is not None:
                state.tensor(at, into=tensors[key])
        exactly = f"{len(taken)} tensors with their exact values in memory" if taken else ""
        return " and ".join(filter(None, (files.describe() if files.tensors else "", exactly))) or "nothing"

    return [_PREFIX + key for key in whole.keys], fit.problems, load_them


def _adapter(
    saved: SavedStep,
    parts: TrainingParts,
    planner: SavePlanner,
    adapter: TrainedAdapter,
    strict: bool,
    workers: int,
    progress: ProgressCallback | None,
    base_loaded: bool,
) -> tuple[list[str], Callable[[], str]]:
    """The differences of the source from the base that the adapter was trained on, and a function that loads both.

    The base comes from the source, unless it is there, and is compared once its values were read; the adapter from the
    checkpoint.
    """
    before = adapter_base.read_base(saved.manifest["training"], str(saved.place / MANIFEST))
    if before is None:
        log.warning("%s: does not say which base it was trained on, so the source is taken for it", saved.place)

    def load_them() -> str:
        said = "" if base_loaded else f"{planner.load_source(parts.model, workers, progress).describe()} and "
        if before is not None:
            _compare_values(before, saved, adapter, planner.source.place, strict, workers)
        return f"{said}{planner.load_adapter(saved.place, parts.model)} tensors of the adapter"

    return [] if before is None else before.structure_differences(
        adapter.current_base(before, workers, values=False)
    ), load_them


def _compare_values(
    before: AdapterBase, saved: SavedStep, adapter: TrainedAdapter, source: Place, strict: bool, workers: int
) -> None:
    """Raise InputError if the values of the base differ from those that the adapter was trained on."""
    changed = (
        before.value_differences(adapter.current_base(before, workers, values=True)) if before.has_checksums else []
    )
    if not changed:
        return
    text = (
        f"{source}: is not the base that {saved.place} was trained on: {len(changed)} of "
        f"{len(before.tensors)} tensors have other values; give the source that the run began with (moved, re-sharded "
        f"or in another format it is the same), or strict=False to train on with this one:{indented_list(changed)}"
    )
    if strict:
        raise InputError(text)
    log.warning("%s", text)
