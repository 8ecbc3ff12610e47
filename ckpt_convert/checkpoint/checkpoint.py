"""Opening a checkpoint: find its files, read their headers, and say which format and family it is."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_convert import containers, formats
from ckpt_convert.checkpoint import diagnosis, legacy_keys, mapping, opening, record
from ckpt_convert.checkpoint.findings import Finding
from ckpt_convert.checkpoint.legacy_keys import Names
from ckpt_convert.checkpoint.mapping import Source
from ckpt_convert.checkpoint.model import Model, is_bare, model_of, names_of
from ckpt_convert.checkpoint.record import Layout, Record
from ckpt_convert.checkpoint.tensors import TensorInfo, assembled, describe
from ckpt_convert.dtypes import DTYPES, majority
from ckpt_convert.errors import (
    AmbiguousFormatError,
    CheckpointNotFoundError,
    CkptConvertError,
    ConfigError,
    CorruptFileError,
    InputError,
    KeyMismatchError,
    UnsafeFileError,
    UnsupportedFamilyError,
    UsageError,
    listing,
)
from ckpt_convert.formats.base import RECORD_FOLDER, Directory, load_json
from ckpt_convert.models import FAMILIES
from ckpt_convert.models.core.config import ConfigOptions
from ckpt_convert.storage import hub
from ckpt_convert.storage.base import read
from ckpt_convert.storage.names import JOURNAL, local_path, resolve
from ckpt_convert.storage.reader import Identity, LocalFile, exists, identify, identities, reading
from ckpt_convert.tensors.bulk import without_collector
from ckpt_convert.tensors.header import StoredTensor, WeightFile
from ckpt_convert.tensors.lazy import LazyTensor, concat, stored

if TYPE_CHECKING:
    import torch

    from ckpt_convert.checkpoint.quantized.recognise import Quantization

_ADVICE = {
    "peft": "merge the adapter into its base model first (peft's merge_and_unload), then convert that",
    "dcp": "say which format it is with --from, and give its config.json with --config if none lies in ckpt_convert/",
    "gguf": "it can be looked at, not converted; take the original checkpoint",
}
"""What to do about what is no format, by kind."""


@dataclass
class Checkpoint:
    """A checkpoint whose headers were read; no tensor was. Close it, or use it as a context manager.

    ``format`` is None when the files are of no format that is known; ``why`` says what the format was told by, or what
    the files are. ``facts`` are (label, text): more that the files say of themselves, such as an adapter's base model.
    ``seen`` are the files of the directory and the record as they were before any of them was read.
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
    facts: tuple[tuple[str, str], ...] = ()
    seen: Mapping[Path, Identity] = field(default_factory=dict, repr=False)

    @cached_property
    def root(self) -> Path:
        """The directory that the weight files lie in."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def stored(self) -> tuple[tuple[WeightFile, StoredTensor], ...]:
        """Every stored tensor with its file, in file and offset order; the position is its number as a source."""
        with without_collector():
            return tuple(
                [
                    (file, tensor)
                    for file in self.files
                    for tensor in sorted(file.header.tensors, key=attrgetter("offset"))
                ]
            )

    @property
    def ranks(self) -> list[dict[str, Source]]:
        """For each rank, its tensors by the keys of the format.

        Raises KeyMismatchError for keys given twice or not as the index says, or that can be read in several ways.
        """
        if self.contradictions:
            said = listing([finding.text for finding in self.contradictions])
            raise KeyMismatchError(f"{self.path}: the files contradict each other:{said}")
        return self._named

    @cached_property
    def names(self) -> Names:
        """What the keys of the files are called in their format; ``tensors`` and ``stored`` have those of the files.

        Those of a quantised checkpoint are left as they are: no table knows its scales.
        """
        return names_of(self) if self.quantization is None else legacy_keys.PLAIN

    @cached_property
    def is_bare(self) -> bool:
        """Whether the keys are those of a model without its head, which an output of the same format keeps."""
        return is_bare(self)

    @cached_property
    def _named(self) -> list[dict[str, Source]]:
        names = self.names
        if self.has_only_weights:
            return self._sources[0]
        return [
            {(name := names.of(key)): source._replace(key=name) for key, source in rank.items() if self.is_weight(key)}
            for rank in self._sources[0]
        ]

    @property
    def contradictions(self) -> list[Finding]:
        """Where the files disagree with each other, or with the index."""
        return self._sources[1]

    @cached_property
    def _sources(self) -> tuple[list[dict[str, Source]], list[Finding]]:
        with without_collector():
            return self._make_sources()

    def _make_sources(self) -> tuple[list[dict[str, Source]], list[Finding]]:
        ranks: list[dict[str, Source]] = [{} for _ in range(max((f.rank for f in self.files), default=0) + 1)]
        findings = []
        boxes: dict[str, list[tuple[int, StoredTensor]]] = {}
        for number, (file, tensor) in enumerate(self.stored):
            key = self._name(file, tensor)
            rank = ranks[file.rank]
            if tensor.box is not None:
                boxes.setdefault(key, []).append((number, tensor))
                if len(boxes[key]) > 1:
                    continue
            elif key in rank and self.is_weight(key):
                text = f"{key} is in {rank[key].where} and in {file.name}"
                findings.append(Finding("error", "duplicate", text, file.name, key))
            rank[key] = Source(key, tensor.dtype, stored(number, tensor.shape, tensor.strides), file.name)
        for key, pieces in boxes.items():
            ranks[0][key] = ranks[0][key]._replace(tensor=assembled(pieces))
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
        for key, text in self.names.clashes:
            findings.append(Finding("error", "duplicate", text, None, key))
        return ranks, findings

    def is_weight(self, key: str) -> bool:
        """Whether a key is one of the model's, and not of what else its training run has saved."""
        return key not in self.names.other and not key.startswith(self._ignores)

    @property
    def _ignores(self) -> tuple[str, ...]:
        return formats.ALL[self.format].ignores if self.format is not None else ()

    @cached_property
    def _twice(self) -> dict[str, str]:
        found = (finding for finding in self.contradictions if finding.check == "duplicate" and finding.file)
        return {str(finding.key): finding.text for finding in found}

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
            return self.stated if self.config_file.name != "params.json" else None

    @property
    def config_file(self) -> Path:
        """The config that was given, else the place of the format's own, where there may be none."""
        own = (formats.ALL[self.format].config or record.CONFIG) if self.format else "config.json"
        return self.config_path or self.root / own

    @cached_property
    def stated(self) -> dict[str, Any] | None:
        """What the config file says, None where there is none; it is read once.

        Raises ConfigError for one that says nothing, and what ``resolve`` and ``load_json`` do.
        """
        path = self.config_file
        if not exists(path):
            return None
        if self.config_path is None:
            resolve(self.root, path.relative_to(self.root).as_posix(), str(self.path))
        return load_json(path)

    @cached_property
    def model(self) -> Model:
        """Family and config; raises ConfigError or UnsupportedFamilyError where they are not to be had."""
        if self.format is None:
            raise AmbiguousFormatError(f"{self.path}: {self.why}; {self.advice}")
        if (cause := diagnosis.placeholders(self)) is not None:  # of any family: there are no values to move
            raise KeyMismatchError(f"{self.path}: {cause}")
        model = model_of(self)
        if (cause := diagnosis.unmerged(self)) is not None:
            raise KeyMismatchError(f"{self.path}: {cause}")
        if self.unknown_scheme is not None:
            raise UnsupportedFamilyError(
                f"{self.path}: is quantised ({self.unknown_scheme}), which is no scheme that is known here: it can "
                "only be laid out anew as it is (--to hf); for anything else dequantise it with the tool that made it, "
                "or take the model that was quantised"
            )
        return model

    @cached_property
    def unknown_scheme(self) -> str | None:
        """The config's word for how the weights are quantised, where no rule knows it and the headers show it."""
        from ckpt_convert.checkpoint.quantized.recognise import unknown_scheme

        scheme = unknown_scheme(self) if self.quantization is None else None
        if scheme is None or self.contradictions:
            return None
        try:
            model = model_of(self)
        except CkptConvertError:
            return scheme
        _, misfits = mapping.examine(model.family, str(self.format), model.dims, self.ranks)
        return scheme if misfits else None

    def model_for(self, *formats: str) -> Model:
        """``model``, for what has to do with these formats alone.

        Where Hugging Face's is the only one, a family that is not known does not matter: its keys are taken as they
        are, and so are those of quantised tensors. Raises what ``model`` does for anything else, and what does not fit
        of a quantised checkpoint.
        """
        try:
            model = self.model
        except UnsupportedFamilyError:
            if {self.format, *formats} != {"hf"} or not self.files:
                raise
            return self._unknown
        from ckpt_convert.checkpoint.quantized import carry

        return carry.carried(self, model, frozenset((str(self.format), *formats)))

    @cached_property
    def quantization(self) -> Quantization | None:
        """What of it is quantised, None for nothing; told from headers and config."""
        from ckpt_convert.checkpoint.quantized.recognise import quantization_of

        return quantization_of(self)

    @cached_property
    def _unknown(self) -> Model:
        from ckpt_convert.checkpoint import unknown

        return unknown.model(self)

    @property
    def advice(self) -> str:
        """What to do about files that are of no format."""
        kinds = {self.directory.kind, *(file.header.kind for file in self.files)}
        return next((advice for kind, advice in _ADVICE.items() if kind in kinds), "say which format it is with --from")

    def refuse_foreign(self) -> None:
        """Raise UnsafeFileError where a pickle asks for more than tensors and plain data: that can only be shown."""
        for file in self.files:
            if file.header.foreign:
                from ckpt_convert.containers.pickle import torchpickle

                raise torchpickle.refusal(str(file.path), "data.pkl", *file.header.foreign)

    @cached_property
    def params(self) -> tuple[Path, dict[str, Any]] | None:
        """params.json of a meta checkpoint, or what was given instead of it."""
        if self.format != "meta":
            return None
        return (self.config_file, self.stated) if self.stated is not None else None

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by key, ranks and pieces joined: full shape, dtype, bytes, and the parts it lies in.

        Where several files of no known format have a key, theirs are called ``file:key``.
        """
        cuts = _cuts(self) if len(self.files) > 1 and self.format == "meta" else {}
        cuts = {self.names.stored.get(key, key): cut for key, cut in cuts.items()}
        with without_collector():
            return describe(self.stored, self._name, cuts, self.format == "meta")

    def _name(self, file: WeightFile, tensor: StoredTensor) -> str:
        return f"{file.name}:{tensor.key}" if tensor.key in self._shared else tensor.key

    @cached_property
    def _shared(self) -> frozenset[str]:
        """Keys that several files have, each for itself: nothing says that the files are one checkpoint."""
        if self.format is not None or self.directory.index is not None or len(self.files) == 1:
            return frozenset()
        keys = Counter(tensor.key for file in self.files for tensor in file.header.tensors if tensor.box is None)
        return frozenset(key for key, count in keys.items() if count > 1)

    @property
    def notices(self) -> list[str]:
        """What a reader should know about the files: objects that are no tensors, files that are not used."""
        return [*opening.notices(self.path, self.files), *self.read_as, *self._caveats]

    @property
    def _caveats(self) -> tuple[str, ...]:
        family = FAMILIES.get(self.family or "")
        return family.caveats(str(self.format)) if family is not None else ()

    @property
    def read_as(self) -> list[str]:
        """How keys are read that are not those of the format, and what is passed over as it is no weight."""
        known = self.has_only_weights
        other = [] if known else [tensor.key for _, tensor in self.stored if not self.is_weight(tensor.key)]
        said = ", ".join(sorted(set(map(legacy_keys.entry, other))))
        count = f"{len(other):,} tensors" if len(other) != 1 else "1 tensor"
        passed = [f"passed over, as no weights: {count} of {said}"] if other else []
        return [*self.names.notices, *passed]

    def layout(self, *, literal: bool = False) -> Layout:
        """How this checkpoint lies in its files, to be recorded or imitated.

        With keys that are not those of the format, or with more than weights: how the weights alone would lie there,
        under the keys of the format; ``literal`` takes everything as it is.
        """
        from ckpt_convert.checkpoint.captured import layout_of  # not needed to look at a checkpoint

        return layout_of(self, literal=literal or self.has_only_weights)

    @property
    def has_only_weights(self) -> bool:
        """Whether every key is one of the format's own, so that nothing is renamed or passed over."""
        return self.names.plain and not self._ignores

    def info(self, key: str) -> TensorInfo:
        """What is known of a tensor, by its key in the files or in the format; raises KeyError for an unknown key."""
        return self.tensors[key if key in self.tensors else self.names.stored.get(key, key)]

    def joined(self, key: str) -> tuple[LazyTensor, str]:
        """A tensor by its key in the files, or in the format: ranks and pieces joined, and its dtype.

        Its tiles are numbered as ``stored``.

        Raises KeyError for an unknown key, AmbiguousFormatError where nothing says how ranks are joined,
        KeyMismatchError where two files have the key, and InputError for a packing whose numbers cannot be told apart.
        """
        info = self.info(key)
        key = info.key
        if not info.settled:
            raise AmbiguousFormatError(
                f"{self.path}: {key} lies on {len(info.parts)} ranks, and nothing says how to join them; "
                "give the model's params.json (or config=)"
            )
        if info.dtype not in DTYPES:
            raise InputError(
                f"{self.path}: {key} is {info.dtype}, which packs several numbers together; its values cannot be read"
            )
        if key in self._twice:
            raise KeyMismatchError(f"{self.path}: {self._twice[key]}; give one of the files")
        tensors = [rank[key].tensor for rank in self._sources[0] if key in rank]
        tensors = tensors[:: info.copies]
        whole = concat(tensors, info.axis) if info.axis is not None and len(tensors) > 1 else tensors[0]
        return whole, info.dtype

    def read_bytes(self, key: str) -> bytes:
        """The bytes of one tensor, dense and row-major, ranks and pieces joined; as stored where numbers are packed.

        Raises what ``joined`` does, but for packed numbers.
        """
        from ckpt_convert.tensors.gather import Gatherer

        info = self.info(key)
        if info.dtype not in DTYPES and len(info.parts) == 1:
            reader = next(file.reader for file in self.files if file.name == info.parts[0].file)
            return read(reader, info.parts[0].offset, info.nbytes)
        return Gatherer(self.stored).read(*self.joined(key))

    def read(self, key: str) -> torch.Tensor:
        """One tensor, read from the file now; raises KeyError for an unknown key."""
        import torch

        from ckpt_convert.tensors.gather import Gatherer

        info = self.info(key)
        data = Gatherer(self.stored).read(*self.joined(key))
        flat = torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[: info.nbytes]
        return flat.view(getattr(torch, DTYPES[info.dtype].torch)).reshape(info.shape)

    __getitem__ = read

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def close(self) -> None:
        opening.close(self.files)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@reading()
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
    path = opening.place(hub.here(path) or hub.locate(path, format=format))
    if path.is_dir() and exists(path / JOURNAL):
        raise CorruptFileError(
            f"{path}: is the unfinished output of a conversion; run that again with --resume, or without to start anew"
        )
    return read_checkpoint(path, format=format, family=family, config=config, options=options)


