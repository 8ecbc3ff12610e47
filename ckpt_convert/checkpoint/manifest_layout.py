"""What a manifest says of weight files and config, so that a look into a store takes no request for each file.

``layout`` names the index and the weight files; of each file rank, kind and metadata, and for each tensor, in the order
of the header, a line of dtype, shape, offset and key. ``config`` is the text of the record's config.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_convert.checkpoint import record
from ckpt_convert.checkpoint.record import Record
from ckpt_convert.containers import safetensors
from ckpt_convert.dtypes import DTYPES
from ckpt_convert.formats.base import WeightDirectory, WeightName
from ckpt_convert.formats.names import is_any_index, is_any_weights
from ckpt_convert.storage.base import Version
from ckpt_convert.storage.checksums import digest
from ckpt_convert.storage.listing import Listing
from ckpt_convert.storage.place import Place
from ckpt_convert.tensors.header import Header, StoredTensor

LAYOUT = "layout"
CONFIG = "config"
"""Keys of the manifest, which earlier versions ignore."""

_KINDS = (safetensors.KIND, "torch")
"""The kinds of files that are described. The headers of DCP files are in one small file, which is read."""

_LINE = re.compile(r"(\w+) ((?:\d{1,18}(?:x\d{1,18})*)?) @(\d{1,18}) (.*)", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class DescribedFiles:
    """The weight files of a directory, and the header of each."""

    directory: WeightDirectory
    headers: tuple[Header, ...]


def describe_layout(files: Iterable[tuple[str, int, Header]], index: str | None) -> dict[str, Any] | None:
    """The ``layout`` of files, each by name, rank and header; None if one holds more than plain tensors."""
    described: dict[str, Any] = {}
    for name, rank, header in sorted(files, key=lambda file: file[0]):
        if header.kind not in _KINDS or header.objects or header.foreign or not all(map(_is_plain, header.tensors)):
            return None
        metadata = {"metadata": dict(header.metadata)} if header.metadata else {}
        lines = [f"{t.dtype} {'x'.join(map(str, t.shape))} @{t.offset} {t.key}" for t in header.tensors]
        described[name] = {"rank": rank, "kind": header.kind, **metadata, "tensors": lines}
    return {"index": index, "files": described}


def _is_plain(tensor: StoredTensor) -> bool:
    return tensor.strides is None and tensor.packed is None and tensor.box is None


def described_headers(manifest: Mapping[str, Any]) -> dict[WeightName, Header]:
    """The header of each weight file as the manifest describes it, in the order of ranks; {} where it does not."""
    try:
        sizes = {name: int(file["size"]) for name, file in manifest["files"].items()}
        files = manifest[LAYOUT]["files"]
        names = sorted((int(file["rank"]), str(name)) for name, file in files.items())
        return {WeightName(name, rank): _header(files[name], sizes[name]) for rank, name in names}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _header(file: Mapping[str, Any], size: int) -> Header:
    tensors = tuple(_tensor(str(line), size) for line in file["tensors"])
    metadata = {str(name): str(value) for name, value in file.get("metadata", {}).items()}
    if file["kind"] not in _KINDS:
        raise ValueError(file["kind"])
    return Header(file["kind"], size, tensors, metadata)


def _tensor(line: str, size: int) -> StoredTensor:
    found = _LINE.fullmatch(line)
    if found is None or found[1] not in DTYPES:
        raise ValueError(line)
    shape = tuple(map(int, found[2].split("x"))) if found[2] else ()
    tensor = StoredTensor(found[4], found[1], shape, int(found[3]))
    if tensor.offset + tensor.nbytes > size:
        raise ValueError(line)
    return tensor


def described_files(found: Record) -> DescribedFiles | None:
    """The weight files of a directory as its manifest describes them; None where they have to be read.

    They have to be in a store that does not tell when a file was written; and where a weight file or an index was
    added, removed, resized, or written after the manifest, which is written last.
    """
    headers = described_headers(found.manifest)
    index = found.manifest[LAYOUT].get("index") if headers else None
    sizes = {file.name: header.size for file, header in headers.items()}
    if {file.rank for file in headers} != {*range(len({file.rank for file in headers}))}:
        return None
    if not headers or not _are_as_written(found, sizes, index):
        return None
    keys = {tensor.key: file.name for file, header in headers.items() for tensor in header.tensors}
    directory = WeightDirectory(tuple(headers), index, keys if index is not None else None)
    return DescribedFiles(directory, tuple(headers.values()))


def _are_as_written(found: Record, sizes: Mapping[str, int], index: str | None) -> bool:
    """Whether these weight files and the index are there, and no others, none of them later than the manifest."""
    entries = found.directory.entries(deep=False) if isinstance(found.directory.listing, Listing) else {}
    there = {place.name: place for place in entries if is_any_weights(place.name) or is_any_index(place.name)}
    return (
        there.keys() == {*sizes, *([index] if index is not None else ())}
        and all(entries[place].size == sizes.get(name, entries[place].size) for name, place in there.items())
        and all(_is_as_old(found, place) for place in there.values())
    )


def _is_as_old(found: Record, place: Place) -> bool:
    """Whether a file was not written after the manifest, by the store's clock."""
    entry, last = place.identity(), (found.directory / record.MANIFEST).identity()
    times = [one.modified for one in (entry, last) if isinstance(one, Version) and one.modified is not None]
    return len(times) == 2 and times[0] <= times[1]


def remember_config(found: Record) -> None:
    """Take the record's config from the manifest, if it was not written later: the listing has it as if it was read."""
    place, text = found.folder / "config.json", found.manifest.get(CONFIG)
    listing = place.listing
    if not isinstance(text, str) or not isinstance(listing, Listing) or not place.is_regular_file():
        return
    data = text.encode()
    if digest(data) == found.checksums.get(record.CONFIG) and _is_as_old(found, place):
        listing.contents.setdefault(str(place.path), data)
