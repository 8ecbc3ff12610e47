"""The open sources of a plan: those of the process that made it, or the same files reopened in another process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple, overload

from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.checkpoint.dequantize import dequantize_if_asked
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.containers import join_small
from ckpt_convert.containers.dcp import dcp
from ckpt_convert.convert.plan import COMPUTED, Plan, SourceFile, memory_key
from ckpt_convert.errors import UsageError
from ckpt_convert.storage.base import Closable, RangeReader
from ckpt_convert.tensors.header import StoredTensor

Sources = Mapping[SourceFile, RangeReader]
"""The reader of each source of a plan."""


class OpenSource(NamedTuple):
    """A source that is open for reading."""

    reader: RangeReader


class NumberedTensors(Sequence[tuple[OpenSource, StoredTensor]]):
    """The stored tensors of a plan by number, each with its source, which is opened on first use."""

    def __init__(self, plan: Plan, sources: Sources) -> None:
        self._plan = plan
        self._sources = sources
        self._opened: list[OpenSource | None] = [None] * len(plan.sources)

    @overload
    def __getitem__(self, number: int) -> tuple[OpenSource, StoredTensor]: ...

    @overload
    def __getitem__(self, number: slice) -> list[tuple[OpenSource, StoredTensor]]: ...

    def __getitem__(
        self, number: int | slice
    ) -> tuple[OpenSource, StoredTensor] | list[tuple[OpenSource, StoredTensor]]:
        if isinstance(number, slice):
            return [self[at] for at in range(len(self))[number]]
        file, tensor = self._plan.stored_in[number], self._plan.stored[number]
        opened = self._opened[file]
        if opened is None:
            opened = self._opened[file] = OpenSource(self._sources[self._plan.sources[file]])
        return opened, tensor

    def __len__(self) -> int:
        return len(self._plan.stored)


@dataclass(frozen=True)
class OpenPlan:
    """A plan with its open sources."""

    plan: Plan
    sources: Mapping[SourceFile, RangeReader]

    def close(self) -> None:
        """Close every file that the plan reads from."""
        close_sources(self.sources)


class ReopenedSources(Mapping[SourceFile, RangeReader]):
    """The files that a plan reads from, reopened by their places on first use; to be closed.

    ``memory`` has the tensors of this process, by key. Raises SourceChangedError for a file that has changed, and
    UsageError for a tensor in the memory of another process.
    """

    def __init__(self, plan: Plan, memory: Mapping[str, RangeReader] | None = None) -> None:
        self._plan = plan
        self._memory = memory or {}
        self._open: dict[SourceFile, RangeReader] = {}
        self._numbers: Identified | None = None
        self._lock = Lock()

    def __getitem__(self, source: SourceFile) -> RangeReader:
        with self._lock:
            if source not in self._open:
                self._open[source] = self._opened(source)
            return self._open[source]

    def __iter__(self) -> Iterator[SourceFile]:
        return iter(self._plan.sources)

    def __len__(self) -> int:
        return len(self._plan.sources)

    def _opened(self, source: SourceFile) -> RangeReader:
        if source.place is None:
            key = memory_key(source)
            if key is None or key not in self._memory:
                raise UsageError(f"{source.name}: is in the memory of another process, which has to write it")
            return self._memory[key]
        if source.kind == COMPUTED:
            return next(file.reader for file in self._as_numbers().files if file.place == source.place)
        if source.kind == dcp.KIND:
            files, _ = dcp.read_dcp_directory(source.place.parent)
            return next(file.reader for file in files if file.place == source.place)
        reader = source.place.open(expected=source.identity)
        number = self._plan.sources.index(source)
        join_small(
            reader,
            (one for one, at in zip(self._plan.stored, self._plan.stored_in, strict=True) if at == number),
        )
        return reader

    def _as_numbers(self) -> Identified:
        """The dequantized view of the quantized checkpoint that the plan reads."""
        if self._numbers is None:
            found, hints = self._plan.source, self._plan.source.hints
            opened = open_identified(
                found.place, format=found.format, family=hints.family, config=hints.config, options=hints.options
            )
            self._numbers = dequantize_if_asked(opened, found.dequantized)
        return self._numbers

    def close(self) -> None:
        """Close every file that was opened."""
        close_sources(self._open)


def close_sources(sources: Sources) -> None:
    for reader in sources.values():
        if isinstance(reader, Closable):
            reader.close()
