"""The plan of a conversion: everything that will be written, decided and checked from headers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from ckpt_convert import dtypes, formats
from ckpt_convert._version import __version__
from ckpt_convert.checkpoint import record
from ckpt_convert.checkpoint.checklist import CHECKLIST
from ckpt_convert.checkpoint.checkpoint import open_checkpoint
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.mapping import Equality, Logical, Logicals, Source
from ckpt_convert.checkpoint.model import Model, naming
from ckpt_convert.checkpoint.opening import close
from ckpt_convert.checkpoint.quantized import carry, view
from ckpt_convert.containers.dcp import DCP_INDEX
from ckpt_convert.convert import brought, configs, embedding, layout, placement, sidefiles, ties, translate
from ckpt_convert.convert.embedding import Cut
from ckpt_convert.convert.layout import OutputFile
from ckpt_convert.convert.request import Request
from ckpt_convert.convert.sidefiles import SideFile
from ckpt_convert.convert.ties import Equal, Ties
from ckpt_convert.convert.translate import Reading
from ckpt_convert.convert.writing import Target
from ckpt_convert.errors import ConfigError, CorruptFileError, ShapeMismatchError, UsageError
from ckpt_convert.formats.names import RECORD_FOLDER
from ckpt_convert.models.core.rope import read_rope
from ckpt_convert.models.core.table import Dims, Instance
from ckpt_convert.storage.base import Entry
from ckpt_convert.storage.checksums import digest
from ckpt_convert.storage.names import JOURNAL
from ckpt_convert.storage.place import Place, compare
from ckpt_convert.storage.reader import reading
from ckpt_convert.tensors.blocks import BLOCK
from ckpt_convert.tensors.gather import SCRATCH
from ckpt_convert.tensors.header import IN_MEMORY, StoredTensor, WeightFile
from ckpt_convert.tensors.lazy import LazyTensor
from ckpt_convert.words import some

_BASE_MEMORY = 40_000_000
"""Bytes of the interpreter with the modules that a conversion and its progress bar need, as measured."""

_TORCH_MEMORY = 220_000_000
"""Bytes that importing torch adds, which only casts and old torch files need."""

_COMPUTING = 8_000_000
"""Bytes of the buffers in which one worker dequantises."""


@dataclass(frozen=True)
class Live:
    """Tensors in memory, of a model that is being trained: they go out as the source lies, in its place.

    ``format`` is that of their keys, ``tensors`` are by key, and ``stored`` is what their lazy tensors are numbered by.
    """

    format: str
    tensors: Mapping[str, Source]
    stored: tuple[tuple[WeightFile, StoredTensor], ...]


@dataclass(frozen=True)
class Plan:
    """A conversion that can be carried out.

    ``stored`` numbers the sources of all lazy tensors; ``checks`` are pairs that have to be equal before anything is
    written; ``losses`` are tensors that the target has no place for, with the zeros that it computes with instead;
    ``undecided`` is the pair that decides whether weights are tied, where no file says it.
    ``cut`` is how ranks cut the embedding and why, where there is a choice.
    ``carried`` names the tensors that the target has no place for and that go into the record. ``said`` takes the
    notices of what is only translated while the output is written (tokenizers). ``live`` are the tensors in memory
    that are written instead of the source's, if so. ``sources`` are the files that are read, as they were before that.
    """

    source: Identified
    model: Model
    request: Request
    files: tuple[OutputFile, ...]
    side: tuple[SideFile, ...]
    stored: tuple[tuple[WeightFile, StoredTensor], ...]
    logicals: Logicals
    checks: tuple[Equality, ...]
    losses: tuple[Equality, ...]
    undecided: Equality | None
    carried: tuple[str, ...]
    ties: tuple[str, ...]
    notices: tuple[str, ...]
    dims: Dims
    cut: Cut | None
    said: list[str]
    live: Live | None = None
    sources: Mapping[Place, Entry] = field(default_factory=dict, repr=False)

    @property
    def target(self) -> str:
        return self.request.to

    @property
    def weights(self) -> tuple[OutputFile, ...]:
        """The output's weight files, without what goes into the record."""
        return tuple(file for file in self.files if not file.name.startswith(f"{RECORD_FOLDER}/"))

    @property
    def tensors(self) -> int:
        """How many keys the output has (one that is cut over ranks counts once)."""
        return len({tensor.key for file in self.weights for tensor in file.layout.header.tensors})

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for file in self.files for tensor in file.tensors)

    @property
    def names(self) -> list[str]:
        """The files that will be written, as far as that is known before."""
        beside = [side.name for side in self.side]
        return [*(file.name for file in self.files), *beside, CHECKLIST, record.MANIFEST]

    @property
    def disk(self) -> int:
        """Bytes of everything that will be written."""
        return sum(file.size for file in self.files) + sum(side.size for side in self.side)

    @property
    def in_memory(self) -> int:
        """Bytes of the source that had to be read whole: old torch files without zip."""
        return sum(tensor.nbytes for file, tensor in self.stored if file.header.kind == "legacy")

    @property
    def needs_torch(self) -> str | None:
        """What of it is done with torch, None for nothing."""
        casts = any(t.dtype != t.source_dtype for file in self.files for t in file.tensors)
        return "casting" if casts else None

    def memory(self, workers: int) -> int:
        """About how many bytes of memory the conversion takes at most."""
        torch = _TORCH_MEMORY if self.request.dtype or self.in_memory else 0
        computing = _COMPUTING if self.source.dequantized is not None else 0
        return _BASE_MEMORY + workers * (BLOCK + SCRATCH + computing) + torch + self.in_memory

    def is_computed(self, tensor: LazyTensor) -> bool:
        """Whether numbers are dequantised for this tensor."""
        is_view = self.source.dequantized is not None
        return is_view and any(view.is_computed(*self.stored[number]) for number in tensor.sources)

    @property
    def moves(self) -> Mapping[str, int]:
        """How many bytes are copied as they lie, put in another order, and cast (or dequantised)."""
        out = {"copied": 0, "reordered": 0, "cast": 0}
        for file in self.files:
            for tensor in file.tensors:
                kind = "copied" if tensor.tensor.whole is not None or not tensor.nbytes else "reordered"
                is_cast = tensor.dtype != tensor.source_dtype or self.is_computed(tensor.tensor)
                out["cast" if is_cast else kind] += tensor.nbytes
        return out

    def check_sources(self) -> None:
        """Hold every file that was read against what it was before: nothing may have been changed meanwhile.

        Raises SourceChangedError; that a file was replaced by its like is only said.
        """
        self.said.extend(compare(self.sources))

    def close(self) -> None:
        """Close every file that the plan reads from."""
        close(dict.fromkeys(file for file, _ in self.stored))

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def manifest(
        self, pieces: Mapping[str, Any], side: list[dict[str, str]], kept: Mapping[str, str]
    ) -> dict[str, Any]:
        """What ``ckpt_convert/manifest.json`` says: no times and no absolute paths, so it is the same every time."""
        return {
            "schema": record.SCHEMA,
            "format": self.target,
            "family": self.model.family.name,
            "source": {"format": self.source.format},
            "dims": dict(sorted(self.dims.items())),
            "tied": bool(self.dims["tied"]),
            "model_parallel": max(file.rank for file in self.weights) + 1,
            "checksum": record.ALGORITHMS,
            "files": dict(sorted(pieces.items())),
            "side_files": sorted(side, key=lambda entry: entry["name"]),
            "record": dict(sorted(kept.items())),
        }


