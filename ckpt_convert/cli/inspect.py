"""``inspect``: what a checkpoint is and what is in it, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt_convert.cli import facts as looking
from ckpt_convert.cli import tree
from ckpt_convert.cli.facts import Count, Facts
from ckpt_convert.cli.text import (
    DIMS,
    columns,
    echo,
    escape,
    fits,
    human_bytes,
    human_count,
    number,
    plural,
    shape_text,
    terminal_width,
    wrap,
)
from ckpt_convert.cli.tree import Entry, Numbering, Row
from ckpt_convert.convert.formats.base import RECORD_FOLDER
from ckpt_convert.models.table import FORMATS

if TYPE_CHECKING:
    from ckpt_convert.convert.checkpoint import TensorInfo, WeightFile
    from ckpt_convert.convert.containers.header import StoredTensor

_SORTS = {"name": False, "size": True, "offset": False}
"""What can be sorted by, and whether the largest comes first unless asked otherwise."""

_KINDS = {"torch": "torch zip", "legacy": "legacy torch"}
_LABEL = 12
_WARNING = "yellow"


@dataclass(frozen=True)
class Order:
    """What rows are sorted by."""

    by: str
    descending: bool


@dataclass(frozen=True)
class View:
    """How much of a checkpoint to show: ``filters`` are globs over keys, ``width`` is that of the terminal, if any."""

    full: bool
    filters: tuple[str, ...]
    order: Order
    by_shard: bool
    width: int | None

    def matches(self, key: str) -> bool:
        return not self.filters or any(fnmatchcase(key, glob) for glob in self.filters)


def _order(context: click.Context, parameter: click.Parameter, value: str) -> Order:
    by, _, direction = value.partition(":")
    if by not in _SORTS or direction not in ("", "asc", "desc"):
        raise click.BadParameter(f"{value!r} should be name, size or offset, with :asc or :desc behind it if you like")
    return Order(by, _SORTS[by] if not direction else direction == "desc")


@click.command(
    short_help="Show what a checkpoint is and what is in it.",
    epilog="""\b
Examples:
  ckpt-convert inspect Llama-3.2-1B
  ckpt-convert inspect meta-llama/Llama-3.2-1B
  ckpt-convert inspect Llama-3.2-1B --filter '*.self_attn.*' --full
  ckpt-convert inspect Llama-3.2-1B --full --sort size | head
  ckpt-convert inspect Llama-3-70B/original --by-shard
  ckpt-convert inspect consolidated.00.pth --sort offset
  ckpt-convert inspect Llama-3.2-1B --json | jq '.tensors[].key'

