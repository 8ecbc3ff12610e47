"""The checkpoint that a run starts from, whose format its saved steps keep."""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ckpt_convert.checkpoint.dequantize import dequantized
from ckpt_convert.checkpoint.opening import OpenedFiles
from ckpt_convert.checkpoint.stated import Hints
from ckpt_convert.checkpointer.run.catalog import Saved
from ckpt_convert.dtypes import DEQUANTIZED, torch_name
from ckpt_convert.errors import CheckpointNotFoundError, CkptConvertError, ConfigError, UsageError
from ckpt_convert.formats.base import Directory, render_json
from ckpt_convert.storage.names import local_path
from ckpt_convert.storage.place import at

STARTED_FROM, CONFIG = "started_from", "config"
"""What the manifest says of a run that began with a config alone."""

Source = str | Path | Sequence[str | Path] | Checkpoint
Config = str | Path | Mapping[str, Any]


def open_source(source: Source, *, format: str | None, family: str | None, config: Config | None) -> Checkpoint:
    """Open what a recipe calls its source: a path, a Hub id, or the weight files of a directory, in any order.

    A checkpoint that is open already is taken as it is. A quantised one is taken for the numbers that it stands for, in
    the dtype that its config names, as training needs them. Raises what ``open_checkpoint`` does, and
    UsageError for a list that is not all of one checkpoint's files.
    """
    if isinstance(source, Checkpoint):
        return _as_numbers(source)
    if not isinstance(source, (str, Path)):
        source = [local_path(file, "source") for file in source]
    given: str | Path = source if isinstance(source, (str, Path)) else _directory(source)
    path = None if config is None else _config_file(config)
    opened = open_checkpoint(given, format=format, family=family, config=path)
    if not isinstance(source, (str, Path)):
        _check_list([Path(file).name for file in source], opened)
    return _as_numbers(opened)


def open_lost(there: Sequence[Saved], config: Config | None, family: str | None) -> tuple[Checkpoint, Path | None]:
    """What a run without a source goes on from, and the step that this is: the newest that has weights, or the config.

    A run that began with a checkpoint keeps its files and its config that way, after the checkpoint is lost. One that
    began with a config alone has nothing of its own to keep. Raises UsageError where there is neither.
    """
    for saved in reversed(there):
        if "format" not in saved.manifest:
            continue  # an adapter: its base is what is missing
        if saved.manifest["training"].get(STARTED_FROM) == CONFIG and config is not None:
            break
        with contextlib.suppress(CkptConvertError):
            return open_source(saved.path, format=None, family=family, config=None), saved.path
    if config is None:
        raise UsageError("source=None: give config= with the model's config.json, to start from nothing")
    return from_config(config, format="hf", family=family), None


def lost(error: CheckpointNotFoundError, there: Sequence[Saved]) -> CheckpointNotFoundError:
    """The error about a source that is not there, with the way to go on without it where a run can."""
    steps = [saved for saved in there if "format" in saved.manifest]
    if not steps:
        return error
    return CheckpointNotFoundError(
        f"{error}\nif it is lost, pass source=None: files, dtypes and config are then those of the newest step, "
        f"{steps[-1].path}"
    )


def from_config(config: Config, *, format: str, family: str | None) -> Checkpoint:
    """A checkpoint without weights, of which only the config is known: what pretraining starts from."""
    path = _config_file(config)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; config= takes a config.json, or what one says as a dict")
    nothing = OpenedFiles(at(path), format, "a config without weights", Directory(()), ())
    return Checkpoint.of(nothing, Hints(family, at(path)))


def _as_numbers(opened: Checkpoint) -> Checkpoint:
    if opened.quantization is None:
        return opened
    config = opened.config or {}
    stated = torch_name(config.get("dtype") or config.get("torch_dtype"))
    return dequantized(opened, stated if stated in DEQUANTIZED else "bfloat16")


def _directory(files: Sequence[str | Path]) -> Path:
    folders = sorted({Path(file).parent for file in files})
    if len(folders) != 1:
        found = ", ".join(map(str, folders)) or "none"
        raise UsageError(f"source: expected the weight files of one directory, found files of {found}")
    for file in files:
        if not Path(file).is_file():
            raise CheckpointNotFoundError(f"{file}: no such file; source= takes a checkpoint, or a list of its files")
    return folders[0]


def _check_list(names: Sequence[str], opened: Checkpoint) -> None:
    there = {file.name for file in opened.files}
    missing, other = sorted(there - set(names)), sorted(set(names) - there)
    problems = [f"{name} belongs to the checkpoint, but is not listed" for name in missing]
    problems += [f"{name} is no weight file of the {opened.format} checkpoint there" for name in other]
    problems += [f"{name} is listed twice" for name in sorted({name for name in names if list(names).count(name) > 1})]
    if problems:
        opened.close()
        raise UsageError(f"{opened.path}: {'; '.join(problems)}; list all of its files, or give the directory")


def _config_file(config: Config) -> Path:
    """The path of a config; one that is given as a dict is written to a temporary place, as files name their origin.

    The place is removed when the process ends.
    """
    if isinstance(config, (str, Path)):
        path = local_path(config, "config")
        return path / "config.json" if path.is_dir() else path
    if not isinstance(config, Mapping):
        to_dict = getattr(config, "to_dict", None)
        if to_dict is None:
            raise UsageError(f"config: expected a path or a dict, found {type(config).__name__}")
        config = to_dict()
    folder = tempfile.mkdtemp(prefix="ckpt-convert-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "config.json"
    path.write_bytes(render_json(config))
    return path