@reading()
def make(source: Identified, request: Request, *, equal: Equal | None = None, live: Live | None = None) -> Plan:
    """Plan a conversion; ``equal`` compares two tensors of the source where their bytes decide whether they are tied.

    With ``live``, the tensors in memory are written as a conversion would write the source's: in its files, each in the
    dtype that it has there. A source without files is only a config; the files are then laid out afresh.

    Raises the error that says everything wrong with the input, or with the request, at once.
    """
    source.refuse_foreign()
    source_format = str(source.format)
    read_format = live.format if live is not None else source_format
    model = source.model_for(read_format, request.to)
    family = model.family
    request.check_source(source_format, family)
    if request.dtype is not None:
        carry.refuse_cast(source.quantization, source.unknown_scheme, source.path, request.dtype)
    with naming(str(source.config_file)):
        translate.check(model, str(source.path), source_format, read_format, request.to)
    like = open_checkpoint(request.like, format=request.to) if request.like is not None else None
    differing = _check_like(source, model, like) if like is not None else []
    sidefiles.checklist_of(source)  # a checklist that is none is an error now, not after everything was written
    reading, template = _read(source, model, live, equal)
    model, logicals = reading.model, reading.logicals
    everything = list(source.stored if live is None else live.stored)
    if live is not None:
        brought.take_derived(source, template, logicals, everything)
    as_stored = live is None and source_format == request.to and request.like is None
    literal = as_stored and source.is_bare
    wanted = placement.recorded(source, request, like, model, literal=literal)
    ranks = placement.ranks(source, request, like, wanted, model)
    dims = model.dims
    cut = embedding.cut_of(source, request, like, model)
    if cut is not None:
        dims = dims.with_cut(cut.axis)
    brought.bring_back(source, request, like, model, logicals, everything)
    places = {key for _, key in wanted.places} if wanted is not None else set()
    earlier = brought.as_it_was(
        source, request, like, model, template if live is not None else None, logicals, everything
    )
    translated = translate.write(
        reading,
        request.to,
        str(source.path),
        dims=dims,
        ranks=ranks,
        keep_tied=None if as_stored else ties.kept(family, request.to, places),
        wanted=lambda key: wanted is None or key in places,
        earlier=earlier,
    )
    targets, carried = translated.targets, translated.left_out
    if literal:
        targets = [replace(target, key=source.names.stored.get(target.key, target.key)) for target in targets]
    if live is not None:  # the training state has them
        carried = [instance for instance in carried if instance.row.lossy is None and instance.row.zeros is None]
    dtype_of = _dtypes(targets, request, template if live is not None else Logicals({}))
    _refuse_partial_cast(source, targets, dtype_of, request, "--dtype" if live is None else "export_dtype")
    files, exact, layout_notices = placement.files(
        source, request, targets, dtype_of, wanted, ranks, model, _file_of(source, template, logicals, live)
    )
    by_rank = [{t.key: t for t in targets if t.rank == rank} for rank in range(ranks)]
    checks = translated.checks
    for file in files:
        checks += layout.aliases(file.layout.header, by_rank[file.rank], file.name)
    made = configs.generated(source, model, request, like, _written_dtype(files), ranks, cut and cut.axis)
    generated = {side.name: side for side in (*made.files, *placement.index(request, files, wanted, exact, model))}
    said: list[str] = []
    generated |= configs.tokenizer(source, request, model, like, said)
    side = sidefiles.plan(source, request.to, like=like, generated=generated)
    if source.dequantized is not None:
        side = [one for one in side if PurePosixPath(one.name).name not in view.SETTINGS]
    own = None if source_format == request.to or not source.files else source.layout()
    side += sidefiles.recorded_layouts(source, request.to, own)
    _check_names(source, files, side)
    return Plan(
        source=source,
        model=model,
        request=request,
        files=(*files, *placement.carried(family, source_format, carried, logicals, model.dims)),
        side=tuple(side),
        stored=tuple(everything),
        logicals=logicals,
        checks=tuple(checks),
        losses=tuple(translated.losses),
        undecided=reading.ties.undecided,
        carried=tuple(sorted({logicals.tensors[instance].key for instance in carried})),
        ties=tuple(translated.ties),
        notices=(
            *source.notices,
            *_edited(source),
            *_skipped(source),
            *model.notices,
            *(model.family.caveats(request.to) if request.to != source_format else ()),
            *made.notices,
            *configs.tokenizer_notice(source, request, model, (one.name for one in side)),
            *layout_notices,
            *differing,
            *placement.rank_notice(request, model, ranks, wanted),
        ),
        dims=dims,
        cut=cut,
        said=said,
        live=live,
        sources=_sources(source, like, everything, side, live),
    )


