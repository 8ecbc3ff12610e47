"""The record, the folder ``ckpt_convert/`` in an output: a manifest, and the layouts of the formats it came from.

``manifest.json`` describes the output directory; ``config.json`` is the model's config with Hugging Face's keys;
``layouts/FORMAT/`` keeps, for each earlier format of the weights, every byte of its files that belongs to no tensor,
the tensors that a later format could not hold, and Meta's params.json and checklist.chk; ``side/`` keeps auxiliary
files that this format does not use. With these the round trip A → B → A reproduces A.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from ckpt_convert import containers
from ckpt_convert.errors import (
    CkptConvertError,
    ConfigError,
    CorruptFileError,
    InputError,
    NewerVersionError,
    UnreadableError,
)
from ckpt_convert.formats.base import JSON_LIMIT, load_json, render_json
from ckpt_convert.formats.names import RECORD_FOLDER
from ckpt_convert.models import FORMATS
from ckpt_convert.storage.names import check_name, partial_path
from ckpt_convert.storage.place import Place
from ckpt_convert.tensors.header import Box, FileLayout, Header, StoredTensor
from ckpt_convert.values import frozen

SCHEMA = 2
"""The schema of manifests. Schema 1 has no checksum of itself nor of headers, and XXH3 of pieces at any offset."""

ACCEPTED = "accepted"
"""The manifest's list of files that were edited on purpose: their checksums match, but are not those as written."""

LAYOUT_SCHEMA = 1
"""The schema of ``layout.json``."""

CHECKSUM = "manifest_checksum"
"""The manifest's key for its own checksum: the XXH3 of everything else, as JSON without spaces with sorted keys."""

ALGORITHMS = {"weights": "crc64_xz", "files": "xxh3_64"}
"""The checksums, by their names in ``storage.checksums``, of weight files (pieces and headers), and of all others."""

MANIFEST = f"{RECORD_FOLDER}/manifest.json"
CONFIG = f"{RECORD_FOLDER}/config.json"
TRAINING_STATE = "training_state"
"""The folder of a saved step's training state."""

MERGED = "merged"
"""The folder of the full weights beside an adapter, with a manifest of its own."""


@frozen()
class LayoutFile:
    """One weight file of a layout; ``literals`` is None when the file cannot be rebuilt byte for byte."""

    name: str
    rank: int
    header: Header
    literals: tuple[tuple[int, bytes], ...] | None

    @property
    def file_layout(self) -> FileLayout | None:
        return None if self.literals is None else FileLayout(self.header, self.literals)


@frozen()
class Layout:
    """The layout of a checkpoint: which key is in which file, in which order, under which header."""

    format: str
    files: tuple[LayoutFile, ...]
    index: tuple[str, bytes] | None = None

    @property
    def ranks(self) -> int:
        return max((file.rank for file in self.files), default=0) + 1

    @property
    def ranked_keys(self) -> set[tuple[int, str]]:
        """(rank, key) of every tensor."""
        return {(file.rank, tensor.key) for file in self.files for tensor in file.header.tensors}


