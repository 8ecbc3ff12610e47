"""The options of a checkpointer, checked alone and against each other: what contradicts or does nothing is refused.

Everything that can be known without opening the source is known here, hours before it would matter.
"""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch

from ckpt_convert import formats
from ckpt_convert.adapters.config import AdapterConfig
from ckpt_convert.checkpoint.checkpoint import Checkpoint
from ckpt_convert.checkpointer.distributed import ranks
from ckpt_convert.checkpointer.distributed.exchange import Writers
from ckpt_convert.checkpointer.distributed.ranks import Ranks
from ckpt_convert.checkpointer.live.tensors import Model, model_tensors
from ckpt_convert.checkpointer.run import retention
from ckpt_convert.checkpointer.run.naming import VARIABLES, DirectoryTemplate
from ckpt_convert.checkpointer.run.schedule import Schedule, parse_schedule
from ckpt_convert.checkpointer.run.source import Config, Source
from ckpt_convert.checkpointer.save.planner import CONTENTS, Contents, Settings, Tensors
from ckpt_convert.checkpointer.save.run_directory import RunDirectory
from ckpt_convert.checkpointer.save.signals import parse_signals
from ckpt_convert.checkpointer.save.upload import UploadOptions
from ckpt_convert.checkpointer.save.uploaded_directory import UploadedDirectory
from ckpt_convert.dtypes import CASTS, torch_name
from ckpt_convert.errors import UsageError
from ckpt_convert.models import FAMILIES
from ckpt_convert.storage.place import Place, checked_place, output_place
from ckpt_convert.storage.reader import DEFAULT_WORKERS
from ckpt_convert.tensors.progress import ProgressCallback
from ckpt_convert.wording import indented_list

SINGLE_WRITER = "rank0"
"""``process_group`` of a checkpointer that one process makes, for a model of which it has all."""

_VARIABLE = re.compile(rf"{{(?:{'|'.join(VARIABLES)})(?::[^{{}}]*)?}}")
_BRACES = "has braces, but only directory= is a template; write it out, or put the variable into directory="


@dataclass(frozen=True)
class Final:
    """Options of the last save that differ from the others; None keeps the value of every save."""

    contents: Contents | None = None
    export_dtype: str | None = None
    output_format: str | None = None

    @classmethod
    def of(cls, given: Final | Mapping[str, Any] | None) -> Final:
        """What a recipe gives, which may be a dict; raises UsageError for a name that is none of the options."""
        if given is None or isinstance(given, Final):
            return given or cls()
        known = [field.name for field in fields(cls)]
        unknown = sorted(given.keys() - set(known))
        if unknown:
            raise UsageError(f"final: {unknown[0]!r} is no option of it; known: {', '.join(known)}")
        return cls(**given)

    @property
    def changes(self) -> dict[str, Any]:
        """The options that differ from every save's, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class SourceOptions:
    """What a run starts from."""

    source: Source | None
    source_format: str | None
    config: Config | None
    family: str | None


@dataclass(frozen=True)
class ScheduleOptions:
    """When to save."""

    save_every: Any
    save_first: bool
    save_last: bool
    save_best: bool
    save_on_signal: Any


@dataclass(frozen=True)
class RetentionOptions:
    """Which steps to keep."""

    keep_last: int | None
    best: str | Sequence[str] | None
    keep_best: int | None
    keep_last_training_state: int | None


@dataclass(frozen=True)
class WeightOptions:
    """What to write of the model, and how."""

    model_format: str
    contents: Contents
    export_dtype: str | torch.dtype | None
    output_format: str | None
    adapter: Any
    merged: bool


@dataclass(frozen=True)
class DirectoryOptions:
    """Where the steps go, and what else goes there."""

    output_dir: str | Path | Place | None
    directory: str
    run_name: str | None
    latest_name: str | None
    best_name: str | None
    overwrite: bool
    extra_files: str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Hooks:
    """What of the recipe runs at each save: ``before_save`` right before the tensors are taken, and what it returns
    after that; ``emit`` is or gives the model whose weights are written instead of the trained one's."""

    before_save: Callable[[], Any] | None = None
    emit: Model | Callable[[], Model] | None = None

    @contextlib.contextmanager
    def around_save(self) -> Iterator[None]:
        """Call ``before_save``, and at the end what it returned, if that is a function."""
        undo = None if self.before_save is None else self.before_save()
        try:
            yield
        finally:
            if callable(undo):
                undo()

    def emitted(self) -> Tensors | None:
        """The tensors to write instead of the model's; None for those of the model."""
        given = self.emit
        if given is not None and not isinstance(given, Mapping | torch.nn.Module):
            given = given()
        return None if given is None else model_tensors(given)


@dataclass(frozen=True)
class Arguments:
    """What a ``Checkpointer`` was called with."""

    source: SourceOptions
    schedule: ScheduleOptions
    retention: RetentionOptions
    weights: WeightOptions
    directory: DirectoryOptions
    final: Final | Mapping[str, Any] | None
    asynchronous: bool
    workers: int | None
    progress: ProgressCallback | None
    process_group: Any
    writers: Writers
    hooks: Hooks
    upload: UploadOptions


