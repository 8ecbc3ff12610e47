"""``convert_checkpoint``: from a source to a directory that holds the same weights in another layout."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from ckpt_convert.checkpoint import locate, record
from ckpt_convert.checkpoint.checkpoint import open_identified, open_unfinished
from ckpt_convert.checkpoint.dequantize import dequantize_if_asked
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.mapping import Equality
from ckpt_convert.checkpoint.opening import describe_part
from ckpt_convert.checkpoint.training_runs import find_run_weights
from ckpt_convert.checkpoint.verbatim import as_stored_tensors
from ckpt_convert.convert import ownership, planning
from ckpt_convert.convert.changes import TensorChange
from ckpt_convert.convert.plan import UNKNOWN, Plan
from ckpt_convert.convert.planning import PlanInputs
from ckpt_convert.convert.request import Globs, Request, requested
from ckpt_convert.convert.sources import OpenPlan, Sources
from ckpt_convert.dtypes import DequantizedDType, OutputDType
from ckpt_convert.errors import (
    CkptConvertError,
    ConfigError,
    InputError,
    KeyMismatchError,
    ShapeMismatchError,
    UsageError,
    VerificationError,
    option_error,
)
from ckpt_convert.formats.base import ContainerName, FormatName
from ckpt_convert.models.core.config import MetaStyle
from ckpt_convert.storage import workspace
from ckpt_convert.storage.place import Location, Place, StorageOptions, output_place, with_options
from ckpt_convert.storage.reader import DEFAULT_WORKERS, reading
from ckpt_convert.storage.workspace import Stage
from ckpt_convert.tensors.progress import ProgressCallback


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    ``files`` are the weight files; ``bytes`` those of their tensors; ``drops`` the tensors that the target has no place
    for (kept in the record); ``side_files`` name → copied, generated or restored; ``moves`` bytes copied,
    reordered and cast; ``verified`` the number of tensors compared, None without ``verify``; ``overflows`` the number
    of finite values that a cast has made infinite, by key; ``merged`` the number of weights that an adapter changed.
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
    merged: int
    seconds: float = field(compare=False)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class SourceOptions:
    """The source of a conversion, what its caller says of it, and the checkpoint to imitate."""

    path: Location
    format: str | None
    family: str | None
    config: Location | None
    revision: str | None
    like: Location | None
    cache: bool = False


@dataclass(frozen=True)
class RunOptions:
    """How a conversion is run; see ``convert_checkpoint``."""

    overwrite: bool = False
    resume: bool = False
    verify: bool = False
    workers: int | None = None
    progress: ProgressCallback | None = None


@reading()
def plan_conversion(
    src: Location,
    *,
    to: FormatName | None = None,
    include: Globs = (),
    exclude: Globs = (),
    from_format: FormatName | None = None,
    family: str | None = None,
    config: Location | None = None,
    revision: str | None = None,
    cache: bool = False,
    dtype: OutputDType | None = None,
    dequantize: DequantizedDType | None = None,
    shards: int | None = None,
    max_shard_size: int | None = None,
    model_parallel: int | None = None,
    container: ContainerName | None = None,
    like: Location | None = None,
    rope_factor: float | None = None,
    rope_theta: float | None = None,
    max_positions: int | None = None,
    meta_style: MetaStyle | None = None,
    drop_rope_scaling: bool = False,
    allow_overflow: bool = False,
    allow_loss: bool = False,
    storage_options: StorageOptions | None = None,
) -> Plan:
    """Plan a conversion from headers alone: no tensor is read, nothing is written.

        plan = plan_conversion("Llama-3.2-1B", to="meta", model_parallel=2)
        print(plan.names, plan.disk)

    The plan holds no open file and can be pickled.

    Args:
        src: a directory, a weight file, a URL, or a Hub id such as "meta-llama/Llama-3.2-1B".
        to: the target format: "hf", "meta", "native" or "torchtitan"; with ``container`` alone, every tensor is taken
            as it is stored, under its own key, whatever the model.
        include: globs of stored keys, or of modules: only these tensors, as they are stored.
        exclude: globs of those to leave out.
        from_format: the format of ``src``, where it cannot be detected.
        family: the name of the architecture, such as "llama", where it cannot be detected.
        config: the config.json or params.json of a ``src`` that has none.
        revision: branch, tag or commit, where ``src`` is a Hub id.
        cache: download a repository of the Hub into its cache first, instead of reading ranges.
        dtype: "float32", "float16" or "bfloat16": cast every floating-point tensor; by default none is cast.
        dequantize: "bfloat16" or "float32": write the values of fp8 and MXFP4 weights, not their codes and scales.
        shards: the number of files, about equal in bytes.
        max_shard_size: the most bytes of a file.
        model_parallel: the number of tensor-parallel ranks of a "meta" output, one file each.
        container: "safetensors", "bin", "pth", "pt" or "dcp", as far as the target has it; by default that of files
            that are kept, else safetensors, for "meta" pth (of Mistral safetensors), for "torchtitan" dcp.
        like: a checkpoint whose file names, key-to-file assignment, config and tokenizer the output takes.
        rope_factor: the factor of a Llama 3 RoPE scaling, which a params.json does not hold.
        rope_theta: the RoPE base, where a params.json does not hold it.
        max_positions: max_position_embeddings, which a params.json does not hold.
        meta_style: "llama2" or "llama3": whose params.json to write, and which axis of the embedding ranks split.
        drop_rope_scaling: leave out a RoPE scaling that the target's config cannot express, instead of refusing.
        allow_overflow: write finite values that ``dtype`` cannot hold as infinite, instead of refusing.
        allow_loss: leave values that the target has no place for in the record alone, even if the model's outputs
            change, instead of refusing.
        storage_options: options of the stores that URLs are in, such as {"endpoint": "https://…"}; see docs/storage.md.

    Raises:
        InputError: the source cannot be read, or does not fit its config; see ``ckpt_convert.errors``.
        UsageError: options that do not fit each other, the source or the target.
    """
    src, config, like = with_options(storage_options, src, config, like)
    origin = SourceOptions(src, from_format, family, config, revision, like, cache)
    request = requested(
        to=to,
        include=include,
        exclude=exclude,
        dtype=dtype,
        dequantize=dequantize,
        shards=shards,
        max_shard_size=max_shard_size,
        model_parallel=model_parallel,
        container=container,
        like=like,
        rope_factor=rope_factor,
        rope_theta=rope_theta,
        max_positions=max_positions,
        meta_style=meta_style,
        drop_rope_scaling=drop_rope_scaling,
        allow_overflow=allow_overflow,
        allow_loss=allow_loss,
    )
    return plan_request(origin, request)


@reading()
def plan_request(origin: SourceOptions, request: Request, change: TensorChange | None = None) -> Plan:
    """The plan of a request, with a change of the source's tensors; see ``plan_conversion``."""
    _, planned = _plan(origin, request, change)
    planned.close()
    return planned.plan


