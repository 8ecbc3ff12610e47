"""``convert_checkpoint``: from a source to a directory that holds the same weights in another layout."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypedDict, Unpack

from ckpt_convert.checkpoint import record
from ckpt_convert.checkpoint.checkpoint import open_identified, open_unfinished
from ckpt_convert.checkpoint.dequantize import dequantize_if_asked
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.mapping import Equality
from ckpt_convert.checkpoint.opening import describe_part
from ckpt_convert.convert import ownership, planning
from ckpt_convert.convert.plan import Plan
from ckpt_convert.convert.planning import PlanInputs
from ckpt_convert.convert.request import Request
from ckpt_convert.convert.sources import OpenPlan, Sources
from ckpt_convert.errors import (
    CkptConvertError,
    ConfigError,
    InputError,
    KeyMismatchError,
    ShapeMismatchError,
    UsageError,
    VerificationError,
    misfit,
)
from ckpt_convert.formats import repository
from ckpt_convert.models.core.config import ConfigOptions, MetaStyle
from ckpt_convert.storage import workspace
from ckpt_convert.storage.place import Location, Place, at, locate
from ckpt_convert.storage.reader import WORKERS, reading
from ckpt_convert.storage.workspace import Stage
from ckpt_convert.tensors.progress import ProgressCallback


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    ``files`` are the weight files; ``bytes`` those of their tensors; ``drops`` the tensors that the target has no place
    for (kept in the record); ``side_files`` name → copied, generated, restored or carried; ``moves`` bytes copied,
    reordered and cast; ``verified`` the number of tensors compared, None without ``verify``; ``overflows`` the number
    of finite values that a cast has made infinite, by key.
    """

    source: str
    destination: str
    source_format: str
    target_format: str
    family: str
    files: list[str]
    tensors: int
    bytes: int
    drops: list[str]
    ties: list[str]
    notices: list[str]
    side_files: dict[str, str]
    moves: dict[str, int]
    resumed_bytes: int
    verified: int | None
    overflows: dict[str, int]
    seconds: float = field(compare=False)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)


class Options(TypedDict, total=False):
    """The options that ``plan_conversion`` and ``convert_checkpoint`` share; every one may be left out.

    from_format: the format of the source, where it cannot be told. family: likewise. config: path of the config.json or
    params.json of a source that has none. revision: of a source on the Hub. dtype: "float32", "float16" or "bfloat16".
    dequantize: "bfloat16" or "float32", for a quantised source. shards: the number of files. max_shard_size: bytes.
    model_parallel: the number of ranks of a meta output. container: one that the format has ("safetensors", "bin",
    "pth", "dcp", "pt"). like: a checkpoint
    whose file names, assignment, config and tokenizer are taken. rope_factor, rope_theta, max_positions: what
    params.json does not say. meta_style: "llama2" or "llama3". drop_rope_scaling: leave out a RoPE scaling that the
    target cannot say. allow_overflow: write values that are too large for ``dtype`` as infinite, instead of refusing.
    allow_loss: keep in the record alone what changes the model's outputs and has no place in the target.
    """

    from_format: str | None
    family: str | None
    config: Location | None
    revision: str | None
    dtype: str | None
    dequantize: str | None
    shards: int | None
    max_shard_size: int | None
    model_parallel: int | None
    container: str | None
    like: Location | None
    rope_factor: float | None
    rope_theta: float | None
    max_positions: int | None
    meta_style: MetaStyle | None
    drop_rope_scaling: bool
    allow_overflow: bool
    allow_loss: bool


@reading()
def plan_conversion(src: Location, *, to: str, **options: Unpack[Options]) -> Plan:
    """The plan of a conversion, from headers alone: nothing is written and no tensor is read.

    ``src`` is a path or a Hub id, ``to`` a format; ``options`` are those of ``Options``. The plan holds no file
    open, and can be pickled. Raises what ``convert_checkpoint`` raises for bad input or
    options that do not fit.
    """
    _, made = _plan(src, to, options)
    made.close()
    return made.plan


def _plan(
    src: Location, to: str, options: Options, equal: Callable[[Identified, Equality], bool] | None = None
) -> tuple[Identified, OpenPlan]:
    """The plan; ``equal`` compares two tensors of the source, where only their bytes say whether they are tied."""
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise UsageError(f"unknown option {sorted(unknown)[0]!r}; known: {', '.join(Options.__annotations__)}")
    settings = ConfigOptions(
        rope_factor=options.get("rope_factor"),
        rope_theta=options.get("rope_theta"),
        max_positions=options.get("max_positions"),
        meta_style=options.get("meta_style"),
        drop_rope_scaling=options.get("drop_rope_scaling", False),
    )
    like = options.get("like")
    request = Request(
        to=to,
        dtype=options.get("dtype"),
        dequantize=options.get("dequantize"),
        shards=options.get("shards"),
        max_shard_size=options.get("max_shard_size"),
        model_parallel=options.get("model_parallel"),
        container=options.get("container"),
        like=at(like) if like is not None else None,
        allow_overflow=options.get("allow_overflow", False),
        allow_loss=options.get("allow_loss", False),
        config=settings,
    )
    request.check()
    if like is not None:
        request = replace(request, like=repository.locate(like, format=to))
    from_format = options.get("from_format")
    where = repository.locate(src, options.get("revision"), format=from_format)
    family = options.get("family")
    source = open_identified(where, format=from_format, family=family, config=options.get("config"), options=settings)
    if request.like is not None and (config := _config_of(request.like, source)) is not None:
        source.close()
        source = open_identified(where, format=from_format, family=family, config=config, options=settings)
    try:
        wanted = dequantize_if_asked(source, request.dequantize)
        imitated = open_identified(request.like, format=to) if request.like is not None else None
        given = PlanInputs(wanted, request, imitated)
        return wanted, planning.make_plan(given, partial(equal, wanted) if equal is not None else None)
    except (ConfigError, KeyMismatchError, ShapeMismatchError) as error:
        part = describe_part(source.place)
        if part is None:
            raise
        raise KeyMismatchError(
            f"{source.place}: is {part}, and no whole model; give the directory, {source.root}"
        ) from error


