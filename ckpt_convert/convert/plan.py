"""The plan of a conversion: everything that will be written, decided and checked from headers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_convert import __version__, dtypes
from ckpt_convert.convert import configs, containers, layout, mapping, placement, record, sidefiles
from ckpt_convert.convert.checkpoint import Checkpoint, WeightFile, open_checkpoint
from ckpt_convert.convert.containers.header import StoredTensor
from ckpt_convert.convert.formats.base import RECORD_FOLDER
from ckpt_convert.convert.layout import OutputFile
from ckpt_convert.convert.mapping import Equality, Logical, Logicals, Target
from ckpt_convert.convert.model import Model
from ckpt_convert.convert.record import Layout
from ckpt_convert.convert.request import CASTABLE, CASTS, Request
from ckpt_convert.convert.sidefiles import SideFile
from ckpt_convert.errors import ConfigError, ShapeMismatchError, UnsupportedFamilyError, UsageError
from ckpt_convert.models.lazy import stored
from ckpt_convert.storage.reader import LocalFile


@dataclass(frozen=True)
class Plan:
    """A conversion that can be carried out.

    ``stored`` numbers the sources of all lazy tensors; ``checks`` are pairs that have to be equal before anything is
    written; ``undecided`` is the pair that decides whether weights are tied, where no file says it.
    ``carried`` names the tensors that the target has no place for and that go into the record.
    """

    source: Checkpoint
    model: Model
    request: Request
    files: tuple[OutputFile, ...]
    side: tuple[SideFile, ...]
    stored: tuple[tuple[WeightFile, StoredTensor], ...]
    logicals: Logicals
    checks: tuple[Equality, ...]
    undecided: Equality | None
    carried: tuple[str, ...]
    ties: tuple[str, ...]
    notices: tuple[str, ...]
    dims: Mapping[str, int]

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
    def disk(self) -> int:
        """Bytes of everything that will be written."""
        return sum(file.size for file in self.files) + sum(side.size for side in self.side)

    @property
    def moves(self) -> Mapping[str, int]:
        """How many bytes are copied as they lie, put in another order, and cast."""
        out = {"copied": 0, "reordered": 0, "cast": 0}
        for file in self.files:
            for tensor in file.tensors:
                kind = "copied" if tensor.tensor.whole is not None or not tensor.nbytes else "reordered"
                out["cast" if tensor.dtype != tensor.source_dtype else kind] += tensor.nbytes
        return out

    def manifest(self, pieces: Mapping[str, Any], side: list[dict[str, Any]]) -> dict[str, Any]:
        """What ``ckpt_convert/manifest.json`` says: no times and no absolute paths, so it is the same every time."""
        return {
            "schema": record.SCHEMA,
            "format": self.target,
            "family": self.model.family.name,
            "source": {"format": self.source.format},
            "dims": dict(sorted(self.dims.items())),
            "tied": bool(self.dims["tied"]),
            "model_parallel": max(file.rank for file in self.weights) + 1,
            "checksum": "xxh3_64",
            "files": dict(sorted(pieces.items())),
            "side_files": sorted(side, key=lambda entry: str(entry["name"])),
        }


def make(source: Checkpoint, request: Request, *, tied: bool | None = None) -> Plan:
    """Plan a conversion; ``tied`` settles what ``Plan.undecided`` asks.

    Raises the error that says everything wrong with the input, or with the request, at once.
    """
    model = source.model
    source_format = str(source.format)
    request.check(source_format)
    family = model.family
    for format in (source_format, request.to):
        if format not in family.formats:
            raise UnsupportedFamilyError(
                f"{source.path}: the {family.name} table has no {format} column; it has {', '.join(family.formats)}"
            )
    undecided = model.tied is None and tied is None
    if model.tied is None:
        model = model.with_tied(tied is not False)
    like = open_checkpoint(request.like, format=request.to) if request.like is not None else None
    if like is not None:
        _check_like(source, model, like)
    logicals = mapping.read(family, source_format, model.dims, source.ranks, str(source.path))
    wanted = placement.recorded(source, request, like)
    ranks = placement.ranks(source, request, like, wanted, model)
    dims = dict(model.dims)
    if request.to == "meta":
        dims["embedding_cut"] = _write_cut(request, like, model)
    everything = list(source.stored)
    _bring_back(source, request, like, model, logicals, everything)
    keep_tied = _keep_tied(source_format, request, wanted, model)
    targets, carried, ties = mapping.write(
        family, request.to, dims, logicals, ranks=ranks, keep_tied=keep_tied, what=str(source.path)
    )
    dtype_of = {target.key: _dtype(target, request) for target in targets}
    files, exact, layout_notices = placement.files(source, request, model, targets, dtype_of, wanted, ranks)
    by_rank = [{t.key: t for t in targets if t.rank == rank} for rank in range(ranks)]
    checks = [*logicals.equal, *ties]
    for file in files:
        checks += layout.aliases(file.layout.header, by_rank[file.rank], file.name)
    made = configs.generated(source, model, request, like)
    generated = {side.name: side for side in (*made.files, *placement.index(request, files, wanted, exact))}
    generated |= configs.tokenizer(source, request, model, like)
    side = sidefiles.plan(source, request.to, like=like, generated=generated)
    own = None if source_format == request.to else source.layout()
    side += sidefiles.recorded_layouts(source, request.to, own)
    pair = _tied_pair(logicals) if undecided else None
    if pair is not None or tied is not None:
        checks = [check for check in checks if check not in ties]  # the bytes decide, or have decided
    return Plan(
        source=source,
        model=model,
        request=request,
        files=(*files, *placement.carried(source_format, carried, logicals)),
        side=tuple(side),
        stored=tuple(everything),
        logicals=logicals,
        checks=tuple(checks),
        undecided=pair,
        carried=tuple(sorted({logicals.tensors[instance].key for instance in carried})),
        ties=_ties(logicals, model, pair, targets),
        notices=(*source.notices, *model.notices, *made.notices, *layout_notices),
        dims=dims,
    )


def _dtype(target: Target, request: Request) -> str:
    if request.dtype is None or target.dtype not in CASTABLE or target.instance.row.derived:
        return target.dtype
    return CASTS[request.dtype]


def _check_like(source: Checkpoint, model: Model, like: Checkpoint) -> None:
    if like.model.family.name != model.family.name:
        raise UsageError(
            f"--like {like.path}: is a {like.model.family.name}, but {source.path} is a {model.family.name}"
        )
    ignored = ("tied", "embedding_cut")
    differing = [
        f"{name}: expected {value}, found {like.model.dims.get(name)}"
        for name, value in model.dims.items()
        if name not in ignored and like.model.dims.get(name) != value
    ]
    if differing:
        raise ShapeMismatchError(
            f"--like {like.path}: has other sizes than {source.path}: {'; '.join(differing)}; "
            "give a checkpoint of the same model"
        )


def _write_cut(request: Request, like: Checkpoint | None, model: Model) -> int:
    if request.config.meta_style is not None:
        return 1 if request.config.meta_style == "llama2" else 0
    return like.model.dims["embedding_cut"] if like is not None else model.dims["embedding_cut"]


def _bring_back(
    source: Checkpoint,
    request: Request,
    like: Checkpoint | None,
    model: Model,
    logicals: Logicals,
    everything: list[tuple[WeightFile, StoredTensor]],
) -> None:
    """Add what was carried along for the target's format: tensors that the config determines (RoPE tables)."""
    found: list[tuple[WeightFile, StoredTensor]] = []
    if like is not None:
        found = [(file, tensor) for file, tensor in like.stored if file.rank == 0]
    elif source.record is not None and (path := source.record.carried(request.to)) is not None:
        reader, header = containers.parse(LocalFile(path))
        file = WeightFile(path.name, 0, path, reader, header)
        found = [(file, tensor) for tensor in header.tensors]
    by_key = {tensor.key: (file, tensor) for file, tensor in found}
    for instance in model.family.instances(model.dims):
        key = instance.key(request.to)
        if not instance.row.derived or key not in by_key or instance in logicals.tensors:
            continue
        file, tensor = by_key[key]
        if tensor.shape != instance.row.sizes(model.dims):
            continue
        lazy = stored(len(everything), tensor.shape, tensor.strides)
        everything.append((file, tensor))
        logicals.tensors[instance] = Logical(tensor.dtype, lazy, str(key), file.name)


