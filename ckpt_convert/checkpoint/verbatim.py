"""A checkpoint as its stored tensors, each under its own key, whatever the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ckpt_convert.checkpoint.hints import ConfigFile
from ckpt_convert.checkpoint.identify import Identified, Verbatim
from ckpt_convert.checkpoint.selection import select_keys
from ckpt_convert.dtypes import DTYPES
from ckpt_convert.errors import ConfigError, KeyMismatchError
from ckpt_convert.tensors.header import WeightFile

RULES = "hf"
"""The format whose rules for files hold: safetensors, .bin, .pt or torch.distributed.checkpoint, in shards or not."""


@dataclass(frozen=True)
class Selection:
    """The tensors of a checkpoint to take, by globs of their stored keys; all of them without any glob."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)


def as_stored_tensors(source: Identified, selection: Selection | None = None) -> Identified:
    """The same files, of whose tensors nothing is known but the keys; without those that are not selected.

    Raises UsageError for a glob that matches nothing, and KeyMismatchError for tensors that are split across ranks.
    """
    ranks = len({file.rank for file in source.files})
    if ranks > 1:
        raise KeyMismatchError(
            f"{source.place}: its tensors are split across {ranks} ranks, which only a format says how to join: give "
            "one (`to='hf'`), or the file of one rank"
        )
    packed = sorted({tensor.dtype for _, tensor in source.opened.stored if tensor.dtype not in DTYPES})
    if packed:
        raise ConfigError(
            f"{source.place}: has tensors of {', '.join(packed)}, which pack several values together; it can be looked "
            "at, not converted"
        )
    chosen = selection or Selection()
    keys = dict.fromkeys(source.opened.keys)
    is_wanted = select_keys(keys, chosen.include or None, chosen.exclude)
    directory = source.directory
    if directory.weight_map is not None:
        kept = {key: name for key, name in directory.weight_map.items() if is_wanted(key)}
        directory = replace(directory, weight_map=kept)
    files = tuple(file for one in source.files if (file := _selected(one, is_wanted)).header.tensors)
    opened = replace(source.opened, format=RULES, directory=directory, files=files)
    config = ConfigFile(source.root / "config.json")
    return replace(source, opened=opened, stated_config=config, record=None, verbatim=Verbatim(source.format))


def _selected(file: WeightFile, is_wanted: Callable[[str], bool]) -> WeightFile:
    tensors = tuple([tensor for tensor in file.header.tensors if is_wanted(tensor.key)])
    return replace(file, header=replace(file.header, tensors=tensors))
