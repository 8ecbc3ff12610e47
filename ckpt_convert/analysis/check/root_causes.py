"""One finding per cause instead of one per tensor: ranks of another split, exchanged file names, truncated files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_convert.analysis.check.lenient_open import LenientCheckpoint
from ckpt_convert.checkpoint.findings import Finding
from ckpt_convert.checkpoint.record import MANIFEST
from ckpt_convert.formats import peft
from ckpt_convert.formats.names import rank_name
from ckpt_convert.wording import first_few

ALL_ZEROS = "nothing but zeros"
"""The ``found`` of a finding by which ``merge_zero_tensors`` recognizes tensors of zeros."""

_STARTS_AT_ZERO = re.compile(r"(?:\A|\.)(?:lora_B|lora_embedding_A|lora_up)\.")
"""Adapter tensors that are initialized with zeros, so that the adapter changes nothing at first."""

_NEVER_ZERO = re.compile(r"\.lora_A\.")
"""Adapter tensors that are never initialized with zeros; methods other than LoRA (OFT) initialize everything so."""

_MOST_RANKS = 128


def check_ranks(opened: LenientCheckpoint, config: Mapping[str, Any] | None) -> tuple[list[Finding], str]:
    """Whether the files of a Meta checkpoint are all ranks of one tensor-parallel split; and why not, in a few words.

    If they are not, the joined tensors have sizes that no setting of the config explains.
    """
    view = opened.view
    if view.format != "meta" or opened.unreadable_files or opened.missing_ranks:
        return [], ""
    names = [file.name for file in opened.checkpoint.files]
    record = opened.checkpoint.record
    written = record.manifest.get("files") if record is not None else None
    if isinstance(written, Mapping):
        missing = [str(name) for name in written if name not in names]
        added = [name for name in names if name not in written]
        if missing:
            return [], f"{', '.join(missing)} is missing"  # which the checksums report
        if added:
            text = (
                f"{', '.join(added)} is no rank of this checkpoint: {MANIFEST} says that it was cut over {len(written)}"
            )
            return [Finding("error", "shards", f"{text}; move it elsewhere, or convert again", added[0])], text
    odd = _odd(view.ranks)
    if odd is not None:
        key, at, shape, usual = odd
        name = view.ranks[at][key].location
        text = (
            f"{name} holds {list(shape)} of {key}, but other ranks hold {list(usual)}: files of checkpoints that are "
            "cut over different numbers of ranks were mixed; fetch the files of one of them"
        )
        return [Finding("error", "shards", text, name, key, str(list(usual)), str(list(shape)))], "of different cuts"
    return _last_ranks(opened, config or {})


def _odd(stored: Sequence[Mapping[str, Any]]) -> tuple[str, int, tuple[int, ...], tuple[int, ...]] | None:
    """A key that a rank holds in another shape than most: key, rank, shape, and the majority's shape."""
    for key, source in stored[0].items():
        shapes = [rank[key].shape for rank in stored if key in rank]
        if any(shape != source.shape for shape in shapes):
            usual = Counter(shapes).most_common(1)[0][0]
            at = next(at for at, rank in enumerate(stored) if key in rank and rank[key].shape != usual)
            return key, at, stored[at][key].shape, usual
    return None


def _last_ranks(opened: LenientCheckpoint, config: Mapping[str, Any]) -> tuple[list[Finding], str]:
    """Whether more ranks of this size would make up the vocabulary that params.json states."""
    stored = opened.view.ranks
    vocab, dim = config.get("vocab_size"), config.get("dim")
    output = stored[0].get("output.weight")
    if type(vocab) is not int or output is None or len(output.shape) != 2 or output.shape[1] != dim:
        return [], ""
    count, rest = divmod(vocab, output.shape[0])
    if rest or not len(stored) < count <= _MOST_RANKS:
        return [], ""
    lacking = [rank_name(number) for number in range(len(stored), count)]
    text = (
        f"{first_few(lacking, 4)} {'is' if len(lacking) == 1 else 'are'} missing: vocab_size {vocab} in params.json is "
        f"that of {count} ranks with {output.shape[0]} rows each, but there are {len(stored)}; download or copy what "
        "is missing"
    )
    return [Finding("error", "shards", text, lacking[0], None, str(count), str(len(stored)))], "ranks are missing"


