"""Plans for saving a model, which are made once and used at every save."""

from __future__ import annotations

import logging
from collections import ChainMap, Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ckpt_convert.adapters.config import AdapterConfig
from ckpt_convert.adapters.parameters import SplitTensors
from ckpt_convert.adapters.peft_files import load_into
from ckpt_convert.checkpoint import legacy_keys, record
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.selection import select_keys
from ckpt_convert.checkpointer.distributed.claims import Claims, Owned, names_elsewhere
from ckpt_convert.checkpointer.distributed.ranks import Ranks
from ckpt_convert.checkpointer.distributed.slices import copy_slice
from ckpt_convert.checkpointer.live import fsdp1, loading
from ckpt_convert.checkpointer.live.selection import ADAPTER, MODEL
from ckpt_convert.checkpointer.live.tensors import (
    MODEL_IN_MEMORY,
    MemoryRanges,
    MemoryReaders,
    Model,
    all_of,
    as_planning_source,
    detached_copies,
    model_tensors,
    same_memory,
    tensors_signature,
    trained_parameters,
)
from ckpt_convert.checkpointer.save import extra_files
from ckpt_convert.checkpointer.save.adapters import TrainedAdapter, copy_parts, trained_tensors
from ckpt_convert.checkpointer.save.buffers import CopyBuffers, State, stage
from ckpt_convert.checkpointer.save.writer import StepContents
from ckpt_convert.checkpointer.state.serialize import SerializedState, serialize
from ckpt_convert.checkpointer.state.shared_state import share
from ckpt_convert.convert import planning
from ckpt_convert.convert.agreement import own_parts
from ckpt_convert.convert.plan import Plan
from ckpt_convert.convert.planning import PlanInputs
from ckpt_convert.convert.request import Request
from ckpt_convert.convert.sharing import OwnParts
from ckpt_convert.convert.sources import OpenPlan
from ckpt_convert.dtypes import DTYPES
from ckpt_convert.errors import KeyMismatchError, UsageError
from ckpt_convert.models import Family
from ckpt_convert.storage.base import RangeReader
from ckpt_convert.storage.place import Place
from ckpt_convert.tensors.header import IN_MEMORY
from ckpt_convert.tensors.progress import ProgressCallback
from ckpt_convert.wording import indented_list

log = logging.getLogger("ckpt_convert")

Contents = Literal["full", "weights", "adapter"]
CONTENTS = ("full", "weights", "adapter")