\b
In the tree, layers.{0..3,5..15}.wq.weight stands for one tensor in each of
these layers, all of one shape and dtype; ×15 counts them.""",
)
@click.argument("path")
@click.option("--full", is_flag=True, help="One line for each tensor.")
@click.option("--filter", "filters", multiple=True, metavar="GLOB", help="Only keys that match; can be repeated.")
@click.option(
    "--sort",
    "order",
    default="name",
    show_default=True,
    metavar="KEY[:asc|desc]",
    callback=_order,
    help="By name, size, or offset (one line for each stored piece, with its offset and file).",
)
@click.option("--by-shard", is_flag=True, help="Each file by itself.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
@click.option("--from", "from_format", type=click.Choice(FORMATS), help="Format of PATH (default: detected).")
@click.option("--family", metavar="NAME", help="The family, where it cannot be told.")
@click.option("--config", metavar="FILE", type=click.Path(), help="The config.json or params.json of PATH.")
@click.option("--revision", help="Branch, tag or commit, where PATH is a Hub id.")
def inspect(
    path: str,
    full: bool,
    filters: tuple[str, ...],
    order: Order,
    by_shard: bool,
    as_json: bool,
    from_format: str | None,
    family: str | None,
    config: str | None,
    revision: str | None,
) -> None:
    """Show what a checkpoint is and what is in it: format, family, files, and every tensor's key, shape and dtype.

    PATH is a directory, one weight file, or a Hub id (org/name). Only headers are read, however large the files are.
    """
    from ckpt_convert.cli import notices
    from ckpt_convert.convert.checkpoint import open_checkpoint

    view = View(full or order.by == "offset", filters, order, by_shard, terminal_width())
    with (
        notices.on_stderr(),
        open_checkpoint(_locate(path, revision), format=from_format, family=family, config=config) as checkpoint,
    ):
        facts = looking.gather(checkpoint)
        if as_json:
            echo("\n".join(looking.as_json(facts, _sorted(facts, view))))
        else:
            echo("\n".join([*_header(facts, view.width), "", *_body(facts, view)]))


def _locate(path: str, revision: str | None) -> Path:
    if Path(path).exists():
        return Path(path)
    from ckpt_convert.storage import hub

    return hub.locate(path, revision)


def _sorted(facts: Facts, view: View) -> list[TensorInfo]:
    """The tensors that match, in the order asked for."""
    found = [info for key, info in facts.checkpoint.tensors.items() if view.matches(key)]
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


def _sorted_rows(rows: list[Row], order: Order) -> list[Row]:
    if order.by == "size":
        return sorted(rows, key=lambda row: row.nbytes, reverse=order.descending)
    return rows[::-1] if order.descending else rows


def _header(facts: Facts, width: int | None) -> Iterator[str]:
    """The facts, a line each, wrapped on a terminal."""
    for label, words in _facts(facts):
        shown = click.style(f"{label:<{_LABEL}}", fg=_WARNING if label == "notice" else None, bold=True)
        lines = [" ".join(words)] if width is None else wrap(words, max(width - _LABEL, _LABEL))
        yield shown + f"\n{' ' * _LABEL}".join(lines)


def _facts(facts: Facts) -> Iterator[tuple[str, list[str]]]:
    """Labels and the words behind them; a line is not broken within a word."""
    checkpoint, model = facts.checkpoint, facts.model
    yield "path", [escape(str(checkpoint.path))]
    if checkpoint.format is None:
        yield "format", _words(f"unknown: {checkpoint.why}; say which it is with --from")
    else:
        yield "format", _words(f"{checkpoint.format} ({checkpoint.why})")
    if model is not None:
        release = f", sizes of {model.release}" if model.release else ""
        yield "family", _words(f"{model.family.name}{release} ({model.evidence})")
        yield "dims", _list(f"{name} {model.dims[name]}" for name in DIMS if name in model.dims)
    else:
        yield "family", _words(f"unknown: {facts.problem}" if checkpoint.format else "unknown, as the format is")
    if facts.ranks is not None:
        held = "; the last column says what each holds" if facts.ranks > 1 else ""
        yield "ranks", _words(f"{facts.ranks} (tensor-parallel degree{held})")
    yield "files", [_files(facts)]
    yield "parameters", _words(_parameters(facts.total))
    yield "bytes", [f"{human_bytes(facts.total.bytes)} ({number(facts.total.bytes)})"]
    yield "dtypes", _list(_dtypes(facts.dtypes)) or ["none"]
    yield "tied", _words(_tied(facts))
    source = looking.converted_from(checkpoint)
    if source is not None:
        yield "converted", _words(f"from {source}, recorded in {RECORD_FOLDER}/")
    for notice in facts.notices:
        yield "notice", _words(notice)


def _words(text: str) -> list[str]:
    # A message that lists problems has a line for each; here it has to do with one.
    first, *rest = text.split("\n")
    return [escape(word) for word in [*first.split(), *"; ".join(line.strip() for line in rest).split()]]


def _list(items: Iterable[str]) -> list[str]:
    *first, last = [*items] or [""]
    return [*(f"{item}," for item in first), last] if last else []


def _files(facts: Facts) -> str:
    files = facts.checkpoint.files
    kinds = ", ".join(sorted({_KINDS.get(file.header.kind, file.header.kind) for file in files}))
    return f"{plural(len(files), 'file')}, {kinds}, {human_bytes(sum(facts.file_bytes().values()))}"


def _parameters(total: Count) -> str:
    tensors = plural(total.tensors, "tensor")
    if total.parameters is None:
        return f"unknown, in {tensors}"
    exact = f" ({number(total.parameters)})" if total.parameters > 999 else ""
    return f"{human_count(total.parameters)}{exact} in {tensors}"


def _dtypes(dtypes: Mapping[str, Count]) -> Iterator[str]:
    for name, count in dtypes.items():
        yield name if len(dtypes) == 1 else f"{name} {human_bytes(count.bytes)} in {plural(count.tensors, 'tensor')}"


def _tied(facts: Facts) -> str:
    if facts.model is None:
        return "unknown"
    if facts.model.tied is None:
        return "unknown: the bytes of embedding and output decide"
    return "yes: the output is the embedding" if facts.model.tied else "no"


def _body(facts: Facts, view: View) -> Iterator[str]:
    """The tensors: collapsed, one by one, or file by file."""
    matching = [info for key, info in facts.checkpoint.tensors.items() if view.matches(key)]
    if not matching:
        yield "no tensors" if not facts.checkpoint.tensors else f"no key matches {_globs(view)}"
        return
    if view.by_shard:
        yield from _shards(facts, view)
    elif view.order.by == "offset":
        yield from _pieces(_stored(facts, view), facts, view, with_file=len(facts.checkpoint.files) > 1)
    elif view.full:
        yield from _tensors(facts, view)
    else:
        entries = [_entry(facts, info) for info in matching]
        yield from _tree(entries, Numbering(facts.checkpoint.tensors), view)
    if view.filters:
        size = human_bytes(sum(map(facts.nbytes, matching)))
        yield ""
        yield f"{number(len(matching))} of {plural(facts.total.tensors, 'tensor')} match {_globs(view)}, {size}"


def _globs(view: View) -> str:
    return " or ".join(map(escape, view.filters))


def _tree(entries: Sequence[Entry], numbering: Numbering, view: View, indent: str = "") -> list[str]:
    """The collapsed keys; a warning goes below its line where it would take room from the keys."""
    found = _sorted_rows(tree.collapse(entries, numbering), view.order)
    rows = [
        (
            escape(row.pattern),
            shape_text(row.shape),
            row.dtype,
            f"×{number(row.count)}" if row.count > 1 else "",
            human_bytes(row.nbytes),
            row.note,
            _missing(row),
        )
        for row in found
    ]
    right = frozenset({3, 4})
    if fits(rows, view.width, indent):
        return columns(rows, right=right, styles={6: _WARNING}, width=view.width, indent=indent)
    lines = columns([row[:-1] for row in rows], right=right, width=view.width, indent=indent)
    for at, row in enumerate(found):
        if row.missing:
            lines[at] += f"\n{indent}    {click.style(_missing(row), fg=_WARNING)}"
    return lines


def _missing(row: Row) -> str:
    return f"missing {escape(row.missing)}" if row.missing else ""


def _tensors(facts: Facts, view: View) -> list[str]:
    entries = (_entry(facts, info) for info in _sorted(facts, view))
    rows = [(escape(e.key), shape_text(e.shape), e.dtype, human_bytes(e.nbytes), e.note) for e in entries]
    return columns(rows, right=frozenset({3}), width=view.width)


def _entry(facts: Facts, info: TensorInfo) -> Entry:
    """A tensor as a line: its full shape where that is known, else that of one rank and a note that says so."""
    return Entry(info.key, info.shape, info.dtype, facts.nbytes(info), _note(facts, info))


def _note(facts: Facts, info: TensorInfo) -> str:
    parts = info.parts
    if len(parts) == 1:
        return "strided" if (parts[0].file, info.key) in facts.strides else ""
    if info.key in facts.open_keys:
        return f"on {len(parts)} ranks"
    if facts.ranks is None:
        return f"in {len(parts)} files"
    if info.axis is None:
        return f"{len(parts)} copies"
    return f"{len(parts)} × {shape_text(parts[0].shape)}"


def _shards(facts: Facts, view: View) -> Iterator[str]:
    """Each file with its tensors below it; what lies in another file is not missing."""
    numbering = Numbering(facts.checkpoint.tensors)
    sizes = facts.file_bytes()
    is_first = True
    for file in facts.checkpoint.files:
        found = [(file, tensor) for tensor in file.header.tensors if view.matches(tensor.key)]
        if not found and view.filters:
            continue
        if not is_first:
            yield ""
        is_first = False
        rank = f"  rank {file.rank}" if facts.ranks is not None else ""
        count = plural(len(file.header.tensors), "tensor")
        yield f"{click.style(escape(file.name), bold=True)}{rank}  {count}  {human_bytes(sizes[file.name])}"
        if view.full:
            yield from _pieces(_sorted_pieces(found, view.order), facts, view, indent="  ")
        else:
            entries = [Entry(t.key, t.shape, t.dtype, t.nbytes, "strided" if t.strides else "") for _, t in found]
            yield from _tree(entries, numbering, view, indent="  ")


def _stored(facts: Facts, view: View) -> list[tuple[WeightFile, StoredTensor]]:
    """Every stored piece that matches, in the order of the files."""
    found = [piece for piece in facts.checkpoint.stored if view.matches(piece[1].key)]
    return found[::-1] if view.order.descending else found


def _sorted_pieces(
    pieces: list[tuple[WeightFile, StoredTensor]], order: Order
) -> list[tuple[WeightFile, StoredTensor]]:
    if order.by == "offset":
        return sorted(pieces, key=lambda piece: (piece[1].offset, piece[1].key), reverse=order.descending)
    pieces = sorted(pieces, key=lambda piece: tree.natural(piece[1].key), reverse=order == Order("name", True))
    return sorted(pieces, key=lambda piece: piece[1].nbytes, reverse=order.descending) if order.by == "size" else pieces


def _pieces(
    pieces: Sequence[tuple[WeightFile, StoredTensor]],
    facts: Facts,
    view: View,
    *,
    with_file: bool = False,
    indent: str = "",
) -> list[str]:
    rows = [
        (
            escape(tensor.key),
            shape_text(tensor.shape),
            tensor.dtype,
            human_bytes(tensor.nbytes),
            "-" if file.name in facts.in_memory else str(tensor.offset),
            escape(file.name) if with_file else "",
            "strided" if tensor.strides else "",
        )
        for file, tensor in pieces
    ]
    return columns(rows, right=frozenset({3, 4}), width=view.width, indent=indent)
