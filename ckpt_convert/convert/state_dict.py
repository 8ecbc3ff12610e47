"""Converting state dicts in memory, through the same tables as files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch

from ckpt_convert import formats, log
from ckpt_convert.checkpoint import legacy_keys
from ckpt_convert.checkpoint.hints import unknown_family
from ckpt_convert.checkpoint.locate import locate_file
from ckpt_convert.checkpoint.mapping import Equality
from ckpt_convert.checkpoint.model import Model, candidates, model_from
from ckpt_convert.checkpoint.tensor_info import SourceTensor
from ckpt_convert.convert.translate import translate
from ckpt_convert.dtypes import DTYPES, FROM_TORCH, torch_name
from ckpt_convert.errors import (
    KeyMismatchError,
    LossyConversionError,
    TiedWeightsError,
    UsageError,
    option_error,
)
from ckpt_convert.formats.base import FormatName, load_json
from ckpt_convert.models import FAMILIES
from ckpt_convert.models.core.config import AXES, ConfigOptions, MetaStyle
from ckpt_convert.storage.place import Location, Place
from ckpt_convert.tensors.lazy import ZEROS, LazyTensor, from_source
from ckpt_convert.wording import indented_list, option_text

StateDict = Mapping[str, torch.Tensor]


@overload
def convert_state_dict(
    state_dict: StateDict | Sequence[StateDict],
    config: Mapping[str, Any] | Location,
    *,
    source: FormatName,
    target: FormatName,
    model_parallel: Literal[1] = ...,
    family: str | None = ...,
    meta_style: MetaStyle | None = ...,
    allow_loss: bool = ...,
) -> dict[str, torch.Tensor]: ...


@overload
def convert_state_dict(
    state_dict: StateDict | Sequence[StateDict],
    config: Mapping[str, Any] | Location,
    *,
    source: FormatName,
    target: FormatName,
    model_parallel: Literal[2, 4, 8, 16],
    family: str | None = ...,
    meta_style: MetaStyle | None = ...,
    allow_loss: bool = ...,
) -> list[dict[str, torch.Tensor]]: ...


@overload
def convert_state_dict(
    state_dict: StateDict | Sequence[StateDict],
    config: Mapping[str, Any] | Location,
    *,
    source: FormatName,
    target: FormatName,
    model_parallel: int,
    family: str | None = ...,
    meta_style: MetaStyle | None = ...,
    allow_loss: bool = ...,
) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]: ...


def convert_state_dict(
    state_dict: StateDict | Sequence[StateDict],
    config: Mapping[str, Any] | Location,
    *,
    source: FormatName,
    target: FormatName,
    model_parallel: int = 1,
    family: str | None = None,
    meta_style: MetaStyle | None = None,
    allow_loss: bool = False,
) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
    """Convert tensors in memory from one format to another; the input is untouched, no memory is shared.

        state_dict = convert_state_dict(model.state_dict(), "Llama-3.2-1B/config.json", source="native", target="hf")

    Tensors stay on their device and keep their dtype.

    Args:
        state_dict: tensors by key; of a "meta" source that is split across ranks a list of them, by rank.
        config: Hugging Face's config.json or Meta's params.json: its path, or its content.
        source: the format of ``state_dict``: "hf", "meta", "native" or "torchtitan".
        target: the format to convert to.
        model_parallel: the number of tensor-parallel ranks of a "meta" target; above 1 a list of dicts is returned.
        family: the name of the architecture, such as "llama", where config and keys do not tell.
        meta_style: "llama2" or "llama3": which axis of the embedding ranks split, where the config does not tell.
        allow_loss: leave out values that the target has no place for even if the model's outputs change. Tables that
            the config determines (rope.freqs) are left out in any case.

    Raises:
        KeyMismatchError, ShapeMismatchError, TiedWeightsError: tensors do not fit the config; lists all that do not.
        LossyConversionError: the target has no place for values that change the model's outputs.
        UnsupportedFamilyError: no table describes the architecture, or none in this format.
        UsageError: no such family, or options that do not fit each other.
    """
    dicts = [state_dict] if isinstance(state_dict, Mapping) else list(state_dict)
    for name, format in (("source", source), ("target", target)):
        formats.check_format_name(format, name)
    if not dicts:
        raise UsageError("the list of state dicts is empty; give one for each rank")
    if model_parallel != 1 and target != "meta":
        raise UsageError(
            f"{option_text('model_parallel', model_parallel)} does not fit {target}: only meta is split across ranks"
        )
    if len(dicts) != 1 and source != "meta":
        raise UsageError(f"{len(dicts)} state dicts do not fit {source}: only meta is split across ranks")
    tensors: list[torch.Tensor] = []
    ranks = [_sources(rank, number, tensors) for number, rank in enumerate(dicts)]
    content = load_json(locate_file(config, "config")) if isinstance(config, str | os.PathLike | Place) else config
    if not isinstance(content, Mapping):
        raise UsageError(f"config: expected a dict or a path, found {type(content).__name__}; try config.to_dict()")
    ranks = _named(ranks, content, family, source)
    model = _model(content, family, ranks, source, meta_style)
    model.family.check_rotation(model.config, source, target)

    def equal(check: Equality) -> bool:
        return _same(check, tensors)

    made = translate(
        model,
        source,
        target,
        ranks,
        "the state dict",
        equal=equal,
        dims=lambda dims: dims if meta_style is None else dims.with_embedding_axis(AXES[meta_style]),
        ranks=model_parallel,
        keep_tied=None if source == target else False,
    )
    for check in made.checks:
        if not equal(check):
            raise TiedWeightsError(check.message)
    _check_losses(made.losses, tensors, f"the {target} format of {model.family.name}", allow_loss)
    out: list[dict[str, torch.Tensor]] = [{} for _ in range(model_parallel)]
    for item in made.targets:
        out[item.rank][item.key] = materialize(item.tensor, tensors, _torch(item.dtype))
    return out if model_parallel > 1 else out[0]


def materialize(tensor: LazyTensor, sources: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor in new memory: dense, on the device (and by default in the dtype) of its first source."""
    first = sources[min(tensor.sources, default=0)]
    has_zeros = any(tile.source == ZEROS for tile in tensor.tiles)
    made = torch.zeros if has_zeros else torch.empty
    out = made(tensor.shape, dtype=dtype or first.dtype, device=first.device)
    for copy in tensor.copies():
        if copy.source == ZEROS:
            continue
        source = sources[copy.source].detach()
        shape = [count for count, _, _ in copy.dims]
        offset = source.storage_offset() + copy.source_offset
        out.as_strided(shape, [step for _, _, step in copy.dims], copy.target_offset).copy_(
            source.as_strided(shape, [step for _, step, _ in copy.dims], offset)
        )
    return out


