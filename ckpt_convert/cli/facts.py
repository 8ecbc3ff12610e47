"""What the headers of a checkpoint say, summed up, and all of it as JSON values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, field
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

from ckpt_convert.checkpoint import diagnosis, record
from ckpt_convert.checkpoint.conventions import SIZES, size_of, text_config
from ckpt_convert.cli.text import plural
from ckpt_convert.errors import CkptConvertError
from ckpt_convert.formats import peft
from ckpt_convert.values import frozen

if TYPE_CHECKING:
    from ckpt_convert.analysis.stats.stats import TensorStats
    from ckpt_convert.checkpoint.identify import Identified
    from ckpt_convert.checkpoint.model import Model
    from ckpt_convert.checkpoint.tensor_info import Part, TensorInfo
    from ckpt_convert.tensors.header import Scalar

SCHEMA = 1

Strides = Mapping[tuple[str, str], tuple[int, ...]]
"""The strides, in elements, of the tensors that are not dense: (file, key) → one for each dimension."""

Statistics = Mapping[str, "TensorStats"]
"""Statistics by key."""


@frozen()
class Count:
    """Tensors, elements and bytes; ``parameters`` is None where the full shapes are not known."""

    tensors: int = 0
    parameters: int | None = 0
    bytes: int = 0

    def plus(self, tensors: int, parameters: int | None, nbytes: int) -> Count:
        """The sum with more of the same."""
        total = None if parameters is None or self.parameters is None else self.parameters + parameters
        return Count(self.tensors + tensors, total, self.bytes + nbytes)


@frozen()
class Facts:
    """What is known of a checkpoint from its headers and its config.

    ``problem`` says why ``model`` is None. ``ranks`` is the tensor-parallel degree of a meta checkpoint, else None.
    ``dims`` are the model's dimensions, as far as its config has them. ``total`` and ``dtypes`` count each tensor
    once, whether it is split across ranks, replicated, or neither. ``open_keys`` are tensors on several ranks that may
    be split or replicated, so their full shapes are not known. ``said`` are more facts, of this
    kind of checkpoint: (label, text).
    """

    checkpoint: Identified
    model: Model | None
    problem: str
    ranks: int | None
    config_source: str | None
    dims: Mapping[str, int]
    total: Count
    dtypes: Mapping[str, Count]
    strides: Strides
    open_keys: frozenset[str]
    said: tuple[tuple[str, str], ...]
    notices: tuple[str, ...]
    besides: Count = field(default_factory=Count)
    """How much of the total is no weights, but what a training run keeps beside them."""

    @property
    def parameters(self) -> int | None:
        """The elements of all weights."""
        return None if self.total.parameters is None else self.total.parameters - (self.besides.parameters or 0)

    def nbytes(self, info: TensorInfo) -> int:
        """The bytes of the tensor; where its full shape is not known, those of all its parts."""
        return info.nbytes if info.settled else sum(part.nbytes for part in info.parts)

    def file_bytes(self) -> dict[str, int]:
        """The size of each weight file."""
        return {file.name: file.place.identity().size for file in self.checkpoint.files}


def gather(checkpoint: Identified) -> Facts:
    """Everything that is known without reading a tensor."""
    model, problem = _model(checkpoint)
    ranks = max((file.rank for file in checkpoint.files), default=0) + 1 if checkpoint.format == "meta" else None
    unsettled = [info for info in checkpoint.tensors.values() if not info.settled]
    # Of 100,000 tensors only a few kinds are different.
    kinds = Counter([(info.dtype, info.shape, info.nbytes) for info in checkpoint.tensors.values() if info.settled])
    total = Count()
    dtypes: dict[str, Count] = {}
    for (dtype, shape, nbytes), count in kinds.items():
        dtypes[dtype] = dtypes.get(dtype, Count()).plus(count, count * prod(shape), count * nbytes)
    for info in unsettled:
        dtypes[info.dtype] = dtypes.get(info.dtype, Count()).plus(1, None, sum(part.nbytes for part in info.parts))
    for count_ in dtypes.values():
        total = total.plus(count_.tensors, count_.parameters, count_.bytes)
    others = [checkpoint.tensors[key] for key in diagnosis.non_weight_keys(checkpoint.keys, checkpoint.tensors)]
    besides = Count(len(others), sum(prod(info.shape) for info in others), sum(info.nbytes for info in others))
    notices = list(checkpoint.notices)
    if unsettled:
        notices.append(
            f"{plural(len(unsettled), 'tensor')} on several ranks may be split or replicated, which "
            f"{'no table' if model else 'only a config'} says: the shapes shown are those of single ranks"
        )
    return Facts(
        checkpoint=checkpoint,
        model=model,
        problem=problem,
        ranks=ranks,
        config_source=_config_source(checkpoint),
        dims=model.dims if model else _config_dims(checkpoint),
        total=total,
        dtypes=dict(sorted(dtypes.items(), key=lambda item: (-item[1].bytes, item[0]))),
        strides={(f.name, t.key): t.strides for f, t in checkpoint.stored if t.strides is not None},
        open_keys=frozenset(info.key for info in unsettled),
        said=(*_kind(checkpoint), *checkpoint.facts, *_quantized(checkpoint), *trained(checkpoint)),
        besides=besides,
        notices=tuple(notices),
    )


def _kind(checkpoint: Identified) -> list[tuple[str, str]]:
    """What files are that are not only a model's weights; a PEFT adapter has its own line."""
    text = (
        diagnosis.describe_files(checkpoint.keys, checkpoint.tensors)
        if checkpoint.directory.kind != peft.KIND
        else None
    )
    return [("kind", text)] if text else []


