"""Planning a conversion in stages: identify, translate, assign to files, choose auxiliary files.

The result is a ``Plan``. Each stage is a function of values, and nothing is written or changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from ckpt_convert import dtypes
from ckpt_convert.checkpoint import record
from ckpt_convert.checkpoint.checklist import CHECKLIST
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.mapping import Equality, LogicalTensors
from ckpt_convert.checkpoint.model import Model, naming
from ckpt_convert.checkpoint.quantized import as_stored, view
from ckpt_convert.checkpoint.record import Layout
from ckpt_convert.checkpoint.tensor_info import SourceTensor
from ckpt_convert.containers.dcp import DCP_INDEX
from ckpt_convert.convert import (
    auxiliary_files,
    config_files,
    embedding,
    layout,
    passthrough,
    shards,
    ties,
    translate,
)
from ckpt_convert.convert.auxiliary_files import AuxiliaryFile
from ckpt_convert.convert.changes import ChangedTensors, TensorChange
from ckpt_convert.convert.embedding import EmbeddingSplit
from ckpt_convert.convert.layout import OutputFile, SourceOrder
from ckpt_convert.convert.plan import COMPUTED, Checklist, Plan, SourceFile, SourceInfo, memory_source, target_dtype
from ckpt_convert.convert.request import Request
from ckpt_convert.convert.sources import OpenPlan
from ckpt_convert.convert.ties import EqualBytes, Ties
from ckpt_convert.convert.translate import SourceReading, Translation
from ckpt_convert.convert.writing import TargetTensor
from ckpt_convert.errors import CorruptFileError, UsageError
from ckpt_convert.formats.names import RECORD_FOLDER
from ckpt_convert.models.core.table import Instance
from ckpt_convert.storage.base import Entry
from ckpt_convert.storage.names import JOURNAL
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.reader import reading
from ckpt_convert.tensors.header import IN_MEMORY, StoredTensor, WeightFile
from ckpt_convert.wording import option_text as said


@dataclass(frozen=True)
class InMemorySource:
    """Tensors in memory, of a model in training, to write in place of the source's tensors.

    ``format`` is that of their keys, ``tensors`` are by key, and their lazy tensors refer to ``stored`` by position.
    ``elsewhere`` maps the position of a slice that other processes hold to that of this process's slice of the tensor.
    """

    format: str
    tensors: Mapping[str, SourceTensor]
    stored: tuple[tuple[WeightFile, StoredTensor], ...]
    elsewhere: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanInputs:
    """What to convert, and how: ``like`` is the checkpoint whose layout the output takes.

    With ``in_memory``, tensors in memory are written in place of the source's: into the same files, each in the dtype
    that the source has. A source without weight files is only a config; the output then has a new layout. ``change``
    replaces tensors of the source. ``notices`` are about the choice of the source.
    """

    source: Identified
    request: Request
    like: Identified | None = None
    in_memory: InMemorySource | None = None
    change: TensorChange | None = None
    notices: tuple[str, ...] = ()

    @property
    def read_format(self) -> str:
        """The format that the weights are read in."""
        return self.in_memory.format if self.in_memory is not None else str(self.source.format)

    @property
    def as_stored(self) -> bool:
        """Whether the output has the source's format and its stored keys."""
        return self.in_memory is None and self.source.format == self.request.to and self.like is None


@dataclass(frozen=True)
class Translated:
    """The tensors of the output, the layout that they should have, and the number of tensor-parallel ranks.

    ``template`` are the source's tensors, of which a model in memory or ``changed`` ones take the place; lazy tensors
    index into ``stored``.
    """

    translation: Translation
    template: LogicalTensors
    stored: tuple[tuple[WeightFile, StoredTensor], ...]
    targets: list[TargetTensor]
    passthrough: list[Instance]
    target_layout: Layout | None
    ranks: int
    embedding_split: EmbeddingSplit | None
    changed: ChangedTensors | None = None

    @property
    def model(self) -> Model:
        return self.translation.reading.model

    def without_targets(self) -> Translated:
        """The same, once the output's files hold the targets: of 100,000 tensors they are 9 MB."""
        return replace(self, targets=[], translation=replace(self.translation, targets=[]))


