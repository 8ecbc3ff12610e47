"""What files say of themselves beside their tensors: ``__metadata__``, and the plain values in a pickle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ckpt_convert.cli.text import escape, shorten
from ckpt_convert.wording import MORE, first_few

if TYPE_CHECKING:
    from ckpt_convert.tensors.header import Scalar, WeightFile

_EVERYWHERE = {"format": "pt"}
"""What safetensors files of every model say; alone it is not worth a line."""

_MAX_ITEMS = 12
_MAX_GROUPS = 4
_MAX_NAME, _MAX_TEXT = 60, 60
"""Limits of what a terminal and a page show; ``--json`` has all of it."""


def stated(files: Sequence[WeightFile]) -> Iterator[tuple[str, list[str]]]:
    """(label, items) of weight files; files that say the same share a line.

    A line that is not of all files begins with the names of its own. Items are escaped and shortened.
    """
    for label, maps in (
        ("metadata", [file.header.metadata for file in files]),
        ("values", [file.header.values for file in files]),
    ):
        groups: dict[tuple[tuple[str, Scalar], ...], list[str]] = {}
        for file, said in zip(files, maps, strict=True):
            if said and said != _EVERYWHERE:
                groups.setdefault(tuple(said.items()), []).append(file.name)
        for items, names in [*groups.items()][:_MAX_GROUPS]:
            where = [] if len(names) == len(files) else [f"{escape(first_few(names, 1, MORE))}:"]
            yield label, [*where, *_listed(items)]
        if len(groups) > _MAX_GROUPS:
            yield label, [f"… and {len(groups) - _MAX_GROUPS} others, in other files"]


def _listed(items: Iterable[tuple[str, Scalar]]) -> list[str]:
    """The items, those that are nested least first: an epoch before what an optimizer keeps of each of its groups."""
    found = sorted(items, key=lambda item: item[0].count("."))
    texts = [f"{shorten(escape(name), _MAX_NAME)} {_value(value)}" for name, value in found[:_MAX_ITEMS]]
    left = len(found) - _MAX_ITEMS
    return [f"{text}," for text in texts[:-1]] + texts[-1:] + ([f"and {left} more"] if left > 0 else [])


def _value(value: Scalar) -> str:
    text = value if isinstance(value, str) else repr(value)
    shown = escape(text[:_MAX_TEXT]) + "…" * (len(text) > _MAX_TEXT)
    return shown if shown and " " not in shown else f"'{shown}'"
