"""Opening a checkpoint that may be broken: a file that cannot be read becomes a finding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from ckpt_convert.analysis.check.container import survey_file
from ckpt_convert.checkpoint import record
from ckpt_convert.checkpoint.findings import Finding, failed_check
from ckpt_convert.checkpoint.hints import make_hints
from ckpt_convert.checkpoint.identify import Identified, identify
from ckpt_convert.checkpoint.opening import (
    OpenedFiles,
    all_weight_files,
    checkpoint_place,
    detect_format,
    format_from_keys,
    open_each,
    open_files,
)
from ckpt_convert.containers import join_small
from ckpt_convert.containers.dcp import DCP_INDEX
from ckpt_convert.errors import (
    CheckpointNotFoundError,
    CkptConvertError,
    UnreadableError,
    error_text,
)
from ckpt_convert.formats.base import WeightDirectory, WeightName, load_json, plain_weights
from ckpt_convert.formats.hf import alternative_set_advice, normalized_weight_map
from ckpt_convert.formats.names import RANK, RECORD_FOLDER, WEIGHT_SUFFIXES, is_index
from ckpt_convert.storage.base import OpenFile
from ckpt_convert.storage.names import JOURNAL, is_safe_name
from ckpt_convert.storage.place import Location, Place
from ckpt_convert.storage.reader import unreadable_error
from ckpt_convert.tensors.header import WeightFile
from ckpt_convert.wording import first_few

if TYPE_CHECKING:
    from ckpt_convert.checkpoint.record import Record


@dataclass(frozen=True)
class LenientCheckpoint:
    """A checkpoint as far as it can be opened.

    ``checkpoint`` may be inconsistent; ``view`` is the same with every key once and without an index, so that its ranks
    can always be joined. ``unreadable_files`` are the weight files whose header cannot be read, ``damaged_files`` those
    whose bytes do not fit their header, ``missing_ranks`` the ranks without a file.
    """

    checkpoint: Identified
    view: Identified
    findings: tuple[Finding, ...]
    unreadable_files: frozenset[str]
    damaged_files: frozenset[str]
    missing_ranks: tuple[int, ...] = ()

    @property
    def has_all_headers(self) -> bool:
        """Whether every weight file's header was read."""
        return not self.unreadable_files and not self.missing_ranks


@dataclass
class _State:
    findings: list[Finding] = field(default_factory=list)
    gone: tuple[int, ...] = ()

    def error(self, check: str, error: CkptConvertError | OSError, path: Place, file: str | None = None) -> None:
        self.findings.append(failed_check(check, error, without_directory(error_text(error), path), file))


def without_directory(text: str, path: Place) -> str:
    """A message without the path of the checkpoint, which the report names once."""
    folder = str(path if path.is_folder() else path.parent)
    return text.replace(f"{folder}/", "").removeprefix(f"{folder}: ")


def open_leniently(
    path: Place, *, format: str | None = None, family: str | None = None, config: Location | None = None
) -> LenientCheckpoint:
    """Open what can be read of a checkpoint.

    Raises CheckpointNotFoundError if nothing is there, UnreadableError if the directory cannot be listed, and
    UsageError or ConfigError for wrong arguments.
    """
    hints = make_hints(family, config)
    path = path.with_listing()
    if path.kind() is None:
        raise CheckpointNotFoundError(f"{path}: no such file or directory")
    path = checkpoint_place(path)
    state = _State()
    found_record = _record(path, state)
    try:
        name, why, directory = _directory(path, format, found_record, state)
    except OSError as error:
        raise unreadable_error(error, path) from error
    if (path / JOURNAL).is_present():
        text = (
            f"{path.name} is the unfinished output of a conversion; run that again with `resume=True`, or remove it "
            "and convert again"
        )
        state.findings.append(Finding("error", "leftover", text, JOURNAL))
    before = len(state.findings)
    files, lost, damaged = _files(path, directory, state)
    if name is None and directory.kind in (None, "dcp"):
        name, why = format_from_keys(files, why, directory.kind)
        if name is None and path.is_folder() and directory.index is None and directory.kind is None and not lost:
            directory = WeightDirectory(tuple(map(WeightName, all_weight_files(path))))
            del state.findings[before:]  # the same files are opened again below
            files, lost, damaged = _files(path, directory, state)
    files_there = OpenedFiles(path, name, why, directory, files)
    checkpoint = identify(files_there, hints, found_record)
    once, plain = _each_key_once(checkpoint), replace(directory, index=None, weight_map=None)
    view = replace(checkpoint, opened=replace(files_there, files=once, directory=plain))
    return LenientCheckpoint(checkpoint, view, tuple(state.findings), frozenset(lost), frozenset(damaged), state.gone)