@dataclass(frozen=True)
class Assigned:
    """The output's files; ``exact`` is whether their headers equal those of the target layout byte for byte."""

    files: list[OutputFile]
    passthrough: list[OutputFile]
    exact: bool
    checks: list[Equality]
    notices: list[str]
    shared: Mapping[str, str]


@dataclass(frozen=True)
class AuxiliaryFiles:
    """The files beside the weights, and those of the record."""

    files: list[AuxiliaryFile]
    notices: tuple[str, ...]


@reading()
def make_plan(inputs: PlanInputs, equal: EqualBytes | None = None) -> OpenPlan:
    """Plan a conversion; ``equal`` compares two tensors of the source where their bytes decide whether they are tied.

    Raises the error that says everything wrong with the input, or with the request, at once.
    """
    model, differing = identify_model(inputs)
    found = translate_tensors(inputs, model, equal)
    assigned = assign_files(inputs, found)
    found = found.without_targets()
    put = plan_auxiliary(inputs, found, assigned)
    _check_names(inputs.source, assigned.files, put.files)
    source, request, model = inputs.source, inputs.request, found.model
    numbers = {file: number for number, file in enumerate(dict.fromkeys(file for file, _ in found.stored))}
    sources = [_source(file, inputs) for file in numbers]
    plan = Plan(
        source=_origin(source, model),
        request=request,
        files=(*assigned.files, *assigned.passthrough),
        auxiliary_files=tuple(put.files),
        sources=tuple(sources),
        stored=tuple([tensor for _, tensor in found.stored]),
        stored_in=tuple([numbers[file] for file, _ in found.stored]),
        logicals=found.translation.logicals,
        checks=tuple(assigned.checks),
        losses=tuple(found.translation.losses),
        undecided_tie=found.translation.reading.ties.undecided,
        passthrough=tuple(sorted({found.translation.logicals.tensors[instance].key for instance in found.passthrough})),
        ties=tuple(found.translation.ties),
        notices=(
            *inputs.notices,
            *source.notices,
            *auxiliary_files.auxiliary_notices(source),
            *model.notices,
            *(model.family.caveats(request.to) if request.to != source.format else ()),
            *put.notices,
            *(found.changed.notices if found.changed is not None else ()),
            *assigned.notices,
            *differing,
            *shards.rank_notice(request, model, found.ranks, found.target_layout),
        ),
        dims=found.translation.dims,
        embedding_split=found.embedding_split,
        checklist=Checklist(
            source.root,
            auxiliary_files.source_checklist(source) if inputs.in_memory is None else {},
            auxiliary_files.checklist_template(source, request.to),
        ),
        computed=_computed(found.stored) if source.dequantized is not None or found.changed else frozenset(),
        changed=found.changed.steps if found.changed is not None else {},
        shared=assigned.shared,
        from_memory=inputs.in_memory is not None,
        elsewhere=frozenset(inputs.in_memory.elsewhere if inputs.in_memory is not None else ()),
        identities=_identities(inputs, found, put.files),
    )
    return OpenPlan(plan, {one: file.reader for one, file in zip(sources, numbers, strict=True)})


def identify_model(inputs: PlanInputs) -> tuple[Model, list[str]]:
    """The model of the weights, and notices about ``like``; refuses sources that cannot become the target."""
    source, request = inputs.source, inputs.request
    source.refuse_foreign()
    model = source.model_for(inputs.read_format, request.to)
    request.check_source(str(source.format), model.family)
    if request.dtype is not None:
        as_stored.refuse_cast(source.quantization, source.unknown_scheme, source.place, request.dtype)
    with naming(str(source.config_file)):
        translate.check_formats(model, str(source.place), str(source.format), inputs.read_format, request.to)
    differing = config_files.check_like(source, model, inputs.like) if inputs.like is not None else []
    auxiliary_files.source_checklist(source)  # an invalid checklist is an error now, not after everything was written
    return model, differing