@dataclass(frozen=True)
class Options:
    """The options of a ``Checkpointer``, checked alone and against each other.

    ``last`` are the settings of the last save, ``output_dir`` is None for a checkpointer that only loads.
    """

    output_dir: Place | None
    schedule: Schedule
    policy: retention.RetentionPolicy
    template: DirectoryTemplate
    settings: Settings
    last: Settings
    config: Config | None
    family: str | None
    has_source: bool
    run_name: str | None
    adapter: AdapterConfig | None
    save_first: bool
    save_last: bool
    save_best: bool
    signals: tuple[int, ...]
    overwrite: bool
    asynchronous: bool
    workers: int
    progress: ProgressCallback | None
    ranks: Ranks | None
    writers: Writers
    hooks: Hooks
    upload: UploadOptions

    @classmethod
    def of(cls, given: Arguments) -> Options:
        """The checked options; raises UsageError, which lists everything that does not fit."""
        final = check(given)
        schedule = parse_schedule(given.schedule.save_every)
        policy = retention.RetentionPolicy(
            given.retention.keep_last,
            retention.parse_best_metrics(given.retention.best),
            given.retention.keep_best,
            given.retention.keep_last_training_state,
        )
        template = DirectoryTemplate(
            given.directory.directory,
            given.directory.latest_name,
            given.directory.best_name if policy.best else None,
            policy.metrics,
        )
        place = None if given.directory.output_dir is None else output_place(given.directory.output_dir, "output_dir")
        if given.upload not in (UploadOptions(), UploadOptions("direct")) and (place is None or place.is_local):
            raise UsageError(
                "local_dir, keep_local, upload_deadline, when_behind: do nothing without an output_dir in an "
                'object store, such as "s3://bucket/run"; leave them out'
            )
        settings = Settings(
            contents=given.weights.contents,
            export_dtype=dtype_of(given.weights.export_dtype),
            output_format=given.weights.output_format,
            model_format=given.weights.model_format,
            extra=_extra_files(given.directory.extra_files),
            merged=given.weights.merged,
        )
        ranks = _ranks(given.process_group, place)
        if ranks is not None and place is not None and not place.is_local and given.upload.mode == "direct":
            raise UsageError(
                f'upload="direct": one process writes a step, and here {ranks.count} ranks save together; leave it '
                "out, and give local_dir=, a directory that all of them see"
            )
        return cls(
            output_dir=place,
            schedule=schedule,
            policy=policy,
            template=template,
            settings=settings,
            last=replace(settings, **final.changes),
            has_source=given.source.source is not None,
            ranks=ranks,
            writers=given.writers,
            hooks=given.hooks,
            upload=given.upload,
            workers=given.workers or DEFAULT_WORKERS,
            config=given.source.config,
            family=given.source.family,
            run_name=given.directory.run_name,
            adapter=None if given.weights.adapter is None else AdapterConfig.of(given.weights.adapter),
            save_first=given.schedule.save_first,
            save_last=given.schedule.save_last,
            save_best=given.schedule.save_best,
            signals=parse_signals(given.schedule.save_on_signal),
            overwrite=given.directory.overwrite,
            asynchronous=given.asynchronous,
            progress=given.progress if ranks is None or ranks.is_first else None,
        )

    def as_text(self) -> dict[str, str]:
        """What all ranks have to be given alike, by the names of the options, to be compared."""
        names = ("run_name", "adapter", "save_first", "save_last", "save_best", "overwrite", "asynchronous", "writers")
        values = {
            **{name: getattr(self, name) for name in names},
            **_by_option(self.settings, extra="extra_files"),
            **_by_option(self.policy),
            **_by_option(self.template, text="directory"),
            **_by_option(self.upload, mode="upload", deadline="upload_deadline"),
            "extra_files": [str(path) for path in self.settings.extra],
            "best": [":".join(metric) for metric in self.policy.best],
            "save_on_signal": [signal.Signals(number).name for number in self.signals],
            "final": {name: value for name, value in vars(self.last).items() if value != getattr(self.settings, name)},
        }
        del values["metrics"]  # those of best
        told = {"output_dir": str(self.output_dir), "save_every": self.schedule.describe()}
        return told | {name: repr(value) for name, value in values.items()}

    def run_directory(self) -> RunDirectory | None:
        """Where the steps go; raises UsageError for a name that no directory of a step can have."""
        if self.output_dir is None:
            return None
        named = self.output_dir, self.template, self.run_name
        if self.output_dir.is_local or self.upload.mode == "direct":
            return RunDirectory(*named, self.policy, self.ranks, self.writers)
        return UploadedDirectory(*named, self.policy, self.ranks, self.writers, self.upload)


