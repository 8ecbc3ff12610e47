"""The options of a checkpointer, each alone and held against each other: what contradicts or does nothing is refused.

Everything that can be known without opening the source is known here, hours before it would matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ckpt_convert import formats
from ckpt_convert.checkpoint.checkpoint import Checkpoint
from ckpt_convert.checkpointer.distributed import ranks
from ckpt_convert.checkpointer.distributed.ranks import Ranks
from ckpt_convert.checkpointer.run import retention
from ckpt_convert.checkpointer.run.naming import VARIABLES, DirectoryTemplate
from ckpt_convert.checkpointer.run.schedule import Schedule, parse_schedule
from ckpt_convert.checkpointer.run.source import Config
from ckpt_convert.checkpointer.save.planner import CONTENTS, Contents, Settings
from ckpt_convert.checkpointer.save.run_directory import RunDirectory
from ckpt_convert.dtypes import CASTS, torch_name
from ckpt_convert.errors import UsageError
from ckpt_convert.models import FAMILIES
from ckpt_convert.storage.place import Place, checked_place
from ckpt_convert.storage.reader import DEFAULT_WORKERS
from ckpt_convert.tensors.progress import ProgressCallback
from ckpt_convert.wording import indented_list

SINGLE_WRITER = "rank0"
"""``process_group`` of a checkpointer that one process makes, for a model of which it has all."""

_VARIABLE = re.compile(rf"{{(?:{'|'.join(VARIABLES)})(?::[^{{}}]*)?}}")
_BRACES = "has braces, but only directory= is a template; write it out, or put the variable into directory="


@dataclass(frozen=True)
class Final:
    """What is different about the last save; None is as every save."""

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
class Options:
    """All that a ``Checkpointer`` was given, each option alone and held against the others.

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
    latest_name: str | None
    save_last: bool
    overwrite: bool
    asynchronous: bool
    workers: int
    progress: ProgressCallback | None
    ranks: Ranks | None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """What was given, by name; raises UsageError for what does not fit, and lists what does not fit together."""
        final = check(given)
        best, output_dir = given["best"], given["output_dir"]
        schedule = parse_schedule(given["save_every"])
        policy = retention.RetentionPolicy(
            given["keep_last"],
            None if best is None else retention.parse_best(best),
            given["keep_best"],
            given["keep_last_training_state"],
        )
        template = DirectoryTemplate(given["directory"], given["latest_name"])
        place = None if output_dir is None else checked_place(output_dir, "output_dir")
        settings = Settings(
            contents=given["contents"],
            export_dtype=dtype_of(given["export_dtype"]),
            output_format=given["output_format"],
            model_format=given["model_format"],
            extra=_extra_files(given["extra_files"]),
            merged=given["merged"],
        )
        same = ("config", "family", "run_name", "latest_name", "save_last", "overwrite", "asynchronous", "progress")
        return cls(
            output_dir=place,
            schedule=schedule,
            policy=policy,
            template=template,
            settings=settings,
            last=replace(settings, **final.changes),
            has_source=given["source"] is not None,
            workers=given["workers"] or DEFAULT_WORKERS,
            ranks=_ranks(given["process_group"]) if place is not None else None,
            **{name: given[name] for name in same},
        )

    def run_directory(self) -> RunDirectory | None:
        """Where the steps go; raises UsageError for a name that no directory of a step can have."""
        if self.output_dir is None:
            return None
        return RunDirectory(self.output_dir, self.template, self.run_name, self.latest_name, self.policy, self.ranks)


def check(given: Mapping[str, Any]) -> Final:
    """Check all that a ``Checkpointer`` was given, by the names of its options; returns what ``final`` denotes.

    Raises UsageError, which lists everything that is wrong.
    """
    final = Final.of(given["final"])
    problems = [*_alone(given, final), *_together(given, final)]
    if problems:
        raise UsageError(problems[0] if len(problems) == 1 else f"the options do not fit:{indented_list(problems)}")
    return replace(final, export_dtype=dtype_of(final.export_dtype))