def _record(path: Place, state: _State) -> Record | None:
    if not path.is_folder():
        return None
    if (path / RECORD_FOLDER).is_folder() and not (path / record.MANIFEST).is_present():
        text = f"{record.MANIFEST} is missing, so nothing says what was written; copy it again, or move the folder away"
        state.findings.append(Finding("warning", "record", text, record.MANIFEST))
    try:
        return record.load_record(path)
    except CkptConvertError as error:
        state.error("record", error, path, record.MANIFEST)
    except OSError as error:
        state.error("record", unreadable_error(error, path / record.MANIFEST), path, record.MANIFEST)
    return None


def _directory(
    path: Place, wanted: str | None, found_record: Record | None, state: _State
) -> tuple[str | None, str, WeightDirectory]:
    """The result of ``detect``; if it raises, the weight files that the directory holds."""
    try:
        return detect_format(path, wanted, found_record)
    except CkptConvertError as error:
        rescued = _rescued(path, state, error) if path.is_folder() else None
        if rescued is None:
            raise
        return rescued


def _rescued(path: Place, state: _State, error: CkptConvertError) -> tuple[str | None, str, WeightDirectory] | None:
    said = "hf" if (path / "config.json").is_regular_file() else None
    indexes = sorted(entry for entry in path.children() if is_index(entry.name))
    if indexes and f"{indexes[0].parent}/" in str(error):
        named = [index for index in indexes if str(index) in str(error)] or indexes
        state.error("index", error, path, named[0].name)
        directory = _sound_part(path, named[0])
        names = [name for suffix in WEIGHT_SUFFIXES if (name := plain_weights(path, (suffix,)))]
        if directory is None and names:
            directory = WeightDirectory(tuple(WeightName(name) for name in names[0]))
        return None if directory is None else (said, "weight files beside a broken index", directory)
    ranks = ((RANK.fullmatch(entry.name), entry.name) for entry in path.children())
    numbered = sorted((int(match[1]), name) for match, name in ranks if match is not None and len(match[1]) <= 4)
    if not numbered or len(numbered) > 1024:
        return None
    state.error("files", error, path)
    by_rank = dict(reversed(numbered))
    most = max(by_rank) + 1 if max(by_rank) < 4 * len(by_rank) + 16 else len(by_rank)
    state.gone = tuple(rank for rank in range(most) if rank not in by_rank)
    kept = [WeightName(by_rank[rank], rank) for rank in sorted(by_rank) if rank < most]
    return "meta", kept[0].name, WeightDirectory(tuple(kept))


def _sound_part(path: Place, index: Place) -> WeightDirectory | None:
    """The entries of an index that name plain files, None if there are none."""
    try:
        weight_map = load_json(index).get("weight_map")
        entries = weight_map.items() if isinstance(weight_map, dict) else ()
        named = normalized_weight_map({key: file for key, file in entries if isinstance(file, str)})
    except CkptConvertError:
        return None
    sound = {key: file for key, file in named.items() if is_safe_name(file)}
    return WeightDirectory(tuple(map(WeightName, sorted(set(sound.values())))), index.name, sound) if sound else None


