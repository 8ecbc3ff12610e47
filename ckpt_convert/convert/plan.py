"""The plan of a conversion: everything that will be written, decided and checked from headers alone.

A plan is a value without open files and tensors. It can be pickled, and other processes can execute parts of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckpt_convert import dtypes
from ckpt_convert._version import __version__
from ckpt_convert.checkpoint import record
from ckpt_convert.checkpoint.checklist import CHECKLIST
from ckpt_convert.checkpoint.hints import Hints
from ckpt_convert.checkpoint.manifest_layout import CONFIG, LAYOUT, describe_layout
from ckpt_convert.checkpoint.mapping import Equality, LogicalTensors
from ckpt_convert.convert.auxiliary_files import AuxiliaryFile
from ckpt_convert.convert.embedding import EmbeddingSplit
from ckpt_convert.convert.layout import OutputFile
from ckpt_convert.convert.request import Request
from ckpt_convert.errors import ConfigError
from ckpt_convert.formats.names import RECORD_FOLDER, is_index
from ckpt_convert.models.core.table import Dims, Instance
from ckpt_convert.storage.base import Entry
from ckpt_convert.storage.checksums import digest
from ckpt_convert.storage.place import Place, check_unchanged
from ckpt_convert.tensors.header import IN_MEMORY, StoredTensor
from ckpt_convert.tensors.lazy import BLOCK, SCRATCH, LazyTensor

_BASE_MEMORY = 40_000_000
"""Measured bytes of the interpreter with the modules that a conversion and its progress bar need."""

_MEMORY = "memory:"

_CASTING = 3_000_000
"""Bytes of the buffers in which one worker casts."""

_COMPUTING = 8_000_000
"""Bytes of one worker's buffers for dequantizing or merging."""

UNKNOWN = "unknown"
"""What a report calls the format of tensors that are taken as they are stored, where it is none that is known."""

COMPUTED = "computed"
"""The kind of a file with tensors that are computed on read."""


@dataclass(frozen=True)
class SourceFile:
    """A source of tensors: a file with its size and etag, or a tensor in memory, named ``memory:KEY``.

    ``kind`` is the container of a file, or ``COMPUTED`` for a quantized file that is dequantized on read.
    """

    name: str
    kind: str
    place: Place | None = None
    identity: Entry | None = None


@dataclass(frozen=True)
class SourceInfo:
    """The source of a conversion: its place, the detected format and family with the evidence, and its dimensions.

    ``dequantized`` is the dtype that a quantized source is dequantized to; ``detected`` the format of a source whose
    tensors are taken as they are stored, None where it has none.
    """

    place: Place
    format: str | None
    why: str
    family: str
    evidence: str
    release: str | None
    literal: bool
    ranks: int
    dims: Dims
    hints: Hints
    dequantized: str | None = None
    detected: str | None = None


@dataclass(frozen=True)
class Checklist:
    """Meta's checklists: the hashes of the source's files below ``root``, and the template of the output's list."""

    root: Place
    listed: Mapping[str, str] = field(default_factory=dict)
    template: Place | None = None


