"""Opening a checkpoint: find its files, read their headers, and say which format and family it is."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_convert.convert import containers, formats, record
from ckpt_convert.convert.containers.header import Header, StoredTensor
from ckpt_convert.convert.findings import Finding
from ckpt_convert.convert.formats.base import Directory, WeightName, load_json
from ckpt_convert.convert.mapping import Source
from ckpt_convert.convert.model import Model, Recorded, identify
from ckpt_convert.convert.record import Layout, LayoutFile, Record
from ckpt_convert.errors import (
    AmbiguousFormatError,
    CheckpointNotFoundError,
    CkptConvertError,
    ConfigError,
    CorruptFileError,
    KeyMismatchError,
    UsageError,
    listing,
)
from ckpt_convert.models import FAMILIES
from ckpt_convert.models.config import ConfigOptions
from ckpt_convert.models.lazy import stored
from ckpt_convert.storage import hub
from ckpt_convert.storage.names import JOURNAL, WEIGHT_SUFFIXES, resolve
from ckpt_convert.storage.reader import LocalFile, RangeReader

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class WeightFile:
    """An open weight file: its name in the checkpoint, its rank, and its header."""

    name: str
    rank: int
    path: Path
    reader: RangeReader
    header: Header


@dataclass(frozen=True, slots=True)
class Part:
    """Where a tensor, or one rank's part of it, lies: ``offset`` and ``nbytes`` are bytes in the file."""

    file: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    rank: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a checkpoint: its full shape, its dtype as safetensors spells it, and the parts it lies in.

    ``axis`` is the one that ranks cut, None where each holds the whole. ``settled`` is False where nothing says which
    of the two it is (no config, or a key of no table): ``shape`` and ``nbytes`` are then those of one rank's part.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    parts: tuple[Part, ...]
    axis: int | None = None
    settled: bool = True


