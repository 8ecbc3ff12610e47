"""``Checkpointer``: loading, saving and resuming for a training loop, in one object."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from ckpt_convert import formats
from ckpt_convert.checkpointer import choosing, resume, starting
from ckpt_convert.checkpointer.distributed.exchange import Writers
from ckpt_convert.checkpointer.distributed.ranks import on_all_ranks
from ckpt_convert.checkpointer.live import loading
from ckpt_convert.checkpointer.live.selection import Selection
from ckpt_convert.checkpointer.live.tensors import Model
from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.checkpointer.run.saved_steps import SavedStep
from ckpt_convert.checkpointer.run.source import Config, Source
from ckpt_convert.checkpointer.save.loop import TrainingLoop
from ckpt_convert.checkpointer.save.options import (
    Arguments,
    DirectoryOptions,
    Final,
    Hooks,
    Options,
    RetentionOptions,
    ScheduleOptions,
    SourceOptions,
    WeightOptions,
)
from ckpt_convert.checkpointer.save.planner import Contents
from ckpt_convert.checkpointer.save.saver import Saver
from ckpt_convert.checkpointer.save.upload import Mode, UploadOptions, WhenBehind
from ckpt_convert.checkpointer.state.parts import TrainingParts
from ckpt_convert.checkpointer.state.sharding import DataPolicy
from ckpt_convert.dtypes import OutputDType
from ckpt_convert.errors import UsageError
from ckpt_convert.formats.base import FormatName
from ckpt_convert.storage import pointer
from ckpt_convert.storage.place import Place, StorageOptions, checked_place, with_options
from ckpt_convert.tensors.progress import ProgressCallback

log = logging.getLogger("ckpt_convert")


class Checkpointer:
    """Loads a model from a checkpoint of any format, and saves it in that format at every saved step.

    A context manager; ``close`` saves the last step if it is not saved yet. Not to be shared between threads.
    """

    def __init__(
        self,
        source: Source | None,
        output_dir: str | Path | Place | None = None,
        *,
        model_format: FormatName = "native",
        config: Config | None = None,
        family: str | None = None,
        source_format: FormatName | None = None,
        save_every: Any = None,
        save_first: bool = False,
        save_last: bool = True,
        save_best: bool = False,
        keep_last: int | None = None,
        best: str | Sequence[str] | None = None,
        keep_best: int | None = None,
        keep_last_training_state: int | None = None,
        contents: Contents = "full",
        final: Final | Mapping[str, Any] | None = None,
        asynchronous: bool = False,
        export_dtype: OutputDType | torch.dtype | None = None,
        output_format: FormatName | None = None,
        extra_files: str | Path | Sequence[str | Path] = (),
        adapter: Any = None,
        merged: bool = False,
        directory: str = "step_{step}",
        run_name: str | None = None,
        latest_name: str | None = "latest",
        best_name: str | None = "best",
        overwrite: bool = False,
        save_on_signal: bool | str | int | Sequence[str | int] = False,
        before_save: Callable[[], Any] | None = None,
        emit: Model | Callable[[], Model] | None = None,
        workers: int | None = None,
        progress: ProgressCallback | None = None,
        process_group: Any = None,
        writers: Writers = "auto",
        storage_options: StorageOptions | None = None,
        upload: Mode = "behind",
        local_dir: str | Path | None = None,
        keep_local: int = 1,
        upload_deadline: float = 3600,
        when_behind: WhenBehind = "wait",
    ) -> None:
        """Open the source and check every option; nothing is written, no tensor is read.

        Args:
            source: a directory, weight file, URL or Hub id of any format, a list of the weight files of a directory,
                an open ``Checkpoint``, or None to start from ``config`` without weights.
            output_dir: the directory of the saved steps; None for a checkpointer that only loads.
            model_format: the format of the training model's state dict: "native", "hf", "torchtitan" or "meta".
            config: a config.json (a path, or its content) for a source that has none.
            family: the name of the architecture, such as "llama", where it cannot be detected.
            source_format: the format of ``source``, where it cannot be detected.
            save_every: "500 steps", "1 epoch", "10_000_000 tokens", "30 min", a list of these, or a function of the
                progress; None to save only where another option says so.
            save_first: also save after the first step.
            save_last: also save in ``close``.
            save_best: also save where an evaluation is the best so far, by a metric of ``best``.
            keep_last: how many of the newest steps to keep; None keeps all.
            best: the metric that is the best by, such as "val_loss:min", or several; "best" is the best by the first.
            keep_best: how many of the best steps by each metric to keep as well.
            keep_last_training_state: how many of the newest steps keep their training state; the others keep weights.
            contents: "full", "weights" or "adapter" (PEFT's files alone); these two have no training state.
            final: what differs in the last save: ``Final(contents=..., export_dtype=..., output_format=...)``.
            asynchronous: write in the background; the training waits only while the tensors are copied in memory.
            export_dtype: "float32", "float16" or "bfloat16" for all weights; by default each keeps the source's dtype.
            output_format: the format of the saved steps, instead of the source's.
            extra_files: files to copy into every step.
            adapter: an ``AdapterConfig``, or PEFT's config, of a model with a LoRA or DoRA adapter.
            merged: also write the full weights with the adapter merged in.
            directory: the name of a step's directory, from {step}, {epoch}, {tokens}, {samples}, {evals}, {run_name}
                and the metrics of ``best`` ("step_{step}-loss{val_loss:.3f}"; "none" where a step is saved before one).
            run_name: what {run_name} in ``directory`` is.
            latest_name: the name of the link to the newest step; None for none.
            best_name: the name of the link to the best step, where ``best`` names a metric; None for none.
            overwrite: a fresh start may replace the run that is in ``output_dir``.
            save_on_signal: on SIGTERM and SIGINT, save at the next step; or on those that are named ("SIGUSR1").
            before_save: called before each save takes the tensors; what it returns, if that is a function, is called
                after they are written, or with ``asynchronous`` copied.
            emit: the model whose weights are written instead of the trained one's, such as an average of it, or a
                function that returns it. The training state then holds the trained weights.
            workers: the number of threads that read and write; by default one for each core, from 2 to 4.
            progress: called with ``TransferProgress`` values while weights are loaded or saved, on the first rank only.
            process_group: the ranks that save together, by default torch's default group where it is initialized;
                "rank0" where this process alone makes a checkpointer, of a model of which it holds all.
            writers: "direct" writes each rank's slices at their places; "exchange" sends them to the owners of ranges
                of the files; "auto" does that with tensors of which ranks have many short runs, and on NFS and SMB.
            storage_options: options of the stores that URLs are in; see docs/storage.md.
            upload: into an ``output_dir`` in an object store: "behind" writes a step to ``local_dir``, and uploads it
                behind the training; "direct" writes into the store.
            local_dir: a directory on a disk that all ranks see; by default a temporary one.
            keep_local: how many of the newest steps stay in ``local_dir`` once they have arrived.
            upload_deadline: the seconds that a failing upload is tried again for before that is raised.
            when_behind: what a save that is due does while two steps are on their way: "wait" or "skip".

        Raises:
            UsageError: options that do not fit, all in one message.
            InputError: the source cannot be read; its subclasses say why.
        """
        source, output_dir, config = with_options(storage_options, source, output_dir, config)
        arguments = Arguments(
            SourceOptions(source, source_format, config, family),
            ScheduleOptions(save_every, save_first, save_last, save_best, save_on_signal),
            RetentionOptions(keep_last, best, keep_best, keep_last_training_state),
            WeightOptions(model_format, contents, export_dtype, output_format, adapter, merged),
            DirectoryOptions(output_dir, directory, run_name, latest_name, best_name, overwrite, extra_files),
            final,
            asynchronous,
            workers,
            progress,
            process_group,
            writers,
            Hooks(before_save, emit),
            UploadOptions(upload, local_dir, keep_local, upload_deadline, when_behind),
        )
        self._options = Options.of(arguments)
        self._ranks, self.workers = self._options.ranks, self._options.workers
        self._saver = starting.open_run(arguments, self._options)
        self._loop = TrainingLoop(self._saver, self._options.signals, self._ranks)
        self._loaded = self._closed = False

    @property
    def output_dir(self) -> Path:
        """The directory of the saved steps; raises UsageError for a checkpointer without one."""
        return self._saver.directory.path.local

    @property
    def config(self) -> Mapping[str, Any]:
        """The source's config with the names of Hugging Face's config.json, whatever its format."""
        return self._saver.planner.source.model_for(self._options.settings.model_format).config

    # Loading

    @on_all_ranks
    def load_model(
        self,
        model: Model,
        strict: bool = True,
        *,
        include: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str | None = None,
    ) -> loading.LoadReport:
        """Fill a model from the source, in place, tensor by tensor; returns what was loaded, and what was left out.

        model: a module, or its state dict; what is not loaded keeps its values.
        strict: every key has to be on both sides, in one shape. False loads what fits by key and shape: the rest is in
        the report, each key with its reason, and in a warning.
        include, exclude: globs of keys ("lm_head.weight", "*.mlp.*"), or of modules ("model.layers.0", "score"). What
        they leave out is no mismatch, whatever ``strict`` is.

        Raises KeyMismatchError listing everything that does not fit, and with strict=False where nothing does;
        UsageError for a glob that matches no key of either side. Nothing is loaded then.
        """
        self._refuse_closed()
        report = starting.load_model(model, self._saver, self._options, strict=strict, include=include, exclude=exclude)
        self._loaded = True
        return report

    def load_state_dict(self, format: str | None = None) -> dict[str, torch.Tensor]:
        """The source's weights, converted to ``format`` (default: ``model_format``), in the dtypes of the source."""
        self._refuse_closed()
        formats.check_format_name(format, "format")
        return loading.read_state_dict(self._saver.planner.source, format or self._options.settings.model_format)

    @on_all_ranks
    def load_best(self, model: Model, metric: str | None = None) -> SavedStep | None:
        """Load the weights of the best checkpoint into a model, in place; returns it, None if none has the metric.

        metric: which of several metrics of ``best=``, by default the first. The base weights of a model with an
        adapter have to be loaded already. Raises CorruptFileError for a damaged checkpoint.
        """
        self._refuse_closed()
        return resume.load_best(self._saver, model, self._options, metric)

    def load_adapter(self, path: str | Path, model: Model) -> int:
        """Fill a model's adapter from a PEFT directory, in place; returns the number of tensors."""
        self._refuse_closed()
        return self._saver.planner.load_adapter(pointer.follow_pointer(checked_place(path)), model)

    # Starting

    @on_all_ranks
    def resume(
        self,
        *,
        model: Model,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        grad_scaler: Any = None,
        dataloader: Any = None,
        extra: Any = None,
        from_: Literal["latest", "best"] | int | str | Path | Place = "latest",
        from_dir: str | Path | Place | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        strict: bool = True,
        weights_only: bool = False,
        verify: bool = True,
        data: DataPolicy = "exact",
        keep: Sequence[str] = (),
    ) -> Progress | None:
        """Continue from the newest complete checkpoint; returns its progress, or None for a fresh start.

        The objects given here are also what is saved from now on.
        from_: "latest", "best", a step, or the path of a checkpoint, whatever its name, or of a directory of them.
        from_dir: the output_dir of another run, in which "latest", "best" (by ``best=`` here) or a step is looked up.
        include, exclude: globs of what to load: "model/*", "optimizer", "rng", …; exclude=["progress"] counts from 0,
        in an output_dir that holds no steps yet.
        strict: missing and unexpected entries are one error that lists them (False: a warning).
        weights_only: load the model and the progress only.
        verify: compare checksums, not only names and sizes, before anything is loaded.
        data: what a data loader does where other ranks, or batches of another size, cannot continue right behind the
        samples that were seen: "exact" is an error, "restart" begins the epoch again, "skip" leaves out few.
        keep: options of the optimizer that stay as the recipe gave them, such as ["lr", "weight_decay"]; the others
        become the checkpoint's, and differences are a warning.

        "latest" skips a damaged checkpoint with a warning and takes the one before it; a damaged one that was asked for
        is a CorruptFileError, and one that the system cannot read now an UnreadableError. Nothing is loaded if anything
        is an error. Raises UsageError for a glob that matches nothing.
        """
        wanted = Selection.of(include, exclude, weights_only)
        resume.check_options(wanted, data, keep, optimizer, self._saver, self._options)
        self._refuse_closed()
        parts = self._loop.begin(model, optimizer, lr_scheduler, grad_scaler, dataloader, extra, data)
        saved = choosing.choose_together(self._saver.directory, self._options, from_, from_dir=from_dir, verify=verify)
        if saved is None:
            resume.start_fresh(self._saver, parts, wanted)
            return None
        resume.continue_from(
            saved, self._saver, parts, self._options, wanted, strict=strict, base_loaded=self._loaded, keep=keep
        )
        return self.progress

    @on_all_ranks
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
        """Set what is saved, without loading anything: a fresh start, or one that continues from a given ``progress``.

        Raises OutputExistsError for a fresh start where checkpoints are, unless ``overwrite`` was said.
        """
        there = starting.existing_steps(self._saver, self._options, progress)
        self._refuse_closed()
        self._loop.begin(model, optimizer, lr_scheduler, grad_scaler, dataloader, extra)
        starting.start_from(progress, self._saver, self._options, there)

    # Counting

    @property
    def progress(self) -> Progress:
        """The counters of the run."""
        return self._saver.counts.progress

    @property
    def interrupted(self) -> int | None:
        """The signal that asked the run to end (``save_on_signal``), None if there was none."""
        return self._loop.interrupted

    @property
    def should_stop(self) -> bool:
        """Whether a signal asked the run to end, and the step was saved: the loop should stop."""
        return self._loop.signal_saved

    def step(self, *, tokens: int = 0, samples: int = 0) -> None:
        """Count an optimizer step, and save if a save is due; call it after the scheduler's step.

        Raises what failed in a save behind the training.
        """
        self._loop.step(self._require("step()"), int(tokens), int(samples))

    def report(self, **metrics: float) -> None:
        """Take the metrics of this step, and count an evaluation; a checkpoint of this step gets them too.

        A value that is no finite number is left out, with a warning: it could be neither compared nor written as JSON,
        but it ends no training. Raises what failed in a save behind the training.
        """
        self._require("report()")
        self._loop.report(metrics)

    def end_epoch(self) -> None:
        """Count an epoch, and save if a save is due and this step is not saved yet."""
        self._loop.end_epoch(self._require("end_epoch()"))

    def epochs(self, count: int | None = None) -> Iterator[int]:
        """The indices of the remaining epochs of ``count``, from 0; without ``count`` they never end.

        A resumed run continues in its epoch. The end of the loop's body counts one, but not if ``should_stop`` is true.
        """
        yield from self._loop.epochs(self._require("epochs()"), count)

    # Saving

    def save(self) -> None:
        """Save this step now, unless it is saved already."""
        self._require("save()")
        self._saver.check()
        if self._saver.saved_step != self.progress.step:
            self._saver.save()

    def create_seed_checkpoint(self, model: Model) -> Path | str:
        """Save a model's initial weights as step 0, without training; returns the directory, of a store its URL."""
        self._refuse_closed()
        if self._saver.parts is None:
            self.register(model=model)
        if self._saver.saved_step is None:
            self._saver.save(replace(self._options.settings, contents="weights"))
        self.wait()
        return self._saver.next_location

    def wait(self) -> None:
        """Wait until a background save is complete; raises its error."""
        self._saver.wait()

    @property
    def saved(self) -> list[SavedStep]:
        """The complete checkpoints, oldest first."""
        return self._saver.directory.saved

    def newest(self) -> SavedStep | None:
        """The newest complete and undamaged checkpoint, None if there is none."""
        return choosing.newest_sound_step(self._saver.directory.places, verify=True, workers=self.workers)

    @property
    def best(self) -> SavedStep | None:
        """The best complete checkpoint by the first metric of ``best=``, None if none has it."""
        return self._saver.directory.best

    def close(self) -> None:
        """Save the last step if it is not saved yet, wait until it is complete, and release everything.

        Raises what failed. Calling it again does nothing.
        """
        if not self._closed:
            try:
                self._loop.finish()
            finally:
                self._release()

    def end_run(self) -> None:
        """End a run as ``close`` does, but allow ``resume`` or ``register`` to start another one."""
        try:
            self._loop.finish()
        finally:
            self._loop.release()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self._saver.wait(alone=True)  # what is in flight is finished; the step that failed is not saved
        except Exception:
            log.exception("a checkpoint could not be saved")
        trouble = self._saver.conflict
        self._release()
        if trouble is not None and trouble != str(error):  # the connection to the process that was refused is dead
            raise UsageError(trouble) from error

    # Internal

    def _release(self) -> None:
        self._closed = True
        with contextlib.ExitStack() as stack:
            stack.callback(self._ranks.leave if self._ranks is not None else lambda: None)
            stack.callback(self._saver.planner.source.close)
            stack.callback(self._loop.release)

    def _require(self, what: str) -> TrainingParts:
        self._refuse_closed()
        return self._saver.require(what)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise UsageError("the checkpointer is closed; make another one")


def saver_of(checkpointer: Checkpointer) -> Saver:
    """What saves the steps of a checkpointer, for the library's own modules."""
    return checkpointer._saver
