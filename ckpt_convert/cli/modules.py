"""The modules of a model as a tree with their total sizes, equal layers and experts on one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from ckpt_convert.cli import colors
from ckpt_convert.cli.facts import Count
from ckpt_convert.cli.text import can_say, columns, escape, human_count, number, plural, shape_text
from ckpt_convert.cli.tree import Entry, is_number, missing_between, natural, numbers_text
from ckpt_convert.cli.view import Order, View, missing, shares
from ckpt_convert.wording import human_bytes

_DEEPEST = 64
"""The most levels of modules; deeper parts of a key (no model has any) belong to the tensor's name."""

_Kind = tuple[tuple[int, ...], str, int, str]


@dataclass(frozen=True, slots=True)
class Module:
    """A module, or a tensor, where ``kind`` has its shape, dtype, bytes and note.

    ``name`` is its part of the key (several parts where modules hold nothing but each other), with the indices of equal
    siblings collapsed; ``copies`` counts these. ``tensors``, ``parameters`` and ``nbytes`` are those of all the copies
    together, but within one copy of the module above. ``missing`` are indices that no module below has, in words.
    """

    name: str
    copies: int
    tensors: int
    parameters: int
    nbytes: int
    kind: _Kind | None
    children: tuple[Module, ...]
    missing: str = ""


def build(entries: Iterable[Entry]) -> tuple[Module, ...]:
    """The modules at the root, in natural order; layers are equal when everything below them is."""
    root = _Node()
    for entry in entries:
        node = root
        for part in entry.key.split(".", _DEEPEST):
            child = node.children.get(part)
            if child is None:
                child = node.children[part] = _Node()
            node = child
        node.kind = entry[1:]
    return _Folding().fold(root).children


class _Node:
    """A module while the keys are being read."""

    __slots__ = ("children", "kind")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.kind: _Kind | None = None


class _Folding:
    """Makes modules from nodes, equal ones once only, so that thousands of experts are one object."""

    def __init__(self) -> None:
        self._seen: dict[object, Module] = {}

    def fold(self, node: _Node) -> Module:
        """A module without a name, as one copy."""
        parts = {part: self.fold(child) for part, child in node.children.items()}
        content = (node.kind, frozenset((part, id(module)) for part, module in parts.items()))
        if content not in self._seen:
            self._seen[content] = _module(node.kind, parts)
        return self._seen[content]


def _module(kind: _Kind | None, parts: dict[str, Module]) -> Module:
    numbered: dict[int, list[int]] = {}
    modules = {id(module): module for module in parts.values()}
    children = []
    for part, module in parts.items():
        if is_number(part):
            numbered.setdefault(id(module), []).append(int(part))
        else:
            children.append(_named(module, part, 1))
    groups = sorted((sorted(values), same) for same, values in numbered.items())
    children.sort(key=lambda child: natural(child.name))
    children = [*(_named(modules[same], numbers_text(values), len(values)) for values, same in groups), *children]
    gaps = missing_between(sorted(value for values, _ in groups for value in values))
    own = (1, prod(kind[0]), kind[2]) if kind else (0, 0, 0)
    return Module(
        name="",
        copies=1,
        tensors=own[0] + sum(child.tensors for child in children),
        parameters=own[1] + sum(child.parameters for child in children),
        nbytes=own[2] + sum(child.nbytes for child in children),
        kind=kind,
        children=tuple(children),
        missing=gaps,
    )


def _named(module: Module, name: str, copies: int) -> Module:
    """The module under its name; one that only holds another is joined with it, as in ``embed_tokens.weight``."""
    if module.kind is None and len(module.children) == 1:
        (child,) = module.children
        module = replace(child, name=f"{name}.{child.name}", missing=child.missing or module.missing)
    else:
        module = replace(module, name=name)
    return replace(
        module,
        copies=module.copies * copies,
        tensors=module.tensors * copies,
        parameters=module.parameters * copies,
        nbytes=module.nbytes * copies,
    )


def lines(entries: Iterable[Entry], view: View, total: Count) -> list[str]:
    """The tree with the size of each module, for a terminal or plain; ``total`` is what 100% is."""
    counted = total.parameters is not None
    drawing = ("├─ ", "└─ ", "│  ") if can_say("├└│─") else ("|- ", "`- ", "|  ")
    found = [*_walk(build(entries), view.order, view.depth, drawing, "", 1, 1)]
    rows = []
    for lead, module, times, is_cut in found:
        kind = module.kind
        rows.append(
            (
                lead + escape(module.name),
                shape_text(kind[0]) if kind else "",
                escape(kind[1]) if kind else "",
                f"×{number(module.copies)}" if module.copies > 1 else "",
                human_count(module.parameters * times) if counted else "",
                human_bytes(module.nbytes * times),
                *shares(module.nbytes * times, total.bytes, view.width),
                (kind[3] if kind else "") or (plural(module.tensors * times, "tensor") if is_cut else ""),
                # What a filter hides is not missing.
                "" if view.filters else missing(module.missing),
            )
        )
    styles = {
        0: colors.key,
        2: colors.dtype,
        6: colors.quiet,
        7: colors.quiet,
        8: colors.quiet,
        9: colors.warning,
    }
    spare = (7, 4, 2, 1, 8, 6)
    return columns(rows, right=frozenset({3, 4, 5, 6}), styles=styles, spare=spare, width=view.width)


_Line = tuple[str, Module, int, bool]


def _walk(
    modules: Sequence[Module],
    order: Order,
    depth: int | None,
    drawing: tuple[str, str, str],
    above: str,
    level: int,
    times: int,
) -> Iterator[_Line]:
    """Each module with its tree prefix, its number of copies in all, and whether its children are left out."""
    branch, last, line = drawing
    if order.by == "size":
        modules = sorted(modules, key=lambda module: module.nbytes, reverse=order.descending)
    elif order.descending:
        modules = modules[::-1]
    for at, module in enumerate(modules):
        is_last = at == len(modules) - 1
        is_cut = bool(module.children) and level == depth
        own = "" if level == 1 else above + (last if is_last else branch)
        yield own, module, times, is_cut
        if not is_cut:
            below = "" if level == 1 else above + (" " * len(line) if is_last else line)
            yield from _walk(module.children, order, depth, drawing, below, level + 1, times * module.copies)