def _ranks(given: Any) -> Ranks | None:
    """The ranks that write together; None where one process writes alone."""
    return None if given == SINGLE_WRITER else ranks.of_group(given)


def dtype_of(given: Any) -> str | None:
    """The name of a dtype that is given by name or as torch has it."""
    return None if given is None else torch_name(given)


def _alone(given: Mapping[str, Any], final: Final) -> Iterator[str]:
    """What is wrong with an option whatever the others are."""
    known: dict[str, tuple[Any, Any]] = {
        "model_format": (given["model_format"], formats.ALL),
        "family": (given["family"], FAMILIES),
        "source_format": (given["source_format"], formats.ALL),
        "output_format": (given["output_format"], formats.ALL),
        "contents": (given["contents"], CONTENTS),
        "export_dtype": (dtype_of(given["export_dtype"]), CASTS),
        "final: contents": (final.contents, CONTENTS),
        "final: export_dtype": (dtype_of(final.export_dtype), CASTS),
        "final: output_format": (final.output_format, formats.ALL),
    }
    for option, (value, values) in known.items():
        if value is not None and value not in values:
            yield f"{option}={value!r}: expected one of {', '.join(values)}"
    workers = given["workers"]
    if workers is not None and (type(workers) is not int or workers < 1):
        yield f"workers={workers!r}: expected a whole number from 1 on, or None to let it be chosen"
    for option in ("latest_name", "run_name"):
        if isinstance(given[option], str) and set("{}") & set(given[option]):
            yield f"{option}={given[option]!r}: {_BRACES}"
    if given["output_dir"] is not None and _VARIABLE.search(str(given["output_dir"])):
        yield f"output_dir={str(given['output_dir'])!r}: {_BRACES}"


def _together(given: Mapping[str, Any], final: Final) -> Iterator[str]:
    """Options that contradict each other, and those of which another one makes that they do nothing."""
    contents = {given["contents"], final.contents or given["contents"]}
    merges = given["merged"] and contents != {"adapter"}
    if given["adapter"] is None:
        asked = ["merged=True"] * bool(given["merged"]) + ['contents="adapter"'] * ("adapter" in contents)
        for option in asked:
            yield f"{option}: there is no adapter; give adapter=AdapterConfig(rank=..., alpha=...)"
    elif given["merged"] and not merges:
        yield 'merged=True, contents="adapter": that is the adapter\'s files alone; take contents="full" or "weights"'
    if given["adapter"] is not None and not given["merged"]:
        for option in ("export_dtype", "output_format"):
            if given[option] is not None or getattr(final, option) is not None:
                yield f"{option}: does nothing for an adapter, whose files are PEFT's; it is for merged=True"
    if given["keep_best"] is not None and given["keep_last"] is None and given["best"] is not None:
        yield f"keep_best={given['keep_best']}: does nothing without keep_last=, which keeps all where it is not given"
    if given["save_best"] and given["best"] is None:
        yield 'save_best=True: best by what? Give best= too, such as best="val_loss:min"'
    if given["keep_last_training_state"] is not None and given["contents"] in ("weights", "adapter"):
        yield f'keep_last_training_state: contents="{given["contents"]}" saves without a training state'
    if final.changes and not given["save_last"]:
        yield "final: does nothing with save_last=False, which leaves the last save out"
    if given["source"] is None and given["source_format"] is not None:
        yield "source_format: there is no source that could be of it"
    if isinstance(given["source"], Checkpoint):
        for option in ("family", "source_format", "config"):
            if given[option] is not None:
                yield f"{option}: does nothing for a source that is open already; give it to open_checkpoint"


def _extra_files(given: Any) -> tuple[Place, ...]:
    """The paths of ``extra_files``, of which one may be given as it is."""
    return tuple(checked_place(path, "extra_files") for path in ((given,) if isinstance(given, str | Path) else given))