def check(given: Arguments) -> Final:
    """Check the arguments of a ``Checkpointer``; returns the options of the last save.

    Raises UsageError, which lists everything that is wrong.
    """
    final = Final.of(given.final)
    problems = [*_alone(given, final), *_together(given, final)]
    if problems:
        raise UsageError(problems[0] if len(problems) == 1 else f"the options do not fit:{indented_list(problems)}")
    return replace(final, export_dtype=dtype_of(final.export_dtype))


def _ranks(given: Any, output_dir: Place | None) -> Ranks | None:
    """The ranks that save together, or load where a group is given; None where one process does alone."""
    alone = given == SINGLE_WRITER or (given is None and output_dir is None)
    return None if alone else ranks.of_group(given)


def _by_option(group: Any, **called: str) -> dict[str, Any]:
    """The values of a group of options, by their names; ``called`` are those that differ from the fields'."""
    return {called.get(field.name, field.name): getattr(group, field.name) for field in fields(group)}


def dtype_of(given: Any) -> str | None:
    """The name of a dtype that is given by name or as a torch.dtype."""
    return None if given is None else torch_name(given)


def _alone(given: Arguments, final: Final) -> Iterator[str]:
    """Problems of single options."""
    known: dict[str, tuple[Any, Any]] = {
        "model_format": (given.weights.model_format, formats.ALL),
        "family": (given.source.family, FAMILIES),
        "source_format": (given.source.source_format, formats.ALL),
        "output_format": (given.weights.output_format, formats.ALL),
        "contents": (given.weights.contents, CONTENTS),
        "writers": (given.writers, get_args(Writers)),
        "export_dtype": (dtype_of(given.weights.export_dtype), CASTS),
        "final: contents": (final.contents, CONTENTS),
        "final: export_dtype": (dtype_of(final.export_dtype), CASTS),
        "final: output_format": (final.output_format, formats.ALL),
    }
    for option, (value, values) in known.items():
        if value is not None and value not in values:
            yield f"{option}={value!r}: expected one of {', '.join(values)}"
    yield from given.upload.problems()
    workers = given.workers
    if workers is not None and (type(workers) is not int or workers < 1):
        yield f"workers={workers!r}: expected a whole number from 1 on, or None to let it be chosen"
    for option in ("latest_name", "best_name", "run_name"):
        name = getattr(given.directory, option)
        if isinstance(name, str) and set("{}") & set(name):
            yield f"{option}={name!r}: {_BRACES}"
    if given.directory.output_dir is not None and _VARIABLE.search(str(given.directory.output_dir)):
        yield f"output_dir={str(given.directory.output_dir)!r}: {_BRACES}"


def _together(given: Arguments, final: Final) -> Iterator[str]:
    """Options that contradict each other, or that have no effect because of another one."""
    contents = {given.weights.contents, final.contents or given.weights.contents}
    merges = given.weights.merged and contents != {"adapter"}
    if given.weights.adapter is None:
        asked = ["merged=True"] * bool(given.weights.merged) + ['contents="adapter"'] * ("adapter" in contents)
        for option in asked:
            yield f"{option}: there is no adapter; give adapter=AdapterConfig(rank=..., alpha=...)"
    elif given.weights.merged and not merges:
        yield 'merged=True, contents="adapter": that is the adapter\'s files alone; take contents="full" or "weights"'
    if given.weights.adapter is not None and not given.weights.merged:
        for option in ("export_dtype", "output_format"):
            if getattr(given.weights, option) is not None or getattr(final, option) is not None:
                yield f"{option}: does nothing for an adapter, whose files are PEFT's; it is for merged=True"
    keeping = given.retention
    if keeping.keep_best is not None and keeping.keep_last is None and keeping.best is not None:
        yield f"keep_best={keeping.keep_best}: does nothing without keep_last=, which keeps all where it is not given"
    if given.hooks.emit is not None and given.weights.adapter is not None:
        yield "emit: the weights of an adapter are those of the model; leave emit or adapter out"
    if given.schedule.save_best and keeping.best is None:
        yield 'save_best=True: best by what? Give best= too, such as best="val_loss:min"'
    if keeping.keep_last_training_state is not None and given.weights.contents in ("weights", "adapter"):
        yield f'keep_last_training_state: contents="{given.weights.contents}" saves without a training state'
    if final.changes and not given.schedule.save_last:
        yield "final: does nothing with save_last=False, which leaves the last save out"
    if given.source.source is None and given.source.source_format is not None:
        yield "source_format: there is no source that could be of it"
    if isinstance(given.source.source, Checkpoint):
        for option in ("family", "source_format", "config"):
            if getattr(given.source, option) is not None:
                yield f"{option}: does nothing for a source that is open already; give it to open_checkpoint"


def _extra_files(given: Any) -> tuple[Place, ...]:
    """The paths of ``extra_files``, which may be a single path."""
    return tuple(checked_place(path, "extra_files") for path in ((given,) if isinstance(given, str | Path) else given))
