"""Finding a checkpoint's weight files, reading their headers, and detecting the format."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import field, replace
from functools import cached_property, partial
from operator import attrgetter
from pathlib import PurePosixPath
from typing import TypeVar

from ckpt_convert import containers, formats
from ckpt_convert.checkpoint import legacy_keys, record
from ckpt_convert.checkpoint.record import Record
from ckpt_convert.containers.dcp import is_dcp_index
from ckpt_convert.dtypes import majority_dtype
from ckpt_convert.errors import CheckpointNotFoundError
from ckpt_convert.formats import peft
from ckpt_convert.formats.base import WeightDirectory, WeightName, dcp_directory, plain_weights
from ckpt_convert.formats.hf import alternative_set_advice, numbered_shards
from ckpt_convert.formats.names import (
    ADAPTER_WEIGHTS,
    GGUF_SUFFIX,
    INDEX_SUFFIX,
    LOOSE_SUFFIXES,
    RANK,
    SHARD,
    TRAINING_PREFIXES,
    WEIGHT_SUFFIXES,
)
from ckpt_convert.models import FAMILIES, Family
from ckpt_convert.storage import hub, pointer
from ckpt_convert.storage.base import Closable, Entry
from ckpt_convert.storage.place import Place
from ckpt_convert.tensors.header import GGUF, SHARDED_TENSOR_CLASSES, FileTensor, StoredTensor, WeightFile
from ckpt_convert.values import frozen
from ckpt_convert.wording import first_few, option_text

T = TypeVar("T")

_INDEX = r"(?<![^.])(?:0|[1-9][0-9]*)(?![^.])"
"""A layer or expert index in a key."""

_CACHED = 32
"""Files of a store whose beginnings stay in memory once the headers were read: a conversion reads them again."""

_LOOSE = "weight files without config.json"
RECORDED = f"{record.MANIFEST} says so"
WRITTEN_BY_DCP = "written by torch.distributed.checkpoint"


@frozen(eq=False)
class OpenedFiles:
    """The weight files at a path, open, with their parsed headers and the format that was detected; no tensor is read.

    ``format`` is None when no known format fits; ``why`` is the evidence for the format, or says what the files are.
    ``facts`` are (label, text) pairs from the files' own metadata. ``identities`` are the files of the directory and of
    the record, with size and etag before any of them was read.
    """

    place: Place
    format: str | None
    why: str
    directory: WeightDirectory
    files: tuple[WeightFile, ...]
    facts: tuple[tuple[str, str], ...] = ()
    identities: Mapping[Place, Entry] = field(default_factory=dict, repr=False)

    @cached_property
    def root(self) -> Place:
        """The directory of the weight files."""
        return self.place if self.place.is_folder() else self.place.parent

    @cached_property
    def stored(self) -> tuple[FileTensor, ...]:
        """Every stored tensor with its file, in file and offset order; lazy tensors refer to them by position."""
        return tuple(
            [
                FileTensor(file, tensor)
                for file in self.files
                for tensor in sorted(file.header.tensors, key=attrgetter("offset"))
            ]
        )

    @property
    def keys(self) -> list[str]:
        """The stored keys, file by file."""
        return [tensor.key for file in self.files for tensor in file.header.tensors]

    @property
    def majority_dtype(self) -> str:
        """The dtype that holds most bytes."""
        return majority_dtype((tensor.dtype, tensor.nbytes) for _, tensor in self.stored) or "F32"


def checkpoint_place(path: Place) -> Place:
    """The place of a checkpoint from its index, a pointer file or its folder in the Hub's cache; other paths unchanged.

    Raises CheckpointNotFoundError for an index that is not the one that its directory is read by.
    """
    path = hub.resolve_snapshot(pointer.follow_pointer(path))
    if not path.name.endswith(INDEX_SUFFIX) or not path.is_regular_file():
        return path
    for format in ("hf", "native"):
        found = formats.ALL[format].find_weights(path.parent)
        if found is not None and found.index == path.name:
            return path.parent
    raise CheckpointNotFoundError(
        f"{path}: is an index, and not the one that the weights beside it are read by; give the directory, or a single "
        "weight file"
    )


def describe_part(path: Place) -> str | None:
    """Describe a single weight file as shard or rank of a checkpoint, by its name; None for a whole checkpoint."""
    if not path.is_regular_file():
        return None
    if (match := SHARD.fullmatch(path.name)) is not None and int(match["total"]) > 1:
        return f"shard {int(match['number'])} of {int(match['total'])}"
    if (match := RANK.fullmatch(path.name)) is not None:
        ranks = {found[1] for entry in path.parent.children() if (found := RANK.fullmatch(entry.name))}
        return f"rank {int(match[1])} of {len(ranks)}" if len(ranks) > 1 else None
    return None


def open_described(
    path: Place, requested: str | None, recorded: Record | None, identities: Mapping[Place, Entry]
) -> OpenedFiles | None:
    """The weight files of a directory in a store as its manifest describes them, without a request for any of them.

    None where it does not, or not as they are now.
    """
    format = recorded.format if recorded is not None else None
    if recorded is None or format is None or requested not in (None, format):
        return None
    from ckpt_convert.checkpoint.manifest_layout import described_files

    described = described_files(recorded)
    if described is None:
        return None
    weights = described.directory.weights
    places = [path.resolve_member(weight.name, record.MANIFEST) for weight in weights]
    files = tuple(
        WeightFile(weight.name, weight.rank, place, place.open(), header)
        for weight, place, header in zip(weights, places, described.headers, strict=True)
    )
    return OpenedFiles(path, format, RECORDED, described.directory, files, (), identities)


def open_weights(
    path: Place,
    requested: str | None,
    recorded: Record | None,
    identities: Mapping[Place, Entry],
    *,
    reads_index: bool = True,
) -> OpenedFiles:
    """Find and open the weight files at a path; ``requested`` is the requested format.

    Files that fit no format are opened all the same, with None as format. Without ``reads_index``, the index of shards
    that are all there by their names is not compared with them. Raises CheckpointNotFoundError where there are no
    weight files, and what reading a header raises.
    """
    shards = None if reads_index else numbered_shards(path)
    name, why, directory = detect_format(path, requested, recorded, shards)
    files, facts = open_files(path, directory)
    if name is None and directory.kind in (None, "dcp"):
        name, why = format_from_keys(files, why, directory.kind)
        loose = path.is_folder() and directory.index is None and directory.kind is None
        names = all_weight_files(path) if name is None and loose else []
        if names and names != [weight.name for weight in directory.weights]:
            close_files(files)
            directory = WeightDirectory(tuple(map(WeightName, names)))
            files, facts = open_files(path, directory)
    directory = _with_keys_of(files, directory)
    if any(file.header.kind == GGUF for file in files):
        name, why = None, "a GGUF file" if len(files) == 1 else "GGUF files"
    return OpenedFiles(path, name, why, directory, files, tuple(facts), identities)


def _with_keys_of(files: Sequence[WeightFile], directory: WeightDirectory) -> WeightDirectory:
    """The same index, sharing its strings with headers and file names: 100,000 keys are kept once."""
    if directory.weight_map is None:
        return directory
    names = {file.name: file.name for file in files}
    keys = {tensor.key: tensor.key for file in files for tensor in file.header.tensors}
    shared = {keys.get(key, key): names.get(name, name) for key, name in directory.weight_map.items()}
    return replace(directory, weight_map=shared)


def detect_format(
    path: Place, requested: str | None, recorded: Record | None, shards: WeightDirectory | None = None
) -> tuple[str | None, str, WeightDirectory]:
    """The format of a path, the evidence for it, and the weight files; raises what ``open_checkpoint`` does.

    ``shards`` are the weights in Hugging Face's format, if they are known already.
    """
    if path.is_regular_file():
        return _a_file(path, requested)
    if not path.is_folder():
        raise CheckpointNotFoundError(f"{path}: is neither a file nor a directory")
    if requested is not None:
        directory = _of_format(path, requested, shards)
        if directory is None:
            raise CheckpointNotFoundError(f"{path}: has no weight files of the {requested} format{_instead(path)}")
        return requested, "as asked for", directory
    if recorded is not None and recorded.format is not None:
        directory = _of_format(path, recorded.format, shards)
        if directory is not None:
            return recorded.format, RECORDED, directory
    return _by_names(path, shards)


def _a_file(path: Place, requested: str | None) -> tuple[str | None, str, WeightDirectory]:
    from ckpt_convert.containers.dcp import dcp

    if is_dcp_index(path.name):
        return requested, WRITTEN_BY_DCP, WeightDirectory((), path.name, kind=dcp.KIND)
    adapter = peft.read_adapter_config(path.parent) if path.name in ADAPTER_WEIGHTS and requested is None else None
    if adapter is not None:
        return None, peft.describe_adapter(adapter), WeightDirectory((WeightName(path.name),), kind=peft.KIND)
    return requested, "as asked for" if requested else "a single file", WeightDirectory((WeightName(path.name),))


def _of_format(path: Place, format: str, shards: WeightDirectory | None) -> WeightDirectory | None:
    if shards is not None and format == "hf":
        return shards
    return formats.ALL[format].find_weights(path) or _in_common(path, format)


def _by_names(path: Place, shards: WeightDirectory | None) -> tuple[str | None, str, WeightDirectory]:
    """The format of a directory by the names of its files."""
    found = shards or formats.ALL["hf"].find_weights(path)
    if found is not None and (path / "config.json").is_regular_file():
        return "hf", f"config.json and {found.index or found.weights[0].name}", found
    ranks = formats.ALL["meta"].find_weights(path) if found is None else None
    if ranks is not None:
        return "meta", ranks.weights[0].name, ranks
    if (pieces := dcp_directory(path)) is not None:
        return None, WRITTEN_BY_DCP, pieces
    adapter = peft.read_adapter_config(path) if found is None else None
    weights = [WeightName(name) for name in ADAPTER_WEIGHTS if (path / name).is_regular_file()]
    if adapter is not None and weights:
        return None, peft.describe_adapter(adapter), WeightDirectory((weights[0],), kind=peft.KIND)
    return None, _LOOSE, _loose(path, found or formats.ALL["native"].find_weights(path))


def _loose(path: Place, directory: WeightDirectory | None) -> WeightDirectory:
    """Weight files by their suffixes, or those ``directory``; raises CheckpointNotFoundError for none."""
    names = [weight.name for weight in directory.weights] if directory is not None else all_weight_files(path)
    if directory is not None and not all(name.startswith(TRAINING_PREFIXES) for name in names):
        return directory
    # Training state beside the weights is only opened where there are no weights.
    if not names or _instead(path):
        raise CheckpointNotFoundError(
            f"{path}: has no weight files that are known ({', '.join('*' + suffix for suffix in WEIGHT_SUFFIXES)})"
            f"{_instead(path)}"
        )
    return WeightDirectory(tuple(map(WeightName, names)))


def _in_common(path: Place, format: str) -> WeightDirectory | None:
    """The weights of a directory of this format in a container that several formats share."""
    if "dcp" in formats.ALL[format].containers and (found := dcp_directory(path)) is not None:
        return found
    names = plain_weights(path, (".pt",)) if "pt" in formats.ALL[format].containers else []
    return WeightDirectory(tuple(WeightName(name) for name in names)) if names else None


def open_files(path: Place, directory: WeightDirectory) -> tuple[tuple[WeightFile, ...], list[tuple[str, str]]]:
    """Open the weight files and read their headers; returns also facts from the files' own metadata."""
    root = path if path.is_folder() else path.parent
    if directory.kind == "dcp":
        from ckpt_convert.containers.dcp import dcp

        found, facts = dcp.read_dcp_directory(root)
        return tuple(WeightFile(file.name, 0, file.place, file.reader, file.header) for file in found), facts
    if path.is_folder() and (other := alternative_set_advice(path, directory)) is not None:
        raise CheckpointNotFoundError(f"{path}: {other}")
    files = tuple(open_each(path, partial(_open, path), directory.weights))
    if len(files) > _CACHED:
        from ckpt_convert.storage.object_store import ObjectFile

        for file in files:
            if isinstance(file.reader, ObjectFile):
                file.reader.forget()
    facts = peft.adapter_facts(root) if directory.kind == peft.KIND else []
    if len(files) == 1 and files[0].header.kind == GGUF:
        from ckpt_convert.containers import gguf

        facts += gguf.facts(files[0].header)
    return files, facts