def _sources(
    source: Identified,
    like: Identified | None,
    stored: Sequence[tuple[WeightFile, StoredTensor]],
    side: Sequence[SideFile],
    live: Live | None,
) -> dict[Place, Entry]:
    """The files that an output is made from, as they were when they were first looked at.

    Of a model in memory's source, those that every save reads again; the rest was read once and for all.
    """
    seen = {**(like.seen if like is not None else {}), **source.seen}
    out = {side_file.path: side_file.identity for side_file in side if side_file.path and side_file.identity}
    paths = {file.path for file, _ in stored if file.header.kind != IN_MEMORY}
    for checkpoint in (source, like) if live is None else ():
        if checkpoint is not None:
            own = (checkpoint.config_file, *_metadata(checkpoint), *_of_record(checkpoint))
            paths |= {path for path in own if path in checkpoint.seen or path == checkpoint.hints.config}
    return out | {path: seen.get(path) or path.identity() for path in sorted(paths)}


def _metadata(checkpoint: Identified) -> list[Place]:
    """The index, torch.distributed.checkpoint's metadata, and the list of hashes, where there are any."""
    names = [checkpoint.directory.index, CHECKLIST] + [name for name in [DCP_INDEX] if not checkpoint.directory.index]
    return [checkpoint.root / name for name in names if name is not None]