def _files(
    path: Place, directory: WeightDirectory, state: _State
) -> tuple[tuple[WeightFile, ...], list[str], list[str]]:
    """The files that can be opened, the names of those that cannot, and of those that are damaged."""
    if directory.kind == "dcp":
        try:
            return open_files(path, directory)[0], [], []
        except (CkptConvertError, OSError) as error:
            state.error("container", error, path)
            return (), [DCP_INDEX], []
    other = alternative_set_advice(path, directory) if path.is_folder() else None
    if other is not None:  # one cause, however many files are missing
        state.findings.append(Finding("error", "files", other, directory.index))
    there = {entry.name for entry in path.children()} if other is not None else set()
    weights = [weight for weight in directory.weights if other is None or weight.name in there]
    surveys = open_each(path, partial(_survey, path, directory), weights)
    state.findings += [finding for survey in surveys for finding in survey.findings]
    files = {survey.file.name: survey.file for survey in surveys if survey.file is not None}
    lost = [weight.name for weight in directory.weights if weight.name not in files]
    return tuple(files.values()), lost, [survey.name for survey in surveys if survey.is_damaged]


@dataclass(frozen=True)
class _Survey:
    """What became of one weight file; ``file`` is None if its header cannot be read."""

    name: str
    findings: Sequence[Finding]
    file: WeightFile | None = None
    is_damaged: bool = False


def _survey(path: Place, directory: WeightDirectory, weight: WeightName) -> _Survey:
    state = _State()
    opened = _open(path, weight, directory, state)
    if opened is None:
        return _Survey(weight.name, state.findings)
    reader, place = opened
    try:
        found = survey_file(reader)
    except UnreadableError as error:
        state.error("container", error, path, weight.name)
        return _Survey(weight.name, state.findings)
    state.findings += [Finding("error", "container", text, weight.name) for text in found.problems]
    header = found.header
    join_small(found.reader, header.tensors if header is not None else ())
    file = WeightFile(weight.name, weight.rank, place, found.reader, header) if header is not None else None
    return _Survey(weight.name, state.findings, file, bool(found.problems))


def _open(path: Place, weight: WeightName, directory: WeightDirectory, state: _State) -> tuple[OpenFile, Place] | None:
    local = path if path.is_regular_file() else path / weight.name
    try:
        if path.is_folder():
            path.resolve_member(weight.name, directory.index or path.name)
        return local.open(weight.name), local
    except CheckpointNotFoundError:
        text, found = _absent(local, weight.name, directory)
        state.findings.append(Finding("error", "files", text, weight.name, found=found))
    except CkptConvertError as error:
        state.error("files", error, path, weight.name)
    except OSError as error:
        state.error("files", unreadable_error(error, local), path, weight.name)
    return None


def _absent(local: Place, name: str, directory: WeightDirectory) -> tuple[str, str]:
    keys = [key for key, file in (directory.weight_map or {}).items() if file == name]
    said = (
        f"{directory.index} says that it holds {len(keys)} tensor{'s' if len(keys) != 1 else ''} ({first_few(keys, 2)})"
        if keys
        else "it should be there"
    )
    if (target := local.link()) is not None:
        return (
            f"{name} is a link that leads nowhere (to {target}), but {said}; download or copy it again",
            "broken link",
        )
    return f"{name} is missing: {said}; download or copy it again", "no such file"


def _each_key_once(checkpoint: Identified) -> tuple[WeightFile, ...]:
    """The files with every key in one of them only: the one that the index names, else the first.

    Of several spellings of one key the first is kept; an ambiguous key is dropped.
    """
    twice = {finding.key for finding in checkpoint.contradictions if finding.check == "duplicate"}
    if not twice:
        return checkpoint.files
    clashing = {key for key, _ in checkpoint.names.clashes}
    weight_map = checkpoint.directory.weight_map or {}
    owners: dict[tuple[int, str], str] = {}
    for file in checkpoint.files:
        for tensor in file.header.tensors:
            place = (file.rank, tensor.key)
            if tensor.key in clashing:
                owners[place] = ""
            elif place not in owners or weight_map.get(tensor.key) == file.name:
                owners[place] = file.name
    return tuple(_without(file, owners, twice) for file in checkpoint.files)


def _without(file: WeightFile, owners: dict[tuple[int, str], str], twice: set[str | None]) -> WeightFile:
    """The file without the tensors that another one owns."""
    tensors = tuple(
        tensor
        for tensor in file.header.tensors
        if tensor.key not in twice or owners[file.rank, tensor.key] == file.name
    )
    return replace(file, header=replace(file.header, tensors=tensors))