def open_each(path: Place, do: Callable[[WeightName], T], weights: Sequence[WeightName]) -> list[T]:
    """``do(weight)`` for every weight file, in order; of a remote store many at a time, since each is a request."""
    if not path.store.prefers_listing or len(weights) < 2:
        return [do(weight) for weight in weights]
    from ckpt_convert.storage.object_store import AT_ONCE
    from ckpt_convert.tensors.pool import map_threaded

    return map_threaded(do, weights, min(AT_ONCE, len(weights)))


def format_from_keys(files: tuple[WeightFile, ...], why: str, kind: str | None = None) -> tuple[str | None, str]:
    """The format that all keys fit, and the evidence for it; None where that is not exactly one.

    Of formats with the same keys it is one that has containers of this ``kind``.
    """
    beginnings = tuple(name for format in formats.ALL.values() for name in format.ignored_prefixes)
    stored = [tensor.key for file in files for tensor in file.header.tensors]
    names = [key for key in stored if not key.startswith(beginnings)]
    others = {name for name, format in formats.ALL.items() if kind is not None and kind not in format.containers}
    # Layers differ only in their index, so one of each kind is enough; but where they differ in more (the blocks of an
    # autoencoder) all keys are tried. `others` have other containers: torchtitan's keys were once Meta's.
    patterns = {re.sub(_INDEX, "0", key) for key in names}
    fits = (_fitting(FAMILIES.built_in, patterns) or _fitting(FAMILIES.built_in, names)) - others
    fits = fits or _fitting(FAMILIES.outside.values(), names) - others
    if len(fits) == 1:
        return fits.pop(), "its keys"
    if not fits:
        scalars = legacy_keys.loose_scalars((t.key, t.shape) for file in files for t in file.header.tensors)
        nested = [key for key in stored if key not in scalars]
        fits = legacy_keys.matching_formats(nested, FAMILIES.values()) - others
        fits = fits or legacy_keys.matching_formats(nested, FAMILIES.values(), former=True) - others
        if len(fits) == 1:
            return fits.pop(), "its keys, as the notices say"
    if fits:
        return None, f"its keys fit more than one format: {', '.join(sorted(fits))}"
    return None, f"{why}, and its keys fit no format that is known"


