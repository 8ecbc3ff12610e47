"""The checkpoint that a run starts from; its saved steps have the same format."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ckpt_convert.checkpoint.checkpoint import Checkpoint, identified_of, open_identified
from ckpt_convert.checkpoint.dequantize import dequantized
from ckpt_convert.checkpoint.hints import Hints
from ckpt_convert.checkpoint.identify import Identified, identify
from ckpt_convert.checkpoint.locate import locate_file
from ckpt_convert.checkpoint.opening import OpenedFiles
from ckpt_convert.checkpointer.run.saved_steps import SavedStep
from ckpt_convert.dtypes import DEQUANTIZED_DTYPES, torch_name
from ckpt_convert.errors import CheckpointNotFoundError, CkptConvertError, ConfigError, UsageError
from ckpt_convert.formats.base import WeightDirectory, render_json
from ckpt_convert.storage.memory import MemoryStore
from ckpt_convert.storage.place import Place, checked_place

STARTED_FROM, CONFIG = "started_from", "config"
"""Key and value in the manifest of a run that began with a config alone."""

Source = str | Path | Place | Sequence[str | Path | Place] | Checkpoint
Config = str | Path | Place | Mapping[str, Any]


def open_source(source: Source, *, format: str | None, family: str | None, config: Config | None) -> Identified:
    """Open what a recipe calls its source: a path, a Hub id, or the weight files of a directory, in any order.

    A checkpoint that is open already is used unchanged. A quantized one is read as dequantized values, in
    the dtype that its config names, as training needs them. Raises what ``open_checkpoint`` does, and
    UsageError for a list that is not all of one checkpoint's files.
    """
    if isinstance(source, Checkpoint):
        return _as_numbers(identified_of(source))
    place = None if config is None else _config_file(config)
    if isinstance(source, str | Path | Place):
        return _as_numbers(open_identified(source, format=format, family=family, config=place))
    files = [checked_place(file, "source") for file in source]
    opened = open_identified(_directory(files), format=format, family=family, config=place)
    _check_list([file.name for file in files], opened)
    return _as_numbers(opened)


def open_without_source(
    steps: Sequence[SavedStep], config: Config | None, family: str | None
) -> tuple[Identified, Place | None]:
    """What a run without a source continues from: the newest step with weights (also returned), or the config.

    A run that began with a checkpoint keeps its files and its config that way, after the checkpoint is lost. One that
    began with a config alone has nothing of its own to keep. Raises UsageError where there is neither.
    """
    for saved in reversed(steps):
        if "format" not in saved.manifest:
            continue  # an adapter: its base is what is missing
        if saved.manifest["training"].get(STARTED_FROM) == CONFIG and config is not None:
            break
        with contextlib.suppress(CkptConvertError):
            return open_source(saved.place, format=None, family=family, config=None), saved.place
    if config is None:
        raise UsageError("source=None: give config= with the model's config.json, to start from nothing")
    return open_config(config, format="hf", family=family), None


def missing_source_error(error: CheckpointNotFoundError, steps: Sequence[SavedStep]) -> CheckpointNotFoundError:
    """The error about a missing source, with the way to continue without it if the run can."""
    with_weights = [saved for saved in steps if "format" in saved.manifest]
    if not with_weights:
        return error
    return CheckpointNotFoundError(
        f"{error}\nif it is lost, pass source=None: files, dtypes and config are then those of the newest step, "
        f"{with_weights[-1].place}"
    )


def open_config(config: Config, *, format: str, family: str | None) -> Identified:
    """A checkpoint of a config without weights, for pretraining."""
    place = _config_file(config)
    if not place.is_regular_file():
        raise ConfigError(f"{place}: no such file; config= takes a config.json, or what one says as a dict")
    nothing = OpenedFiles(place, format, "a config without weights", WeightDirectory(()), ())
    return identify(nothing, Hints(family, place))


def _as_numbers(opened: Identified) -> Identified:
    if opened.quantization is None:
        return opened
    config = opened.config or {}
    stated = torch_name(config.get("dtype") or config.get("torch_dtype"))
    return dequantized(opened, stated if stated in DEQUANTIZED_DTYPES else "bfloat16")


def _directory(files: Sequence[Place]) -> Place:
    folders = sorted({file.parent for file in files})
    if len(folders) != 1:
        found = ", ".join(map(str, folders)) or "none"
        raise UsageError(f"source: expected the weight files of one directory, found files of {found}")
    for file in files:
        if not file.is_regular_file():
            raise CheckpointNotFoundError(f"{file}: no such file; source= takes a checkpoint, or a list of its files")
    return folders[0]


def _check_list(names: Sequence[str], opened: Identified) -> None:
    there = {file.name for file in opened.files}
    missing, other = sorted(there - set(names)), sorted(set(names) - there)
    problems = [f"{name} belongs to the checkpoint, but is not listed" for name in missing]
    problems += [f"{name} is no weight file of the {opened.format} checkpoint there" for name in other]
    problems += [f"{name} is listed twice" for name in sorted({name for name in names if list(names).count(name) > 1})]
    if problems:
        opened.close()
        raise UsageError(f"{opened.place}: {'; '.join(problems)}; list all of its files, or give the directory")


def _config_file(config: Config) -> Place:
    """The place of a config: in memory, if it is given as a dict."""
    if isinstance(config, str | Path | Place):
        place = locate_file(config, "config")
        return place / "config.json" if place.is_folder() else place
    if not isinstance(config, Mapping):
        to_dict = getattr(config, "to_dict", None)
        if to_dict is None:
            raise UsageError(f"config: expected a path or a dict, found {type(config).__name__}")
        config = to_dict()
    return Place(MemoryStore({"config.json": render_json(config)}), PurePosixPath("config.json"))