def translate_tensors(inputs: PlanInputs, model: Model, equal: EqualBytes | None) -> Translated:
    """Every tensor of the output, including those that come from the record or ``like``."""
    source, request, like, live = inputs.source, inputs.request, inputs.like, inputs.in_memory
    read, template = _read(inputs, model, equal)
    everything = list(source.stored if live is None else live.stored)
    changed = inputs.change.plan(source, read) if inputs.change is not None else None
    if changed is not None:
        read, everything = changed.applied(read), list(changed.stored)
    model, logicals = read.model, read.logicals
    if live is not None:
        passthrough.add_derived(source, template, logicals, everything)
    literal = inputs.as_stored and source.is_bare
    wanted = shards.recorded_layout(source, request, like, model, literal=literal)
    ranks = shards.count_ranks(source, request, like, wanted, model)
    cut = embedding.embedding_split(source, request, like, model)
    passthrough.restore_passthrough(source, request, like, model, logicals, everything)
    places = {key for _, key in wanted.ranked_keys} if wanted is not None else set()
    earlier = passthrough.restore_originals(
        source, request, like, model, template if live is not None else None, logicals, everything
    )
    made = translate.write_target(
        read,
        request.to,
        str(source.place),
        dims=model.dims if cut is None else model.dims.with_embedding_axis(cut.axis),
        ranks=ranks,
        keep_tied=None if inputs.as_stored else ties.kept_tied_keys(model.family, request.to, places),
        wants_key=lambda key: wanted is None or key in places,
        originals=earlier,
    )
    targets, carried = made.targets, made.unmapped
    if literal:
        targets = [replace(target, key=source.names.stored.get(target.key, target.key)) for target in targets]
    if live is not None:  # the training state has them
        carried = [instance for instance in carried if instance.row.lossy_column is None and instance.row.zeros is None]
    return Translated(made, template, tuple(everything), targets, carried, wanted, ranks, cut, changed)


def assign_files(inputs: PlanInputs, translated: Translated) -> Assigned:
    """Assign each tensor of the output to a file, an offset and a dtype."""
    source, request, live, logicals = inputs.source, inputs.request, inputs.in_memory, translated.translation.logicals
    dtype_of = _dtypes(translated.targets, request, translated.template if live is not None else LogicalTensors({}))
    _refuse_partial_cast(source, translated.targets, dtype_of, request, "dtype" if live is None else "export_dtype")
    shared = layout.shared_tensors(translated.targets, translated.stored, dtype_of) if request.verbatim else {}
    files, exact, notices = shards.assign_shards(
        source,
        request,
        translated.targets,
        dtype_of,
        translated.target_layout,
        translated.ranks,
        translated.model,
        lambda: _source_order(source, translated.template, logicals, live),
        shared,
    )
    aliases = layout.alias_checks(files, translated.targets)
    family, dims = translated.model.family, translated.model.dims
    carried = shards.passthrough_files(family, str(source.format), translated.passthrough, logicals, dims)
    return Assigned(files, carried, exact, [*translated.translation.checks, *aliases], notices, shared)


def plan_auxiliary(inputs: PlanInputs, translated: Translated, assigned: Assigned) -> AuxiliaryFiles:
    """Config, index, tokenizer and all other files of the output, and the files of the record."""
    source, request, like, model = inputs.source, inputs.request, inputs.like, translated.model
    written = _written_dtype(assigned.files)
    made = config_files.choose_configs(
        source,
        model,
        request,
        like,
        written,
        translated.ranks,
        translated.embedding_split and translated.embedding_split.axis,
    )
    index = shards.index_files(request, assigned.files, translated.target_layout, assigned.exact, model)
    generated = {side.name: side for side in (*made.files, *index)}
    generated |= config_files.translated_tokenizer(source, request, model, like)
    files = auxiliary_files.choose_auxiliary(source, request.to, like=like, generated=generated)
    if source.dequantized is not None:
        files = [one for one in files if PurePosixPath(one.name).name not in view.SETTINGS]
    own = None if source.format == request.to or not source.files else source.layout()
    files += auxiliary_files.layout_record_files(source, request.to, own)
    absent = config_files.tokenizer_notice(source, request, model, (one.name for one in files))
    return AuxiliaryFiles(files, (*made.notices, *absent))