Tensors = Mapping[str, torch.Tensor]
Section = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What a save writes; ``merged`` adds the full weights to an adapter."""

    contents: Contents
    export_dtype: str | None
    output_format: str | None
    model_format: str
    extra: tuple[Place, ...] = ()
    merged: bool = False


class SavePlanner:
    """Plans saves of a model, in the format and files of a source."""

    def __init__(
        self,
        source: Identified,
        settings: Settings,
        adapter: AdapterConfig | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.source = source
        self.settings = settings
        self.adapter = None if adapter is None else TrainedAdapter(adapter, source, settings.model_format, ranks)
        self.ranks = ranks
        self._claims = None if ranks is None else Claims(ranks, by_rows=adapter is not None)
        self._state_claims = None if ranks is None else Claims(ranks)
        self._plans: dict[tuple[Any, ...], tuple[OpenPlan, OwnParts]] = {}
        self._kinds: dict[Any, int] = {}

    def loadable_names(self, model: Model) -> list[str]:
        """The names for include= and exclude=: each tensor by its key, or the adapter, which is loaded as a whole."""
        if self.adapter is not None:
            return [ADAPTER]
        return [f"{MODEL}/{key}" for key in self.split(model_tensors(model)).base]

    def split(self, tensors: Tensors, *, strict: bool = True) -> SplitTensors:
        """The tensors of a model, split from those of an adapter; ``strict`` checks the adapter against its config."""
        if self.adapter is None:
            return SplitTensors(self._distinct(tensors), {})
        found = self.adapter.split(tensors, strict=strict)
        return replace(found, base=self._distinct(found.base))

    def _distinct(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """The tensors without the second key of weights that are tied in memory and in the config.

        Of a family that is not known, the name to leave out is the one that the source does not have.
        """
        model = self.source.model_for(self.settings.model_format)
        if model.family.literal:
            return loading.without_tied_aliases(tensors, model.family.literal.keys())
        out = dict(tensors) if self.adapter is not None else self._named(tensors, model.family)
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

    def _named(self, tensors: Tensors, family: Family) -> dict[str, torch.Tensor]:
        """The tensors by the keys of the model's format; newer classes of transformers have other keys in memory."""
        names = legacy_keys.read_keys(tensors, [family], self.settings.model_format)
        if names.clashes:
            said = indented_list([text for _, text in names.clashes])
            raise KeyMismatchError(f"{MODEL_IN_MEMORY}: its keys contradict each other:{said}")
        return {names.of(key): tensor for key, tensor in tensors.items()}

    def load_source(
        self,
        model: Model,
        workers: int,
        progress: ProgressCallback | None,
        *,
        strict: bool = True,
        include: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str | None = None,
    ) -> loading.LoadReport:
        """Fill a model from the source, an adapter aside; see ``Checkpointer.load_model``."""
        model = fsdp1.as_model(model, self.ranks)
        parts = self.split(model_tensors(model), strict=False)  # DoRA starts from the base: the adapter may come later
        _refuse_copies(model, parts.base | parts.trained_whole)
        format = self.settings.model_format
        every = loading.match_model(self.source, parts.base, format)
        is_wanted = select_keys(every.keys, include, exclude)
        every = every.without(names_elsewhere(parts.base, self.ranks))
        found = every.select(is_wanted)
        found = replace(
            found, mismatched={**found.mismatched, **loading.untied_sources(found, parts.base, self.source, format)}
        )
        if strict or len(found.targets) == len(found.mismatched):
            loading.refuse_mismatch(found, self.source, format)
        whole = {key: tensor for key, tensor in parts.trained_whole.items() if not same_memory(tensor, parts.base[key])}
        loading.load_tensors(
            self.source, whole, replace(found, targets=[one for one in found.targets if one.key in whole])
        )
        checksums: dict[str, str] | None = None if self.adapter is None else {}
        loaded = loading.load_tensors(
            self.source, parts.base, found, workers=workers, progress=progress, checksums=checksums
        )
        if self.adapter is not None and checksums is not None:
            self.adapter.set_base(parts.base, found.targets, checksums)
        fsdp1.put(model)
        return replace(
            loaded,
            missing=tuple(found.missing),
            unexpected=tuple(found.unexpected),
            mismatched=found.mismatched,
            excluded=tuple(key for key in every.keys if not is_wanted(key)),
        )

    def load_adapter(self, path: Place, model: Model) -> int:
        """Fill a model's adapter from PEFT's files; returns the number of tensors."""
        if self.adapter is None:
            raise UsageError("there is no adapter to load into; give adapter=AdapterConfig(rank=..., alpha=...)")
        loaded, model = self.adapter.read(path), fsdp1.as_model(model, self.ranks)
        parts = self.split(model_tensors(model))
        _refuse_copies(model, trained_tensors(parts))
        for notice in load_into(parts, loaded, copy_slice):
            log.info("%s: %s", path, notice)
        fsdp1.put(model)
        return sum(len([one for one in adapter if one is not None]) for adapter in loaded.adapters.values()) + len(
            loaded.trained_whole
        )

    def plan_ahead(
        self, model: Model, settings: Settings, others: Sequence[torch.Tensor] = (), emitted: Tensors | None = None
    ) -> list[str]:
        """Plan a save of this model; returns the warnings for all saves.

        ``emitted`` as ``prepare_save`` takes them; ``others`` are the parameters of its optimizers. Raises the error
        that says everything in which they do not fit the source, or what is asked for.
        """
        parts = self.split(model_tensors(model))
        _refuse_copies(model, parts.base if self.adapter is None else trained_tensors(parts))
        self._refuse_unsaved(model, parts, others)
        if self.adapter is not None:
            extra_files.check_extra_files(settings.extra, None)
            self.adapter.check(parts)
            if not _merges(settings):
                return []
            owned = self._owned_of_merged(self.adapter, parts)
            whole = self.adapter.gathered(parts, to_all=True)
            return list(self._merged(self.adapter, whole, owned, settings).plan.notices)
        written = parts.base if emitted is None else self._emitted(parts.base, emitted)
        made = self._plan(self._owned(written), settings)[0].plan
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
        if settings.contents != "full":
            return [*made.notices, *said]
        for text in said:
            log.info("%s", text)
        return list(made.notices)

    def prepare_save(
        self,
        tensors: Tensors,
        state: Mapping[str, SerializedState] | None,
        settings: Settings,
        buffers: CopyBuffers | None,
        emitted: Tensors | None = None,
    ) -> Callable[[Section, Mapping[str, bytes]], StepContents]:
        """Prepare writing the current values; with ``buffers``, these are copied and may change afterwards.

        ``emitted`` are the tensors for the weight files where these are not the model's; the model's are then all in
        the training state. The result takes what gives the manifest's section about training, and small files by name,
        to give the step.
        """
        parts = self.split(tensors)
        state = dict(state) if state is not None else None
        if self.adapter is not None:
            return self._adapter_job(self.adapter, parts, state, settings, buffers)
        owned = self._owned(parts.base if emitted is None else self._emitted(parts.base, emitted))
        made, own = self._plan(owned, settings)
        if state is not None:
            exact = _inexact(made.plan) if emitted is None else parts.base.keys()
            if exact:
                state[MODEL] = serialize({key: tensor for key, tensor in parts.base.items() if key in exact}, MODEL)
        written = self._shared(state)
        if buffers is not None:
            owned, written = stage(owned, written, buffers)
            made, own = self._plan(owned, settings)
        planned = OpenPlan(made.plan, ChainMap(dict(made.sources), MemoryReaders(owned)))  # type: ignore[arg-type]
        return lambda section, files: StepContents(planned, section, written, files, settings.extra, own=own)

    def _emitted(self, trained: Tensors, emitted: Tensors) -> Tensors:
        """The tensors for the weight files; raises UsageError where keys and shapes are not those of the model."""
        found = self.split(emitted).base
        shapes, expected = ({key: tuple(one.shape) for key, one in every.items()} for every in (found, trained))
        if shapes != expected:
            wrong = [
                f"{key}: {list(shapes[key]) if key in shapes else 'is missing'}, the model has "
                f"{list(expected[key]) if key in expected else 'none'}"
                for key in sorted(shapes.keys() | expected.keys())
                if shapes.get(key) != expected.get(key)
            ]
            raise UsageError(f"emit: is no model of the same keys and shapes as model=:{indented_list(wrong)}")
        return found

    def _shared(self, state: Mapping[str, SerializedState] | None) -> State | None:
        """A training state as this process writes it: all of it, or what it owns where other ranks write as well."""
        if state is None:
            return None
        if self.ranks is not None and self._state_claims is not None:
            return share(state, self.ranks, self._state_claims)
        return {name: SerializedState(one.skeleton, _local(one.tensors)) for name, one in state.items()}

    def _owned(self, tensors: Tensors) -> dict[str, Owned]:
        """What this process writes of the tensors of a model: all, unless other ranks have a part of it as well."""
        return all_of(tensors) if self._claims is None else self._claims.of(tensors)

    def _adapter_job(
        self,
        adapter: TrainedAdapter,
        parts: SplitTensors,
        state: dict[str, SerializedState] | None,
        settings: Settings,
        buffers: CopyBuffers | None,
    ) -> Callable[[Section, Mapping[str, bytes]], StepContents]:
        merges_too = _merges(settings)
        written = self._shared(state)
        if self.ranks is not None:
            owned = self._owned_of_merged(adapter, parts) if merges_too else {}
            parts = adapter.gathered(parts, to_all=merges_too)
            if buffers is not None:
                owned, written = stage(owned, written, buffers)
        else:
            if buffers is not None:
                parts, written = copy_parts(parts, written, buffers, with_base=merges_too)
            owned = self._owned_of_merged(adapter, parts) if merges_too else {}

        def step(section: Section, files: Mapping[str, bytes]) -> StepContents:
            own = adapter.render(parts)
            made = self._merged(adapter, parts, owned, settings) if merges_too else None

            def training() -> Mapping[str, Any]:
                return {**section(), **adapter.base_section(parts.base)}

            return StepContents(made, training, written, {**own, **files}, settings.extra, record.MERGED)

        return step

    def _owned_of_merged(self, adapter: TrainedAdapter, parts: SplitTensors) -> dict[str, Owned]:
        """What this process merges and writes of the full weights."""
        return self._owned(adapter.with_whole_rows(parts, parts.base | parts.trained_whole))

    def _merged(
        self, adapter: TrainedAdapter, parts: SplitTensors, owned: Mapping[str, Owned], settings: Settings
    ) -> OpenPlan:
        """The plan of the merged weights, which are computed when they are read."""
        live = self._live(owned, settings, adapter.merged_readers(parts, owned))
        given = PlanInputs(self.source, self._request(settings), in_memory=live)
        made = planning.make_plan(given)
        made.plan.refuse_unreadable()
        return made

    def _refuse_unsaved(self, model: Model, parts: SplitTensors, others: Sequence[torch.Tensor]) -> None:
        """Raise UsageError for trained tensors that no save would contain; ``others`` are an optimizer's parameters.

        An optimizer's parameters outside of the model are saved with its state.
        """
        trained = trained_parameters(model)
        if not isinstance(model, torch.nn.Module):  # of a detached state dict, the optimizer says what is trained
            updated = MemoryRanges(one for one in others if one.requires_grad)
            trained |= {parts.names.get(key, key): one for key, one in parts.base.items() if one in updated}
        held = MemoryRanges((parts.base if self.adapter is None else trained_tensors(parts)).values())
        base = MemoryRanges(parts.base.values())
        beside = MemoryRanges(others)
        lost = sorted(key for key, one in trained.items() if one not in held and (one in base or one not in beside))
        if lost and self.adapter is not None:
            raise UsageError(
                "base weights are trained beside the adapter, whose files would not hold them: freeze them "
                f"(requires_grad_(False)), or name them in modules_to_save:{indented_list(lost)}"
            )
        if lost:
            raise UsageError(
                f"{MODEL_IN_MEMORY}: has parameters that are trained, but that its state dict does not hold, so no "
                "save would: freeze them (requires_grad_(False)), or pass the optimizer that trains them:"
                f"{indented_list(lost)}"
            )

    def _plan(self, tensors: Mapping[str, Owned], settings: Settings) -> tuple[OpenPlan, OwnParts]:
        """The plan for tensors of this signature, and what this process has of its files.

        Its sources are files only, as it is reused with other tensors.
        """
        request = self._request(settings)
        key = (request, settings.model_format, settings.extra, tensors_signature(tensors, self._kinds))
        if key not in self._plans:
            planned = planning.make_plan(PlanInputs(self.source, request, in_memory=self._live(tensors, settings)))
            made = planned.plan
            made.refuse_unreadable()
            extra_files.check_extra_files(settings.extra, made)
            # A source that is itself a saved step has files of its own run (Trainer's state).
            earlier = record.read_training(self.source.root) or {}
            said = extra_files.replaced_files(settings.extra, made, earlier.get("extra_files") or ())
            names = {path.name for path in settings.extra} | (earlier.get("files") or {}).keys()
            side = tuple(side for side in made.auxiliary_files if side.name not in names)
            made = replace(made, auxiliary_files=side, notices=(*made.notices, *said))
            files = {one: reader for one, reader in planned.sources.items() if one.kind != IN_MEMORY}
            self._plans[key] = OpenPlan(made, files), own_parts(made, self.ranks is None or self.ranks.is_first)
        return self._plans[key]

    def _live(
        self, tensors: Mapping[str, Owned], settings: Settings, readers: Mapping[str, RangeReader] | None = None
    ) -> planning.InMemorySource:
        family = self.source.model_for(settings.model_format).family
        return as_planning_source(tensors, family.detect_column(settings.model_format, tensors), readers)

    def _request(self, settings: Settings) -> Request:
        # A value must not end a training run: overflows are warnings, and the training state keeps the exact values.
        form = settings.output_format or str(self.source.format)
        return Request(to=form, dtype=settings.export_dtype, allow_overflow=True, allow_loss=True)


def _refuse_copies(model: Model, tensors: Tensors) -> None:
    copies = detached_copies(model, tensors)
    if copies:
        raise UsageError(
            f"{MODEL_IN_MEMORY}: its state dict creates these tensors on each call, so nothing that is loaded into "
            f"them would reach the model; pass the module that has them as parameters or buffers:"
            f"{indented_list(copies)}"
        )


def _merges(settings: Settings) -> bool:
    return settings.merged and settings.contents != "adapter"


def _inexact(made: Plan) -> set[str]:
    """The keys in memory of tensors that are written in another dtype, or that the files cannot hold."""
    keys = {check.key for check in made.losses}
    for file in made.weights:
        for tensor in file.tensors:
            if tensor.dtype != tensor.source_dtype:
                keys |= {made.stored[number].key for number in tensor.tensor.sources}
    return keys


def _local(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {key: tensor for key, (tensor, _) in all_of(tensors).items()}
