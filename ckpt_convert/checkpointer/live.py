"""The tensors of a model in memory: under the keys of its layout whatever it is wrapped in, and read like a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ckpt_convert.convert.containers.header import IN_MEMORY, Header, StoredTensor
from ckpt_convert.convert.mapping import Source
from ckpt_convert.convert.opening import WeightFile
from ckpt_convert.convert.plan import Live
from ckpt_convert.dtypes import FROM_TORCH
from ckpt_convert.errors import KeyMismatchError, UsageError, listing
from ckpt_convert.models.lazy import stored
from ckpt_convert.storage.reader import RangeReader

Model = nn.Module | Mapping[str, Any]
"""A model, or its state dict, whose tensors training goes on to change in place."""

WHERE = "the model in memory"

_WRAPPED = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
"""Where a wrapper keeps what it wraps, by the name of its class (torch.compile's is private)."""


def tensors_of(model: Model) -> dict[str, torch.Tensor]:
    """The persistent tensors by key, without what torch.compile, DDP or DataParallel put before them; no copies.

    Raises KeyMismatchError for entries that are no tensors, and UsageError for tensors that cannot be read as they are.
    """
    named = _state_of_module(model) if isinstance(model, nn.Module) else _state_of_mapping(model)
    out: dict[str, torch.Tensor] = {}
    problems = []
    for key, tensor in named:
        if not isinstance(tensor, torch.Tensor):
            problems.append(f"{key}: is a {type(tensor).__name__}, no tensor")
        elif key in out:
            problems.append(f"{key}: is there twice, once in a wrapper")
        else:
            out[key] = tensor.detach()
    if problems:
        raise KeyMismatchError(f"{WHERE}: not everything in its state dict can be saved:{listing(problems)}")
    for key, tensor in out.items():
        _check(key, tensor)
    return out


def names_of(model: Model) -> dict[int, str]:
    """The key of each parameter, by the ``id`` of the parameter itself; {} for a state dict of detached tensors."""
    if isinstance(model, nn.Module):
        return {id(parameter): plain_key(model, name) for name, parameter in model.named_parameters()}
    return {id(tensor): key for key, tensor in _state_of_mapping(model)}


def plain_key(model: nn.Module, key: str) -> str:
    """The key without the parts that wrappers around the model, or around modules in it, have added."""
    parts = []
    module: Any = model
    for part in key.split("."):
        if _WRAPPED.get(type(module).__name__) != part:
            parts.append(part)
        module = getattr(module, part, None)
    return ".".join(parts)


def signature(tensors: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    """What a plan for these tensors depends on, which is everything but their values and where they lie."""
    return tuple((key, t.dtype, tuple(t.shape), t.stride()) for key, t in tensors.items())


class MemoryReader:
    """The storage of a tensor, read as if it were a file; on an accelerator range by range."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self.bind(tensor)

    def bind(self, tensor: torch.Tensor) -> None:
        """Read from this tensor from now on, whose shape, strides and dtype are those of the one before."""
        self.offset = tensor.storage_offset() * tensor.element_size()
        with torch.no_grad():
            self._bytes = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        self.size = self._bytes.numel()

    def readinto(self, offset: int, buffer: memoryview) -> None:
        start = self.offset + offset
        np.copyto(np.frombuffer(buffer, np.uint8), self._bytes[start : start + len(buffer)].cpu().numpy())


def as_live(tensors: Mapping[str, torch.Tensor], format: str, readers: Mapping[str, RangeReader] | None = None) -> Live:
    """The tensors as a plan takes them; they are read when the plan is carried out.

    ``readers`` give the bytes of some of them instead, dense and row-major.
    """
    sources: dict[str, Source] = {}
    files: list[tuple[WeightFile, StoredTensor]] = []
    for number, (key, tensor) in enumerate(tensors.items()):
        dtype = FROM_TORCH[str(tensor.dtype).removeprefix("torch.")].name
        shape, strides = tuple(tensor.shape), tensor.stride()
        given = (readers or {}).get(key)
        dense = tensor.is_contiguous() or given is not None
        description = StoredTensor(key, dtype, shape, 0, None if dense else strides)
        reader = given or MemoryReader(key, tensor)
        file = WeightFile(WHERE, 0, Path(WHERE), reader, Header(IN_MEMORY, reader.size, (description,)))
        sources[key] = Source(key, dtype, stored(number, shape, None if dense else strides), WHERE)
        files.append((file, description))
    return Live(format, sources, tuple(files))


def bind(live: Live, tensors: Mapping[str, torch.Tensor]) -> None:
    """Let a plan read these tensors, which have the ``signature`` of those that it was made for."""
    for file, description in live.stored:
        if isinstance(file.reader, MemoryReader):
            file.reader.bind(tensors[description.key])


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one: tied weights that a state dict names twice."""
    return (
        one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.storage_offset() == other.storage_offset()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.device == other.device
    )


def _state_of_module(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in model.state_dict(keep_vars=True).items():
        yield plain_key(model, key), value


def _state_of_mapping(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    module = all(key.startswith(("module.", "_orig_mod.module.")) for key in state)
    for key, value in state.items():
        parts = [part for part in key.split(".") if part != "_orig_mod"]
        yield ".".join(parts[1:] if module else parts), value


def _check(key: str, tensor: torch.Tensor) -> None:
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        raise UsageError(
            f"{key}: is on the meta device, so there is nothing to load into or to save; use model.to_empty()"
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise UsageError(f"{key}: expected a dense tensor, found {tensor.layout}, quantised: {tensor.is_quantized}")
    if hasattr(tensor, "full_tensor"):
        raise UsageError(
            f"{key}: is sharded over processes ({type(tensor).__name__}); give a state dict of whole tensors, such as "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(full_state_dict=True) makes"
        )
    if name not in FROM_TORCH:
        raise UsageError(f"{key}: dtype {name} is not known; known: {', '.join(sorted(FROM_TORCH))}")