def _origin(source: Identified, model: Model) -> SourceInfo:
    return SourceInfo(
        place=source.place,
        format=source.format,
        why=source.why,
        family=model.family.name,
        evidence=model.evidence,
        release=model.release,
        literal=bool(model.family.literal),
        ranks=len(source.ranks),
        dims=model.dims,
        hints=source.hints,
        dequantized=source.dequantized.dtype if source.dequantized is not None else None,
        detected=source.verbatim.format if source.verbatim is not None else None,
    )


def _source(file: WeightFile, inputs: PlanInputs) -> SourceFile:
    if file.header.kind == IN_MEMORY:
        return memory_source(file.header.tensors[0].key)
    seen = inputs.source.identities.get(file.place) or (
        inputs.like.identities.get(file.place) if inputs.like is not None else None
    )
    kind = COMPUTED if view.is_view(file) else file.header.kind
    return SourceFile(file.name, kind, file.place, seen or file.place.identity())


def _computed(stored: Sequence[tuple[WeightFile, StoredTensor]]) -> frozenset[int]:
    return frozenset(number for number, (file, tensor) in enumerate(stored) if view.is_computed(file, tensor))


def _identities(inputs: PlanInputs, translated: Translated, side: Sequence[AuxiliaryFile]) -> dict[Place, Entry]:
    """The files that an output is made from, with size and etag from before they were read.

    Of a model in memory's source, those that every save reads again; the rest was read once and for all.
    """
    source, like = inputs.source, inputs.like
    seen = {**(like.identities if like is not None else {}), **source.identities}
    out = {one.place: one.identity for one in side if one.place and one.identity}
    out |= translated.changed.identities if translated.changed is not None else {}
    seen |= out
    paths = {file.place for file, _ in translated.stored if file.header.kind != IN_MEMORY}
    for checkpoint in (source, like) if inputs.in_memory is None else ():
        if checkpoint is not None:
            own = (checkpoint.config_file, *_metadata(checkpoint), *_of_record(checkpoint))
            paths |= {path for path in own if path in checkpoint.identities or path == checkpoint.hints.config}
    return out | {path: seen.get(path) or path.identity() for path in sorted(paths)}


def _metadata(checkpoint: Identified) -> list[Place]:
    """The index, torch.distributed.checkpoint's metadata and the checklist, where they exist."""
    return [checkpoint.root / name for name in (checkpoint.directory.index or DCP_INDEX, CHECKLIST)]


def _of_record(checkpoint: Identified) -> list[Place]:
    """The files of the record, without a saved step's manifest, which a run updates with metrics at any time."""
    if checkpoint.record is None:
        return []
    folder, manifest = checkpoint.record.folder, checkpoint.root / record.MANIFEST
    files = [path for path in checkpoint.identities if path.is_inside(folder)]
    return [path for path in files if path != manifest or "training" not in checkpoint.record.manifest]


def _read(inputs: PlanInputs, model: Model, equal: EqualBytes | None) -> tuple[SourceReading, LogicalTensors]:
    """The tensors to write, and those of the source: the same ones, unless a model in memory is written."""
    source, live = inputs.source, inputs.in_memory
    known = model if live is None else ties.tied_in_memory(model, live.format, live.tensors.keys())
    template = SourceReading(str(source.format), LogicalTensors({}), Ties(ties.presumed_untied(known), is_stated=True))
    if source.files:
        template = translate.read_source(known, template.format, source.ranks, str(source.place), equal)
    if live is None:
        return template, template.logicals
    reading = translate.read_model(known, live.format, live.tensors)
    told = replace(reading.ties, is_stated=model.tied is not None)
    return replace(reading, ties=told), template.logicals


