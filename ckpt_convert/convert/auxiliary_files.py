"""Auxiliary files beside the weights: copied, generated, restored from the record, or passed through in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from ckpt_convert import formats
from ckpt_convert.checkpoint import checklist, record
from ckpt_convert.checkpoint.checklist import CHECKLIST
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.record import Layout, Record
from ckpt_convert.errors import CheckpointNotFoundError, CorruptFileError, InputError, UnreadableError, UnsafeFileError
from ckpt_convert.formats.base import TEXT_LIMIT
from ckpt_convert.formats.names import (
    NEVER_ENTERED,
    RECORD_FOLDER,
    TOKENIZER_PREFIXES,
    has_tokenizer,
    is_any_weights,
    is_never_auxiliary,
    is_weights,
)
from ckpt_convert.storage.base import Entry
from ckpt_convert.storage.names import is_safe_name
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.reader import reading
from ckpt_convert.wording import first_few


class GeneratedFiles(Protocol):
    """Files that are generated together when they are written. A picklable value."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """Contents by name, without files that cannot be generated."""

    @property
    def notices(self) -> tuple[str, ...]:
        """Notices about generating them."""


@dataclass(frozen=True)
class AuxiliaryFile:
    """A file to write beside the weights, or into the record.

    ``origin`` is "copied", "generated", "restored" or "carried"; the content is that of ``place``, or ``data``, or what
    ``generated`` has under the name. ``identity`` is the size and etag of ``place`` when the file was chosen.
    """

    name: str
    origin: str
    place: Place | None = None
    data: bytes | None = None
    generated: GeneratedFiles | None = None
    size: int = 0
    identity: Entry | None = None

    @classmethod
    def of(cls, name: str, origin: str, data: bytes) -> AuxiliaryFile:
        """A file of known content."""
        return cls(name, origin, data=data, size=len(data))

    @property
    def content(self) -> bytes | None:
        """The bytes of a file that is not a copy; None where nothing could be generated."""
        return self.generated.files.get(self.name) if self.generated is not None else self.data


def file_from(name: str, origin: str, path: Place) -> AuxiliaryFile:
    """A file with the current content of ``path``."""
    found = path.identity()
    return AuxiliaryFile(name, origin, path, size=found.size, identity=found)


def find_auxiliary(checkpoint: Identified) -> dict[str, Place]:
    """The auxiliary files of a checkpoint: everything in its directory but weights, index, config and record.

    Raises UnsafeFileError for a link that leaves the directory.
    """
    if not checkpoint.place.is_folder():
        return {}
    format = formats.ALL[str(checkpoint.format)]
    used = {file.name for file in checkpoint.files} | {checkpoint.directory.index, format.config}
    out = {}
    for path in _walk(checkpoint.place):
        name = path.relative_name(checkpoint.place)
        if not is_safe_name(name) or name == RECORD_FOLDER:
            continue
        if name in used or is_never_auxiliary(name):
            continue
        out[name] = checkpoint.place.resolve_member(name, str(checkpoint.place))
    return out


def find_nearby_tokenizer(checkpoint: Identified) -> dict[str, Place]:
    """Tokenizer files near a checkpoint that has none of its own.

    Searched are the directory of a single weight file, the directory of the config that was passed, and the parent of
    Meta's weights, where its download script puts the tokenizer.
    """
    there = find_auxiliary(checkpoint)
    restored = checkpoint.record.passthrough_files if checkpoint.record is not None else {}
    if has_tokenizer({**there, **restored}):
        return {}
    places = [checkpoint.root] if checkpoint.place.is_regular_file() else []
    places += [checkpoint.hints.config.parent] if checkpoint.hints.config is not None else []
    places += [checkpoint.root.real().parent] if checkpoint.format == "meta" else []
    for place in places:
        try:
            entries = sorted(place.children())
        except UnreadableError:  # not a directory of the checkpoint
            continue
        found = {path.name: path for path in entries if _is_tokenizer(path)}
        if has_tokenizer(found):
            return {name: path for name, path in found.items() if name not in there}
    return {}


def _is_tokenizer(path: Place) -> bool:
    """Whether a file has the name of a tokenizer file, and does not link out of its directory."""
    name = path.name
    if not (name.startswith(TOKENIZER_PREFIXES) or name == "generation_config.json"):
        return False
    if not path.is_regular_file() or is_weights(name) or name.endswith((".chk", ".py")):
        return False
    try:
        path.parent.resolve_member(name, str(path.parent))
    except (UnsafeFileError, CheckpointNotFoundError):
        return False
    return True


def auxiliary_notices(source: Identified) -> list[str]:
    """Notices about files that were edited since an earlier conversion wrote them, and files that are not copied."""
    out = []
    if source.record is not None:
        format = source.record.format
        edited = source.record.edited(own_config=format is not None and formats.ALL[format].config is None)
        out += [f"edited or damaged since it was written, and used as it is: {', '.join(edited)}"] if edited else []
    left = skipped_files(source)
    return out + ([f"not copied: {first_few(left, 8, ' …')}"] if left else [])


def skipped_files(checkpoint: Identified) -> list[str]:
    """The files below the directory that are not copied: links to folders or nowhere, and weights in subfolders."""
    if not checkpoint.place.is_folder():
        return []
    out = []
    for here, folders, files in checkpoint.place.walk(_enters):
        out += [folder for folder in folders if folder.link() is not None]
        out += [
            file
            for file in files
            if not file.is_regular_file() or not is_safe_name(file.relative_name(checkpoint.place))
        ]
        if here != checkpoint.place:
            out += [file for file in files if is_any_weights(file.name)]
    return [path.relative_name(checkpoint.place) for path in out]


def _enters(folder: str) -> bool:
    return folder not in NEVER_ENTERED and not folder.startswith(".")


def _walk(directory: Place) -> Iterator[Place]:
    for _, _, files in directory.walk(_enters):
        yield from (file for file in files if file.is_regular_file())


def choose_auxiliary(
    source: Identified,
    target: str,
    *,
    like: Identified | None,
    generated: Mapping[str, AuxiliaryFile],
) -> list[AuxiliaryFile]:
    """The auxiliary files of the output, copied and generated, sorted by name.

    ``generated`` are files that the target needs (config, index); they replace copies of the same name.
    """
    format = formats.ALL[target]
    own = {format.config, CHECKLIST} if format.has_ranks else {format.config}  # generated for the target
    out: dict[str, AuxiliaryFile] = dict(generated)

    def keep(name: str, path: Place, origin: str) -> None:
        if name == CHECKLIST and source.format == "meta" and origin == "copied":
            if target == "meta":
                return  # generated from the files that are written
            name, origin = f"{RECORD_FOLDER}/layouts/meta/{name}", "carried"
        elif name in own or not format.uses_auxiliary(name):
            name, origin = f"{RECORD_FOLDER}/side/{name}", "carried"
        out.setdefault(name, file_from(name, origin, path))

    here = {**find_nearby_tokenizer(source), **find_auxiliary(source)}
    for name, path in here.items():
        # Within a format nothing is generated, so files that were generated earlier are copied like all others.
        if target == source.format or not _is_generated(source.record, name):
            keep(name, path, "copied")
    for name, path in (source.record.passthrough_files if source.record else {}).items():
        keep(name, path, "restored")
    if like is not None:
        for name, path in find_auxiliary(like).items():
            if name.startswith(TOKENIZER_PREFIXES) or name == "generation_config.json":
                out[name] = file_from(name, "copied", path)
    return [out[name] for name in sorted(out)]


def layout_record_files(source: Identified, target: str, snapshot: Layout | None) -> list[AuxiliaryFile]:
    """The record's files with the layouts of the weights in other formats, including the source's own."""
    out = []
    if source.record is not None:
        for name in source.record.layouts:
            if name not in (target, source.format):
                out += [file_from(file, "carried", path) for file, path in source.record.files_of_layout(name)]
    if snapshot is not None and snapshot.format != target:
        folder = f"{RECORD_FOLDER}/layouts/{snapshot.format}"
        for name, data in record.layout_files(snapshot).items():
            out.append(AuxiliaryFile.of(f"{folder}/{name}", "carried", data))
    return out


@reading()
def checklist_template(source: Identified, target: str) -> Place | None:
    """The checklist.chk that determines order and hash algorithm of the output's checklist."""
    if target != "meta":
        return None
    if source.format == "meta":
        path = source.root / CHECKLIST
        return path if path.is_regular_file() else None
    return source.record.meta_file(CHECKLIST) if source.record else None


def _is_generated(earlier: Record | None, name: str) -> bool:
    """Whether a file was generated by an earlier conversion and is unchanged."""
    entry = earlier.auxiliary_files.get(name) if earlier else None
    return entry is not None and entry["origin"] == "generated" and earlier is not None and earlier.unchanged(name)


@reading()
def source_checklist(source: Identified) -> dict[str, str]:
    """The hashes in the source's checklist.chk of files that exist, {} if there is no checklist.

    Raises CorruptFileError when it is invalid, or lists weight files that do not exist.
    """
    path = source.root / CHECKLIST
    if source.format != "meta" or not path.is_regular_file():
        return {}
    try:
        listed = checklist.parse_checklist(path.read(TEXT_LIMIT).decode(errors="replace"))
    except InputError as error:
        raise type(error)(f"{source.root}: {error}") from error
    absent = [name for name in listed if is_weights(name) and not (source.root / name).is_regular_file()]
    if absent:
        raise CorruptFileError(
            f"{path}: lists {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not there; "
            "download again what is missing, or remove the checklist if this is all there should be"
        )
    return {name: value for name, value in listed.items() if (source.root / name).is_regular_file()}
