"""The tensors of a checkpoint as lines: collapsed, one by one, or file by file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ckpt_convert.cli import colors, tree
from ckpt_convert.cli.facts import Facts
from ckpt_convert.cli.text import columns, escape, fits, number, plural, shape_text
from ckpt_convert.cli.tree import Entry, Numbering, Row
from ckpt_convert.cli.view import Order, View, matching, missing, ordered, shares
from ckpt_convert.errors import CkptConvertError
from ckpt_convert.wording import human_bytes

if TYPE_CHECKING:
    from ckpt_convert.checkpoint.tensor_info import TensorInfo
    from ckpt_convert.tensors.header import StoredTensor, WeightFile


def body(facts: Facts, view: View) -> Iterator[str]:
    """The tensors that match, and how many they are where some do not."""
    found = matching(facts, view)
    if not found:
        yield "no tensors" if not facts.checkpoint.tensors else f"no key matches {view.globs}"
        return
    if view.by_shard:
        yield from _shards(facts, view)
    elif view.order.by == "offset":
        yield from _pieces(_stored(facts, view), facts, view, with_file=len(facts.checkpoint.files) > 1)
    elif view.full:
        yield from _tensors(facts, view)
    elif view.tree:
        from ckpt_convert.cli import modules

        yield from modules.lines([entry(facts, info) for info in found], view, facts.total)
    else:
        entries = [entry(facts, info) for info in found]
        yield from _collapsed(entries, _numbering(facts), view, facts.total.bytes)
    yield from matched(facts, view)


def _numbering(facts: Facts) -> Numbering:
    """The indices that exist, and those that the family's table expects."""
    checkpoint = facts.checkpoint

    def expected() -> list[str] | None:
        try:
            model = checkpoint.model
        except CkptConvertError:
            return None
        return [entry.key for entry in model.family.stored_specs(str(checkpoint.format), model.dims)]

    return Numbering(checkpoint.tensors, expected)


def matched(facts: Facts, view: View) -> Iterator[str]:
    """How many tensors match, where some may not."""
    if view.filters:
        found = matching(facts, view)
        size = human_bytes(sum(map(facts.nbytes, found)))
        yield ""
        yield f"{number(len(found))} of {plural(facts.total.tensors, 'tensor')} match {view.globs}, {size}"


def entry(facts: Facts, info: TensorInfo) -> Entry:
    """A tensor as a line: its full shape where that is known, else the shape of one rank, with a note."""
    key, shape, dtype, nbytes, parts, _, settled, _ = info
    note = _note(facts, info) if len(parts) > 1 or facts.strides else ""
    return Entry(key, shape, dtype, nbytes if settled else facts.nbytes(info), note)


def sorted_rows(rows: list[Row], order: Order) -> list[Row]:
    """Collapsed lines in the order asked for."""
    if order.by == "size":
        return sorted(rows, key=lambda row: row.nbytes, reverse=order.descending)
    return rows[::-1] if order.descending else rows


def _note(facts: Facts, info: TensorInfo) -> str:
    parts = info.parts
    if len(parts) == 1:
        return "strided" if (parts[0].file, info.key) in facts.strides else ""
    if not info.settled:
        return f"on {len(parts)} ranks"
    if parts[0].origin is not None:
        is_even = len({part.shape for part in parts}) == 1
        return f"{len(parts)} × {shape_text(parts[0].shape)}" if is_even else f"{len(parts)} pieces"
    if facts.ranks is None:
        return f"in {len(parts)} files"
    if info.axis is None:
        return f"{len(parts)} copies"
    return f"{len(parts)} × {shape_text(parts[0].shape)}"


def _collapsed(
    entries: Sequence[Entry], numbering: Numbering, view: View, total: int, indent: str = ""
) -> Iterator[str]:
    """The collapsed keys; a warning that leaves no room for the key goes on the next line."""
    found = sorted_rows(tree.collapse(entries, numbering), view.order)
    rows = [
        (
            escape(row.pattern),
            shape_text(row.shape),
            escape(row.dtype),
            f"×{number(row.count)}" if row.count > 1 else "",
            human_bytes(row.nbytes),
            *shares(row.nbytes, total, view.width),
            row.note,
            missing(row.missing),
        )
        for row in found
    ]
    styles = {0: colors.key, 2: colors.dtype, 5: colors.quiet, 6: colors.quiet, 8: colors.warning}
    right = frozenset({3, 4, 5})
    if fits([(*row[:5], "", "", *row[7:]) for row in rows], view.width, indent):
        yield from columns(rows, right=right, styles=styles, spare=(6, 5), width=view.width, indent=indent)
        return
    lines = columns(
        [row[:-1] for row in rows], right=right, styles=styles, spare=(6, 5), width=view.width, indent=indent
    )
    for line, row in zip(lines, found, strict=True):
        yield line
        if row.missing:
            yield f"{indent}    {colors.warning(missing(row.missing))}"


def _tensors(facts: Facts, view: View) -> list[str]:
    entries = (entry(facts, info) for info in ordered(facts, view))
    rows = [(escape(e.key), shape_text(e.shape), escape(e.dtype), human_bytes(e.nbytes), e.note) for e in entries]
    return columns(rows, right=frozenset({3}), styles={2: colors.dtype}, width=view.width)


def _shards(facts: Facts, view: View) -> Iterator[str]:
    """Each file with its tensors below it; a tensor of another file is not missing."""
    numbering = _numbering(facts)
    sizes = facts.file_bytes()
    is_first = True
    for file in facts.checkpoint.files:
        found = [(file, tensor) for tensor in file.header.tensors if view.matches(tensor.key)]
        if not found and view.filters:
            continue
        if not is_first:
            yield ""
        is_first = False
        rank = f"rank {file.rank}" if facts.ranks is not None else ""
        heading = (escape(file.name), rank, plural(len(file.header.tensors), "tensor"), human_bytes(sizes[file.name]))
        yield from columns([heading], styles={0: colors.label}, width=view.width)
        if view.full:
            yield from _pieces(_sorted_pieces(found, view.order), facts, view, indent="  ")
        else:
            entries = [Entry(t.key, t.shape, t.dtype, t.nbytes, "strided" if t.strides else "") for _, t in found]
            yield from _collapsed(entries, numbering, view, facts.total.bytes, indent="  ")


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
            escape(tensor.dtype),
            human_bytes(tensor.nbytes),
            str(tensor.offset),
            escape(file.name) if with_file else "",
            "strided" if tensor.strides else "",
        )
        for file, tensor in pieces
    ]
    return columns(rows, right=frozenset({3, 4}), styles={2: colors.dtype}, width=view.width, indent=indent)