def _of_record(checkpoint: Identified) -> list[Place]:
    """The files of the record. A saved step's manifest is none of them: a run may report metrics at any time."""
    if checkpoint.record is None:
        return []
    folder, manifest = checkpoint.record.folder, checkpoint.root / record.MANIFEST
    files = [path for path in checkpoint.seen if path.is_below(folder)]
    return [path for path in files if path != manifest or "training" not in checkpoint.record.manifest]


def _read(source: Identified, model: Model, live: Live | None, equal: Equal | None) -> tuple[Reading, Logicals]:
    """What is to be written, and what the source has of it: the same, but where a model in memory is written."""
    known = model if live is None else ties.of_memory(model, live.format, live.tensors.keys())
    template = Reading(str(source.format), Logicals({}), Ties(ties.presumed(known), told=True))
    if source.files:
        template = translate.read(known, template.format, source.ranks, str(source.path), equal)
    if live is None:
        return template, template.logicals
    reading = translate.read(known, live.format, [live.tensors], f"the model, as {live.format}")
    told = replace(reading.ties, told=model.tied is not None)
    return replace(reading, ties=told), template.logicals


def _file_of(source: Identified, template: Logicals, logicals: Logicals, live: Live | None) -> dict[int, int]:
    """For the number of each stored tensor, the number of the source's file that it, or its model, lies in."""
    numbers = {file: number for number, file in enumerate(source.files)}
    of_source = {at: numbers[file] for at, (file, _) in enumerate(source.stored)}
    if live is None:
        return of_source
    out = {}
    for instance, logical in logicals.tensors.items():
        origin = template.tensors.get(instance)
        if origin is not None:
            out[_first(logical)] = of_source[_first(origin)]
    return out


def _first(logical: Logical) -> int:
    return min(logical.tensor.sources)


def _written_dtype(files: Sequence[OutputFile]) -> str | None:
    """The floating-point dtype of most bytes that are written, in torch's words."""
    return dtypes.majority_of_floats((tensor.dtype, tensor.nbytes) for file in files for tensor in file.tensors)


