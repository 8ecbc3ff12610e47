"""What the headers of a checkpoint say of it as a whole, and all of it as values for JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_convert.cli.text import plural
from ckpt_convert.convert import record
from ckpt_convert.errors import CkptConvertError

if TYPE_CHECKING:
    from ckpt_convert.convert.checkpoint import Checkpoint, Part, TensorInfo
    from ckpt_convert.convert.model import Model

SCHEMA = 1
_CONFIGS = {"meta": "params.json", "native": record.CONFIG}

Strides = Mapping[tuple[str, str], tuple[int, ...]]
"""The strides, in elements, of the tensors that are not dense: (file, key) → one for each dimension."""


@dataclass(frozen=True, slots=True)
class Count:
    """How much there is of something; ``parameters`` is None where the full shapes are not known."""

    tensors: int = 0
    parameters: int | None = 0
    bytes: int = 0

    def plus(self, parameters: int | None, nbytes: int) -> Count:
        """One tensor more."""
        unknown = parameters is None or self.parameters is None
        return Count(
            self.tensors + 1, None if unknown else (self.parameters or 0) + (parameters or 0), self.bytes + nbytes
        )


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint from its headers and its config.

    ``problem`` says why ``model`` is None. ``ranks`` is the tensor-parallel degree of a meta checkpoint, else None.
    ``total`` and ``dtypes`` count each tensor once, whether it is cut over ranks, held by all of them, or neither.
    ``open_keys`` are the tensors on several ranks of which nothing says whether they are cut, so their full shapes are
    not known; ``in_memory`` the files whose tensors torch had to load.
    """

    checkpoint: Checkpoint
    model: Model | None
    problem: str
    ranks: int | None
    config_source: str | None
    total: Count
    dtypes: Mapping[str, Count]
    strides: Strides
    in_memory: frozenset[str]
    open_keys: frozenset[str]
    notices: tuple[str, ...]

    def nbytes(self, info: TensorInfo) -> int:
        """The bytes of the whole tensor; all that is stored of it where the shape is not known."""
        return _nbytes(info, info.key in self.open_keys)

    def file_bytes(self) -> dict[str, int]:
        """The size of each weight file."""
        return {file.name: file.path.stat().st_size for file in self.checkpoint.files}


def gather(checkpoint: Checkpoint) -> Facts:
    """Look at everything that can be known without reading a tensor."""
    model, problem = _model(checkpoint)
    ranks = max((file.rank for file in checkpoint.files), default=0) + 1 if checkpoint.format == "meta" else None
    open_keys = frozenset(key for key, info in checkpoint.tensors.items() if not info.settled)
    total = Count()
    dtypes: dict[str, Count] = {}
    for key, info in checkpoint.tensors.items():
        parameters = None if key in open_keys else prod(info.shape)
        nbytes = _nbytes(info, key in open_keys)
        total = total.plus(parameters, nbytes)
        dtypes[info.dtype] = dtypes.get(info.dtype, Count()).plus(parameters, nbytes)
    notices = list(checkpoint.notices)
    if open_keys:
        notices.append(
            f"{plural(len(open_keys), 'tensor')} on several ranks may be cut or whole, which "
            f"{'no table' if model else 'only a config'} says: the shapes shown are those of single ranks"
        )
    return Facts(
        checkpoint=checkpoint,
        model=model,
        problem=problem,
        ranks=ranks,
        config_source=_config_source(checkpoint),
        total=total,
        dtypes=dict(sorted(dtypes.items(), key=lambda item: (-item[1].bytes, item[0]))),
        strides={(f.name, t.key): t.strides for f, t in checkpoint.stored if t.strides is not None},
        in_memory=frozenset(file.name for file in checkpoint.files if file.header.kind == "legacy"),
        open_keys=open_keys,
        notices=tuple(notices),
    )


def converted_from(checkpoint: Checkpoint) -> str | None:
    """The format that an earlier conversion made this checkpoint from, as its record says."""
    if checkpoint.record is None:
        return None
    source = checkpoint.record.manifest.get("source")
    return str(source.get("format")) if isinstance(source, dict) else None


def as_json(facts: Facts, tensors: Sequence[TensorInfo]) -> Iterator[str]:
    """The lines of one JSON object: the facts, and these tensors in this order, a line each."""
    fields = [f"  {json.dumps(name)}: {_field(value)}" for name, value in _document(facts, tensors).items()]
    yield "{"
    yield ",\n".join(fields)
    yield "}"


def _document(facts: Facts, tensors: Sequence[TensorInfo]) -> dict[str, Any]:
    checkpoint, model = facts.checkpoint, facts.model
    sizes = facts.file_bytes()
    return {
        "schema": SCHEMA,
        "path": str(checkpoint.path),
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
        "parameters": facts.total.parameters,
        "bytes": facts.total.bytes,
        "dtypes": {dtype: asdict(count) for dtype, count in facts.dtypes.items()},
        "dims": dict(model.dims) if model else None,
        "notices": list(facts.notices),
        "files": [
            {"name": file.name, "bytes": sizes[file.name], "tensors": len(file.header.tensors), "rank": file.rank}
            for file in checkpoint.files
        ],
        "tensors": [_tensor(facts, info) for info in tensors],
    }


def _tensor(facts: Facts, info: TensorInfo) -> dict[str, Any]:
    out: dict[str, Any] = {
        "key": info.key,
        "shape": None if info.key in facts.open_keys else list(info.shape),
        "dtype": info.dtype,
        "nbytes": facts.nbytes(info),
    }
    first = info.parts[0]
    if len(info.parts) > 1 or (first.file, info.key) in facts.strides:
        return {**out, "parts": [_part(facts, info.key, part) for part in info.parts]}
    out["file"] = first.file
    # What torch had to load has no place in the file that anybody could read it from.
    return out if first.file in facts.in_memory else {**out, "offset": first.offset}


def _part(facts: Facts, key: str, part: Part) -> dict[str, Any]:
    offset = None if part.file in facts.in_memory else part.offset
    out: dict[str, Any] = {"file": part.file, "offset": offset, "nbytes": part.nbytes}
    strides = facts.strides.get((part.file, key))
    spread = {} if strides is None else {"strides": list(strides)}
    return {**out, "shape": list(part.shape), "rank": part.rank, **spread}


def _field(value: object) -> str:
    """JSON with a line for each entry of a list of objects: quick to write, and a tensor is easy to find in it."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n    " + ",\n    ".join(map(json.dumps, value)) + "\n  ]"
    return json.dumps(value)


def _model(checkpoint: Checkpoint) -> tuple[Model | None, str]:
    try:
        return checkpoint.model, ""
    except CkptConvertError as error:
        return None, str(error).removeprefix(f"{checkpoint.path}: ")


def _nbytes(info: TensorInfo, is_open: bool) -> int:
    return sum(part.nbytes for part in info.parts) if is_open else info.nbytes


def _config_source(checkpoint: Checkpoint) -> str | None:
    path: Path = checkpoint.config_path or checkpoint.root / _CONFIGS.get(str(checkpoint.format), "config.json")
    return str(path) if path.is_file() else None