def _keep_tied(source_format: str, request: Request, wanted: Layout | None, model: Model) -> bool | None:
    if source_format == request.to and request.like is None:
        return None
    keys = {key for _, key in wanted.places} if wanted else set()
    return any(
        key.template in keys for row in model.family.rows if (key := row.column(request.to)) and key.omitted_if_tied
    )


def _tied_pair(logicals: Logicals) -> Equality | None:
    for instance, logical in logicals.tensors.items():
        if instance.row.tied_to and instance not in logicals.omitted:
            other = mapping.tied_to(instance, logicals.tensors)
            return Equality(other.tensor, logical.tensor, logical.dtype, "")
    return None


def _ties(logicals: Logicals, model: Model, pair: Equality | None, targets: list[Target]) -> tuple[str, ...]:
    written = {target.instance for target in targets}
    out = []
    for instance in logicals.tensors:
        if not instance.row.tied_to:
            continue
        if pair is not None:
            out.append(f"{instance.name} and {instance.row.tied_to}: tied if equal, which the bytes decide")
        elif model.dims["tied"]:
            how = "written as well" if instance in written else "stored once"
            out.append(f"{instance.name} is tied to {instance.row.tied_to}: {how}")
    return tuple(out)


def fingerprint(plan: Plan) -> str:
    """A checksum of everything that decides the output's bytes, to tell whether a partial output can be resumed."""
    parts: list[Any] = [__version__, plan.model.family.name, plan.target, plan.request.dtype, sorted(plan.dims.items())]
    for file in dict.fromkeys(file for file, _ in plan.stored):
        stat = file.path.stat()
        parts.append([file.name, stat.st_size, stat.st_mtime_ns])
    for file_ in plan.files:
        digest = sidefiles.digest(b"".join(data for _, data in file_.layout.literals))
        parts.append([file_.name, file_.size, digest, [[t.key, t.offset, t.nbytes, t.dtype] for t in file_.tensors]])
    return sidefiles.digest(json.dumps(parts).encode())


def refuse_unreadable(plan: Plan) -> None:
    """Raise ConfigError for what no conversion can move: reordering elements smaller than a byte."""
    for file in plan.files:
        for tensor in file.tensors:
            if dtypes.DTYPES[tensor.source_dtype].bits < 8 and tensor.tensor.whole is None:
                raise ConfigError(
                    f"{plan.source.path}: {tensor.key} has dtype {tensor.source_dtype}, smaller than a byte, and would "
                    "have to be put in another order; convert it to a wider dtype first"
                )
