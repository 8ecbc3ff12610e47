"""The adapter that a model is trained with: PEFT's files of it, the base it belongs to, and copies for a save.

Where several ranks save, each has slices of the adapter. It is small, so it is gathered for every save: by the first
one, which writes PEFT's files, and by all of them where they merge it, each into its slices of the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from ckpt_convert.adapters.arithmetic import LastBlock
from ckpt_convert.adapters.config import AdapterConfig
from ckpt_convert.adapters.merge import MergedReader, plan_merges
from ckpt_convert.adapters.modules import Modules
from ckpt_convert.adapters.parameters import Adapter, SplitTensors, split_adapters
from ckpt_convert.adapters.peft_files import LoadedAdapter, from_peft, render_files, to_peft
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpointer.distributed import gathering
from ckpt_convert.checkpointer.distributed.claims import Claims, Owned, names_elsewhere
from ckpt_convert.checkpointer.distributed.ranks import Ranks
from ckpt_convert.checkpointer.distributed.slices import slice_of
from ckpt_convert.checkpointer.live import adapter_base
from ckpt_convert.checkpointer.live.adapter_base import AdapterBase
from ckpt_convert.checkpointer.live.tensors import all_of
from ckpt_convert.checkpointer.save.buffers import CopyBuffers, State, stage
from ckpt_convert.convert.writing import TargetTensor
from ckpt_convert.errors import CkptConvertError, UsageError, error_text
from ckpt_convert.storage import hub
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.reader import DEFAULT_WORKERS

log = logging.getLogger("ckpt_convert")

Tensors = Mapping[str, torch.Tensor]

_SAVED = "saved/"
_NO_BASE = "the base that the adapter is of is not written down with it: %s"


class TrainedAdapter:
    """An adapter that is trained on the base of a source, by one process or by several ``ranks``."""

    def __init__(self, config: AdapterConfig, source: Identified, model_format: str, ranks: Ranks | None) -> None:
        self._config, self._source, self._format, self._ranks = config, source, model_format, ranks
        self._claims = None if ranks is None else Claims(ranks)
        self._base: AdapterBase | None = None
        self._is_base_agreed = False

    @cached_property
    def modules(self) -> Modules:
        """The modules of the model that adapters refer to."""
        model = self._source.model
        model.family.check_rotation(model.config, self._format, "hf")
        return Modules(model.family, self._format, model.dims)

    def split(self, tensors: Tensors, *, strict: bool) -> SplitTensors:
        """The tensors of a model, split from those of the adapter; ``strict`` checks these against the config."""
        return split_adapters(tensors, self._config if strict else None, self.modules)

    def read(self, path: Place) -> LoadedAdapter:
        """The adapter in PEFT's files."""
        return from_peft(path, self.modules, self._config)

    def check(self, parts: SplitTensors) -> None:
        """Raise the error that says why PEFT's files cannot hold this adapter; all ranks do."""
        mine = {*parts.base, *trained_tensors(parts)}
        if missing := sorted(names_elsewhere(mine, self._ranks)):
            raise UsageError(
                f"adapter: {missing[0]} is on another rank and not on this one; the adapter of a model in pipeline "
                "stages cannot be saved: every rank needs a slice or a copy of every tensor"
            )
        whole = self.gathered(parts, to_all=False)
        if self._writes_files:
            to_peft(whole, self._config, self.modules)
        self._agree_on_base(parts.base)

    @property
    def _writes_files(self) -> bool:
        return self._ranks is None or self._ranks.is_first

    def gathered(self, parts: SplitTensors, *, to_all: bool) -> SplitTensors:
        """The parts with the whole adapter: on the first rank, and ``to_all`` with A, B and magnitude on every one.

        What a rank does not get is left out. All ranks call it, in the training's thread.
        """
        if self._ranks is None or self._claims is None:
            return parts
        owned = self._claims.of(_by_name(parts))
        saved = {name: one for name, one in owned.items() if name.startswith(_SAVED)}
        tensors = gathering.gather({n: one for n, one in owned.items() if n not in saved}, self._ranks, to_all=to_all)
        tensors |= gathering.gather(saved, self._ranks, to_all=False) if saved else {}
        return _with_trained(parts, tensors)

    def with_whole_rows(self, parts: SplitTensors, weights: Tensors) -> dict[str, torch.Tensor]:
        """The weights of a model as merging needs them: DoRA divides each row by its length."""
        dora = {f"{module}.weight" for module, one in parts.adapters.items() if one.magnitude is not None}
        return {
            key: gathering.with_whole_rows(key, weight) if key in dora else weight for key, weight in weights.items()
        }

    def render(self, parts: SplitTensors) -> dict[str, bytes]:
        """PEFT's files of the adapter, by name; {} on ranks that do not write them."""
        if not self._writes_files:
            return {}
        return render_files(*to_peft(parts, self._config, self.modules, base_model=_base_name(self._source)))

    def merged_readers(self, parts: SplitTensors, owned: Mapping[str, Owned]) -> dict[str, MergedReader]:
        """What is ``owned`` of the weights, with the adapter merged in, by key; computed when it is read."""
        out, last = {}, LastBlock()
        for key, merge in plan_merges(parts, self._config, self.modules).items():
            weight, (rows, columns) = owned[key].tensor, owned[key].part.axes
            all_columns = weight.shape[1] == owned[key].part.shape[1]
            out[key] = MergedReader(key, weight, merge, rows, None if all_columns else columns, last)
        return out

    def set_base(self, tensors: Tensors, targets: Collection[TargetTensor], checksums: Mapping[str, str]) -> None:
        """Remember the base as it was read from the source, if this process has read all of it."""
        if not all(slice_of(key, tensor).is_whole for key, tensor in tensors.items()):
            return
        self._base = adapter_base.base_from_targets(self._layout(tensors), targets, checksums)

    def current_base(self, recorded: AdapterBase, workers: int, *, values: bool) -> AdapterBase:
        """The fingerprint of the source, in the layout of a recorded one; ``values`` reads all of it."""
        if self._ranks is not None and values:
            self._share_base(recorded.layout, recorded.tensors.keys(), workers)
        if self._base is not None and self._base.layout == recorded.layout:
            return self._base
        return adapter_base.base_from_source(
            self._source, recorded.layout, recorded.tensors.keys(), workers=workers, values=values
        )

    def base_section(self, tensors: Tensors) -> dict[str, Any]:
        """The manifest's entry about the base of an adapter; the base is read for it if it was not loaded here."""
        if not self._source.files:
            return {}
        if self._base is None and self._ranks is None:
            layout = self._layout(tensors)
            try:
                self._base = adapter_base.base_from_source(
                    self._source, layout, tensors.keys(), workers=DEFAULT_WORKERS, values=True
                )
            except (OSError, CkptConvertError) as error:
                log.warning(_NO_BASE, error_text(error))
        return {} if self._base is None else {adapter_base.SECTION: self._base.as_json()}

    def _agree_on_base(self, tensors: Tensors) -> None:
        """Let the ranks read the base for what is written down of it, unless they have."""
        if self._ranks is None or not self._source.files:
            return
        try:
            self._share_base(self._layout(tensors), tensors.keys(), DEFAULT_WORKERS)
        except CkptConvertError as error:
            if self._ranks.is_first:
                log.warning(_NO_BASE, error)

    def _share_base(self, layout: str, keys: Collection[str], workers: int) -> None:
        """Let each rank read its share of the base, unless it has read all when it was loaded."""
        if self._ranks is not None and not self._is_base_agreed:
            known = self._base if self._base is not None and self._base.layout == layout else None
            self._base = adapter_base.base_of_all(self._source, layout, keys, known, self._ranks, workers=workers)
            self._is_base_agreed = True

    def _layout(self, tensors: Tensors) -> str:
        return self._source.model_for(self._format).family.detect_column(self._format, tensors)


