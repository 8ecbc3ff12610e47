"""``Checkpointer``: what a recipe has to do with checkpoints, in one object."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from ckpt_convert import formats
from ckpt_convert._version import __version__
from ckpt_convert.checkpoint.checkpoint import Checkpoint
from ckpt_convert.checkpointer import resuming
from ckpt_convert.checkpointer.live import loading
from ckpt_convert.checkpointer.live.choice import PROGRESS, Choice
from ckpt_convert.checkpointer.live.copies import CopyCheck
from ckpt_convert.checkpointer.live.tensors import Model, tensors_of
from ckpt_convert.checkpointer.run import catalog, retention, schedule
from ckpt_convert.checkpointer.run.catalog import Saved
from ckpt_convert.checkpointer.run.metrics import Reported, numbers
from ckpt_convert.checkpointer.run.names import Template
from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.checkpointer.run.source import CONFIG, STARTED_FROM, Config, Source, lost, open_lost, open_source
from ckpt_convert.checkpointer.run.watch import Watch
from ckpt_convert.checkpointer.save import options, signals
from ckpt_convert.checkpointer.save.background import Background
from ckpt_convert.checkpointer.save.buffers import Buffers
from ckpt_convert.checkpointer.save.emitting import Contents, Emitter, Settings
from ckpt_convert.checkpointer.save.options import Final
from ckpt_convert.checkpointer.save.run_directory import RunDirectory
from ckpt_convert.checkpointer.state import optimizers, parts
from ckpt_convert.errors import CheckpointNotFoundError, OutputExistsError, UsageError
from ckpt_convert.storage import pointer
from ckpt_convert.storage.names import local_path
from ckpt_convert.storage.reader import WORKERS
from ckpt_convert.tensors.blocks import ProgressCallback

log = logging.getLogger("ckpt_convert")


class Checkpointer:
    """Loads a model from a checkpoint of any format, and saves it in that format at every saved step.

    A context manager; ``close`` saves the last step if it is not saved yet. Not to be shared between threads.
    """

    def __init__(
        self,
        source: Source | None,
        output_dir: str | Path | None = None,
        *,
        model_format: str = "native",
        config: Config | None = None,
        family: str | None = None,
        source_format: str | None = None,
        save_every: Any = None,
        save_first: bool = False,
        save_last: bool = True,
        save_best: bool = False,
        keep_last: int | None = None,
        best: str | None = None,
        keep_best: int | None = None,
        keep_last_training_state: int | None = None,
        contents: Contents = "full",
        final: Final | Mapping[str, Any] | None = None,
        asynchronous: bool = False,
        export_dtype: str | torch.dtype | None = None,
        output_format: str | None = None,
        extra_files: Sequence[str | Path] = (),
        adapter: Any = None,
        merged: bool = False,
        directory: str = "step_{step}",
        run_name: str | None = None,
        latest_name: str | None = "latest",
        overwrite: bool = False,
        save_on_signal: bool = False,
        workers: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Open the source and check every option; nothing is written, no tensor is read.

        source: a directory, file or Hub id of any format, a list of the weight files of one, or None with ``config``.
        output_dir: where the directories of the steps go; may be left out to load only.
        model_format: the layout of the training model's state dict: native, hf, torchtitan or meta.
        config: a config.json, or its content, for a source that has none.
        family, source_format: what cannot be told from the source.
        save_every: see ``schedule.parse``; save_first: also after the first step; save_last: also in ``close``;
        save_best: also where an evaluation is better than that of every step saved before, by the metric of ``best``.
        keep_last, best, keep_best, keep_last_training_state: see ``retention.Policy``.
        contents: "full", "weights", or "adapter". final: what is different about the last save.
        asynchronous: write behind the training, which waits for one copy in memory.
        export_dtype: float32, float16 or bfloat16 for all weights. output_format: instead of the source's.
        extra_files: copied into every directory.
        adapter: an ``AdapterConfig``, or PEFT's. merged: write the full weights beside the adapter.
        directory: how a step's directory is called, see ``names.Template``. run_name: for {run_name} in it.
        latest_name: the pointer to the newest checkpoint, None for none.
        overwrite: a fresh start may take the place of a run that is there.
        save_on_signal: SIGTERM and SIGINT save at the next step.
        workers: threads that read and write. progress: called with ``Progress`` of loading.

        Raises UsageError for options that do not fit, and what ``open_checkpoint`` raises for the source.
        """
        last = options.check({name: value for name, value in locals().items() if name != "self"})
        self.workers = workers or WORKERS
        self._report_loading = progress
        self._schedule = schedule.parse(save_every)
        policy = retention.Policy(
            keep_last, None if best is None else retention.parse_best(best), keep_best, keep_last_training_state
        )
        template = Template(directory, latest_name)
        self._run: RunDirectory | None = None
        if output_dir is not None:
            self._run = RunDirectory(local_path(output_dir, "output_dir"), template, run_name, latest_name, policy)
        self._save_first, self._save_last, self._save_best = save_first, save_last, save_best
        self._overwrite = overwrite
        self._policy, self._watch = policy, Watch(self._schedule, policy.best)
        self._config, self._family, self._has_source = config, family, source is not None
        self._source = self._open_source(source, source_format)
        if self._run is not None:
            self._run.check(self._source)
        self._settings = Settings(
            contents=contents,
            export_dtype=options.dtype_of(export_dtype),
            output_format=output_format,
            model_format=model_format,
            extra=options.extra_files(extra_files),
            merged=merged,
        )
        self._last_settings = replace(self._settings, **last.changes)
        self._emitter = Emitter(self._source, self._settings, adapter)
        self._asynchronous = asynchronous
        self._background, self._buffers = Background(), Buffers()
        self._signals = signals.Signals() if save_on_signal else None
        self._parts: parts.Parts | None = None
        self._copy_check: CopyCheck | None = None
        self._over = self._lacks_final = False
        self._captured_trained = False
        self._progress = Progress()
        self._reported = Reported()
        self._said: set[str] = set()
        self._saved_step: int | None = None
        self._saved_at = Path()
        self._started_from: int | None = None
        self._clock = 0.0
        self._loaded = False
        self._more_files: Callable[[], Mapping[str, bytes]] = dict
        self._signal_saved = False
        self._best_value: float | None = None
        self._holding = self._held = False
        self._closed = False

    @property
    def output_dir(self) -> Path:
        """Where the directories of the steps go; raises UsageError for a checkpointer that was made to load only."""
        return self._directory.path

    @property
    def _directory(self) -> RunDirectory:
        if self._run is None:
            raise UsageError("there is no output_dir, so nothing can be saved or resumed; give one")
        return self._run

    @property
    def config(self) -> Mapping[str, Any]:
        """The source's config in the words of Hugging Face's config.json, whatever its format."""
        return self._source.model_for(self._settings.model_format).config

    # Loading

    def load_model(self, model: Model) -> loading.Loaded:
        """Fill a model from the source, in place, tensor by tensor; returns how many tensors, and their dtypes.

        Raises KeyMismatchError listing everything that does not fit.
        """
        self._refuse_closed()
        if not self._has_source:
            raise UsageError("source=None: there are no weights to load; initialise the model, then register() it")
        found = self._emitter.load_source(model, self.workers, self._report_loading)
        self._loaded = True
        log.info("loaded %s: %s", self._source.path, found.describe())
        return found

    def load_state_dict(self, format: str | None = None) -> dict[str, torch.Tensor]:
        """The source's weights, converted (``model_format`` unless said otherwise), in the dtypes of the source."""
        self._refuse_closed()
        if format is not None and format not in formats.ALL:
            raise UsageError(f"{format!r} is no format; known: {', '.join(formats.ALL)}")
        return loading.state_dict(self._source, format or self._settings.model_format)

    def load_best(self, model: Model) -> Saved | None:
        """Fill a model, in place, with the weights of the best checkpoint; returns it, None where none has the metric.

        Of a model with an adapter, the base has to be loaded. Raises CorruptFileError for a damaged checkpoint.
        """
        self._refuse_closed()
        if self.best is None:
            return None
        found = resuming.choose(self.output_dir, "best", self._policy, verify=True, workers=self.workers)
        assert found is not None
        resuming.load(
            found,
            parts.Parts(model),
            self._emitter,
            wanted=Choice(weights_only=True),
            strict=True,
            workers=self.workers,
            progress=self._report_loading,
            base_loaded=True,
        )
        log.info("loaded the best checkpoint, %s", found.path)
        return found

    def load_adapter(self, path: str | Path, model: Model) -> int:
        """Fill a model's adapter from a PEFT directory, in place; returns the number of tensors."""
        self._refuse_closed()
        return self._emitter.load_adapter(pointer.followed(local_path(path)), model)

    # Beginning

    def resume(
        self,
        *,
        model: Model,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        grad_scaler: Any = None,
        dataloader: Any = None,
        extra: Any = None,
        from_: Literal["latest", "best"] | int | str | Path = "latest",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        strict: bool = True,
        weights_only: bool = False,
        verify: bool = True,
    ) -> Progress | None:
        """Go on from the newest complete checkpoint; returns its progress, or None for a fresh start.

        What is given here is also what is saved from now on. from_: "latest", "best", a step, or the path of a
        checkpoint, whatever its name, or of a directory of them. include, exclude: globs of what to load: "model/*",
        "optimizer", "rng", …; to exclude "progress" is to count from 0, in an output_dir that holds no steps yet.
        strict: missing and unexpected entries are an error, listed as one report (else a warning). weights_only: the
        model only, and the progress. verify: compare checksums, not only names and sizes, before anything is loaded.

        A newest checkpoint that is damaged is passed over, with a warning, for the one before it; one that was asked
        for is a CorruptFileError, and one that the system does not give now an UnreadableError. Nothing is loaded where
        the report is an error. Raises UsageError for a glob that matches nothing.
        """
        wanted = Choice.of(include, exclude, weights_only)
        self._refuse_restart(wanted)
        self._begin(model, optimizer, lr_scheduler, grad_scaler, dataloader, extra)
        assert self._parts is not None
        saved = resuming.choose(self.output_dir, from_, self._directory.policy, verify=verify, workers=self.workers)
        if saved is None:
            wanted.check([*self._parts.entries(), *self._emitter.names(model)])
            log.info("%s: holds no checkpoint: fresh start", self.output_dir)
            self._plan_ahead()
            self._directory.warn_ahead(0)
            self._begin_watch([])
            return None
        self._parts.begin_at(saved.step)
        self._take_layout_of(saved)
        resuming.load(
            saved,
            self._parts,
            self._emitter,
            wanted=wanted,
            strict=strict,
            workers=self.workers,
            progress=self._report_loading,
            base_loaded=self._loaded,
        )
        self._progress, self._reported = Progress(), Reported()
        if wanted.progress:
            self._progress, self._reported = saved.progress, Reported(saved.progress.evals, saved.metrics)
            if any(one.path.resolve() == saved.path.resolve() for one in self.saved):
                self._saved_step, self._saved_at = saved.step, saved.path
                self._lacks_final = not saved.manifest["training"].get("final")
        self._started_from = self._progress.step
        if self._parts.epoch_is_over:  # its last batch was saved, but a kill came before its end was counted
            self._parts.end_epoch()
            if wanted.progress:
                self._progress = replace(self._progress, epoch=self._progress.epoch + 1)
        self._plan_ahead()
        if wanted.progress:
            self._directory.go_on_from(saved)
        self._directory.warn_ahead(self._progress.step)
        self._begin_watch(self.saved)
        offer = f"; exclude=[{PROGRESS!r}] counts from 0" if weights_only and wanted.progress else ""
        log.info("resumed from %s, at step %d%s", saved.path, self._progress.step, offer)
        return self._progress

    def register(
        self,
        *,
        model: Model,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        grad_scaler: Any = None,
        dataloader: Any = None,
        extra: Any = None,
        progress: Progress | None = None,
    ) -> None:
        """Say what is to be saved, without loading anything: a fresh start, or one at the ``progress`` of elsewhere.

        Raises OutputExistsError for a fresh start where checkpoints are, unless ``overwrite`` was said.
        """
        there = self.saved
        if there and progress is None and not self._overwrite:
            raise OutputExistsError(
                f"{self.output_dir}: holds {len(there)} checkpoints, up to step {there[-1].step}; resume() from it, "
                "pass overwrite=True to start anew in its place, or choose another output_dir"
            )
        self._begin(model, optimizer, lr_scheduler, grad_scaler, dataloader, extra)
        self._progress = progress or Progress()
        self._reported = Reported(self._progress.evals)
        self._started_from = None if progress is None else progress.step
        self._directory.supersede(there if progress is None or self._overwrite else ())
        self._plan_ahead()
        self._directory.warn_ahead(self._progress.step)
        self._begin_watch([] if progress is None else there)

    # Counting

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        return self._progress

    @property
    def interrupted(self) -> int | None:
        """The signal that asked the run to end (``save_on_signal``), None as long as none has."""
        return self._signals.received if self._signals is not None else None

    @property
    def should_stop(self) -> bool:
        """Whether a signal asked the run to end, and the step was saved for it: the loop may be left."""
        return self._signal_saved

    def step(self, *, tokens: int = 0, samples: int = 0) -> None:
        """Count an optimizer step, and save if that is due; call it after the scheduler's step.

        Raises what failed in a save behind the training.
        """
        self._require("step()")
        before = self._progress
        now = time.monotonic()
        self._progress = replace(
            before,
            step=before.step + 1,
            tokens=before.tokens + int(tokens),
            samples=before.samples + int(samples),
            seconds=before.seconds + now - self._clock,
        )
        self._clock = now
        self._reported = Reported(before.evals)
        self._look_at_state()
        signalled = self._signals is not None and self._signals.received is not None and not self._signal_saved
        first = self._save_first and self._progress.step == 1
        if signalled:
            self._signal_saved = True
        # What failed behind is raised after this step is counted and saved: a recipe may catch it and go on.
        due = self._schedule.due(before, self._progress, "step") or first
        if signalled:
            self._save()
        elif due:
            self._save_or_hold()
        else:
            self._background.check()
        self._watch.look(self._progress)
        if signalled:
            self._background.wait()
            log.warning("saved step %d; end the loop where checkpointer.should_stop says so", self._progress.step)

    def report(self, **metrics: float) -> None:
        """Take the metrics of this step, and count an evaluation; a checkpoint of this step learns of them.

        A value that is no finite number is left out, with a warning: it could be neither compared nor written as JSON,
        but it ends no training. Raises what failed in a save behind the training.
        """
        self._require("report()")
        found, wrong = numbers(metrics)
        before = self._progress
        self._progress = replace(before, evals=before.evals + 1)
        changed = self._reported.add(found)
        self._watch.reported(self._progress.step, metrics)
        due = self._schedule.due(before, self._progress, "eval") | self._is_new_best(found)
        if self._saved_step == self._progress.step:
            self._amend()
            self._held |= self._holding and self._signal_saved  # what the evaluation drew is to be saved as well
        elif due:
            self._save_or_hold()
        self._say_of_report(wrong, changed)
        self._background.check()

    def end_epoch(self) -> None:
        """Count an epoch, and save if that is due and this step is not saved yet."""
        self._require("end_epoch()")
        before = self._progress
        self._progress = replace(before, epoch=before.epoch + 1)
        assert self._parts is not None
        self._parts.end_epoch()
        if self._schedule.due(before, self._progress, "epoch") and self._saved_step != self._progress.step:
            self._save_or_hold()
        self._watch.look(self._progress)
        self._background.check()

    def epochs(self, count: int | None = None) -> Iterator[int]:
        """The numbers of the epochs that are left of ``count``, from 0 on; without ``count`` they have no end.

            for epoch in checkpointer.epochs(3):
                for batch in loader:
                    ...

        A resumed run goes on in the epoch that it was in. An epoch ends, and is counted, where the body of the loop
        does; not where the loop is left by ``break`` or ``return``, nor where ``should_stop`` says that a signal came.
        """
        self._require("epochs()")
        while (count is None or self._progress.epoch < count) and not self.should_stop:
            epoch = self._progress.epoch
            yield epoch
            if not self.should_stop and self._progress.epoch == epoch:  # else the body has called end_epoch()
                self.end_epoch()
        self._over = not self.should_stop

    # Saving

    def save(self) -> None:
        """Save this step now, unless it is saved already."""
        self._require("save()")
        self._background.check()
        if self._saved_step != self._progress.step:
            self._save()

    def hold_saves(self) -> None:
        """From now on, a save that is due waits for ``save_held``; one for a signal does not.

        For trainers that evaluate after a step is counted and draw random numbers for it: what would be saved before
        is not what the run goes on from.
        """
        self._holding = True

    def save_held(self) -> None:
        """Save the step now if a save was due since the last one."""
        if self._held:
            self._save()

    def create_seed_checkpoint(self, model: Model) -> Path:
        """Save a model's initial weights as step 0, without training; returns the directory."""
        self._refuse_closed()
        if self._parts is None:
            self.register(model=model)
        if self._saved_step is None:
            self._save(replace(self._settings, contents="weights"))
        self.wait()
        return self._directory.destination(self._progress)

    def wait(self) -> None:
        """Wait until what is being saved is complete; raises what failed."""
        self._background.wait()

    @property
    def saved(self) -> list[Saved]:
        """The complete checkpoints, oldest first."""
        return self._directory.saved

    def newest(self) -> Saved | None:
        """The newest complete checkpoint whose files are as they were written, None where there is none."""
        return resuming.newest(self.output_dir, verify=True, workers=self.workers)

    def add_files(self, make: Callable[[], Mapping[str, bytes]]) -> None:
        """Write more small files into every directory: ``make`` gives their content, by name, at each save."""
        self._more_files = make

    @property
    def best(self) -> Saved | None:
        """The best complete checkpoint by the metric of ``best=``, None where none has it."""
        return self._directory.best

    @property
    def best_metric(self) -> retention.Best | None:
        """What ``best=`` asks for: the metric, and "min" or "max"."""
        return self._policy.best

    def close(self) -> None:
        """Save the last step if it is not saved yet, wait until it is complete, and let go of everything.

        Raises what failed. Calling it again does nothing.
        """
        if self._closed:
            return
        try:
            self._finish()
        finally:
            self._release()

    def end_run(self) -> None:
        """End a run as ``close`` does, but so that ``resume`` or ``register`` can begin another one."""
        try:
            self._finish()
        finally:
            self._let_go()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self._background.wait()  # what is in flight is finished; the step that failed is not saved
        except Exception:
            log.exception("a checkpoint could not be saved")
        trouble = self._run.trouble if self._run is not None else None
        self._release()
        if trouble is not None and trouble != str(error):  # the connection to the process that was refused is dead
            raise UsageError(trouble) from error

    # Inside

    def _open_source(self, source: Source | None, format: str | None) -> Checkpoint:
        if source is None:
            return self._open_lost(self._run.saved if self._run is not None and not self._overwrite else [])
        try:
            return open_source(source, format=format, family=self._family, config=self._config)
        except CheckpointNotFoundError as error:
            raise lost(error, self._run.saved if self._run is not None else []) from error

    def _open_lost(self, there: Sequence[Saved]) -> Checkpoint:
        opened, step = open_lost(there, self._config, self._family)
        if step is not None and self._run is not None:
            log.info("there is no source: files, dtypes and config are those of %s", step)
            self._run.template = step
        return opened

    def _take_layout_of(self, saved: Saved) -> None:
        """Let a run without a source go on in the files of the step that it is resumed from, if that is its own."""
        if not self._has_source and saved.path.parent == self._directory.path and saved.path != self._source.path:
            self._source.close()
            self._source = self._open_lost([saved])
            self._emitter = Emitter(self._source, self._settings)

    def _finish(self) -> None:
        """What a run that comes to its end has to do: save the last step, and say what it was asked for in vain."""
        failed = self._background.settle()  # told at the end: the last step is to be saved all the same
        trained = self._parts is not None and self._progress.step > (self._started_from or 0)
        settings = self._last_settings
        different = self._saved_step != self._progress.step or settings != self._settings
        # A kill may have come between the save of the last step and that which final= asks for.
        if self._save_last and different and (trained or (self._over and self._lacks_final)):
            self._save(settings)
        else:
            self.save_held()
        if trained and not self.should_stop:
            self._watch.end(self._progress)
        self._background.wait()
        if failed is not None:
            raise failed

    def _refuse_restart(self, wanted: Choice) -> None:
        """Raise UsageError for the option of a fresh start, OutputExistsError for one over steps that are there."""
        if self._overwrite:
            raise UsageError(
                "overwrite=True is for register(), which starts anew where checkpoints are; resume() goes on "
                "from them: leave it out"
            )
        if not wanted.progress and (there := self.saved):
            raise OutputExistsError(
                f"{self.output_dir}: holds {len(there)} checkpoints, up to step {there[-1].step}, which a run that "
                f"counts from 0 (exclude={PROGRESS!r}) would replace; choose another output_dir, or go on without it"
            )

    def _begin(
        self, model: Model, optimizer: Any, lr_scheduler: Any, grad_scaler: Any, dataloader: Any, extra: Any
    ) -> None:
        self._refuse_closed()
        if self._parts is not None:
            self._parts.untrack()
        for path in self._settings.extra:
            if not path.is_file():
                raise UsageError(f"{path}: no such file; extra_files are copied into every checkpoint")
        self._directory.open(self._source)
        if self._signals is not None:
            self._signals.install()
        self._signal_saved = self._held = self._over = self._lacks_final = False
        self._saved_step = None
        self._parts = parts.make(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            grad_scaler=grad_scaler,
            dataloader=dataloader,
            extra=extra,
        )
        given = None if optimizer is None else optimizers.tensors(optimizer)
        self._copy_check = CopyCheck(model, given) if isinstance(model, Mapping) else None
        self._captured_trained = False
        self._clock = time.monotonic()

    def _plan_ahead(self) -> None:
        """Find out now what could not be saved later, and say once what the saved steps will be."""
        assert self._parts is not None
        trained = list(optimizers.tensors(self._parts.optimizer))
        for settings in dict.fromkeys((self._settings, self._last_settings)):
            for notice in self._emitter.prepare(self._parts.model, settings, trained):
                log.warning("%s", notice)
        if self._saves_state:
            self._parts.capture()  # what cannot be saved is told now, not at the first save
        if self._copy_check is not None:
            self._copy_check.start(self._progress.step)
        self._refuse_others()
        self._clock = time.monotonic()

    def _begin_watch(self, there: Sequence[Saved]) -> None:
        """What is there already counts for what is the best so far, and for what ever took effect."""
        found = retention.best(there, self._policy)
        self._best_value = found.metrics[self._policy.best[0]] if found and self._policy.best else None
        self._watch.begin(self._progress, [saved.metrics for saved in there])

    def _is_new_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether these metrics are to be saved for being the best so far (``save_best``)."""
        if not self._save_best or self._policy.best is None or self._policy.best[0] not in metrics:
            return False
        value, sign = metrics[self._policy.best[0]], 1 if self._policy.best[1] == "min" else -1
        if self._best_value is not None and sign * value >= sign * self._best_value:
            return False
        self._best_value = value
        return True

    def _save_or_hold(self) -> None:
        if self._holding:
            self._held = True
        else:
            self._save()

    @property
    def _saves_state(self) -> bool:
        return "full" in (self._settings.contents, self._last_settings.contents)

    def _look_at_state(self) -> None:
        """After each step: which gradients were used; after the first: whether what training has made can be saved."""
        if not self._saves_state:
            return
        assert self._parts is not None
        self._parts.updated()
        if not self._captured_trained:
            self._captured_trained = True
            self._parts.capture()

    def _refuse_others(self) -> None:
        """Raise UsageError where another process of this run has a checkpointer for the same directory."""
        if (trouble := self._directory.trouble) is not None:
            raise UsageError(trouble)

    def _save(self, settings: Settings | None = None) -> None:
        """Take everything as it is now, and write it: behind the training, or before this returns."""
        assert self._parts is not None
        settings, self._held = settings or self._settings, False
        self._watch.saved(self._progress.step)
        self._refuse_others()
        if self._copy_check is not None:
            self._copy_check.refuse_copies(self._progress.step)
        if self._background.busy:
            log.info("step %d waits for the save before it", self._progress.step)
        failed = self._background.settle()
        tensors = tensors_of(self._parts.model)
        state = self._parts.capture() if settings.contents == "full" else None
        directory = self._directory
        destination = directory.destination(self._progress)
        job = self._emitter.job(tensors, state, settings, self._buffers if self._asynchronous else None)
        files = dict(self._more_files())
        step, progress, reported = self._progress.step, self._progress, self._reported
        section = {
            "version": catalog.VERSION,
            "saver": "default",
            "directory": destination.name,
            "sequence": directory.next_sequence(),
            "contents": settings.contents,
            "model_format": settings.model_format,
            "run_name": directory.run_name,
            "versions": {"ckpt_convert": __version__, "torch": str(torch.__version__)},
            STARTED_FROM: "checkpoint" if self._source.files else CONFIG,
        }
        if settings is self._last_settings and settings != self._settings:
            section["final"] = True

        def training() -> dict[str, Any]:
            evals, metrics = reported.known
            return {**section, "progress": {**progress.as_dict(), "evals": evals}, "metrics": dict(metrics)}

        previous, self._saved_step, self._saved_at = self._saved_step, step, destination

        def attempt() -> None:
            try:
                directory.write(job(training, files), destination, self.workers)
            except BaseException:
                if self._saved_step == step:  # it may be tried again
                    self._saved_step = previous
                raise

        if self._asynchronous:
            self._background.run(attempt)
        else:
            attempt()
        if failed is not None:
            raise failed

    def _amend(self) -> None:
        """Tell the checkpoint of this step, once it is complete, of metrics that were reported after it."""
        directory, destination = self._directory, self._saved_at
        evals, metrics = self._reported.known
        if self._background.busy:
            self._background.then(lambda: directory.amend(destination, metrics, evals))
        else:
            directory.amend(destination, metrics, evals)

    def _say_of_report(self, wrong: Mapping[str, str], changed: Mapping[str, str]) -> None:
        """Warn of metrics that do nothing, or not what they seem to; of each name once."""
        step = self._progress.step
        for name, why in wrong.items():
            self._warn_once(
                f"{name} is none", f"step {step}: the metric {name!r} {why}; it is left out, and never best"
            )
        for name, how in changed.items():
            self._warn_once(
                f"{name} twice", f"step {step}: the metric {name!r} {how}; a step has the one reported last"
            )
        if step == (self._started_from or 0) != self._saved_step:
            self._warn_once(
                "before the first step",
                f"report() before the first step(): step {step} is not saved, so no checkpoint has these metrics; "
                "save() before it, or report after step()",
            )

    def _warn_once(self, about: str, text: str) -> None:
        if about not in self._said:
            self._said.add(about)
            log.warning("%s", text)

    def _release(self) -> None:
        self._closed = True
        with contextlib.ExitStack() as stack:
            stack.callback(self._source.close)
            stack.callback(self._let_go)

    def _let_go(self) -> None:
        tracked, self._parts = self._parts, None
        with contextlib.ExitStack() as stack:
            if self._run is not None:
                stack.callback(self._run.close)
            if self._signals is not None:
                stack.callback(self._signals.restore)
            if tracked is not None:
                stack.callback(tracked.untrack)
            stack.callback(self._buffers.clear)
            stack.callback(self._background.close)

    def _require(self, what: str) -> None:
        self._refuse_closed()
        if self._parts is None:
            raise UsageError(f"{what}: nothing says what to save; call resume(model=..., ...) or register(...) first")

    def _refuse_closed(self) -> None:
        if self._closed:
            raise UsageError("the checkpointer is closed; make another one")
