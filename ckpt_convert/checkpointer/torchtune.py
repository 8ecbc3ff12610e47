"""``TorchtuneCheckpointer``: what a recipe of torchtune takes for its checkpointer, saving in the source's format.

The interface is that of torchtune 0.6.1, with the arguments that its main branch added. When a recipe saves, it gives
the weights as a dict, and everything that it needs to go on, which torchtune writes to recipe_state.pt. Both become one
step of a ``Checkpointer``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from ckpt_convert.adapters.config import AdapterConfig
from ckpt_convert.adapters.parameters import parsed_parameter
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.record import TRAINING_STATE
from ckpt_convert.checkpointer import choosing
from ckpt_convert.checkpointer.checkpointer import Checkpointer, saver_of
from ckpt_convert.checkpointer.live import loading
from ckpt_convert.checkpointer.live.selection import MODEL
from ckpt_convert.checkpointer.run import saved_steps
from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.checkpointer.run.saved_steps import SavedStep
from ckpt_convert.checkpointer.run.source import Config, open_source
from ckpt_convert.checkpointer.save.adapters import TrainedAdapter
from ckpt_convert.checkpointer.save.options import SINGLE_WRITER, Final
from ckpt_convert.checkpointer.state import training_state
from ckpt_convert.checkpointer.torchtune_files import TorchtuneRun, find_torchtune_run, listed_files, load_pickle
from ckpt_convert.dtypes import OutputDType
from ckpt_convert.errors import CkptConvertError, CorruptFileError, UsageError
from ckpt_convert.formats.base import FormatName, load_json
from ckpt_convert.storage.place import Place, checked_place
from ckpt_convert.storage.reader import DEFAULT_WORKERS
from ckpt_convert.wording import indented_list

log = logging.getLogger("ckpt_convert")

_NATIVE: FormatName = "native"
_ADAPTER, _ADAPTER_CONFIG = "adapter", "adapter_config"
"""What a recipe's dict has of an adapter. Beside these and "model", all entries are the state of the recipe."""

_EPOCHS = "epochs_run"
_RECIPE = "torchtune"
"""The entry of ``extra`` in the training state that holds the recipe's state."""

_PEFT_FOLDER = "adapter"
"""Where PEFT's files are below merged weights: beside them, transformers would add the adapter to these once more."""

_REPO = "original_repo_id.json"
"""Where ``tune download`` writes down which repository of the Hub the files are from."""