@frozen()
class Record:
    """The ``ckpt_convert/`` folder of a checkpoint."""

    directory: Place
    manifest: Mapping[str, Any]

    @property
    def folder(self) -> Place:
        return self.directory / RECORD_FOLDER

    @property
    def format(self) -> str | None:
        """The format of the files; None where they hold tensors as they were stored elsewhere."""
        said = self.manifest["format"]
        return None if said is None else str(said)

    @property
    def weights_checksum(self) -> str | None:
        """The checksum algorithm of pieces of weight files; None where the manifest names no known one."""
        said = self.manifest.get("checksum")
        if self.manifest["schema"] == 1:
            return ALGORITHMS["files"] if said == ALGORITHMS["files"] else None
        return ALGORITHMS["weights"] if said == ALGORITHMS else None

    @property
    def tied(self) -> bool | None:
        tied = self.manifest.get("tied")
        return tied if isinstance(tied, bool) else None

    @property
    def layouts(self) -> tuple[str, ...]:
        """The formats whose layout is recorded here."""
        folder = self.folder / "layouts"
        return tuple(sorted(entry.name for entry in folder.children())) if folder.is_folder() else ()

    @cached_property
    def auxiliary_files(self) -> dict[str, dict[str, str]]:
        """Name → manifest entry (origin and checksum) of each auxiliary file."""
        return {str(entry["name"]): entry for entry in self.manifest.get("side_files", [])}

    def meta_file(self, name: str) -> Place | None:
        """The original params.json or checklist.chk, from when the weights were in Meta's format."""
        return self._kept(f"layouts/meta/{name}")

    @property
    def config(self) -> Place | None:
        """The model's config with Hugging Face's keys."""
        return self._kept("config.json")

    def _kept(self, name: str) -> Place | None:
        """A file of the record, if it exists; raises UnsafeFileError for a link that leaves the directory."""
        if not (self.folder / name).is_regular_file():
            return None
        return self.directory.resolve_member(f"{RECORD_FOLDER}/{name}", MANIFEST)

    def unchanged(self, name: str) -> bool:
        """Whether an auxiliary file, or a file of the record, is unchanged since it was written."""
        return name not in self.manifest.get(ACCEPTED, ()) and self.matches(name) is True

    def edited(self, *, own_config: bool) -> list[str]:
        """The auxiliary files that differ from their checksums, with ``own_config`` also the record's config."""
        return [
            name for name in (*self.auxiliary_files, *([CONFIG] if own_config else ())) if self.matches(name) is False
        ]

    def matches(self, name: str) -> bool | None:
        """Whether a file has its checksum in the manifest; None where that has none, or there is no file."""
        entry = self.auxiliary_files.get(name)
        checksum = entry["checksum"] if entry else self.checksums.get(name)
        if checksum is None:
            return None
        from ckpt_convert.storage.checksums import digest_file

        try:
            return digest_file(self.directory.resolve_member(name, MANIFEST)) == checksum
        except UnreadableError:
            raise  # its content may be right
        except CkptConvertError:
            return None

    @property
    def checksums(self) -> Mapping[str, str]:
        """The checksum of each file of the record."""
        found = self.manifest.get("record", {})
        return found if isinstance(found, dict) else {}

    def layout(self, format: str) -> Layout | None:
        """The recorded layout of a format, if any; raises CorruptFileError when it is damaged."""
        if format not in self.layouts:
            return None
        for name, path in self.files_of_layout(format):
            if name in self.checksums and path.suffix != ".safetensors" and not self.unchanged(name):
                raise CorruptFileError(
                    f"{path}: was edited or damaged; put it back, or move the folder {path.parent} elsewhere to do "
                    "without this layout"
                )
        return read_layout(self.folder / "layouts" / format)

    def passthrough_tensors(self, format: str) -> Place | None:
        """The file of the tensors that only this format can hold."""
        return self._kept(f"layouts/{format}/carried.safetensors")

    @cached_property
    def passthrough_files(self) -> dict[str, Place]:
        """The auxiliary files that the output's format does not use, by name."""
        folder = self.folder / "side"
        if not folder.is_folder():
            return {}
        return {path.relative_name(folder): path for path in self._files(folder)}

    def _files(self, folder: Place) -> list[Place]:
        """The files below a folder of the record; raises UnsafeFileError for a link that leaves the directory."""
        return [
            self.directory.resolve_member(path.relative_name(self.directory), MANIFEST)
            for path in sorted(folder.entries())
        ]

    def files_of_layout(self, format: str) -> Iterator[tuple[str, Place]]:
        """Every file of a recorded layout, with its name in an output."""
        for path in self._files(self.folder / "layouts" / format):
            yield path.relative_name(self.directory), path


def read_manifest(directory: Place) -> dict[str, Any]:
    """The manifest of a directory, with its own checksum verified.

    Raises ConfigError where it cannot be read, NewerVersionError where a newer version wrote it, and CorruptFileError
    where it was edited or damaged.
    """
    path = directory / MANIFEST
    manifest = load_json(path)
    schema, said = manifest.get("schema"), manifest.get(CHECKSUM)
    if type(schema) is int and schema > SCHEMA:
        raise NewerVersionError(
            f"{path}: expected schema {SCHEMA} at most, found {schema}; it was written by a newer ckpt-convert: "
            f"update, or {_without(directory)}"
        )
    found = manifest_checksum(manifest)
    if said != found and (schema == SCHEMA or said is not None):
        raise CorruptFileError(
            f"{path}: was edited or damaged: expected its checksum {said}, found {found}; put it back as it was "
            f"written, or {_without(directory)}"
        )
    return manifest