def _fitting(families: Iterable[Family], keys: Collection[str]) -> set[str]:
    """The formats in which some family has all of these keys."""
    return {
        format
        for family in families
        for format in family.formats
        if keys and all(family.has_key(format, key) for key in keys)
    }


def file_notices(path: Place, files: Sequence[WeightFile]) -> list[str]:
    """What a user should know about the files: objects that are no tensors, files that are not used."""
    out: list[str] = []
    for file in files:
        foreign, objects = file.header.foreign, file.header.objects
        if SHARDED_TENSOR_CLASSES.intersection(foreign):
            out.append(
                f"{file.name}: holds what one rank has of tensors that are distributed over several (DTensor): the "
                "shapes below are those of its parts"
            )
        elif foreign:
            out.append(
                f"{file.name}: asks for objects of {first_few(foreign, 5, ' …')}, which tensors do not need; none was "
                "made, nothing was executed, and convert refuses the file"
            )
        if objects:
            names = first_few(_grouped(objects), 8, " …")
            said = "1 entry is no tensor" if len(objects) == 1 else f"{len(objects)} entries are no tensors"
            out.append(f"{file.name}: {said}: {names}")
    used = {file.name for file in files}
    there = path.children() if path.is_folder() else ()
    if unused := sorted(entry.name for entry in there if entry.suffix in WEIGHT_SUFFIXES and entry.name not in used):
        out.append(f"not used: {first_few(unused, 8, ' …')}")
    return out


