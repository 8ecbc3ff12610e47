"""Checks of the directory: the index against the headers, and unused weight files."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import PurePosixPath
from typing import Any

from ckpt_convert.analysis.check.lenient_open import LenientCheckpoint
from ckpt_convert.checkpoint.findings import Finding
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.dtypes import CASTABLE
from ckpt_convert.errors import CkptConvertError
from ckpt_convert.formats.base import load_json
from ckpt_convert.formats.hf import alternative_set_advice
from ckpt_convert.formats.names import (
    ADAPTER,
    CONSOLIDATED,
    SHARD,
    TRAINING_PREFIXES,
    TRANSFORMERS_NAMES,
    index_for,
    is_found_without_index,
    is_index,
    is_unfinished,
    is_weights,
    shard_name,
)
from ckpt_convert.models import FAMILIES
from ckpt_convert.storage.names import partial_path, replaced_path
from ckpt_convert.storage.place import Place
from ckpt_convert.wording import first_few, short_repr


def check_index(opened: LenientCheckpoint) -> Iterator[Finding]:
    """Disagreements of index and headers, except for files that could not be opened."""
    for finding in opened.checkpoint.contradictions:
        if finding.check != "index" or finding.expected not in opened.unreadable_files:
            yield finding


def check_index_totals(opened: LenientCheckpoint) -> Iterator[Finding]:
    """The totals in the index against those of the tensors."""
    checkpoint = opened.checkpoint
    index = checkpoint.directory.index
    if index is None:
        return
    try:
        metadata = load_json(checkpoint.root / index).get("metadata")
    except CkptConvertError:
        return
    stated = metadata if isinstance(metadata, dict) else {}
    # If tensors share bytes (tied ones in .bin files), some writers count these once.
    distinct = {(file.name, tensor.offset, tensor.nbytes): tensor for file, tensor in opened.view.stored}
    everything = [tensor for _, tensor in opened.view.stored]
    packed = any(tensor.dtype not in CASTABLE for tensor in everything)
    for name, size in (("total_size", lambda t: t.nbytes), ("total_parameters", lambda t: prod(t.shape))):
        found = sum(map(size, everything))
        said = stated.get(name)
        unsure = packed or opened.view.family is None or (type(said) is int and said < found)
        if name == "total_parameters" and unsure:
            continue  # transformers counts no buffers, what it does not save (Marian's), and what is packed one by one
        if name in stated and said not in (found, sum(map(size, distinct.values()))):
            unit = " bytes" if name == "total_size" else ""
            text = (
                f"{name} is {short_repr(stated[name], 60)} in {index}, but the tensors have {found}{unit} together; "
                "the index was not made for these files, or was edited: correct it, or save the model again"
            )
            yield Finding("warning", "index", text, index, None, short_repr(stated[name], 60), str(found))


def check_leftovers(opened: LenientCheckpoint) -> Iterator[Finding]:
    """Weight files that the checkpoint does not use, and leftovers of interrupted programs."""
    path = opened.checkpoint.place
    if not path.is_folder():
        return
    for left in (partial_path(path.real()), replaced_path(path.real())):
        if left.is_folder():  # False if the name is too long for the file system
            text = (
                f"{left.name} next to the directory was left by a conversion that did not end; run that again with "
                "`resume=True`, or remove what is left"
            )
            yield Finding("warning", "leftover", text, left.name)
    used = {weight.name for weight in opened.checkpoint.directory.weights}
    known = {opened.checkpoint.directory.index, *(finding.file for finding in opened.findings)}
    names = sorted(entry.name for entry in path.children())
    for name in names:
        if is_unfinished(name):
            text = f"{name} was left by a download or a conversion that did not end; remove it, or fetch it to its end"
            yield Finding("warning", "leftover", text, name)
        elif is_index(name) and name not in known:
            yield from _other_index(path, name, used)
    unused = [name for name in names if is_weights(name) and name not in used and _counts(path, name)]
    if used.issubset(names):
        yield from _unused(unused, used, opened.checkpoint)
    elif (
        unused and alternative_set_advice(path, opened.checkpoint.directory) is None
    ):  # they may be the only weights here
        shown = first_few(unused, 3)
        text = f"{shown}: not used, and not checked; keep what is here until the files that are missing are found"
        yield Finding("note", "leftover", text, unused[0])


def check_shard_numbers(opened: LenientCheckpoint) -> Iterator[Finding]:
    """Whether the shard numbers of the used files form one complete set."""
    totals: dict[tuple[str, str], dict[int, list[int]]] = {}
    for weight in opened.checkpoint.directory.weights:
        if match := SHARD.fullmatch(weight.name):
            of = totals.setdefault((match["stem"], match["suffix"]), {})
            of.setdefault(int(match["total"]), []).append(int(match["number"]))
    indexed = opened.checkpoint.directory.index is not None
    for (stem, suffix), sets in totals.items():
        if len(sets) > 1:
            said = " and ".join(f"{len(numbers)} of a set of {total}" for total, numbers in sorted(sets.items()))
            whole = [total for total, numbers in sets.items() if len(set(numbers)) == total]
            way = (
                f"the set of {whole[0]} is whole: if it is the one that is meant, move the others aside"
                if len(whole) == 1
                else "fetch what is missing of the one that is meant before you move the others aside"
            )
            text = f"{stem}-…{suffix}: the files that are used are {said}; shards of two sets were mixed; {way}"
            yield Finding("warning" if indexed else "error", "shards", text)
            continue
        index = index_for(f"{stem}{suffix}")
        alone = not (opened.checkpoint.root / index).is_present()  # a broken index is reported where it is read
        if alone and opened.checkpoint.format == "hf" and len(opened.checkpoint.directory.weights) > 1:
            text = (
                f"{index} is missing: without it, transformers and others do not find the shards; download it, or "
                "write the checkpoint again with `convert_checkpoint(SRC, DST, to='hf')`"
            )
            yield Finding("warning", "index", text, index)
        for total, numbers in sets.items():
            first = 0 if 0 in numbers else 1
            lacking = sorted(set(range(first, min(total, 100_000) + first)) - set(numbers))
            if lacking and not indexed:
                width = _width(opened.checkpoint, stem)
                files = [shard_name(stem, number, total, suffix, width) for number in lacking[:6]]
                text = (
                    f"{len(lacking)} of {total} shards missing: {first_few(files, 5)}; download or copy what is missing"
                )
                yield Finding("error", "shards", text, None, None, str(total), str(len(numbers)))
            elif lacking:
                text = (
                    f"{opened.checkpoint.directory.index} names {len(numbers)} of {total} shards, and not number "
                    f"{', '.join(map(str, lacking[:5]))}; if keys are missing below, they are in these shards"
                )
                yield Finding("warning", "shards", text, opened.checkpoint.directory.index)


def check_file_names(opened: LenientCheckpoint) -> Iterator[Finding]:
    """Weight files beside a config.json that loaders do not find: without an index and not under a default name."""
    checkpoint = opened.checkpoint
    used = [weight.name for weight in checkpoint.directory.weights]
    family = FAMILIES.get(opened.view.family) if opened.view.family else None
    alone = checkpoint.format == "hf" and checkpoint.directory.index is None and checkpoint.directory.kind is None
    if family is not None and family.from_shapes is not None:
        return  # its loaders take a file of any name
    if not alone or not (checkpoint.root / "config.json").is_regular_file() or any(map(SHARD.fullmatch, used)):
        return
    for name in used:
        if not is_found_without_index(name):
            text = (
                f"{name} is no name that transformers and others find ({', '.join(TRANSFORMERS_NAMES)}): rename "
                "it if it is safetensors, or write the checkpoint again with `convert_checkpoint(SRC, DST, to='hf', "
                "container='safetensors')`"
            )
            yield Finding("warning", "shards", text, name)


def _width(checkpoint: Identified, stem: str) -> int:
    matches = (SHARD.fullmatch(weight.name) for weight in checkpoint.directory.weights)
    return next((len(match["number"]) for match in matches if match and match["stem"] == stem), 5)


def _counts(path: Place, name: str) -> bool:
    return not name.startswith((".", *TRAINING_PREFIXES)) and (
        (path / name).is_regular_file() or (path / name).link() is not None
    )


def _unused(names: list[str], used: set[str], checkpoint: Identified) -> Iterator[Finding]:
    sets = {(m["stem"], m["suffix"]) for name in used if (m := SHARD.fullmatch(name))}
    suffixes = {PurePosixPath(name).suffix for name in used}
    others: dict[str, list[str]] = {}
    for name in names:
        match = SHARD.fullmatch(name)
        said = checkpoint.directory.index or "no file"
        if match and ((match["stem"], match["suffix"]) in sets or match["suffix"] in suffixes):
            text = (
                f"{name} is a stale shard: {said} does not use it, but some loaders read every file of that kind; "
                "move it elsewhere"
            )
            yield Finding("warning", "leftover", text, name)
        elif name.startswith(CONSOLIDATED):
            others.setdefault("the same model in Meta's layout, perhaps", []).append(name)
        elif PurePosixPath(name).suffix not in suffixes:
            others.setdefault(f"another set of {PurePosixPath(name).suffix} files", []).append(name)
        else:
            text = f"{name} is not used: {said} names it; move it elsewhere if it does not belong here"
            yield Finding("warning", "leftover", text, name)
    for what, group in others.items():
        text = f"{first_few(group, 3)}: {what}; not used, and not checked (give the file to check it)"
        yield Finding("note", "leftover", text, group[0])


def _other_index(path: Place, name: str, used: set[str]) -> Iterator[Finding]:
    try:
        weight_map: Any = load_json(path / name).get("weight_map")
    except CkptConvertError:
        weight_map = None
    files = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    absent = sorted(file for file in files if not (path / file).is_regular_file())  # False for an invalid name
    if name.startswith((CONSOLIDATED, ADAPTER)) and not absent:
        return
    if absent:
        text = (
            f"{name} is stale: nothing uses it, and it names {len(absent)} files that are not here; move it elsewhere"
        )
        yield Finding("warning", "leftover", text, name)
    elif (
        files & used
        or not files
        or {PurePosixPath(name).suffix for name in used} & {PurePosixPath(name).suffix for name in files}
    ):
        text = f"{name} is not used, for a single weight file or another index comes before it; move it elsewhere"
        yield Finding("warning", "leftover", text, name)