@reading()
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
    config_path = local_path(config, "config") if config is not None else None
    if format is not None and format not in formats.ALL:
        raise UsageError(f"--from {format}: no such format; known: {', '.join(formats.ALL)}")
    if config_path is not None and not config_path.is_file():
        raise ConfigError(f"{config_path}: no such file; --config takes a config.json or params.json")
    if not path.exists():
        raise CheckpointNotFoundError(f"{path}: no such file or directory")
    seen = identities(path, RECORD_FOLDER) if path.is_dir() else {path: identify(path)}
    found_record = record.load(path) if path.is_dir() else None
    with without_collector():
        found = opening.find(path, format, found_record)
    opened = Checkpoint(
        path,
        found.format,
        found.why,
        found.files,
        found.directory,
        found_record,
        family,
        config_path,
        options or ConfigOptions(),
        found.facts,
        seen,
    )
    with contextlib.suppress(ConfigError, UnsafeFileError):  # what is wrong with it is said where it is needed
        _ = opened.stated
    return opened


def _cuts(checkpoint: Checkpoint) -> dict[str, tuple[int | None, int]]:
    """The axis of each key that ranks cut, and how many of them in succession hold the same part."""
    try:
        model = checkpoint.model
    except CkptConvertError:
        return {}
    ranks = max(file.rank for file in checkpoint.files) + 1
    return {
        entry.key: (entry.cut_axis("meta", model.dims), entry.column("meta").repeats(model.dims, ranks))
        for entry in model.family.entries("meta", model.dims)
    }


def tensors_of(path: Path) -> list[tuple[WeightFile, StoredTensor]]:
    """The tensors of a single file, such as those that the record carries."""
    reader, header = containers.parse(LocalFile(path))
    file = WeightFile(path.name, 0, path, reader, header)
    return [(file, tensor) for tensor in header.tensors]


def usual_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that holds most bytes."""
    return majority((tensor.dtype, tensor.nbytes) for _, tensor in checkpoint.stored) or "F32"
