"""Hugging Face directories: config.json, one weight file or shards with an index that maps keys to files."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath

from ckpt_convert.errors import CorruptFileError
from ckpt_convert.formats.base import Format, WeightDirectory, WeightName, load_json, plain_weights
from ckpt_convert.formats.names import (
    ADAPTER,
    CONSOLIDATED,
    HF_STEMS,
    INDEX_SUFFIX,
    SHARD,
    SUFFIXES,
    TRANSFORMERS_NAMES,
    common_file_names,
    index_for,
    indexed_weights,
    is_variant,
    numbered_names,
)
from ckpt_convert.storage.names import check_name
from ckpt_convert.storage.place import Place


def find(directory: Place) -> WeightDirectory | None:
    """The weights that transformers would load: safetensors before .bin, a single file before an index without it."""
    for container, stem in HF_STEMS.items():
        suffix = SUFFIXES[container]
        single = stem + suffix
        index = _index(directory, single)
        found = weights_from_index(directory, index) if index is not None else None
        names = plain_weights(directory, (suffix,))
        if single in names and (found is None or single not in {weight.name for weight in found.weights}):
            return WeightDirectory((WeightName(single),))
        if found is not None:
            return found
        if names and container == "safetensors":
            return WeightDirectory(tuple(WeightName(name) for name in names if not is_variant(name, names)))
        shards = [name for name in names if name.startswith(stem)]
        if shards:
            return WeightDirectory(tuple(WeightName(name) for name in shards))
    return None


def numbered_shards(directory: Place) -> WeightDirectory | None:
    """The weights by their names alone, in a folder with a config and an index of the default names.

    None unless there are all of its shards, and no other weights that transformers would look at.
    """
    stem, suffix = HF_STEMS["safetensors"], SUFFIXES["safetensors"]
    names = {entry.name for entry in directory.files()} if directory.is_folder() else set()
    shards = sorted(name for name in names if name.endswith(suffix))
    index, whole = index_for(stem + suffix), numbered_names(len(shards), stem, suffix)
    if len(shards) < 2 or shards != whole or not names.issuperset(("config.json", index)):
        return None
    return WeightDirectory(tuple(map(WeightName, shards)), index)


def weights_from_index(directory: Place, name: str) -> WeightDirectory:
    """The files that an index names, each once, sorted; raises CorruptFileError for a malformed index."""
    path = directory.resolve_member(name, str(directory))
    weight_map = load_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{path}: has no weight_map, so it is no index; download or copy it again")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise CorruptFileError(f"{path}: its weight_map has values that are no file names; download or copy it again")
    weight_map = normalized_weight_map(weight_map)
    files = sorted(check_name(file, str(path)) for file in set(weight_map.values()))
    return WeightDirectory(tuple(WeightName(file) for file in files), name, weight_map)


def normalized_weight_map(weight_map: Mapping[str, str]) -> dict[str, str]:
    """An index's weight_map with "./name" replaced by "name"."""
    return {key: file.removeprefix("./") for key, file in weight_map.items()}


def file_names(count: int, container: str) -> list[str]:
    return common_file_names(count, container) or numbered_names(count, HF_STEMS[container], SUFFIXES[container])


def index_name(container: str) -> str:
    """The name of the index for shards of a container."""
    return index_for(HF_STEMS[container] + SUFFIXES[container])


def alternative_set_advice(directory: Place, found: WeightDirectory) -> str | None:
    """Advice if files that an index names are missing while another set of shards is complete; else None.

    It is unknown which of the two is meant, so the advice covers both.
    """
    used = {weight.name for weight in found.weights}
    names = {entry.name for entry in directory.children()}
    lacking = sorted(used - names)
    if found.index is None or not lacking:
        return None
    whole = [files for files in _whole_sets(names) if not used.issuperset(files)]
    if not whole:
        return None
    suffix, sets = PurePosixPath(indexed_weights(found.index)).suffix, " and ".join(map(_set, whole))
    mixed = sorted(name for name in used & names if name.endswith(suffix) and all(name not in files for files in whole))
    aside = " ".join([found.index, *mixed])
    return (
        f"{len(lacking)} of the {len(used)} files that {found.index} names {'is' if len(lacking) == 1 else 'are'} "
        f"missing ({lacking[0]}{', …' if len(lacking) > 1 else ''}), but {sets} "
        f"{'is a whole set' if len(whole) == 1 else 'are whole sets'} that it does not name; if "
        f"{'that is' if len(whole) == 1 else 'one of these is'} the one that is meant, move what belongs to the other "
        f"one aside (mkdir aside && mv {aside} aside/), else download or copy what is missing; remove nothing before"
    )


def _whole_sets(names: Collection[str]) -> list[list[str]]:
    """The complete sets of weight files in a directory, by name: single files, and all shards of n."""
    found = [[name] for name in TRANSFORMERS_NAMES if name in names]
    suffixes = {SUFFIXES[container] for container in HF_STEMS}
    sets: dict[tuple[str, int, str], dict[int, str]] = {}
    for name in names:
        if PurePosixPath(name).suffix in suffixes and (match := SHARD.fullmatch(name)):
            of = sets.setdefault((match["stem"], int(match["total"]), match["suffix"]), {})
            of[int(match["number"])] = name
    for (_, total, _), by_number in sorted(sets.items()):
        first = 0 if 0 in by_number else 1
        if len(by_number) == total and all(number in by_number for number in range(first, first + total)):
            found.append([by_number[number] for number in sorted(by_number)])
    return found


def _set(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _index(directory: Place, weights: str) -> str | None:
    """The index of a container: the default name, else the only other one, else that of the only variant."""
    usual = weights + INDEX_SUFFIX
    if (directory / usual).is_regular_file():
        return usual
    suffix = PurePosixPath(weights).suffix
    names = [entry.name for entry in directory.children()]
    for pattern in (f"*{suffix}{INDEX_SUFFIX}", f"*{suffix}.index.*.json"):
        others = sorted(fnmatch.filter(names, pattern))
        others = [name for name in others if not name.startswith((CONSOLIDATED, ADAPTER))]
        if others:
            return others[0] if len(others) == 1 and not (directory / weights).is_regular_file() else None
    return None


FORMAT = Format("hf", find, file_names, ("safetensors", "bin", "dcp", "pt"), "config.json", lambda name: True)