def _plan(
    origin: SourceOptions,
    request: Request,
    change: TensorChange | None,
    equal: Callable[[Identified, Equality], bool] | None = None,
) -> tuple[Identified, OpenPlan]:
    """The plan; ``equal`` compares two tensors of the source, where only their bytes say whether they are tied."""
    request.check()
    request.check_origin(family=origin.family, config=origin.config)
    if origin.like is not None:  # as it was given: an address is refused by its name, and ~ is the home directory
        request = replace(request, like=locate.locate_checkpoint(origin.like, format=request.to))
    place = locate.locate_checkpoint(origin.path, origin.revision, format=origin.format, cache=origin.cache)
    options, config = request.config, origin.config
    open_source = partial(open_identified, format=origin.format, family=origin.family, options=options)
    if (chosen := find_run_weights(place)) is not None:  # what training leaves is not what loaders read
        place, config = chosen.place, config or (chosen.config if origin.like is None else None)
        request = request.for_loaders()
    source = open_source(place, config=config)
    if request.like is not None and (theirs := _config_of(request.like, source)) is not None:
        source.close()
        source = open_source(place, config=theirs)
    try:
        if request.verbatim:
            request.check_within(source.format)
            source = as_stored_tensors(source, request.selection)
        wanted = dequantize_if_asked(source, request.dequantize)
        imitated = open_identified(request.like, format=request.to) if request.like is not None else None
        given = PlanInputs(wanted, request, imitated, None, change, chosen.notices if chosen is not None else ())
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
    if source.format is None or source.config_file.is_present() or source.from_shapes is not None:
        return None
    with open_identified(like) as opened:
        return opened.config_file if opened.config_file.is_present() else None