def _grouped(objects: Mapping[str, str]) -> list[str]:
    """Entries with their types; nested entries by their top-level name and their number."""
    groups: dict[str, list[str]] = {}
    for key in objects:
        groups.setdefault(key.partition(".")[0], []).append(key)
    return [
        f"{keys[0]} ({objects[keys[0]]})" if len(keys) == 1 else f"{name} ({len(keys)} of its entries)"
        for name, keys in groups.items()
    ]


def close_files(files: Iterable[WeightFile]) -> None:
    for file in files:
        if isinstance(file.reader, Closable):
            file.reader.close()


def _open(path: Place, weight: WeightName) -> WeightFile:
    file = path if path.is_regular_file() else path.resolve_member(weight.name, str(path))
    reader, header = containers.parse_header(file.open(), foreign=True)
    return WeightFile(weight.name, weight.rank, file, reader, header)


def tensors_in_file(path: Place) -> list[tuple[WeightFile, StoredTensor]]:
    """The tensors of a single file, such as the record's passthrough tensors."""
    reader, header = containers.parse_header(path.open())
    file = WeightFile(path.name, 0, path, reader, header)
    return [(file, tensor) for tensor in header.tensors]


def all_weight_files(directory: Place) -> list[str]:
    """All weight files, without those that exist as safetensors as well; GGUF files where there are no others."""
    names = _named(directory, LOOSE_SUFFIXES)
    stems = {PurePosixPath(name).stem for name in names if name.endswith(".safetensors")}
    if any(stem.startswith("model") for stem in stems):
        names = [name for name in names if not name.startswith("pytorch_model") or not name.endswith(".bin")]
    return [name for name in names if name.endswith(".safetensors") or PurePosixPath(name).stem not in stems] or _named(
        directory, (GGUF_SUFFIX,)
    )


def _named(directory: Place, suffixes: tuple[str, ...]) -> list[str]:
    return sorted(
        entry.name for entry in directory.files() if entry.suffix in suffixes and not entry.name.startswith(".")
    )


def _instead(path: Place) -> str:
    from ckpt_convert.containers.dcp import dcp

    config = path / "config.json"
    for folder in sorted(entry for entry in path.folders() if not entry.name.startswith(".")):
        if folder.name.startswith(TRAINING_PREFIXES):
            continue
        if any(entry.suffix in LOOSE_SUFFIXES for entry in folder.children()) or dcp.is_dcp_directory(folder):
            how = f": give that, with {option_text('config', config)}" if config.is_regular_file() else ""
            return f"; there are some in {folder}{how}"
    return ""
