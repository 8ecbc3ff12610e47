"""From the tensors of a model to what is written of them: plans, which are made once and used at every save."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ckpt_convert.checkpointer import loading
from ckpt_convert.checkpointer.buffers import Buffers
from ckpt_convert.checkpointer.live import Model, as_live, bind, same_memory, signature, tensors_of
from ckpt_convert.checkpointer.pack import Packed, pack
from ckpt_convert.checkpointer.saving import Step
from ckpt_convert.convert import plan as planning
from ckpt_convert.convert.blocks import ProgressCallback
from ckpt_convert.convert.checkpoint import Checkpoint
from ckpt_convert.convert.plan import Plan
from ckpt_convert.convert.request import Request
from ckpt_convert.dtypes import DTYPES
from ckpt_convert.errors import UsageError

Contents = Literal["full", "weights", "adapter"]
CONTENTS = ("full", "weights", "adapter")

MODEL = "model"
"""The part of the training state that holds the tensors whose files have another dtype."""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """What a save writes; ``merged`` is full weights beside an adapter."""

    contents: Contents
    export_dtype: str | None
    output_format: str | None
    model_format: str
    extra: tuple[Path, ...] = ()
    merged: bool = False


class Emitter:
    """Plans what is written of a model, in the format of a source and in its files."""

    def __init__(self, source: Checkpoint, settings: Settings, adapter: Any = None) -> None:
        self.source = source
        self.settings = settings
        self.check(settings)
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def check(self, settings: Settings) -> None:
        """Raise UsageError for settings that do not fit."""
        if settings.contents not in CONTENTS:
            raise UsageError(f"contents={settings.contents!r}: expected one of {', '.join(CONTENTS)}")
        self._request(settings).check()

    def distinct(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """The tensors without the second name of weights that are tied in memory, and that the config ties as well."""
        model = self.source.model
        out = dict(tensors)
        names = {row.name: row for row in model.family.rows}
        for row in model.family.rows:
            column = row.column(self.settings.model_format)
            other = names[row.tied_to].column(self.settings.model_format) if row.tied_to else None
            if column is None or other is None or model.tied is False:
                continue
            pair = out.get(column.template), out.get(other.template)
            if pair[0] is not None and pair[1] is not None and same_memory(pair[0], pair[1]):
                del out[column.template]
        return out

    def load_source(self, model: Model, workers: int, progress: ProgressCallback | None) -> loading.Loaded:
        """Fill a model from the source; raises KeyMismatchError where they do not fit."""
        tensors = self.distinct(tensors_of(model))
        found = loading.fit(self.source, tensors, self.settings.model_format)
        loading.refuse_misfits(found, self.source, self.settings.model_format)
        return loading.load(self.source, tensors, found, workers=workers, progress=progress)

    def load_adapter(self, path: Path, tensors: Tensors) -> int:
        raise UsageError("adapters are not there yet")

    def prepare(self, tensors: Tensors, settings: Settings) -> list[str]:
        """Plan a save of these tensors; returns what there is to say of every save.

        Raises the error that says everything in which they do not fit the source, or what is asked for.
        """
        made = self._plan(self.distinct(tensors), settings)
        casts = Counter(
            (DTYPES[tensor.source_dtype].torch, DTYPES[tensor.dtype].torch)
            for file in made.weights
            for tensor in file.tensors
            if tensor.dtype != tensor.source_dtype
        )
        kept = "training_state keeps" if settings.contents == "full" else "nothing keeps"
        said = [
            f"{count} {here} tensors of the model are written as {there}; {kept} them exact"
            for (here, there), count in casts.items()
        ]
        return [*made.notices, *said]

    def job(
        self, tensors: Tensors, state: Mapping[str, Packed] | None, settings: Settings, buffers: Buffers | None
    ) -> Callable[[Mapping[str, Any], Mapping[str, bytes]], Step]:
        """What is to be written, of the values as they are now: with ``buffers``, they may change afterwards.

        Takes the manifest's section about training, and small files by name, to give the step.
        """
        chosen = self.distinct(tensors)
        state = dict(state) if state is not None else None
        if state is not None:
            exact = _cast(self._plan(chosen, settings))
            if exact:
                state[MODEL] = pack({key: tensor for key, tensor in chosen.items() if key in exact}, MODEL)
        if buffers is not None:
            chosen, state = _staged(chosen, state, buffers)
        made = self._plan(chosen, settings)
        if made.live is not None:
            bind(made.live, chosen)
        return lambda section, files: Step(made, section, state, files, settings.extra)

    def _plan(self, tensors: Tensors, settings: Settings) -> Plan:
        request = self._request(settings)
        key = (request, settings.model_format, settings.extra, signature(tensors))
        if key not in self._plans:
            made = planning.make(self.source, request, live=as_live(tensors, settings.model_format))
            planning.refuse_unreadable(made)
            names = {path.name for path in settings.extra}
            taken = sorted(names & {file.name for file in made.files})
            if taken or len(names) < len(settings.extra):
                raise UsageError(
                    f"extra_files: {taken[0] if taken else 'two of them'} would have the name of another file of the "
                    "checkpoint; rename it"
                )
            self._plans[key] = replace(made, side=tuple(side for side in made.side if side.name not in names))
        return self._plans[key]

    def _request(self, settings: Settings) -> Request:
        return Request(to=settings.output_format or str(self.source.format), dtype=settings.export_dtype)


def _cast(made: Plan) -> set[str]:
    """The keys in memory of the tensors that are written in another dtype."""
    assert made.live is not None
    keys = set()
    for file in made.weights:
        for tensor in file.tensors:
            if tensor.dtype != tensor.source_dtype:
                keys |= {made.live.stored[tile.source][1].key for tile in tensor.tensor.tiles}
    return keys


def _staged(
    tensors: Tensors, state: Mapping[str, Packed] | None, buffers: Buffers
) -> tuple[dict[str, torch.Tensor], dict[str, Packed] | None]:
    """Everything in memory of our own, copied in one go; a tensor that is there twice once."""
    names = {f"{MODEL}/{key}": tensor for key, tensor in tensors.items()}
    for part, packed in (state or {}).items():
        names |= {f"state/{part}/{at}": tensor for at, tensor in packed.tensors.items()}
    copies = buffers.copy(names)
    staged = None
    if state is not None:
        staged = {
            part: Packed(packed.skeleton, {at: copies[f"state/{part}/{at}"] for at in packed.tensors})
            for part, packed in state.items()
        }
    return {key: copies[f"{MODEL}/{key}"] for key in tensors}, staged
