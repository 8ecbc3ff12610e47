"""What checks read: spans of files, and pairs of tensors that should be equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import TypeVar

from ckpt_convert.checkpoint.findings import Finding
from ckpt_convert.checkpoint.mapping import Equality
from ckpt_convert.storage import checksums
from ckpt_convert.storage.base import RangeReader

T = TypeVar("T")


class Share:
    """What one of several processes reads of a checkpoint that all of them check: about as many bytes as each other.

    They find it out alone, so all have to ask the same.
    """

    def __init__(self, number: int = 0, count: int = 1) -> None:
        self._number = number
        self._given = [(0, one) for one in range(count)]
        heapify(self._given)

    def of(self, items: Iterable[tuple[int, T]]) -> list[T]:
        """Those that are its own, of items with their bytes: each goes to the process that has the least so far."""
        own = []
        for nbytes, item in sorted(items, key=lambda one: -one[0]):
            before, process = self._given[0]
            heapreplace(self._given, (before + nbytes, process))
            if process == self._number:
                own.append(item)
        return own


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file that are passed to ``add`` in order; ``finish`` then returns the findings."""

    reader: RangeReader
    file: str
    start: int
    end: int
    add: Callable[[memoryview], None]
    finish: Callable[[], Iterable[Finding]]


@dataclass(frozen=True, slots=True)
class ExpectedEqual:
    """Two tensors that should hold the same bytes: the finding if they differ, and one if they are equal."""

    equality: Equality
    differ: Finding
    equal: Finding | None = None


def hashed_span(
    reader: RangeReader, name: str, start: int, end: int, kind: str, done: Callable[[str], Iterable[Finding]]
) -> Span:
    """A span whose checksum (of any kind of ``checksums.new_checksum``) is passed to ``done``."""
    digest = checksums.new(kind)
    return Span(reader, name, start, end, digest.update, lambda: done(digest.hexdigest()))