@dataclass
class Checkpoint:
    """A checkpoint whose headers were read; no tensor was. Close it, or use it as a context manager.

    ``format`` is None when the keys fit no format that is known; ``why`` says what the format was told by.
    """

    path: Path
    format: str | None
    why: str
    files: tuple[WeightFile, ...]
    directory: Directory
    record: Record | None
    family_name: str | None = None
    config_path: Path | None = None
    options: ConfigOptions = field(default_factory=ConfigOptions)

    @property
    def root(self) -> Path:
        """The directory that the weight files lie in."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def stored(self) -> tuple[tuple[WeightFile, StoredTensor], ...]:
        """Every stored tensor with its file, in file and offset order; the position is its number as a source."""
        return tuple(
            (file, tensor)
            for file in self.files
            for tensor in sorted(file.header.tensors, key=lambda tensor: tensor.offset)
        )

    @property
    def ranks(self) -> list[dict[str, Source]]:
        """For each rank, its tensors by key; raises KeyMismatchError for keys given twice or not as the index says."""
        if self.contradictions:
            said = listing([finding.text for finding in self.contradictions])
            raise KeyMismatchError(f"{self.path}: the files contradict each other:{said}")
        return self._sources[0]

    @property
    def contradictions(self) -> list[Finding]:
        """Where the files disagree with each other, or with the index."""
        return self._sources[1]

    @cached_property
    def _sources(self) -> tuple[list[dict[str, Source]], list[Finding]]:
        ranks: list[dict[str, Source]] = [{} for _ in range(max((f.rank for f in self.files), default=0) + 1)]
        findings = []
        for number, (file, tensor) in enumerate(self.stored):
            found = ranks[file.rank].get(tensor.key)
            if found is not None:
                text = f"{tensor.key} is in {found.where} and in {file.name}"
                findings.append(Finding("error", "duplicate", text, file.name, tensor.key))
            lazy = stored(number, tensor.shape, tensor.strides)
            ranks[file.rank][tensor.key] = Source(tensor.key, tensor.dtype, lazy, file.name)
        index, weight_map = self.directory.index, self.directory.weight_map or {}
        for key, name in weight_map.items():
            found = ranks[0].get(key)
            if found is None:
                text = f"{key} is missing: {index} says that it lies in {name}"
                findings.append(Finding("error", "index", text, name, key, name))
            elif found.where != name:
                text = f"{key} lies in {found.where}, but {index} says {name}"
                findings.append(Finding("error", "index", text, found.where, key, name, found.where))
        for key, source in ranks[0].items() if weight_map else ():
            if key not in weight_map:
                text = f"{key} lies in {source.where}, but {index} does not list it"
                findings.append(Finding("error", "index", text, source.where, key, None, source.where))
        return ranks, findings

    @cached_property
    def family(self) -> str | None:
        """The name of the family, None when it is not known (``model`` says why, and has its table)."""
        try:
            return self.model.family.name
        except CkptConvertError:
            return None

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The config in the words of Hugging Face's config.json, None when there is none."""
        try:
            return self.model.config
        except CkptConvertError:
            path = self.config_path or self.root / "config.json"
            return load_json(path) if path.is_file() else None

    @cached_property
    def model(self) -> Model:
        """Family and config; raises ConfigError or UnsupportedFamilyError where they are not to be had."""
        if self.format is None:
            raise AmbiguousFormatError(f"{self.path}: {self.why}; say which format it is with --from")
        return _model(self)

    @cached_property
    def params(self) -> tuple[Path, dict[str, Any]] | None:
        """params.json of a meta checkpoint, or what was given instead of it."""
        if self.format != "meta":
            return None
        path = self.config_path or self.root / "params.json"
        return (path, load_json(path)) if path.is_file() else None

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by key, ranks joined: full shape, dtype, bytes, and the parts it lies in."""
        parts: dict[str, list[tuple[WeightFile, StoredTensor]]] = {}
        for file, tensor in self.stored:
            parts.setdefault(tensor.key, []).append((file, tensor))
        axes = _cut_axes(self) if len(self.files) > 1 and self.format == "meta" else {}
        return {
            key: _info(key, found, axes.get(key), key in axes or self.format != "meta") for key, found in parts.items()
        }

    @property
    def notices(self) -> list[str]:
        """What a reader should know about the files: objects that are no tensors, files that are not used."""
        out = []
        for file in self.files:
            if file.header.kind == "legacy":
                out.append(f"{file.name}: an old torch file without zip, read whole into memory")
            if file.header.objects:
                names = ", ".join(f"{key} ({kind})" for key, kind in list(file.header.objects.items())[:5])
                count = len(file.header.objects)
                out.append(
                    f"{file.name}: {count} {'entry is no tensor' if count == 1 else 'entries are no tensors'}: {names}"
                )
        used = {file.name for file in self.files}
        if self.path.is_dir():
            weights = (entry.name for entry in self.path.iterdir() if entry.suffix in WEIGHT_SUFFIXES)
            stale = sorted(name for name in weights if name not in used)
            if stale:
                out.append(f"not used: {', '.join(stale[:8])}{' …' if len(stale) > 8 else ''}")
        return out

    def layout(self) -> Layout:
        """How this checkpoint lies in its files, to be recorded or imitated."""
        files = []
        for file in self.files:
            captured = containers.capture(file.reader, file.header)
            files.append(LayoutFile(file.name, file.rank, file.header, captured.literals if captured else None))
        index = self.directory.index
        named = (index, (self.root / index).read_bytes()) if index else None
        return Layout(str(self.format), tuple(files), named)

    def read_bytes(self, key: str) -> bytes:
        """The bytes of one tensor, dense and row-major, ranks joined; raises KeyError for an unknown key."""
        from ckpt_convert.convert.gather import Gatherer

        info = self.tensors[key]
        if not info.settled:
            raise AmbiguousFormatError(
                f"{self.path}: {key} lies on {len(info.parts)} ranks, and nothing says how to join them; "
                "give the model's params.json (or config=)"
            )
        sources = [rank[key] for rank in self.ranks if key in rank]
        return Gatherer(self.stored).read(_whole(sources, info.axis).tensor, info.dtype)

    def read(self, key: str) -> torch.Tensor:
        """One tensor, read from the file now; raises KeyError for an unknown key."""
        import torch

        from ckpt_convert.dtypes import DTYPES

        info = self.tensors[key]
        flat = torch.frombuffer(bytearray(self.read_bytes(key)) or bytearray(1), dtype=torch.uint8)[: info.nbytes]
        return flat.view(getattr(torch, DTYPES[info.dtype].torch)).reshape(info.shape)

    __getitem__ = read

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def close(self) -> None:
        for file in self.files:
            if isinstance(file.reader, LocalFile):
                file.reader.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_checkpoint(
    path: str | Path,
    *,
    format: str | None = None,
    family: str | None = None,
    config: str | Path | None = None,
    options: ConfigOptions | None = None,
) -> Checkpoint:
    """Open a checkpoint directory, one file of any container, or a Hub id, from its headers alone.

    ``format`` and ``family`` settle what detection cannot; ``config`` is a config.json or params.json to use.
    Raises CheckpointNotFoundError, CorruptFileError or UnsafeFileError; an unknown family is not an error here.
    """
    path = Path(path) if Path(path).exists() else hub.locate(path, format=format)
    if os.path.exists(path / JOURNAL):  # False, not an error, where the directory cannot be read
        raise CorruptFileError(
            f"{path}: is the unfinished output of a conversion; run that again with --resume, or without to start anew"
        )
    return read_checkpoint(path, format=format, family=family, config=config, options=options)


def read_checkpoint(
    path: Path,
    *,
    format: str | None = None,
    family: str | None = None,
    config: str | Path | None = None,
    options: ConfigOptions | None = None,
) -> Checkpoint:
    """``open_checkpoint`` for any directory, also one that is still being written."""
    if family is not None and family not in FAMILIES:
        raise UsageError(f"--family {family}: is no family; known: {', '.join(FAMILIES)}")
    config_path = Path(config) if config is not None else None
    if format is not None and format not in formats.ALL:
        raise UsageError(f"--from {format}: no such format; known: {', '.join(formats.ALL)}")
    if config_path is not None and not config_path.is_file():
        raise ConfigError(f"{config_path}: no such file; --config takes a config.json or params.json")
    if not path.exists():
        raise CheckpointNotFoundError(f"{path}: no such file or directory")
    try:
        found_record = record.load(path) if path.is_dir() else None
        name, why, directory = _detect(path, format, found_record)
    except OSError as error:
        raise CheckpointNotFoundError(f"{error.filename or path}: cannot be read: {error.strerror}") from error
    files = tuple(_open(path, weight) for weight in directory.weights)
    if name is None:
        name, why = _by_keys(files, why)
    return Checkpoint(path, name, why, files, directory, found_record, family, config_path, options or ConfigOptions())


def _detect(path: Path, wanted: str | None, found_record: Record | None) -> tuple[str | None, str, Directory]:
    if path.is_file():
        return wanted, "as asked for" if wanted else "a single file", Directory((WeightName(path.name),))
    if not path.is_dir():
        raise CheckpointNotFoundError(f"{path}: is neither a file nor a directory")
    if wanted is not None:
        directory = formats.ALL[wanted].find(path)
        if directory is None:
            raise CheckpointNotFoundError(f"{path}: has no weight files of the {wanted} format{_instead(path)}")
        return wanted, "as asked for", directory
    if found_record is not None:
        directory = formats.ALL[found_record.format].find(path)
        if directory is not None:
            return found_record.format, f"{record.MANIFEST} says so", directory
    directory = formats.ALL["hf"].find(path)
    if directory is not None:
        if (path / "config.json").is_file():
            return "hf", f"config.json and {directory.index or directory.weights[0].name}", directory
        return None, "weight files without config.json", directory
    directory = formats.ALL["meta"].find(path)
    if directory is not None:
        return "meta", directory.weights[0].name, directory
    directory = formats.ALL["native"].find(path)
    if directory is not None:
        return None, "weight files without config.json", directory
    raise CheckpointNotFoundError(
        f"{path}: has no weight files that are known ({', '.join('*' + suffix for suffix in WEIGHT_SUFFIXES)})"
        f"{_instead(path)}"
    )


def _instead(path: Path) -> str:
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        if any(entry.suffix in WEIGHT_SUFFIXES for entry in folder.iterdir()):
            return f"; there are some in {folder}"
    return ""


def _open(path: Path, weight: WeightName) -> WeightFile:
    file = path if path.is_file() else resolve(path, weight.name, str(path))
    try:
        opened = LocalFile(file, str(file))
    except OSError as error:
        raise CheckpointNotFoundError(f"{file}: cannot be read: {error.strerror}") from error
    reader, header = containers.parse(opened)
    return WeightFile(weight.name, weight.rank, file, reader, header)


def _by_keys(files: tuple[WeightFile, ...], why: str) -> tuple[str | None, str]:
    keys = {tensor.key for file in files for tensor in file.header.tensors}
    fits = {
        format
        for family in FAMILIES.values()
        for format in family.formats
        if keys and all(family.knows(format, key) for key in keys)
    }
    if len(fits) == 1:
        return fits.pop(), "its keys"
    if fits:
        return None, f"its keys fit more than one format: {', '.join(sorted(fits))}"
    return None, f"{why}, and its keys fit no format that is known"


def _model(checkpoint: Checkpoint) -> Model:
    path, content = checkpoint.params or _config(checkpoint)
    recorded = _recorded(checkpoint, path)
    return identify(
        content,
        str(path),
        str(checkpoint.format),
        checkpoint.ranks,
        checkpoint.options,
        family=checkpoint.family_name,
        recorded=recorded,
    )


def _config(checkpoint: Checkpoint) -> tuple[Path, dict[str, Any]]:
    name = {"meta": "params.json", "native": record.CONFIG}.get(str(checkpoint.format), "config.json")
    path = checkpoint.config_path or checkpoint.root / name
    if not path.is_file():
        raise ConfigError(
            f"{checkpoint.path}: has no {name}, so the model's sizes are not known; "
            "pass --config with its config.json or params.json"
        )
    return path, load_json(path if checkpoint.config_path else resolve(checkpoint.root, name, str(checkpoint.path)))


def _recorded(checkpoint: Checkpoint, config: Path) -> Recorded:
    """What the record says; the config in it counts as long as nobody changed the params.json made from it."""
    found = checkpoint.record
    if found is None:
        return Recorded()
    cut = found.manifest.get("dims", {}).get("embedding_cut")
    options = checkpoint.options
    asked = options.rope_factor or options.rope_theta or options.max_positions or checkpoint.config_path
    counts = checkpoint.format == "meta" and not asked and found.unchanged(config.name)
    path = found.config if counts else None
    return Recorded(found.tied, cut, load_json(path) if path is not None else None)


def _cut_axes(checkpoint: Checkpoint) -> dict[str, int | None]:
    try:
        model = checkpoint.model
    except CkptConvertError:
        return {}
    return {
        str(instance.key("meta")): column.cut_axis(model.dims)
        for instance in model.family.instances(model.dims)
        if (column := instance.row.column("meta")) is not None
    }


def _info(key: str, found: list[tuple[WeightFile, StoredTensor]], axis: int | None, known: bool) -> TensorInfo:
    tensor = found[0][1]
    shape = list(tensor.shape)
    if axis is not None and axis < len(shape):
        shape[axis] = sum(part.shape[axis] for _, part in found)
    parts = tuple(Part(file.name, part.offset, part.nbytes, part.shape, file.rank) for file, part in found)
    nbytes = sum(part.nbytes for part in parts) if axis is not None else parts[0].nbytes
    return TensorInfo(key, tuple(shape), tensor.dtype, nbytes, parts, axis, known or len(found) == 1)


def _whole(sources: list[Source], axis: int | None) -> Source:
    from ckpt_convert.models.lazy import concat

    first = sources[0]
    if axis is None or len(sources) == 1:
        return first
    return Source(first.key, first.dtype, concat([source.tensor for source in sources], axis), first.where)


def tensors_of(path: Path) -> list[tuple[WeightFile, StoredTensor]]:
    """The tensors of a single file, such as those that the record carries."""
    reader, header = containers.parse(LocalFile(path))
    file = WeightFile(path.name, 0, path, reader, header)
    return [(file, tensor) for tensor in header.tensors]


def usual_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that holds most bytes."""
    counts: Counter[str] = Counter()
    for _, tensor in checkpoint.stored:
        counts[tensor.dtype] += tensor.nbytes
    return counts.most_common(1)[0][0] if counts else "F32"
