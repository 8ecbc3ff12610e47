"""Tensors that take the place of the source's in a conversion, such as weights with an adapter merged in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.mapping import Equality, LogicalTensor
from ckpt_convert.convert.translate import SourceReading
from ckpt_convert.models.core.table import Instance
from ckpt_convert.storage.base import Entry
from ckpt_convert.storage.place import Place
from ckpt_convert.tensors.header import StoredTensor, WeightFile


@dataclass(frozen=True)
class ChangedTensors:
    """The tensors that replace those of the source, each of the same shape and dtype, in the logical layout.

    ``stored`` are the source's stored tensors and others after them; the lazy tensors of ``tensors`` and ``checks``
    refer to them by position. ``steps`` says of each changed stored tensor, by position, how it comes about. ``checks``
    are pairs that must be equal for the change to be valid; ``identities`` the files that it was planned from, with
    size and etag before reading.
    """

    tensors: Mapping[Instance, LogicalTensor]
    stored: tuple[tuple[WeightFile, StoredTensor], ...]
    steps: Mapping[int, str]
    checks: tuple[Equality, ...] = ()
    notices: tuple[str, ...] = ()
    identities: Mapping[Place, Entry] = field(default_factory=dict)

    def applied(self, reading: SourceReading) -> SourceReading:
        """The reading of the source with its tensors replaced."""
        before = reading.logicals
        tensors = {**before.tensors, **self.tensors}
        checks = [*before.replica_checks, *self.checks]
        return replace(reading, logicals=replace(before, tensors=tensors, replica_checks=checks))


class TensorChange(Protocol):
    """A change of the source's tensors that a conversion makes on the way."""

    def plan(self, source: Identified, reading: SourceReading) -> ChangedTensors:
        """The changed tensors, from headers alone; raises the error that lists everything that does not fit."""

    def overflows(self) -> Mapping[str, int]:
        """Count by key the finite values that became infinite in what was computed so far."""