def _without(directory: Place) -> str:
    """The way out where a manifest is unusable; it loses no data."""
    return (
        f"move the folder {RECORD_FOLDER} out of {directory} to use the weights without their record (where they come "
        "with no config of their own, it is config.json in that folder: `config=`)"
    )


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """The checksum of a manifest's content, independent of key order and white space."""
    from ckpt_convert.storage.checksums import digest

    said = {name: value for name, value in manifest.items() if name != CHECKSUM}
    return digest(json.dumps(said, sort_keys=True, separators=(",", ":")).encode())


def render_manifest(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of ``manifest.json``, with its own checksum unless its schema has none."""
    if manifest.get("schema") != SCHEMA:
        return render_json(manifest)
    said = {name: value for name, value in manifest.items() if name != CHECKSUM}
    return render_json({**said, CHECKSUM: manifest_checksum(said)})


def replace_manifest(directory: Place, manifest: Mapping[str, Any]) -> None:
    """Atomically replace the manifest of a complete directory.

    Raises OutputExistsError if ``directory`` was listed and its manifest has changed since, and OSError.
    """
    place = directory / MANIFEST
    etag = place.identity().etag if place.listing is not None else None
    from ckpt_convert.storage import workspace  # reading a record does not need it

    workspace.workspace_of(place).replace_file(place, render_manifest(manifest), etag)


def load_record(directory: Place) -> Record | None:
    """The record of a directory, None if it has none (of weights).

    Raises what ``read_manifest`` does, and ConfigError for an invalid record.
    """
    path = directory / MANIFEST
    if not path.is_regular_file():
        return None
    manifest = read_manifest(directory)
    if manifest.get("schema") not in (1, SCHEMA):
        raise ConfigError(
            f"{path}: expected schema 1 or {SCHEMA}, found {manifest.get('schema')!r}; {_without(directory)}"
        )
    if "format" not in manifest and "training" in manifest:
        return None  # a saved step that holds only an adapter
    if manifest.get("format", "") not in (*FORMATS, None):
        raise ConfigError(f"{path}: names no format; {_without(directory)}")
    sides = manifest.get("side_files", [])
    sound = isinstance(sides, list) and all(
        isinstance(side, dict) and {"name", "origin", "checksum"} <= side.keys() for side in sides
    )
    if not sound or not isinstance(manifest.get("dims", {}), dict):
        raise ConfigError(f"{path}: is damaged; {_without(directory)}")
    return Record(directory, manifest)


def read_training(directory: Place) -> dict[str, Any] | None:
    """The training section of a saved step's manifest; None where there is none, or the manifest is invalid."""
    try:
        found = read_manifest(directory).get("training") if (directory / MANIFEST).is_regular_file() else None
    except UnreadableError:
        raise
    except InputError:
        return None
    return found if isinstance(found, dict) else None


def is_recorded(directory: Place) -> bool:
    """Whether a directory has a manifest of this package, of any schema."""
    return isinstance(_manifest(directory, lambda at: load_json(at / MANIFEST)).get("schema"), int)


def listed_files(directory: Place) -> frozenset[str]:
    """Every file that the manifest of a directory lists, and the manifest; empty without a valid manifest.

    Raises UnreadableError.
    """
    names = _listed(_manifest(directory, read_manifest))
    inner = _listed(_manifest(directory / MERGED, read_manifest)) if names else ()
    return frozenset([*names, *(f"{MERGED}/{name}" for name in inner)])


def _listed(manifest: Mapping[str, Any]) -> list[str]:
    if not manifest:
        return []
    training = _mapping(manifest.get("training"))
    state = _mapping(_mapping(training.get(TRAINING_STATE)).get("files"))
    sides = manifest.get("side_files")
    return [
        *(MANIFEST, str(partial_path(PurePosixPath(MANIFEST)))),
        *_mapping(manifest.get("files")),
        *(str(side.get("name")) for side in (sides if isinstance(sides, list) else ()) if isinstance(side, dict)),
        *_mapping(manifest.get("record")),
        *_mapping(training.get("files")),
        *_mapping(training.get("extra_files")),
        *(f"{TRAINING_STATE}/{name}" for name in state),
    ]


def _manifest(directory: Place, load: Callable[[Place], Mapping[str, Any]]) -> Mapping[str, Any]:
    try:
        return load(directory) if (directory / MANIFEST).is_regular_file() else {}
    except UnreadableError:
        raise
    except CkptConvertError:
        return {}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def layout_files(layout: Layout) -> dict[str, bytes]:
    """The files that store a layout, by name below ``layouts/FORMAT/``."""
    out: dict[str, bytes] = {}
    files = []
    for number, file in enumerate(layout.files):
        entry: dict[str, Any] = {"name": file.name, "rank": file.rank, "size": file.header.size}
        if file.literals is None:
            entry["kind"] = file.header.kind
            entry["tensors"] = [[t.key, t.dtype, list(t.shape)] for t in file.header.tensors]
        else:
            entry["bytes"] = f"{number:05d}.bytes"
            entry["literals"] = [[offset, len(data)] for offset, data in file.literals]
            if file.header.kind == "dcp":  # its header is in another file, .metadata
                entry["pieces"] = [list(tensor) for tensor in file.header.tensors]
            out[entry["bytes"]] = b"".join(data for _, data in file.literals)
        files.append(entry)
    content: dict[str, Any] = {"schema": LAYOUT_SCHEMA, "format": layout.format, "files": files}
    if layout.index is not None:
        content["index"] = layout.index[0]
        out["index.json"] = layout.index[1]
    out["layout.json"] = (json.dumps(content, separators=(",", ":")) + "\n").encode()
    return out


def read_layout(folder: Place) -> Layout:
    """The inverse of ``layout_files``; raises CorruptFileError when the record is damaged."""
    path = folder / "layout.json"
    try:
        content = load_json(path)
        files = tuple(_read_file(folder, entry) for entry in content["files"])
        if sorted({file.rank for file in files}) != list(range(max(file.rank for file in files) + 1)):
            raise CorruptFileError("its ranks have gaps")
        index = None
        if "index" in content:
            index = (check_name(content["index"], str(path)), folder.read_member("index.json", str(path), JSON_LIMIT))
        return Layout(str(content["format"]), files, index)
    except UnreadableError:
        raise  # its content may be right
    except (CkptConvertError, KeyError, ValueError, TypeError) as error:
        raise CorruptFileError(
            f"{path}: the recorded layout is damaged ({type(error).__name__}: {error}); "
            f"move the folder {folder} elsewhere to do without it"
        ) from error


def _read_file(folder: Place, entry: Mapping[str, Any]) -> LayoutFile:
    name = check_name(entry["name"], str(folder))
    if "tensors" in entry:
        tensors = tuple(StoredTensor(key, dtype, tuple(shape), 0) for key, dtype, shape in entry["tensors"])
        return LayoutFile(name, entry["rank"], Header(entry["kind"], entry["size"], tensors), None)
    data = folder.read_member(entry["bytes"], str(folder), containers.MAX_LITERALS)
    literals = []
    start = 0
    for offset, size in entry["literals"]:
        literals.append((offset, data[start : start + size]))
        start += size
    if start != len(data):
        raise CorruptFileError(f"{entry['bytes']} has {len(data)} bytes, expected {start}")
    if "pieces" in entry:
        header = Header("dcp", entry["size"], tuple(map(_piece, entry["pieces"])))
        return LayoutFile(name, entry["rank"], header, tuple(literals))
    layout = containers.parse_layout(name, entry["size"], tuple(literals))
    return LayoutFile(name, entry["rank"], layout.header, layout.literals)


def _piece(fields: list[Any]) -> StoredTensor:
    key, dtype, shape, offset, strides, packed, box = fields
    return StoredTensor(
        str(key),
        str(dtype),
        tuple(map(int, shape)),
        int(offset),
        None if strides is None else tuple(map(int, strides)),
        packed,
        None if box is None else Box(tuple(map(int, box[0])), tuple(map(int, box[1]))),
    )