def merge_exchanged_files(findings: Iterable[Finding], check: str) -> list[Finding]:
    """The findings, those of two files that hold each other's tensors merged into one."""
    kept = list(findings)
    wrong = [finding for finding in kept if finding.check == check and finding.expected and finding.found]
    pairs = {frozenset((str(finding.expected), str(finding.found))) for finding in wrong}
    for pair in sorted(pairs, key=sorted):
        ours = [finding for finding in wrong if {finding.expected, finding.found} == pair]
        if len(pair) != 2 or len(ours) < 4 or len({finding.found for finding in ours}) != 2:
            continue
        one, other = sorted(pair)
        text = (
            f"{one} holds what the index says of {other}, and the other way round ({len(ours)} tensors): their names "
            "were exchanged; rename them, or download them again"
        )
        kept = [finding for finding in kept if finding not in ours] + [Finding("error", check, text, one)]
    return kept


@dataclass(frozen=True, slots=True)
class _Stored:
    key: str
    offset: int
    end: int
    is_matrix: bool
    is_meant: bool
    """Whether zeros may be the intended values."""


def merge_zero_tensors(findings: Iterable[Finding], opened: LenientCheckpoint) -> list[Finding]:
    """The findings, those of tensors of zeros merged into one for each file whose end was never written.

    Norms that are stored minus one (Gemma) may be zeros; a truncated file has zeros up to its end.
    """
    kept, empty = [], set()
    for finding in findings:
        if finding.found == ALL_ZEROS:
            empty.add((finding.file, finding.key))
        else:
            kept.append(finding)
    if not empty:
        return kept
    files: dict[str, list[_Stored]] = {}
    is_adapter = opened.checkpoint.directory.kind == peft.KIND
    for file, tensor in opened.view.stored:
        end, is_matrix = tensor.offset + tensor.nbytes, len(tensor.shape) > 1
        starts = not _NEVER_ZERO.search(tensor.key) if is_adapter else bool(_STARTS_AT_ZERO.search(tensor.key))
        stored = _Stored(tensor.key, tensor.offset, end, is_matrix, not is_matrix or starts)
        files.setdefault(file.name, []).append(stored)
    for name, tensors in files.items():
        ordered = sorted((tensor for tensor in tensors if tensor.end > tensor.offset), key=lambda t: t.offset)
        kept += _zeros(name, ordered, lambda tensor, name=name: (name, tensor.key) in empty)  # type: ignore[misc]
    return kept


def _zeros(name: str, tensors: Sequence[_Stored], is_empty: Callable[[_Stored], bool]) -> Iterator[Finding]:
    start = len(tensors)
    while start and is_empty(tensors[start - 1]):
        start -= 1
    before = [tensor for tensor in tensors[:start] if is_empty(tensor)]
    tail = tensors[start:]
    was_cut = any(not tensor.is_meant for tensor in tail) or (tail and not before and not tail[-1].is_matrix)
    if was_cut and (start or len(tail) > 1):
        count = f"{len(tail)} tensors, " if len(tail) > 1 else ""
        text = (
            f"{name} holds nothing but zeros from {tail[0].key} on ({count}its last {tail[-1].end - tail[0].offset:,} "
            "bytes), as a file does that was not downloaded to its end; download or copy it again"
        )
        yield Finding("warning", "values", text, name, tail[0].key)
    for tensor in before if was_cut else [*before, *tail]:
        if not tensor.is_meant:
            text = (
                f"{tensor.key} in {name} holds nothing but zeros; it was never trained, or the file is damaged: "
                "download it again if it should hold something"
            )
            yield Finding("warning", "values", text, name, tensor.key)
