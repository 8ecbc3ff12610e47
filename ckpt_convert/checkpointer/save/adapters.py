"""The adapter that a model is trained with: PEFT's files of it, the base it belongs to, and copies for a save."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import torch

from ckpt_convert.adapters.config import AdapterConfig
from ckpt_convert.adapters.merge import MergedReader, plan_merges
from ckpt_convert.adapters.modules import Modules
from ckpt_convert.adapters.parameters import Adapter, SplitTensors, split_adapters
from ckpt_convert.adapters.peft_files import LoadedAdapter, from_peft, render_files, to_peft
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpointer.live import adapter_base
from ckpt_convert.checkpointer.live.adapter_base import AdapterBase
from ckpt_convert.checkpointer.live.tensors import all_of
from ckpt_convert.checkpointer.save.buffers import CopyBuffers, State, stage
from ckpt_convert.convert.writing import TargetTensor
from ckpt_convert.errors import CkptConvertError, error_text
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.reader import DEFAULT_WORKERS

log = logging.getLogger("ckpt_convert")

Tensors = Mapping[str, torch.Tensor]


class TrainedAdapter:
    """An adapter that is trained on the base of a source."""

    def __init__(self, config: AdapterConfig, source: Identified, model_format: str) -> None:
        self._config, self._source, self._format = config, source, model_format
        self._base: AdapterBase | None = None

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
        """Raise the error that says why PEFT's files cannot hold this adapter."""
        to_peft(parts, self._config, self.modules)

    def render(self, parts: SplitTensors) -> dict[str, bytes]:
        """PEFT's files of the adapter, by name."""
        place = str(self._source.place.absolute()) if self._source.format == "hf" else None
        return render_files(*to_peft(parts, self._config, self.modules, base_model=place))

    def merged_readers(self, parts: SplitTensors) -> dict[str, MergedReader]:
        """The weights with the adapter merged in, by key; they are computed when they are read."""
        whole = parts.base | parts.trained_whole
        merges = plan_merges(parts, self._config, self.modules)
        return {key: MergedReader(key, whole[key], merge) for key, merge in merges.items()}

    def set_base(self, tensors: Tensors, targets: Collection[TargetTensor], checksums: Mapping[str, str]) -> None:
        """Remember the base as it was read from the source."""
        self._base = adapter_base.base_from_targets(self._layout(tensors), targets, checksums)

    def current_base(self, recorded: AdapterBase, workers: int, *, values: bool) -> AdapterBase:
        """The fingerprint of the source, in the layout of a recorded one; ``values`` reads all of it."""
        if self._base is not None and self._base.layout == recorded.layout:
            return self._base
        return adapter_base.base_from_source(
            self._source, recorded.layout, recorded.tensors.keys(), workers=workers, values=values
        )

    def base_section(self, tensors: Tensors) -> dict[str, Any]:
        """The manifest's entry about the base of an adapter; the base is read for it if it was not loaded here."""
        if not self._source.files:
            return {}
        if self._base is None:
            layout = self._layout(tensors)
            try:
                self._base = adapter_base.base_from_source(
                    self._source, layout, tensors.keys(), workers=DEFAULT_WORKERS, values=True
                )
            except (OSError, CkptConvertError) as error:
                log.warning("the base that the adapter is of is not written down with it: %s", error_text(error))
                return {}
        return {adapter_base.SECTION: self._base.as_json()}

    def _layout(self, tensors: Tensors) -> str:
        return self._source.model_for(self._format).family.detect_column(self._format, tensors)


def trained_tensors(parts: SplitTensors) -> dict[str, torch.Tensor]:
    """The trained tensors of a model with an adapter: the adapter, and modules that are saved whole."""
    adapters = {
        f"{module}.{name}": one
        for module, adapter in parts.adapters.items()
        for name, one in adapter._asdict().items()
        if one is not None
    }
    return adapters | parts.trained_whole


def copy_parts(
    parts: SplitTensors, state: State | None, buffers: CopyBuffers, *, with_base: bool
) -> tuple[SplitTensors, State | None]:
    """Copies of an adapter, of modules that are saved whole and of a training state, in the reused buffers."""
    names = {f"saved/{key}": tensor for key, tensor in parts.trained_whole.items()}
    names |= {f"base/{key}": tensor for key, tensor in parts.base.items() if with_base}
    for module, adapter in parts.adapters.items():
        names |= {f"{module}/{name}": one for name, one in adapter._asdict().items() if one is not None}
    staged, written = stage(all_of(names), state, buffers)
    copies = {name: tensor for name, (tensor, _) in staged.items()}
    copied = SplitTensors(
        {key: copies.get(f"base/{key}", tensor) for key, tensor in parts.base.items()},
        {m: Adapter(*(copies.get(f"{m}/{name}") for name in Adapter._fields)) for m in parts.adapters},  # type: ignore[arg-type]
        {key: copies[f"saved/{key}"] for key in parts.trained_whole},
        parts.names,
    )
    return copied, written