def _config_of(like: Place, source: Identified) -> Place | None:
    """The config of the checkpoint to imitate, where the source has none of its own."""
    if source.format is None or source.config_file.is_there() or source.from_shapes is not None:
        return None
    with open_identified(like) as opened:
        return opened.config_file if opened.config_file.is_there() else None


def convert_checkpoint(
    src: Location,
    dst: Location,
    *,
    to: str,
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = False,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    **options: Unpack[Options],
) -> Report:
    """Convert the checkpoint ``src`` to the format ``to`` in the directory ``dst``, which appears whole or not at all.

    ``src`` is a path or a Hub id; ``overwrite`` replaces ``dst``; ``resume`` continues an interrupted attempt;
    ``verify`` reads the output again and compares every tensor before ``dst`` appears; ``workers`` is the number of
    threads; ``progress`` is called with ``TransferProgress`` values, from several threads. The other options are
    those of ``Options``.

    Raises InputError (and what derives from it) for bad input, UsageError for options that do not fit, and
    CkptConvertError for what goes wrong while writing; ``dst`` is then as it was.
    """
    from ckpt_convert.convert import execute, output  # not before: they need NumPy, and a plan does not

    started = time.monotonic()
    if workers is not None and workers < 1:
        raise misfit("workers", workers, "expected 1 or more")
    for name, given in (("SRC", src), ("DST", dst)):
        if not str(given):
            raise UsageError(f"{name} is empty; give a path")
    destination = locate(dst, "DST")
    place = workspace.of(destination)
    count = workers or WORKERS

    def check(source: Identified) -> None:
        with reading(source.place):
            place.check_destination(destination, source.place, ownership.RULES, overwrite=overwrite)

    def equal(source: Identified, pair: Equality) -> bool:
        check(source)  # before any tensor is read
        return execute.byte_comparer(source.stored)(pair)

    with reading():
        source, planned = _plan(src, to, options, equal)
    made, sources = planned.plan, planned.sources
    try:
        check(source)
        made.refuse_unreadable()
        execute.run_checks(made, sources, progress)
        lost = execute.check_losses(made, sources)
        mode = output.output_permissions(source)
        with place.stage(destination, ownership.RULES, overwrite=overwrite, resume=resume, mode=mode) as staging:
            try:
                place.check_space(destination, made.disk - staging.allocated())
                staging.expect(made.names)
                written = output.write_output(made, sources, staging, count, progress)
                staging.folder.write(record.MANIFEST, record.render_manifest(written.manifest))
                staging.complete()
                verified = _verify(made, sources, staging, count, progress) if verify else None
                replaced = made.check_sources()
                staging.commit()
            except CkptConvertError as error:
                if not staging.keeps(error):
                    staging.discard()
                raise
    except (InputError, VerificationError):
        made.check_sources()  # a file that was changed meanwhile is the reason why something does not fit
        raise
    finally:
        planned.close()
    return Report(
        source=str(src),
        destination=str(dst),
        source_format=str(source.format),
        target_format=made.target,
        family=made.family,
        files=[file.name for file in made.weights],
        tensors=made.tensors,
        bytes=sum(tensor.nbytes for file in made.weights for tensor in file.tensors),
        drops=list(made.passthrough),
        ties=list(made.ties),
        notices=[*made.notices, *written.notices, *replaced, *_accepted(made, lost, written.overflows)],
        side_files={str(entry["name"]): str(entry["origin"]) for entry in written.manifest["side_files"]},
        moves=dict(made.bytes_by_kind),
        resumed_bytes=written.resumed,
        verified=verified,
        overflows=written.overflows,
        seconds=round(time.monotonic() - started, 3),
    )


def _accepted(made: Plan, lost: dict[str, int], overflows: dict[str, int]) -> list[str]:
    """What the output has lost as its user accepted."""
    from ckpt_convert.convert import execute, output

    said = [f"{execute.loss_text(lost)} are kept in the record alone, as accepted"] if lost else []
    return said + ([f"{output.overflow_text(overflows)} in {made.request.dtype}, as accepted"] if overflows else [])


def _verify(made: Plan, sources: Sources, staging: Stage, workers: int, progress: ProgressCallback | None) -> int:
    from ckpt_convert.convert import readback

    family = None if made.source.literal else made.family
    try:
        with open_unfinished(staging.place.listed(), format=made.target, family=family) as written:
            return readback.verify_output(made, sources, written, workers=workers, progress=progress)
    except InputError as error:
        raise VerificationError(f"{staging.destination}: the output cannot be read again: {error}") from error
