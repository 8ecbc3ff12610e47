"""The files beside the weights: what is copied, generated, restored from the record, or carried in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ckpt_convert.convert import checklist, formats, record
from ckpt_convert.convert.checkpoint import Checkpoint
from ckpt_convert.convert.formats.base import (
    NEVER_SIDE_FILES,
    NEVER_SIDE_FOLDERS,
    RECORD_FOLDER,
    WEIGHT_SUFFIXES,
)
from ckpt_convert.convert.record import Layout, Record
from ckpt_convert.storage.names import resolve

CHECKLIST = "checklist.chk"
_TOKENIZERS = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "tekken", "chat_template")


@dataclass(frozen=True)
class SideFile:
    """A file to be put beside the weights, or into the record.

    ``origin`` is copied, generated, restored or carried; the content is that of ``path``, or what ``make`` returns
    when the files are written (None: nothing to write after all).
    """

    name: str
    origin: str
    path: Path | None = None
    make: Callable[[], bytes | None] | None = None
    size: int = 0


def beside(checkpoint: Checkpoint) -> dict[str, Path]:
    """The side files of a checkpoint: everything in its directory but weights, indexes, its config and the record.

    Raises UnsafeFileError for a link that leaves the directory.
    """
    if not checkpoint.path.is_dir():
        return {}
    format = formats.ALL[str(checkpoint.format)]
    used = {file.name for file in checkpoint.files} | {checkpoint.directory.index, format.config}
    out = {}
    for path in _walk(checkpoint.path):
        name = path.relative_to(checkpoint.path).as_posix()
        if name in used or name.endswith((*WEIGHT_SUFFIXES, *NEVER_SIDE_FILES, ".index.json")):
            continue
        out[name] = resolve(checkpoint.path, name, str(checkpoint.path))
    return out


def _walk(directory: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(directory):
        folders[:] = sorted(name for name in folders if name not in NEVER_SIDE_FOLDERS and not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if path.exists() and not name.startswith(".cache"):
                yield path


def plan(
    source: Checkpoint,
    target: str,
    *,
    like: Checkpoint | None,
    generated: Mapping[str, SideFile],
) -> list[SideFile]:
    """What becomes of every side file, and what is made new; in the order of the names.

    ``generated`` are files that the target needs (config, index); they win over copies of the same name.
    """
    format = formats.ALL[target]
    own = {format.config, CHECKLIST} if format.ranks else {format.config}  # the target's own are made new
    out: dict[str, SideFile] = dict(generated)

    def keep(name: str, path: Path, origin: str) -> None:
        if name in own:
            return
        if not format.uses(name):
            name, origin = f"{RECORD_FOLDER}/side/{name}", "carried"
        out.setdefault(name, SideFile(name, origin, path, size=path.stat().st_size))

    here = beside(source)
    for name, path in here.items():
        if not _made_by_us(source.record, name):
            keep(name, path, "copied")
    for name, path in (source.record.carried_side_files if source.record else {}).items():
        keep(name, path, "restored")
    if like is not None:
        for name, path in beside(like).items():
            if name.startswith(_TOKENIZERS) or name == "generation_config.json":
                out[name] = SideFile(name, "copied", path, size=path.stat().st_size)
    return [out[name] for name in sorted(out)]


def recorded_layouts(source: Checkpoint, target: str, own: Layout | None) -> list[SideFile]:
    """The record's files that keep how the weights lay in other formats, the source's own among them."""
    out = []
    if source.record is not None:
        for name in source.record.layouts:
            if name not in (target, source.format):
                out += [
                    SideFile(file, "carried", path, size=path.stat().st_size)
                    for file, path in source.record.files_of_layout(name)
                ]
    if own is not None and own.format != target:
        folder = f"{RECORD_FOLDER}/layouts/{own.format}"
        for name, data in record.layout_files(own).items():
            out.append(SideFile(f"{folder}/{name}", "carried", make=_constant(data), size=len(data)))
    return out


def checklist_for(source: Checkpoint, target: str) -> Path | None:
    """The checklist.chk whose lines the output's files should be listed by."""
    if target != "meta":
        return None
    if source.format == "meta":
        path = source.root / CHECKLIST
        return path if path.is_file() else None
    return source.record.carried_side_files.get(CHECKLIST) if source.record else None


def unchanged(found: Record, name: str) -> bool:
    """Whether a side file is still as the record says that it was written."""
    entry = found.side_files.get(name)
    path = found.directory / name
    return entry is not None and path.is_file() and digest(path.read_bytes()) == entry["checksum"]


def digest(data: bytes) -> str:
    """The checksum under which the manifest keeps side files."""
    return xxhash.xxh3_64_hexdigest(data)


def _made_by_us(found: Record | None, name: str) -> bool:
    """Whether a file was generated for this format by an earlier conversion, and nobody changed it since."""
    entry = found.side_files.get(name) if found else None
    return entry is not None and entry["origin"] == "generated" and found is not None and unchanged(found, name)


def _constant(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def checklist_of(source: Checkpoint) -> dict[str, str]:
    """What the source's checklist.chk says of its files, {} if there is none."""
    path = source.root / CHECKLIST
    if source.format != "meta" or not path.is_file():
        return {}
    return checklist.parse(path.read_text(encoding="utf-8", errors="replace"))