def convert_checkpoint(
    src: Location,
    dst: Location,
    *,
    to: FormatName | None = None,
    include: Globs = (),
    exclude: Globs = (),
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = False,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    from_format: FormatName | None = None,
    family: str | None = None,
    config: Location | None = None,
    revision: str | None = None,
    cache: bool = False,
    dtype: OutputDType | None = None,
    dequantize: DequantizedDType | None = None,
    shards: int | None = None,
    max_shard_size: int | None = None,
    model_parallel: int | None = None,
    container: ContainerName | None = None,
    like: Location | None = None,
    rope_factor: float | None = None,
    rope_theta: float | None = None,
    max_positions: int | None = None,
    meta_style: MetaStyle | None = None,
    drop_rope_scaling: bool = False,
    allow_overflow: bool = False,
    allow_loss: bool = False,
    storage_options: StorageOptions | None = None,
) -> Report:
    """Convert a checkpoint to another format, or re-shard it in its own; ``dst`` appears complete or not at all.

        report = convert_checkpoint("Llama-3.2-1B", "Llama-3.2-1B-meta", to="meta", model_parallel=2, verify=True)
        print(report.files, report.tensors, report.notices)

    Tensors are streamed: memory does not grow with the model.

    Args:
        src: a directory, a weight file, a URL, or a Hub id such as "meta-llama/Llama-3.2-1B".
        dst: the directory to write, whose parent is created, or the URL of one in an object store.
        to: the target format: "hf", "meta", "native" or "torchtitan"; with ``container`` alone, every tensor is taken
            as it is stored, under its own key, whatever the model.
        include: globs of stored keys, or of modules: only these tensors, as they are stored.
        exclude: globs of those to leave out.
        overwrite: replace a checkpoint at ``dst``, once the new one is complete; in a bucket, before it is written.
        resume: continue an interrupted conversion with the same source and options.
        verify: read the output again and compare every tensor with the source, bit for bit, before ``dst`` appears.
        workers: the number of threads; by default one for each core, from 2 to 4.
        progress: called with ``TransferProgress`` values, from several threads, one at a time.
        from_format: the format of ``src``, where it cannot be detected.
        family: the name of the architecture, such as "llama", where it cannot be detected.
        config: the config.json or params.json of a ``src`` that has none.
        revision: branch, tag or commit, where ``src`` is a Hub id.
        cache: download a repository of the Hub into its cache first, instead of reading ranges.
        dtype: "float32", "float16" or "bfloat16": cast every floating-point tensor; by default none is cast.
        dequantize: "bfloat16" or "float32": write the values of fp8 and MXFP4 weights, not their codes and scales.
        shards: the number of files, about equal in bytes.
        max_shard_size: the most bytes of a file.
        model_parallel: the number of tensor-parallel ranks of a "meta" output, one file each.
        container: "safetensors", "bin", "pth", "pt" or "dcp", as far as the target has it; by default that of files
            that are kept, else safetensors, for "meta" pth (of Mistral safetensors), for "torchtitan" dcp.
        like: a checkpoint whose file names, key-to-file assignment, config and tokenizer the output takes.
        rope_factor: the factor of a Llama 3 RoPE scaling, which a params.json does not hold.
        rope_theta: the RoPE base, where a params.json does not hold it.
        max_positions: max_position_embeddings, which a params.json does not hold.
        meta_style: "llama2" or "llama3": whose params.json to write, and which axis of the embedding ranks split.
        drop_rope_scaling: leave out a RoPE scaling that the target's config cannot express, instead of refusing.
        allow_overflow: write finite values that ``dtype`` cannot hold as infinite, instead of refusing.
        allow_loss: leave values that the target has no place for in the record alone, even if the model's outputs
            change, instead of refusing.
        storage_options: options of the stores that URLs are in, such as {"endpoint": "https://…"}; see docs/storage.md.

    Raises:
        InputError: the source cannot be read, or does not fit its config; its subclasses say what is wrong.
        UsageError: options that do not fit each other, the source or the target.
        OutputExistsError: something is at ``dst`` that ``overwrite`` does not allow to replace.
        LossyConversionError: the output would lose values; see ``allow_overflow`` and ``allow_loss``.
        NotEnoughSpaceError, UnwritableError, LockedError: ``dst`` cannot be written.
        VerificationError: the output is not what was written.

    After an error ``dst`` is unchanged (in a bucket, what ``overwrite`` replaces may be gone), and ``resume`` continues
    where that is possible.
    """
    src, dst, config, like = with_options(storage_options, src, dst, config, like)
    origin = SourceOptions(src, from_format, family, config, revision, like, cache)
    request = requested(
        to=to,
        include=include,
        exclude=exclude,
        dtype=dtype,
        dequantize=dequantize,
        shards=shards,
        max_shard_size=max_shard_size,
        model_parallel=model_parallel,
        container=container,
        like=like,
        rope_factor=rope_factor,
        rope_theta=rope_theta,
        max_positions=max_positions,
        meta_style=meta_style,
        drop_rope_scaling=drop_rope_scaling,
        allow_overflow=allow_overflow,
        allow_loss=allow_loss,
    )
    return run_request(origin, dst, request, RunOptions(overwrite, resume, verify, workers, progress))