class TorchtuneCheckpointer:
    """Loads and saves for a recipe of torchtune, in place of any of its FullModel…Checkpointers.

        checkpointer:
          _component_: ckpt_convert.TorchtuneCheckpointer

    Each save is a directory ``epoch_N`` (or ``step_N``), complete or not there, with the files and the format of
    ``checkpoint_dir``; ``latest`` leads to the newest. The state of the recipe is in there, too, unless it is the last.
    """

    def __init__(
        self,
        checkpoint_dir: str,
        checkpoint_files: Sequence[str] | Mapping[str, str] | None = None,
        model_type: str | None = None,
        output_dir: str | None = None,
        adapter_checkpoint: str | None = None,
        recipe_checkpoint: str | None = None,
        resume_from_checkpoint: bool = False,
        safe_serialization: bool = True,
        should_load_recipe_state: bool = False,
        *,
        keep_last_n_checkpoints: int | None = None,
        enable_dcp: bool = False,
        export_dtype: OutputDType | None = None,
        config: Config | None = None,
        family: str | None = None,
        source_format: FormatName | None = None,
    ) -> None:
        """Look at the files; no tensor is read, and nothing is written.

        Args:
            checkpoint_dir: the directory of the weights that the run starts from, of any format.
            checkpoint_files: its weight files, in any order, or torchtune's filename_format and max_filename; None
                takes all that are there.
            model_type: has no effect: the family is detected.
            output_dir: the directory of the saved steps, or the URL of one in an object store.
            adapter_checkpoint: the adapter_model.pt, below output_dir, of a run of torchtune's own checkpointer.
            recipe_checkpoint: the recipe_state.pt, below output_dir, of such a run.
            resume_from_checkpoint: torchtune's older name of ``should_load_recipe_state``.
            safe_serialization: has no effect: the files are of the kind that the source's are.
            should_load_recipe_state: go on from the newest step in ``output_dir``.
            keep_last_n_checkpoints: how many of the newest steps to keep; None keeps all.
            enable_dcp: has no effect.
            export_dtype: "float32", "float16" or "bfloat16" for all weights; by default each keeps the source's dtype.
            config: a config.json (a path, or its content) for weights that have none.
            family: the name of the architecture, such as "llama", where it cannot be detected.
            source_format: the format of the weights, where it cannot be detected.

        Raises:
            UsageError: files are not those of the checkpoint.
            CheckpointNotFoundError: there is nothing to load, or to go on from.
            InputError: the weights cannot be read; its subclasses say why.
        """
        # torchtune's recipes give these two to its DistributedCheckpointer (enable_async_checkpointing).
        self._checkpoint_dir, self._output_dir = checkpoint_dir, output_dir
        self._place = checked_place(checkpoint_dir, "checkpoint_dir")
        if not safe_serialization:
            log.info("safe_serialization=False has no effect: the files are of the kind that the source's are")
        self._options: dict[str, Any] = {"config": config, "family": family}
        self._format, self._dtype, self._keep_last = source_format, export_dtype, keep_last_n_checkpoints
        self._files = listed_files(checkpoint_files)
        self._run: SavedStep | TorchtuneRun | None = None
        self._saving: tuple[str, AdapterConfig | None, Checkpointer] | None = None
        if resume_from_checkpoint or should_load_recipe_state:
            self._run = self._find_run(recipe_checkpoint, adapter_checkpoint)
        self._open(self._source).close()

    @property
    def _source(self) -> Place | list[Place]:
        """The checkpoint whose files are kept. torchtune has a list name those of the last epoch, to go on from it."""
        listed = [self._place / name for name in self._files]
        return listed if listed and (self._run is None or all(map(Place.is_regular_file, listed))) else self._place

    def _open(self, source: Any) -> Identified:
        return open_source(source, format=self._format, **self._options)

    # Loading

    def load_checkpoint(self, weights_only: bool = True) -> dict[str, Any]:
        """The weights under "model", by torchtune's keys and in the dtypes of the files.

        Where a run goes on, also the state of its recipe, as it was saved ("optimizer", "epochs_run", "seed", …), and
        the "adapter"; the weights are then those of its base.

        weights_only: has no effect: no pickle is read that rebuilds more than tensors and plain values.
        """
        if isinstance(self._run, SavedStep):
            return self._load_step(self._run)
        if self._run is None:
            return {MODEL: self._weights(self._source)}
        state = load_pickle(self._run.recipe)
        said = ", ".join(sorted(map(str, state)))
        log.info("%s: going on after %s epochs, with all it has: %s", self._run.recipe, state.get(_EPOCHS), said)
        if self._run.adapter is None:
            return {MODEL: self._weights(self._run.weights), **state}
        return {MODEL: self._weights(self._source), _ADAPTER: load_pickle(self._run.adapter), **state}

    def _weights(self, source: Any) -> dict[str, torch.Tensor]:
        with self._open(source) as opened:
            return loading.read_state_dict(opened, _NATIVE)

    def _load_step(self, step: SavedStep) -> dict[str, Any]:
        """What a step holds: of weights that its files have in another dtype, the exact values."""
        state = training_state.open_state(step.place / TRAINING_STATE)
        found = state.read([name for name in ("extra", MODEL) if name in (state.parts or ())])
        recipe: dict[str, Any] = found["extra"]["values"][_RECIPE]
        if _ADAPTER in recipe:
            return {MODEL: self._weights(self._source), **recipe}
        return {MODEL: {**self._weights(step.place), **found.get(MODEL, {})}, **recipe}

    def _find_run(self, recipe: str | None, adapter: str | None) -> SavedStep | TorchtuneRun:
        """The newest step that a recipe can go on from, or else what torchtune's own checkpointer has left."""
        output = self._place if self._output_dir is None else checked_place(self._output_dir, "output_dir")
        own = saved_steps.read_step(self._place.real(), renamed=True)
        steps = saved_steps.scan_steps(output) if own is None or not own.has_training_state else [own]
        problems: list[str] = []
        for step in reversed(steps) if recipe is None else ():
            found = ["it has no state of a recipe"]
            if step.has_training_state:
                found = choosing.check_step(step, verify=True, workers=DEFAULT_WORKERS)
                problems += found
            if not found:
                return step
            log.warning("%s: cannot be gone on from: %s", step.place, "; ".join(found))
        if problems:
            raise CorruptFileError(f"{output}: has no step that is sound:{indented_list(problems)}")
        return find_torchtune_run(self._place, output, self._files, recipe, adapter)

    # Saving

    def save_checkpoint(
        self,
        state_dict: Mapping[str, Any],
        epoch: int,
        intermediate_checkpoint: bool = False,
        adapter_only: bool = False,
        *,
        step: int | None = None,
        dir_prefix: Literal["epoch", "step"] = "epoch",
        max_shard_size: str | None = None,
    ) -> None:
        """Save what a recipe gives: its weights in the source's files, an adapter in PEFT's files.

        state_dict: "model", by torchtune's keys; of an adapter "adapter" and "adapter_config"; and the state of the
        recipe. It is left as it is.
        epoch: the number of the epoch, in the directory's name.
        intermediate_checkpoint: the run goes on: the state of the recipe is saved, too, and with it the adapter.
        adapter_only: write PEFT's files alone; otherwise they are in the folder "adapter" below the merged weights.
        step: the number of the step, in the directory's name where ``dir_prefix`` is "step".
        dir_prefix: "epoch" or "step".
        max_shard_size: has no effect: the files are the source's.

        Raises UsageError for a call that does not say what to save, and KeyMismatchError for weights that are not the
        source's.
        """
        number = {"epoch": epoch, "step": step}.get(dir_prefix)
        if number is None:
            raise UsageError(f'dir_prefix={dir_prefix!r}: expected "epoch", or "step" and a step=')
        needed = (_ADAPTER, _ADAPTER_CONFIG) if adapter_only else (MODEL,)
        if lacking := [name for name in needed if name not in state_dict]:
            raise UsageError(f"state_dict: has no {' and no '.join(map(repr, lacking))}, which is to be saved")
        adapter = self._adapter_config(state_dict) if {_ADAPTER, _ADAPTER_CONFIG} <= state_dict.keys() else None
        checkpointer = self._checkpointer(dir_prefix, adapter if adapter_only else None)
        recipe = {name: one for name, one in state_dict.items() if name not in (MODEL, _ADAPTER_CONFIG)}
        checkpointer.register(
            model=_with_its_base(state_dict[_ADAPTER]) if adapter_only else state_dict[MODEL],
            extra={_RECIPE: recipe} if intermediate_checkpoint else None,
            progress=Progress(step=number, epoch=recipe.get(_EPOCHS, epoch + 1)),
        )
        saver = saver_of(checkpointer)
        saver.more_files = dict
        if adapter is not None and not adapter_only:
            files = _peft_files(state_dict[_ADAPTER], adapter, saver.planner.source)
            saver.more_files = lambda: files
        last: Literal["adapter", "weights"] = "adapter" if adapter_only else "weights"
        try:
            saver.save(replace(saver.planner.settings, contents="full" if intermediate_checkpoint else last))
        finally:
            checkpointer.end_run()  # a recipe says no more at its end: what is uploaded has to have arrived by then

    def _checkpointer(self, prefix: str, adapter: AdapterConfig | None) -> Checkpointer:
        """What saves the steps, made at the first save: only then is it known whether an adapter alone is saved."""
        if self._output_dir is None:
            raise UsageError("there is no output_dir to save into")
        if self._saving is None or self._saving[:2] != (prefix, adapter):
            if self._saving is not None:
                self._saving[2].close()
            checkpointer = Checkpointer(
                self._source,
                self._output_dir,
                directory=f"{prefix}_{{step}}",
                keep_last=self._keep_last,
                adapter=adapter,
                export_dtype=None if adapter is not None else self._dtype,  # PEFT's files keep the adapter's
                final=Final(contents="weights" if adapter is None else "adapter"),
                process_group=SINGLE_WRITER,  # a recipe gathers the weights on the first rank, and saves them there
                source_format=self._format,
                **self._options,
            )
            self._saving = prefix, adapter, checkpointer
        return self._saving[2]

    def _adapter_config(self, state_dict: Mapping[str, Any]) -> AdapterConfig:
        """The config of PEFT's files; torchtune's says nothing of DoRA, and may name modules that have no adapter."""
        stated = AdapterConfig.of({**state_dict[_ADAPTER_CONFIG], "target_modules": None})
        kinds = {kind for key in state_dict[_ADAPTER] for _, kind in [parsed_parameter(key)]}
        repo = self._place / _REPO
        name = load_json(repo).get("repo_id") if repo.is_regular_file() else None
        return replace(stated, use_dora="magnitude" in kinds, base_model=name if isinstance(name, str) else None)


def _with_its_base(adapter: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter beside the weights that it is of, which are empty, as none of their values is written."""
    modules = {module for key in adapter for module, kind in [parsed_parameter(key)] if kind is not None}
    return {**adapter, **{f"{module}.weight": torch.empty(0) for module in modules}}


def _peft_files(tensors: Mapping[str, torch.Tensor], config: AdapterConfig, source: Identified) -> dict[str, bytes]:
    """PEFT's files of an adapter, by name; where they cannot hold it, none: it is merged into the weights beside."""
    adapter = TrainedAdapter(config, source, _NATIVE, None)
    try:
        files = adapter.render(adapter.split(_with_its_base(tensors), strict=True))
    except CkptConvertError as error:
        log.warning("the adapter is saved merged only, and not in PEFT's files: %s", error)
        return {}
    return {f"{_PEFT_FOLDER}/{name}": data for name, data in files.items()}
