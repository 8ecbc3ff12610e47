"""The view of a checkpoint: filters, order, and the lines above its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ckpt_convert.checkpoint.conventions import SIZES
from ckpt_convert.cli import colors, tree
from ckpt_convert.cli import facts as looking
from ckpt_convert.cli.facts import Count, Facts
from ckpt_convert.cli.flags import in_flags
from ckpt_convert.cli.stated import stated
from ckpt_convert.cli.text import Labelled, bar, escape, human_count, labelled, number, percent, plural
from ckpt_convert.formats.names import RECORD_FOLDER
from ckpt_convert.values import frozen
from ckpt_convert.wording import human_bytes

if TYPE_CHECKING:
    from ckpt_convert.checkpoint.tensor_info import TensorInfo

SORTS = {"name": False, "size": True, "offset": False}
"""What can be sorted by, and whether the largest comes first unless asked otherwise."""

_KINDS = {"torch": "torch zip", "legacy": "legacy torch"}
_BAR = 20


@frozen()
class Order:
    """What rows are sorted by."""

    by: str
    descending: bool


@frozen()
class View:
    """What of a checkpoint to show: ``filters`` are globs over keys, ``width`` is that of the terminal, if any.

    ``tree`` shows modules, ``depth`` levels of them (None: all).
    """

    filters: tuple[str, ...] = ()
    order: Order = Order("name", False)
    full: bool = False
    by_shard: bool = False
    tree: bool = False
    depth: int | None = None
    width: int | None = None

    def matches(self, key: str) -> bool:
        return not self.filters or any(fnmatchcase(key, glob) for glob in self.filters)

    @property
    def globs(self) -> str:
        """The filters as a message says them."""
        return " or ".join(map(escape, self.filters))


def matching(facts: Facts, view: View) -> list[TensorInfo]:
    """The matching tensors, in the order of the files."""
    tensors = facts.checkpoint.tensors
    return [info for key, info in tensors.items() if view.matches(key)] if view.filters else list(tensors.values())


def ordered(facts: Facts, view: View) -> list[TensorInfo]:
    """The matching tensors, in the order asked for."""
    found = matching(facts, view)
    if view.order.by == "offset":
        files = {file.name: at for at, file in enumerate(facts.checkpoint.files)}
        found.sort(
            key=lambda info: (files[info.parts[0].file], info.parts[0].offset, info.key), reverse=view.order.descending
        )
        return found
    found.sort(key=lambda info: tree.natural(info.key), reverse=view.order == Order("name", True))
    if view.order.by == "size":
        found.sort(key=facts.nbytes, reverse=view.order.descending)
    return found


def header(facts: Facts, width: int | None) -> Iterator[str]:
    """The facts, a line each, wrapped on a terminal."""
    return labelled(_facts(facts), width)


def shares(nbytes: int, total: int, width: int | None) -> tuple[str, str]:
    """The share of the bytes, with a bar, for a terminal only."""
    return (percent(nbytes, total), bar(nbytes / max(total, 1), _BAR)) if width is not None else ("", "")


def missing(numbers: str) -> str:
    """The warning about missing indices."""
    return f"missing {escape(numbers)}" if numbers else ""


def _facts(facts: Facts) -> Iterator[Labelled]:
    checkpoint, model = facts.checkpoint, facts.model
    yield Labelled("path", [escape(str(checkpoint.place))])
    # Files of no format may be of a known kind, which has facts of its own.
    is_foreign = checkpoint.format is None and any(label != "kind" for label, _ in facts.said)
    if checkpoint.format is None:
        text = f"{checkpoint.why}; {checkpoint.advice}"
        yield Labelled("format", _words(text) if is_foreign else _unknown(text))
    else:
        yield Labelled("format", _words(f"{checkpoint.format} ({checkpoint.why})"))
    if model is not None:
        release = f", sizes of {model.release}" if model.release else ""
        yield Labelled("family", _words(f"{model.family.name}{release} ({model.evidence})"))
    elif not is_foreign:
        yield Labelled("family", _unknown(facts.problem) if checkpoint.format else _words("unknown, as the format is"))
    if any(name in facts.dims for name in SIZES):
        yield Labelled("dims", _list(f"{name} {facts.dims[name]}" for name in SIZES if name in facts.dims))
    if facts.ranks is not None:
        held = "; the last column says what each holds" if facts.ranks > 1 else ""
        yield Labelled("ranks", _words(f"{facts.ranks} (tensor-parallel degree{held})"))
    for label, text in facts.said:
        yield Labelled(escape(label), _words(text))
    yield Labelled("files", [_files(facts)])
    for label, items in stated(checkpoint.files):
        yield Labelled(label, items)
    yield Labelled("parameters", _words(_parameters(facts)))
    yield Labelled("bytes", [f"{human_bytes(facts.total.bytes)} ({number(facts.total.bytes)})"])
    yield Labelled("dtypes", _list(_dtypes(facts.dtypes)) or ["none"])
    if not is_foreign:
        yield Labelled("tied", _words(_tied(facts)))
    source = looking.converted_from(checkpoint)
    if source is not None:
        yield Labelled("converted", _words(f"from {source}, recorded in {RECORD_FOLDER}/"))
    for notice in facts.notices:
        yield Labelled("notice", _words(notice), colors.WARNING)


def _words(text: str) -> list[str]:
    # A message may have several lines; here it gets one.
    first, *rest = in_flags(text).split("\n")
    return [escape(word) for word in [*first.split(), *"; ".join(line.strip() for line in rest).split()]]


def _unknown(why: str) -> list[str]:
    return [colors.warning("unknown:"), *_words(why)]


def _list(items: Iterable[str]) -> list[str]:
    *first, last = [*items] or [""]
    return [*(f"{item}," for item in first), last] if last else []


def _files(facts: Facts) -> str:
    files = facts.checkpoint.files
    kinds = ", ".join(sorted({_KINDS.get(file.header.kind, file.header.kind) for file in files}))
    return f"{plural(len(files), 'file')}, {escape(kinds)}, {human_bytes(sum(facts.file_bytes().values()))}"


def _parameters(facts: Facts) -> str:
    tensors, count = plural(facts.total.tensors - facts.besides.tensors, "tensor"), facts.parameters
    if count is None:
        return f"unknown, in {tensors}"
    exact = f" ({number(count)})" if count > 999 else ""
    besides = ""
    if facts.besides.tensors:
        besides = f"; besides, {plural(facts.besides.tensors, 'tensor')} that are no weights"
    return f"{human_count(count)}{exact} in {tensors}{besides}"


def _dtypes(dtypes: Mapping[str, Count]) -> Iterator[str]:
    for name, count in dtypes.items():
        said = "" if len(dtypes) == 1 else f" {human_bytes(count.bytes)} in {plural(count.tensors, 'tensor')}"
        yield colors.dtype(escape(name)) + said


def _tied(facts: Facts) -> str:
    if facts.model is None:
        return "unknown"
    if facts.model.tied is None:
        return "unknown: the bytes of embedding and output decide"
    return "yes: the output is the embedding" if facts.model.tied else "no"