def _refuse_partial_cast(
    source: Identified, targets: Sequence[Target], dtype_of: Mapping[str, str], request: Request, option: str
) -> None:
    """Raise UsageError for a cast that would leave most weights, or weights packed into less than a byte, as they are.

    Whole numbers beside the weights (positions, counts) stay what they are.
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
        f"{option} {request.dtype}: {len(left)} of {len(targets)} tensors of {source.path} are {kinds}, which cannot "
        f"be cast ({(packed or left)[0].key}); leave {option} out, or decode them with the tool that made them"
    )


def _check_names(source: Identified, files: list[OutputFile], side: list[SideFile]) -> None:
    """Refuse an output in which two files would have one name, or one would have a name of ours."""
    taken = {record.MANIFEST, JOURNAL}
    for name in (*(file.name for file in files), *(one.name for one in side)):
        if name in taken:
            raise CorruptFileError(
                f"{source.path}: two files of the output would be called {name}; the record is damaged, "
                f"move the folder {source.root / RECORD_FOLDER} elsewhere to do without it"
            )
        taken.add(name)
    hidden = [file.name for file in files if file.name.startswith(f"{RECORD_FOLDER}/")]
    if hidden:
        raise CorruptFileError(f"{source.path}: weights would be called {hidden[0]}, which is in the record's folder")


def _edited(source: Identified) -> list[str]:
    if source.record is None:
        return []
    names = source.record.edited(own_config=formats.ALL[source.record.format].config is None)
    return [f"edited or damaged since it was written, and taken as it is: {', '.join(names)}"] if names else []


def _skipped(source: Identified) -> list[str]:
    names = sidefiles.skipped(source)
    return [f"not taken along: {some(names, 8, ' …')}"] if names else []


def _dtypes(targets: Sequence[Target], request: Request, template: Logicals) -> dict[str, str]:
    """The dtype of every target: what was asked for, else as the template has it, else as it is.

    A template's tensors that are quantised say nothing of what a model in memory is to be written as.
    """
    out = {}
    for target in targets:
        like = template.tensors.get(target.instance)
        dtype = target_dtype(target.dtype, target.instance, request)
        if request.dtype is None and like is not None and dtype in dtypes.CAST_FROM:
            dtype = like.dtype if like.dtype in dtypes.CASTABLE else dtype
        out[target.key] = dtype
    return out


def target_dtype(dtype: str, instance: Instance, request: Request) -> str:
    """The dtype of a tensor in the output: as in the source, unless a cast is asked for and it is one to be cast."""
    if request.dtype is None or dtype not in dtypes.CAST_FROM or instance.row.derived:
        return dtype
    return dtypes.CASTS[request.dtype]


def _check_like(source: Identified, model: Model, like: Identified) -> list[str]:
    """Refuse a --like of another family or other sizes; returns what its config says otherwise."""
    try:
        theirs = like.model_for(str(like.format))
    except ConfigError:
        return []  # native files without a record: they give names and assignment, which the keys have to fit
    if theirs.family.name != model.family.name:
        raise UsageError(f"--like {like.path}: is a {theirs.family.name}, but {source.path} is a {model.family.name}")
    if theirs.family.literal:
        return []  # the keys have to fit here, too; nothing else of such a model is understood
    differing = [
        f"{name}: expected {value}, found {theirs.dims.get(name)}"
        for name, value in model.dims.items()
        if name not in model.dims.decided and theirs.dims.get(name) != value
    ]
    if differing:
        raise ShapeMismatchError(
            f"--like {like.path}: has other sizes than {source.path}: {'; '.join(differing)}; "
            "give a checkpoint of the same model"
        )
    rope, other_rope = read_rope(model.config), read_rope(theirs.config)
    pairs = {
        "rope theta": (rope.theta, other_rope.theta),
        "rope scaling": ((rope.kind, rope.parameters), (other_rope.kind, other_rope.parameters)),
        **{name: (model.config.get(name), theirs.config.get(name)) for name in _COMPARED},
    }
    return [
        f"--like {like.path}: its config is taken, which says {name} {other}, where {source.path} says {mine}"
        for name, (mine, other) in pairs.items()
        if mine != other
    ]


_COMPARED = ("rms_norm_eps", "hidden_act", "sliding_window", "max_position_embeddings")
"""What of a config changes the model's results beside the sizes and RoPE."""


def fingerprint(plan: Plan) -> str:
    """A checksum of everything that decides the output's bytes, to tell whether a partial output can be resumed."""
    if plan.live is not None:
        return "tensors in memory"  # never the same again
    casts = [plan.request.dtype, plan.request.dequantize]
    dims = sorted(plan.dims.items())
    parts: list[Any] = [__version__, record.SCHEMA, plan.model.family.name, plan.target, casts, dims]
    # Neither permissions nor the inode, which a cache that copies on write may give anew, change what is in a file.
    for file in dict.fromkeys(file for file, _ in plan.stored):
        found = file.path.identity()
        parts.append([file.name, str(file.path.real()), found.size, found.etag])
    for file_ in plan.files:
        header = digest(data for _, data in file_.layout.literals)
        parts.append([file_.name, file_.size, header, [[t.key, t.offset, t.nbytes, t.dtype] for t in file_.tensors]])
    return digest(json.dumps(parts).encode())


def refuse_unreadable(plan: Plan) -> None:
    """Raise ConfigError for what no conversion can move: reordering elements smaller than a byte."""
    for file in plan.files:
        for tensor in file.tensors:
            if dtypes.DTYPES[tensor.source_dtype].bits < 8 and tensor.tensor.whole is None:
                raise ConfigError(
                    f"{plan.source.path}: {tensor.key} has dtype {tensor.source_dtype}, smaller than a byte, and would "
                    "have to be put in another order; convert it to a wider dtype first"
                )