def _base_name(source: Identified) -> str | None:
    """What PEFT is to load the base from: the repository that the source is of, or the path as it was given.

    Not ``_name_or_path`` in its config.json: that is what the source itself was made from.
    """
    if source.format != "hf":
        return None
    named = hub.repository_of(source.place)
    return str(source.place) if named is None or named.path else named.repo


def trained_tensors(parts: SplitTensors) -> dict[str, torch.Tensor]:
    """The trained tensors of a model with an adapter: the adapter, and modules that are saved whole."""
    adapters = {
        f"{module}.{name}": one
        for module, adapter in parts.adapters.items()
        for name, one in adapter._asdict().items()
        if one is not None
    }
    return adapters | parts.trained_whole


def _by_name(parts: SplitTensors) -> dict[str, torch.Tensor]:
    """The trained tensors by names that ``_with_trained`` knows."""
    names = {f"{_SAVED}{key}": tensor for key, tensor in parts.trained_whole.items()}
    for module, adapter in parts.adapters.items():
        names |= {f"{module}/{name}": one for name, one in adapter._asdict().items() if one is not None}
    return names


def _with_trained(parts: SplitTensors, tensors: Tensors) -> SplitTensors:
    """The parts with these tensors of the adapter, as far as they are there."""
    adapters = {
        module: Adapter(*(tensors.get(f"{module}/{name}") for name in Adapter._fields))  # type: ignore[arg-type]
        for module in parts.adapters
        if f"{module}/a" in tensors
    }
    saved = {key: tensors[name] for key in parts.trained_whole if (name := f"{_SAVED}{key}") in tensors}
    return replace(parts, adapters=adapters, trained_whole=saved)


def copy_parts(
    parts: SplitTensors, state: State | None, buffers: CopyBuffers, *, with_base: bool
) -> tuple[SplitTensors, State | None]:
    """Copies of an adapter, of modules that are saved whole and of a training state, in the reused buffers."""
    names = {f"base/{key}": tensor for key, tensor in parts.base.items() if with_base} | _by_name(parts)
    staged, written = stage(all_of(names), state, buffers)
    copies = {name: tensor for name, (tensor, _) in staged.items()}
    base = {key: copies.get(f"base/{key}", tensor) for key, tensor in parts.base.items()}
    return replace(_with_trained(parts, copies), base=base), written