def _torch(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, DTYPES[name].torch)
    return found


def _sources(state_dict: StateDict, rank: int, tensors: list[torch.Tensor]) -> dict[str, SourceTensor]:
    out = {}
    for key, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise KeyMismatchError(f"{key}: expected a tensor, found {type(tensor).__name__}; leave it out")
        dtype = torch_name(tensor.dtype)
        if dtype not in FROM_TORCH:
            raise KeyMismatchError(f"{key}: dtype {dtype} is not known; known: {', '.join(sorted(FROM_TORCH))}")
        lazy = from_source(len(tensors), tuple(tensor.shape), tensor.stride())
        tensors.append(tensor)
        out[key] = SourceTensor(key, FROM_TORCH[dtype].name, lazy, f"rank {rank}")
    return out


def _named(
    ranks: list[dict[str, SourceTensor]], content: Mapping[str, Any], family: str | None, format: str
) -> list[dict[str, SourceTensor]]:
    """The tensors by the keys of the format, without prefixes of wrappers such as torch.compile."""
    keys = dict.fromkeys(key for rank in ranks for key in rank)
    names = legacy_keys.read_keys(keys, candidates(content, format, family, keys), format)
    if names.clashes:
        said = indented_list([text for _, text in names.clashes])
        raise KeyMismatchError(f"the state dict: its keys contradict each other:{said}")
    for notice in names.notices:
        log.info("the state dict: %s", notice)
    return [{(name := names.of(key)): source._replace(key=name) for key, source in rank.items()} for rank in ranks]


def _model(
    content: Mapping[str, Any],
    family: str | None,
    ranks: list[dict[str, SourceTensor]],
    source: str,
    meta_style: MetaStyle | None,
) -> Model:
    if family is not None and family not in FAMILIES:
        raise option_error("family", family, unknown_family(family))
    options = ConfigOptions(meta_style=meta_style)
    return model_from(content, "config", source, ranks, options, family=family)


def _check_losses(losses: Sequence[Equality], tensors: Sequence[torch.Tensor], target_name: str, allowed: bool) -> None:
    """Raise LossyConversionError for values that would be left out although they change what the model computes."""
    counts = {one.key: int(materialize(one.left, tensors, _torch(one.dtype)).count_nonzero()) for one in losses}
    lost = {key: count for key, count in counts.items() if count}
    if lost and not allowed:
        said = indented_list([f"{key}: {count:,} values other than zero" for key, count in lost.items()])
        raise LossyConversionError(
            f"{target_name} has no place for values that change what the model computes (allow_loss=True omits them):"
            f"{said}",
            lost,
        )


def _same(check: Equality, tensors: Sequence[torch.Tensor]) -> bool:
    left, right = (_bits(materialize(side, tensors, _torch(check.dtype))) for side in (check.left, check.right))
    return torch.equal(left, right)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