def run_request(
    origin: SourceOptions, dst: Location, request: Request, run: RunOptions, change: TensorChange | None = None
) -> Report:
    """Carry out a request, with a change of the source's tensors; see ``convert_checkpoint``."""
    from ckpt_convert.convert import execute, output  # not before: they need NumPy, and a plan does not

    started = time.monotonic()
    if run.workers is not None and run.workers < 1:
        raise option_error("workers", run.workers, "expected 1 or more")
    for name, given in (("SRC", origin.path), ("DST", dst)):
        if not str(given):
            raise UsageError(f"{name} is empty; give a path")
    destination = output_place(dst, "DST")
    place = workspace.workspace_of(destination)
    count = run.workers or DEFAULT_WORKERS

    def check(source: Identified) -> None:
        with reading(source.place):
            place.check_destination(destination, source.place, ownership.RULES, overwrite=run.overwrite)

    def equal(source: Identified, pair: Equality) -> bool:
        check(source)  # before any tensor is read
        return execute.byte_comparer(source.stored)(pair)

    with reading():
        source, planned = _plan(origin, request, change, equal)
    made, sources = planned.plan, planned.sources
    try:
        check(source)
        made.refuse_unreadable()
        execute.run_checks(made, sources, run.progress)
        lost = execute.check_losses(made, sources)
        mode = output.output_permissions(source)
        with place.stage(
            destination, ownership.RULES, overwrite=run.overwrite, resume=run.resume, mode=mode
        ) as staging:
            try:
                place.check_space(destination, made.disk - staging.allocated())
                staging.expect(made.names)
                written = output.write_output(made, sources, staging, count, run.progress)
                computed = change.overflows() if change is not None else {}
                output.refuse_overflows(made, computed)
                staging.folder.write(record.MANIFEST, record.render_manifest(written.manifest))
                staging.complete()
                verified = _verify(made, sources, staging, count, run.progress) if run.verify else None
                replaced = made.check_sources()
                staging.commit()
            except CkptConvertError as error:
                if not staging.is_resumable_after(error):
                    staging.discard()
                raise
    except (InputError, VerificationError):
        made.check_sources()  # a file that was changed meanwhile is the reason why something does not fit
        raise
    finally:
        planned.close()
    overflows = {**written.overflows, **computed}
    return Report(
        source=str(origin.path),
        destination=str(dst),
        source_format=made.formats[0] or UNKNOWN,
        target_format=made.formats[1] or UNKNOWN,
        family=made.family,
        files=[file.name for file in made.weights],
        tensors=made.tensors,
        bytes=sum(tensor.nbytes for file in made.weights for tensor in file.tensors),
        drops=list(made.passthrough),
        ties=list(made.ties),
        notices=[*made.notices, *written.notices, *replaced, *output.accepted_losses(made, lost, overflows)],
        side_files={str(entry["name"]): str(entry["origin"]) for entry in written.manifest["side_files"]},
        moves=dict(made.bytes_by_kind),
        resumed_bytes=written.resumed,
        verified=verified,
        overflows=overflows,
        merged=len(made.changed),
        seconds=round(time.monotonic() - started, 3),
    )


def _verify(plan: Plan, sources: Sources, staging: Stage, workers: int, progress: ProgressCallback | None) -> int:
    from ckpt_convert.convert import readback

    family = None if plan.source.literal else plan.family
    try:
        with open_unfinished(staging.place.listed(), format=plan.target, family=family) as written:
            return readback.verify_output(plan, sources, written, workers=workers, progress=progress)
    except InputError as error:
        raise VerificationError(f"{staging.destination}: the output cannot be read again: {error}") from error
