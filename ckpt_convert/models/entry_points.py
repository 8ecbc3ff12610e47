"""Families of other distributions: each names its own as an entry point of the group ``ckpt_convert.families``.

The object of an entry point is a ``Family``, or a tuple of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckpt_convert.models.core.table import Family

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "ckpt_convert.families"


@dataclass(frozen=True)
class Plugin:
    """The families of one entry point: ``origin`` is its distribution and version, ``problem`` why there are none."""

    name: str
    origin: str
    families: tuple[Family, ...] = ()
    problem: str | None = None


def plugins() -> Iterator[Plugin]:
    """Load the entry points of all installed distributions, sorted by name; a failure becomes a ``problem``."""
    from importlib.metadata import entry_points  # takes 20 ms, and few need it

    for origin, point in sorted((_origin(point), point) for point in entry_points(group=GROUP)):
        try:
            found = point.load()
        except Exception as error:  # importing a foreign module may raise anything
            yield Plugin(point.name, origin, problem=f"{type(error).__name__}: {error}")
            continue
        families = found if isinstance(found, tuple) else (found,)
        if all(isinstance(family, Family) for family in families):
            yield Plugin(point.name, origin, families)
        else:
            yield Plugin(point.name, origin, problem=f"{point.value} is no Family and no tuple of them")


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unnamed distribution"
