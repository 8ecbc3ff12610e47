"""What checks read: spans of files, and pairs of tensors that should be equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ckpt_convert.checkpoint.findings import Finding
from ckpt_convert.checkpoint.mapping import Equality
from ckpt_convert.storage import checksums
from ckpt_convert.storage.base import RangeReader


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
