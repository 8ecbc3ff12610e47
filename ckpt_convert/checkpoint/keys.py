"""The tensors of opened files by key: as stored, and by the keys of their format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property

from ckpt_convert import formats
from ckpt_convert.checkpoint import legacy_keys
from ckpt_convert.checkpoint.findings import Finding
from ckpt_convert.checkpoint.legacy_keys import PLAIN, KeyNames
from ckpt_convert.checkpoint.opening import OpenedFiles
from ckpt_convert.checkpoint.tensor_info import SourceTensor, join_boxes
from ckpt_convert.errors import KeyMismatchError
from ckpt_convert.storage.place import Place
from ckpt_convert.tensors.header import StoredTensor, WeightFile
from ckpt_convert.tensors.lazy import from_source
from ckpt_convert.values import frozen
from ckpt_convert.wording import indented_list


@frozen(eq=False)
class Keys:
    """Opened files, and the format's names of their keys; lazy tensors refer to ``OpenedFiles.stored`` by position."""

    opened: OpenedFiles
    names: KeyNames = PLAIN

    @cached_property
    def ranks(self) -> list[dict[str, SourceTensor]]:
        """For each rank, its tensors by the keys of the format.

        Raises KeyMismatchError for duplicate keys, ambiguous keys, and keys that contradict the index.
        """
        if self.contradictions:
            _refuse(self.opened.place, [finding.text for finding in self.contradictions])
        if self.has_only_weights:
            return self.stored_ranks
        names = self.names
        return [
            {(name := names.of(key)): source._replace(key=name) for key, source in rank.items() if self.is_weight(key)}
            for rank in self.stored_ranks
        ]

    @property
    def stored_ranks(self) -> list[dict[str, SourceTensor]]:
        """For each rank, its tensors by stored key; of duplicates the last."""
        return self._found[0]

    @property
    def contradictions(self) -> list[Finding]:
        """Where the files disagree with each other, or with the index."""
        return self._found[1]

    @cached_property
    def duplicates(self) -> dict[str, str]:
        """The keys that several files have, with a message for each."""
        found = (finding for finding in self.contradictions if finding.check == "duplicate" and finding.file)
        return {str(finding.key): finding.text for finding in found}

    @cached_property
    def _found(self) -> tuple[list[dict[str, SourceTensor]], list[Finding]]:
        return self._find()

    def _find(self) -> tuple[list[dict[str, SourceTensor]], list[Finding]]:
        files = self.opened.files
        ranks: list[dict[str, SourceTensor]] = [{} for _ in range(max((f.rank for f in files), default=0) + 1)]
        findings = []
        boxes: dict[str, list[tuple[int, StoredTensor]]] = {}
        for number, (file, tensor) in enumerate(self.opened.stored):
            key = self.key_in_file(file, tensor)
            rank = ranks[file.rank]
            if tensor.box is not None:
                boxes.setdefault(key, []).append((number, tensor))
                if len(boxes[key]) > 1:
                    continue
            elif key in rank and self.is_weight(key):
                text = f"{key} is in {rank[key].location} and in {file.name}"
                findings.append(Finding("error", "duplicate", text, file.name, key))
            rank[key] = SourceTensor(key, tensor.dtype, from_source(number, tensor.shape, tensor.strides), file.name)
        for key, pieces in boxes.items():
            ranks[0][key] = ranks[0][key]._replace(tensor=join_boxes(pieces))
        findings += self._against_index(ranks[0])
        findings += [Finding("error", "duplicate", text, None, key) for key, text in self.names.clashes]
        return ranks, findings

    def _against_index(self, found: dict[str, SourceTensor]) -> list[Finding]:
        index, weight_map = self.opened.directory.index, self.opened.directory.weight_map or {}
        findings = []
        for key, name in weight_map.items():
            source = found.get(key)
            if source is None:
                text = f"{key} is missing: {index} says that it is in {name}"
                findings.append(Finding("error", "index", text, name, key, name))
            elif source.location != name:
                text = f"{key} is in {source.location}, but {index} says {name}"
                findings.append(Finding("error", "index", text, source.location, key, name, source.location))
        for key, source in found.items() if weight_map else ():
            if key not in weight_map:
                text = f"{key} is in {source.location}, but {index} does not list it"
                findings.append(Finding("error", "index", text, source.location, key, None, source.location))
        return findings

    def is_weight(self, key: str) -> bool:
        """Whether a stored key is one of the model's weights, and not of other training state."""
        return key not in self.names.non_weights and not key.startswith(self._ignores)

    @cached_property
    def _ignores(self) -> tuple[str, ...]:
        return formats.ALL[self.opened.format].ignored_prefixes if self.opened.format is not None else ()

    @property
    def has_only_weights(self) -> bool:
        """Whether every key is one of the format's, so that nothing is renamed or skipped."""
        return self.names.is_identity and not self._ignores

    def key_in_file(self, file: WeightFile, tensor: StoredTensor) -> str:
        """The key of a stored tensor, as ``file:key`` where several files of no known format have the key."""
        return f"{file.name}:{tensor.key}" if tensor.key in self._shared else tensor.key

    @cached_property
    def _shared(self) -> frozenset[str]:
        """Keys that several unrelated files have: nothing says that the files are one checkpoint."""
        opened = self.opened
        if opened.format is not None or opened.directory.index is not None or len(opened.files) == 1:
            return frozenset()
        keys = Counter(tensor.key for file in opened.files for tensor in file.header.tensors if tensor.box is None)
        return frozenset(key for key, count in keys.items() if count > 1)

    @property
    def notices(self) -> list[str]:
        """Which keys are read under other names, and which are skipped because they are no weights."""
        stored_keys = () if self.has_only_weights else (tensor.key for _, tensor in self.opened.stored)
        other = [key for key in stored_keys if not self.is_weight(key)]
        said = ", ".join(sorted(set(map(legacy_keys.top_level_entry, other))))
        count = f"{len(other):,} tensors" if len(other) != 1 else "1 tensor"
        passed = [f"skipped, as they are no weights: {count} of {said}"] if other else []
        return [*self.names.notices, *passed]


def refuse_clashes(names: KeyNames, place: Place) -> None:
    """Raise KeyMismatchError for stored keys that name the same tensor of the format, or could name several."""
    if names.clashes:
        _refuse(place, [text for _, text in names.clashes])


def _refuse(place: Place, messages: Sequence[str]) -> None:
    raise KeyMismatchError(f"{place}: the files contradict each other:{indented_list(messages)}")