def _source_order(
    source: Identified, template: LogicalTensors, logicals: LogicalTensors, live: InMemorySource | None
) -> SourceOrder:
    """For each stored tensor, by number, the number of the source's file that has it or its counterpart."""
    numbers = {file: number for number, file in enumerate(source.files)}
    of_source = {at: numbers[file] for at, (file, _) in enumerate(source.stored)}
    counterparts = {
        min(logical.tensor.sources): min(origin.tensor.sources)
        for instance, logical in logicals.tensors.items()
        if (origin := template.tensors.get(instance)) is not None and origin is not logical
    }
    if live is None:
        return SourceOrder(of_source, counterparts)
    out = {number: of_source[origin] for number, origin in counterparts.items()}
    for other, own in live.elsewhere.items():
        out |= {number: out[one] for number, one in ((own, other), (other, own)) if one in out}
    return SourceOrder(out, {})


def _written_dtype(files: Sequence[OutputFile]) -> str | None:
    """Torch's name of the floating-point dtype of most bytes in the output."""
    return dtypes.majority_float_dtype((tensor.dtype, tensor.nbytes) for file in files for tensor in file.tensors)


def _refuse_partial_cast(
    source: Identified, targets: Sequence[TargetTensor], dtype_of: Mapping[str, str], request: Request, option: str
) -> None:
    """Raise UsageError for a cast that would not apply to most weights, or to weights packed below a byte.

    Integer tensors beside the weights (positions, counts) are not cast.
    """
    if request.dtype is None:
        return
    left = [t for t in targets if dtype_of[t.key] != dtypes.CASTS[request.dtype] and not t.instance.row.derived]
    sizes = [dtypes.nbytes(dtype_of[target.key], target.tensor.shape) for target in (*left, *targets)]
    packed = [target for target in left if dtypes.DTYPES[target.dtype].bits < 8]
    if not packed and 2 * sum(sizes[: len(left)]) <= sum(sizes[len(left) :]):
        return
    kinds = ", ".join(dict.fromkeys(target.dtype for target in left))
    raise UsageError(
        f"{said(option, request.dtype)}: {len(left)} of {len(targets)} tensors of {source.place} are {kinds}, which "
        f"cannot be cast ({(packed or left)[0].key}); leave `{option}=` out, or decode them with the tool that made "
        "them"
    )


def _check_names(source: Identified, files: list[OutputFile], side: list[AuxiliaryFile]) -> None:
    """Refuse an output in which two files would have the same name, or one a reserved name."""
    taken = {record.MANIFEST, JOURNAL}
    for name in (*(file.name for file in files), *(one.name for one in side)):
        if name in taken:
            raise CorruptFileError(
                f"{source.place}: two files of the output would be called {name}; the record is damaged, "
                f"move the folder {source.root / RECORD_FOLDER} elsewhere to do without it"
            )
        taken.add(name)
    hidden = [file.name for file in files if file.name.startswith(f"{RECORD_FOLDER}/")]
    if hidden:
        raise CorruptFileError(f"{source.place}: weights would be called {hidden[0]}, which is in the record's folder")


def _dtypes(targets: Sequence[TargetTensor], request: Request, template: LogicalTensors) -> dict[str, str]:
    """The dtype of every target: as requested, else that of the template, else its own.

    The dtype of quantized tensors of a template does not count.
    """
    out = {}
    for target in targets:
        like = template.tensors.get(target.instance)
        dtype = target_dtype(target.dtype, target.instance, request)
        if request.dtype is None and like is not None and dtype in dtypes.CAST_FROM:
            dtype = like.dtype if like.dtype in dtypes.CASTABLE else dtype
        out[target.key] = dtype
    return out