@dataclass(frozen=True)
class Plan:
    """A conversion that can be executed.

    ``stored`` numbers the stored tensors that lazy tensors refer to, each with the index of its file in ``sources``;
    ``computed`` are the numbers of those that are computed on read (dequantized, merged with an adapter); ``changed``
    says of those that are not the source's how they come about; ``shared`` are the keys that are names of another key's
    tensor. ``checks`` are pairs of tensors that must be equal
    before anything is written; ``losses`` pair each tensor that the target cannot hold with the zeros that the
    target computes with instead; ``undecided_tie`` is the pair whose bytes decide whether weights are tied, where no
    file states it. ``embedding_split`` says how tensor-parallel ranks split the embedding and why, where there is a
    choice. ``passthrough`` names the tensors that only the record keeps. ``from_memory`` is whether tensors in memory
    replace those of the source; ``elsewhere`` are those of them that other processes hold and write. ``identities`` are
    the files that are read, with size and etag before reading.
    """

    source: SourceInfo
    request: Request
    files: tuple[OutputFile, ...]
    auxiliary_files: tuple[AuxiliaryFile, ...]
    sources: tuple[SourceFile, ...]
    stored: tuple[StoredTensor, ...]
    stored_in: tuple[int, ...]
    logicals: LogicalTensors
    checks: tuple[Equality, ...]
    losses: tuple[Equality, ...]
    undecided_tie: Equality | None
    passthrough: tuple[str, ...]
    ties: tuple[str, ...]
    notices: tuple[str, ...]
    dims: Dims
    embedding_split: EmbeddingSplit | None
    checklist: Checklist
    computed: frozenset[int] = frozenset()
    changed: Mapping[int, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    from_memory: bool = False
    elsewhere: frozenset[int] = frozenset()
    identities: Mapping[Place, Entry] = field(default_factory=dict, repr=False)

    @property
    def target(self) -> str:
        return self.request.to

    @property
    def formats(self) -> tuple[str | None, str | None]:
        """The formats of source and output; None for tensors as they are stored, under keys of no format."""
        if self.request.verbatim:
            return self.source.detected, self.source.detected
        return self.source.format, self.target

    @property
    def family(self) -> str:
        return self.source.family

    @property
    def weights(self) -> tuple[OutputFile, ...]:
        """The output's weight files, without those of the record."""
        return tuple(file for file in self.files if not file.name.startswith(f"{RECORD_FOLDER}/"))

    @property
    def tensors(self) -> int:
        """The number of keys of the output; a key that is split across ranks counts once."""
        return len({tensor.key for file in self.weights for tensor in file.layout.header.tensors})

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for file in self.files for tensor in file.tensors)

    @property
    def names(self) -> list[str]:
        """The names of the files that may be written."""
        beside = [side.name for side in self.auxiliary_files]
        return [*(file.name for file in self.files), *beside, CHECKLIST, record.MANIFEST]

    @property
    def disk(self) -> int:
        """Total bytes of the output."""
        return sum(file.size for file in self.files) + sum(side.size for side in self.auxiliary_files)

    def memory(self, workers: int) -> int:
        """An upper estimate of the bytes of memory that the conversion needs."""
        casting = _CASTING if self.request.dtype else 0
        computing = _COMPUTING if self.computed else 0
        return _BASE_MEMORY + workers * (BLOCK + SCRATCH + casting + computing)

    def is_computed(self, tensor: LazyTensor) -> bool:
        """Whether this tensor is computed on read."""
        return bool(self.computed) and not self.computed.isdisjoint(tensor.sources)

    @property
    def bytes_by_kind(self) -> Mapping[str, int]:
        """The bytes that are copied, reordered (to another element order), and cast or dequantized."""
        out = {"copied": 0, "reordered": 0, "cast": 0}
        for file in self.files:
            for tensor in file.tensors:
                kind = "copied" if tensor.tensor.contiguous_source is not None or not tensor.nbytes else "reordered"
                is_cast = tensor.dtype != tensor.source_dtype or self.is_computed(tensor.tensor)
                out["cast" if is_cast else kind] += tensor.nbytes
        return out

    def check_sources(self) -> list[str]:
        """Check that no source file has changed since the plan was made.

        Raises SourceChangedError; returns notices for files that were replaced by identical ones.
        """
        return check_unchanged(self.identities)

    def refuse_unreadable(self) -> None:
        """Raise ConfigError for tensors that would need elements smaller than a byte reordered."""
        for file in self.files:
            for tensor in file.tensors:
                if dtypes.DTYPES[tensor.source_dtype].bits < 8 and tensor.tensor.contiguous_source is None:
                    raise ConfigError(
                        f"{self.source.place}: {tensor.key} has dtype {tensor.source_dtype}, smaller than a byte, and "
                        "its elements would have to be reordered; convert it to a wider dtype first"
                    )

    def manifest(
        self, pieces: Mapping[str, Any], side: Sequence[Mapping[str, str]], kept: Mapping[str, str]
    ) -> dict[str, Any]:
        """The content of ``ckpt_convert/manifest.json``: without times and absolute paths, so it is reproducible."""
        content = {
            "schema": record.SCHEMA,
            "format": self.formats[1],
            "family": self.family,
            "source": {"format": self.formats[0]},
            "dims": dict(sorted(self.dims.items())),
            "tied": bool(self.dims["tied"]),
            "model_parallel": max(file.rank for file in self.weights) + 1,
            "checksum": record.ALGORITHMS,
            "files": dict(sorted(pieces.items())),
            "side_files": sorted(side, key=lambda entry: entry["name"]),
            "record": dict(sorted(kept.items())),
        }
        return content | self._described()

    def _described(self) -> dict[str, Any]:
        """The entries of the manifest that spare a look into a store the requests for each file."""
        names = {side.name: side for side in self.auxiliary_files}
        index = next((name for name in names if is_index(name)), None)
        layout = describe_layout(((file.name, file.rank, file.layout.header) for file in self.weights), index)
        config = names[record.CONFIG].data if record.CONFIG in names and "config.json" not in names else None
        found = {LAYOUT: layout, CONFIG: config.decode(errors="ignore") if config is not None else None}
        return {name: entry for name, entry in found.items() if entry is not None}

    def fingerprint(self) -> str:
        """A checksum of everything that determines the output's bytes, which a partial output to resume must match."""
        if self.from_memory:
            return "tensors in memory"  # never the same again
        casts = [self.request.dtype, self.request.dequantize]
        dims = sorted(self.dims.items())
        parts: list[Any] = [__version__, record.SCHEMA, self.family, self.target, casts, dims]
        # Not permissions and inode: a copy-on-write cache may change the inode without the content.
        for source in self.sources:
            if source.place is not None:
                found = source.place.identity()
                parts.append([source.name, str(source.place.real()), found.size, found.etag])
        for file in self.files:
            header = digest(data for _, data in file.layout.literals)
            parts.append([file.name, file.size, header, [[t.key, t.offset, t.nbytes, t.dtype] for t in file.tensors]])
        return digest(json.dumps(parts).encode())


def memory_source(key: str) -> SourceFile:
    """A tensor in memory, which only its own process can read."""
    return SourceFile(f"{_MEMORY}{key}", IN_MEMORY)


def memory_key(source: SourceFile) -> str | None:
    """The key of a tensor in memory; None for any other source."""
    return source.name.removeprefix(_MEMORY) if source.kind == IN_MEMORY else None


def target_dtype(dtype: str, instance: Instance, request: Request) -> str:
    """The dtype of a tensor in the output: that of the source, unless a cast is requested and applies to it."""
    if request.dtype is None or dtype not in dtypes.CAST_FROM or instance.row.derived:
        return dtype
    return dtypes.CASTS[request.dtype]