def _quantized(checkpoint: Identified) -> list[tuple[str, str]]:
    found = checkpoint.quantization
    if found is None:
        return []
    broken = f"; {plural(len(found.findings), 'mistake')}, which `ckpt-convert verify` lists" if found.findings else ""
    return [("quantised", f"{found.text}{broken}")]


def trained(checkpoint: Identified) -> list[tuple[str, str]]:
    """The progress of the training run that saved this step, as (label, text); nothing for other checkpoints."""
    found = record.read_training(checkpoint.root)
    progress, metrics = (found or {}).get("progress"), (found or {}).get("metrics")
    if not isinstance(progress, dict):
        return []
    counts = [f"{name} {progress[name]:,}" for name in ("step", "epoch") if type(progress.get(name)) is int]
    counts += [f"{progress[name]:,} {name}" for name in ("tokens", "samples") if progress.get(name)]
    numbers = metrics.items() if isinstance(metrics, dict) else ()
    counts += [f"{name} {value:.6g}" for name, value in numbers if type(value) in (int, float)]
    return [("trained", ", ".join(counts))]


def converted_from(checkpoint: Identified) -> str | None:
    """The format that an earlier conversion made this checkpoint from, as its record says."""
    if checkpoint.record is None or "training" in checkpoint.record.manifest:
        return None
    source = checkpoint.record.manifest.get("source")
    format = source.get("format") if isinstance(source, dict) else None
    return str(format) if format is not None else None


def document(facts: Facts, tensors: Sequence[TensorInfo], statistics: Statistics | None = None) -> dict[str, Any]:
    """The facts and these tensors, in this order, as values for JSON; docs/json.md explains every field."""
    checkpoint, model = facts.checkpoint, facts.model
    return {
        "schema": SCHEMA,
        "path": str(checkpoint.place),
        "format": checkpoint.format,
        "why": checkpoint.why,
        "family": model.family.name if model else None,
        "evidence": model.evidence if model else None,
        "release": model.release if model else None,
        "problem": facts.problem or None,
        "config_source": facts.config_source,
        "converted_from": converted_from(checkpoint),
        "model_parallel": facts.ranks,
        "tied": model.tied if model else None,
        "parameters": facts.parameters,
        "bytes": facts.total.bytes,
        "dtypes": {dtype: asdict(count) for dtype, count in facts.dtypes.items()},
        "dims": dict(facts.dims) or None,
        "facts": [{"label": label, "text": text} for label, text in facts.said],
        "notices": list(facts.notices),
        "files": [*_files(facts)],
        "tensors": [_tensor(facts, info, statistics) for info in tensors],
    }


def _files(facts: Facts) -> Iterator[dict[str, Any]]:
    sizes = facts.file_bytes()
    for file in facts.checkpoint.files:
        header = file.header
        out = {"name": file.name, "bytes": sizes[file.name], "tensors": len(header.tensors), "rank": file.rank}
        if header.metadata:
            out["metadata"] = dict(header.metadata)
        if header.values:
            out["values"] = {key: _finite(value) for key, value in header.values.items()}
        yield out


def _finite(value: Scalar) -> Scalar:
    """The value; None for infinity and NaN, which JSON lacks."""
    return None if isinstance(value, float) and not isfinite(value) else value


def _tensor(facts: Facts, info: TensorInfo, statistics: Statistics | None) -> dict[str, Any]:
    out: dict[str, Any] = {
        "key": info.key,
        "shape": list(info.shape) if info.settled else None,
        "dtype": info.dtype,
        "nbytes": facts.nbytes(info),
    }
    if statistics is not None:
        out["stats"] = _stats(statistics[info.key])
    first = info.parts[0]
    if len(info.parts) > 1 or first.origin is not None or (first.file, info.key) in facts.strides:
        return {**out, "parts": [_part(facts, info.key, part) for part in info.parts]}
    out["file"] = first.file
    return {**out, "offset": first.offset}


def _part(facts: Facts, key: str, part: Part) -> dict[str, Any]:
    out: dict[str, Any] = {"file": part.file, "offset": part.offset, "nbytes": part.nbytes}
    strides = facts.strides.get((part.file, key))
    spread = {} if strides is None else {"strides": list(strides)}
    placed = {} if part.origin is None else {"origin": list(part.origin)}
    return {**out, "shape": list(part.shape), "rank": part.rank, **spread, **placed}


def _stats(stats: TensorStats) -> dict[str, Any]:
    return {
        "min": _finite(stats.min),
        "max": _finite(stats.max),
        "mean": _finite(stats.mean),
        "std": _finite(stats.std),
        "nan": stats.nan,
        "inf": stats.inf,
        "zero_fraction": stats.zeros / stats.count if stats.count else None,
        "checksum": f"xxh3_64:{stats.checksum}",
    }


def _model(checkpoint: Identified) -> tuple[Model | None, str]:
    try:
        return checkpoint.model, ""
    except CkptConvertError as error:
        # The path is on the line above; what is wrong with the config itself needs its name.
        text = str(error).removeprefix(f"{checkpoint.place}: ").removeprefix(f"{checkpoint.config_file}: ")
        return None, f"{checkpoint.config_file.name}: {text}" if text.startswith("is ") else text


def _config_dims(checkpoint: Identified) -> dict[str, int]:
    """The dimensions in the config of an unknown family, by their common names."""
    try:
        config = checkpoint.config or {}
    except CkptConvertError:
        return {}
    content = {**text_config(config), **config}
    found = {symbol: size_of(content, *names) for symbol, names in SIZES.items()}
    return {symbol: size for symbol, size in found.items() if size is not None}


def _config_source(checkpoint: Identified) -> str | None:
    path = checkpoint.config_file
    return str(path) if path.is_regular_file() else None
