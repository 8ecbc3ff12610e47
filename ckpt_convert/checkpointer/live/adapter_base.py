"""The base model that an adapter was trained on: its fingerprint in a step, and comparing it with a source.

The fingerprint has the tensors of the training model: key, dtype, shape, and a checksum of the values as the source
stores them, computed while they are read. A base that was moved, re-sharded or converted has the same fingerprint;
another dtype, or one changed value, gives another one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckpt_convert import dtypes
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpointer.distributed.ranks import Ranks, packed, unpacked
from ckpt_convert.checkpointer.live import loading
from ckpt_convert.convert.writing import TargetTensor
from ckpt_convert.errors import CorruptFileError

SECTION = "base"
"""The key in the manifest's training section."""


class TensorFingerprint(NamedTuple):
    """One tensor; the checksum (xxh3_64, hex) is None if its values were not read."""

    dtype: str
    shape: tuple[int, ...]
    checksum: str | None = None


@dataclass(frozen=True)
class AdapterBase:
    """The tensors of a base model by key, in the ``layout`` (a column of the family's table) of a training model."""

    layout: str
    tensors: Mapping[str, TensorFingerprint]

    @property
    def has_checksums(self) -> bool:
        """Whether every tensor has a checksum."""
        return all(tensor.checksum is not None for tensor in self.tensors.values())

    def as_json(self) -> dict[str, Any]:
        """The entry in the manifest."""
        return {
            "layout": self.layout,
            "checksum": "xxh3_64",
            "tensors": {key: tensor._asdict() for key, tensor in sorted(self.tensors.items())},
        }

    def structure_differences(self, now: AdapterBase) -> list[str]:
        """A line for each tensor that another base lacks, or has in another dtype or shape."""
        lines = []
        for key, (dtype, shape, _) in self.tensors.items():
            other = now.tensors.get(key)
            if other is None or (other.dtype, other.shape) != (dtype, shape):
                found = "nothing" if other is None else f"{other.dtype} {list(other.shape)}"
                lines.append(f"{key}: expected {dtype} {list(shape)} as in the adapter's base, found {found}")
        return lines

    def value_differences(self, now: AdapterBase) -> list[str]:
        """The keys of tensors whose checksums differ, if both have one."""
        return [
            key
            for key, tensor in self.tensors.items()
            if (other := now.tensors.get(key)) is not None
            and tensor.checksum is not None
            and other.checksum not in (None, tensor.checksum)
        ]


def read_base(training: Mapping[str, Any], where: str) -> AdapterBase | None:
    """The base in a manifest's training section, None if it has none; raises CorruptFileError."""
    content = training.get(SECTION)
    if content is None:
        return None
    try:
        tensors = {
            str(key): TensorFingerprint(str(one["dtype"]), tuple(map(int, one["shape"])), one.get("checksum"))
            for key, one in content["tensors"].items()
        }
        return AdapterBase(str(content["layout"]), tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"{where}: what it says of the adapter's base is damaged ({error})") from error


def base_from_targets(
    layout: str, targets: Collection[TargetTensor], checksums: Mapping[str, str] | None = None
) -> AdapterBase:
    """The fingerprint of these tensors of a source."""
    known = checksums or {}
    return AdapterBase(
        layout, {one.key: TensorFingerprint(one.dtype, one.tensor.shape, known.get(one.key)) for one in targets}
    )


def base_from_source(
    source: Identified, layout: str, keys: Collection[str], *, workers: int, values: bool
) -> AdapterBase:
    """The fingerprint of the tensors under these keys, from headers; ``values`` reads them for their checksums."""
    targets = [target for target in loading.source_targets(source, layout)[0] if target.key in keys]
    return base_from_targets(layout, targets, loading.read_checksums(source, targets, workers) if values else None)


def base_of_all(
    source: Identified,
    layout: str,
    keys: Collection[str],
    known: AdapterBase | None,
    ranks: Ranks,
    *,
    workers: int,
) -> AdapterBase:
    """The fingerprint of the tensors under these keys, for which each of several ranks reads its share of them.

    ``known`` is what this rank has read of it already. All ranks ask at the same time.
    """
    targets = [target for target in loading.source_targets(source, layout)[0] if target.key in keys]
    by_size = sorted(targets, key=lambda one: dtypes.nbytes(one.dtype, one.tensor.shape))
    share = by_size[ranks.rank :: ranks.count]

    def read() -> bytes:
        if known is not None and all(one.key in known.tensors for one in share):
            return packed({one.key: known.tensors[one.key].checksum for one in share})
        return packed(loading.read_checksums(source, share, workers))

    answer = ranks.round("reading the base of the adapter", read, _all_checksums)
    return base_from_targets(layout, targets, unpacked(answer))


def _all_checksums(every: Sequence[bytes]) -> list[bytes]:
    return [packed({key: checksum for one in every for key, checksum in unpacked(one).items()})]
