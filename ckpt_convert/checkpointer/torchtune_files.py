"""What torchtune's own checkpointers leave: directories of epochs or steps, the state of the recipe, an adapter.

Up to 0.6.1 the state of a recipe is output_dir/recipe_state/recipe_state.pt, overwritten at each epoch; on torchtune's
main branch it is in the directory of the epoch or step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch

from ckpt_convert.errors import CheckpointNotFoundError, CorruptFileError, UsageError
from ckpt_convert.storage.place import Place
from ckpt_convert.wording import first_few

_STATE, _STATE_FOLDER = "recipe_state.pt", "recipe_state"
_ADAPTER = "adapter_model.pt"


@dataclass(frozen=True)
class TorchtuneRun:
    """A run to go on with: the state of its recipe, and its newest weights (a directory, or files) or adapter.

    An adapter goes with the weights that the run started from.
    """

    recipe: Place
    weights: Place | list[Place] | None = None
    adapter: Place | None = None


def find_torchtune_run(
    checkpoint_dir: Place, output_dir: Place, files: Sequence[str], recipe: str | None, adapter: str | None
) -> TorchtuneRun:
    """The run in an output directory; ``files``, ``recipe`` and ``adapter`` are names below it, where they are given.

    Raises CheckpointNotFoundError where there is no state of a recipe, or neither weights nor an adapter.
    """
    folders = _numbered(output_dir)
    places = [output_dir / recipe] if recipe else []
    places += [checkpoint_dir / _STATE, output_dir / _STATE_FOLDER / _STATE, *(folder / _STATE for folder in folders)]
    state = next((place for place in places if place.is_regular_file()), None)
    if state is None:
        raise CheckpointNotFoundError(
            f"{output_dir}: has nothing to go on from: neither a step with the state of a recipe nor {_STATE}; set "
            "resume_from_checkpoint to false for a new run"
        )
    newest = state.parent if state.parent in folders else next(iter(folders), None)
    adapters = [output_dir / adapter] if adapter else [] if newest is None else [newest / _ADAPTER]
    if found := next((place for place in adapters if place.is_regular_file()), None):
        return TorchtuneRun(state, adapter=found)
    listed = [output_dir / name for name in files]
    if listed and all(place.is_regular_file() for place in listed):
        return TorchtuneRun(state, listed)
    if newest is None or adapter is not None:
        missing = adapter or first_few([*files], 3, " …") or "a directory epoch_N"
        raise CheckpointNotFoundError(f"{output_dir}: has {state.name}, but not {missing}, which goes with it")
    return TorchtuneRun(state, newest)


def load_pickle(place: Place) -> dict[str, Any]:
    """What torchtune has saved by torch.save; nothing but tensors and plain values is rebuilt."""
    try:
        return dict(torch.load(place.local, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, TypeError, ValueError, EOFError, UnpicklingError) as error:
        said = " ".join(str(error).split())[:300]
        raise CorruptFileError(f"{place}: is none of the files that torchtune saves: {said}") from error


def listed_files(given: Sequence[str] | Mapping[str, str] | None) -> list[str]:
    """The names of weight files, which torchtune counts where there are many: filename_format and max_filename."""
    if not isinstance(given, Mapping):
        return [str(name) for name in given or ()]
    try:
        last, template = str(given["max_filename"]), str(given["filename_format"])
        return [template.format(str(at).zfill(len(last)), last) for at in range(1, int(last) + 1)]
    except (KeyError, ValueError, IndexError) as error:
        raise UsageError(
            f"checkpoint_files={dict(given)!r}: expected a list of names, or filename_format "
            '("model-{}-of-{}.safetensors") and max_filename ("00004")'
        ) from error


def _numbered(output_dir: Place) -> list[Place]:
    """The directories of epochs, or else of steps, newest first, as torchtune looks for them."""
    folders = output_dir.folders() if output_dir.is_folder() else []
    for prefix in ("epoch", "step"):
        numbers = {one: one.name.removeprefix(f"{prefix}_") for one in folders if one.name.startswith(f"{prefix}_")}
        found = {one: int(digits) for one, digits in numbers.items() if digits.isascii() and digits.isdigit()}
        if found:
            return sorted(found, key=lambda one: found[one], reverse=True)
    return []
