"""The tensors of a model in memory: under the keys of its layout whatever it is wrapped in, and read like a file."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from ckpt_convert.checkpoint.legacy_keys import HOLDER, WRAPPERS, without_wrappers
from ckpt_convert.checkpoint.tensor_info import SourceTensor
from ckpt_convert.checkpointer.distributed.claims import Owned
from ckpt_convert.checkpointer.distributed.slices import Slice, local_of, slice_of, whole
from ckpt_convert.checkpointer.live.fsdp1 import Fsdp1Model
from ckpt_convert.convert.plan import SourceFile, memory_key, memory_source
from ckpt_convert.convert.planning import InMemorySource
from ckpt_convert.dtypes import FROM_TORCH, torch_name
from ckpt_convert.errors import KeyMismatchError, UsageError
from ckpt_convert.storage.base import RangeReader
from ckpt_convert.storage.place import as_place
from ckpt_convert.tensors.header import IN_MEMORY, Header, StoredTensor, WeightFile
from ckpt_convert.tensors.lazy import LazyTensor, Tile, from_source
from ckpt_convert.wording import indented_list

Model = nn.Module | Mapping[str, Any]
"""A model, or its state dict with tensors that training updates in place."""

MODEL_IN_MEMORY = "the model in memory"

_GATHER = (
    ", and whole tensors are what is saved; gather them anew for every save (get_model_state_dict with "
    "full_state_dict=True of torch.distributed.checkpoint.state_dict), then register(model=THEM, progress=...) and "
    "save() on one process: tensors that were gathered once do not change with the training"
)

_MODULE = (
    *("DistributedDataParallel", "DataParallel", "AveragedModel"),
    *("QuantWrapper", "LossWrapper"),  # of torch.ao.quantization and torch.distributed.pipelining
)
_WRAPPED = {kind: part for kind, (part, _) in WRAPPERS.items()} | dict.fromkeys(_MODULE, HOLDER)
"""The attribute in which torch's wrappers keep the wrapped module, by the name of their class or a base class."""

_COUNT = "n_averaged"
"""The only own tensor of these wrappers: the number of models that an AveragedModel averages."""


def model_tensors(model: Model) -> dict[str, torch.Tensor]:
    """The persistent tensors by key, without the prefixes and own tensors of torch's wrappers; no copies.

    Raises KeyMismatchError for entries that are no tensors, and UsageError for tensors that cannot be read as they are
    and for what is no model.
    """
    if isinstance(model, Fsdp1Model):
        model.refresh()
    out: dict[str, torch.Tensor] = {}
    problems = []
    for key, tensor, own in _state_of(model):
        if own:
            continue
        if not isinstance(tensor, torch.Tensor):
            problems.append(f"{key}: is a {type(tensor).__name__}, no tensor")
        elif key in out:
            problems.append(f"{key}: is there twice, once in a wrapper")
        else:
            out[key] = tensor.detach()
    if problems:
        raise KeyMismatchError(
            f"{MODEL_IN_MEMORY}: not everything in its state dict can be saved:{indented_list(problems)}"
        )
    for key, tensor in out.items():
        _check(key, tensor)
    return out


def wrapper_tensors(model: Model) -> dict[str, torch.Tensor]:
    """The own tensors of a wrapper around the model, for which a checkpoint of the model has no key."""
    if not isinstance(model, nn.Module):
        return {key: tensor for key, tensor, own in _state_of(model) if own}
    return {key: one for name, one in model.named_buffers() for key, own in (_plain(model, name),) if own}


def parameter_names(model: Model) -> dict[int, str]:
    """The key of each parameter, by the ``id`` of the parameter itself; {} for a state dict of detached tensors.

    It is the key that the state dict has for this very parameter, whatever ``named_parameters`` calls it.
    """
    if not isinstance(model, nn.Module):
        return {id(tensor): key for key, tensor, _ in _state_of(model)}
    state = {key: tensor for key, tensor, _ in _state_of(model)}  # first: it has FSDP2 put its slices back
    names = {id(parameter): _plain(model, name)[0] for name, parameter in model.named_parameters()}
    for key, tensor in state.items():
        called = names.get(id(tensor))
        if called is not None and state.get(called) is not tensor:
            names[id(tensor)] = key
    return names


def key_finder(model: Model) -> Callable[[str], str]:
    """A function from a parameter's name in a checkpoint, such as that of ``named_parameters``, to its key."""
    names = parameter_names(model)
    called = {}
    if isinstance(model, nn.Module):
        called = {_plain(model, name)[0]: names[id(one)] for name, one in model.named_parameters()}

    def key(name: str) -> str:
        plain = ".".join(without_wrappers(name))
        return called.get(plain, plain)

    return key


def trained_parameters(model: Model) -> dict[str, torch.Tensor]:
    """The parameters that require gradients, by key; of a state dict, its tensors that are not detached."""
    if not isinstance(model, nn.Module):
        return {key: one for key, one, _ in _state_of(model) if isinstance(one, torch.Tensor) and one.requires_grad}
    names = parameter_names(model)
    return {names[id(parameter)]: parameter for parameter in model.parameters() if parameter.requires_grad}


def all_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Owned]:
    """The tensors as one process writes all of them; raises UsageError for one that is split over several."""
    for key, tensor in tensors.items():
        if hasattr(tensor, "full_tensor") and not slice_of(key, tensor).is_whole:
            raise UsageError(f"{key}: is sharded over processes ({type(tensor).__name__}){_GATHER}")
    return {key: Owned(local_of(tensor), whole(tensor.shape)) for key, tensor in tensors.items()}


class MemoryRanges:
    """The memory of some tensors; ``in`` tells whether another tensor overlaps it."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._extents: dict[tuple[object, ...], set[tuple[int, int]]] = {}
        for tensor in tensors:
            storage, extent = _extent(tensor)
            self._extents.setdefault(storage, set()).add(extent)

    def __contains__(self, tensor: object) -> bool:
        if not isinstance(tensor, torch.Tensor):
            return False
        storage, (start, end) = _extent(tensor)
        there = self._extents.get(storage, set())
        return start == end or (start, end) in there or any(first < end and start < last for first, last in there)


def detached_copies(model: Model, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The keys of tensors that a module's state dict creates on each call: loading into them has no effect."""
    if not isinstance(model, nn.Module):
        return []
    memory = MemoryRanges((*model.parameters(), *model.buffers()))
    return [key for key, tensor in tensors.items() if tensor not in memory]


def tensors_signature(tensors: Mapping[str, Owned], kinds: dict[Any, int]) -> tuple[Any, ...]:
    """What a plan for these tensors depends on: everything except their values and addresses.

    ``kinds`` numbers the different shapes, dtypes, strides and slices; pass the same dict for the same plans. Of
    100,000 tensors few are different, and a tuple for each would trigger full garbage collections.
    """
    numbers = [kinds.setdefault((t.dtype, t.shape, t.stride(), part), len(kinds)) for t, part in tensors.values()]
    return tuple(tensors), array("I", numbers).tobytes()


class MemoryReader:
    """A reader of a tensor's storage, with the interface of a file; from an accelerator it copies range by range."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self.offset = tensor.storage_offset() * tensor.element_size()
        self._bytes = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        self.size = self._bytes.numel()

    def readinto(self, offset: int, buffer: memoryview) -> None:
        np.copyto(np.frombuffer(buffer, np.uint8), self._range(offset, len(buffer)).cpu().numpy())

    def view(self, offset: int, nbytes: int) -> memoryview | None:
        """These bytes, without a copy; None where they are on an accelerator."""
        there = self._range(offset, nbytes)
        return there.numpy().data if there.is_cpu else None

    def _range(self, offset: int, nbytes: int) -> torch.Tensor:
        start = self.offset + offset
        if start + nbytes > self.size:
            raise UsageError(f"{self.name}: this part of it is in the memory of another process")
        return self._bytes[start : start + nbytes]


def as_planning_source(
    tensors: Mapping[str, Owned], format: str, readers: Mapping[str, RangeReader] | None = None
) -> InMemorySource:
    """The tensors as a plan takes them; they are read when the plan is carried out.

    ``readers`` give the bytes of some of them instead, dense and row-major.
    """
    sources: dict[str, SourceTensor] = {}
    files: list[tuple[WeightFile, StoredTensor]] = []
    elsewhere: dict[int, int] = {}
    for key, (tensor, part) in tensors.items():
        dtype = FROM_TORCH[torch_name(tensor.dtype)].name
        shape, strides = tuple(tensor.shape), tensor.stride()
        given = (readers or {}).get(key)
        dense = tensor.is_contiguous() or given is not None
        own = StoredTensor(key, dtype, shape, 0, None if dense else strides)
        reader = given or MemoryReader(key, tensor)
        file = WeightFile(MODEL_IN_MEMORY, 0, as_place(MODEL_IN_MEMORY), reader, Header(IN_MEMORY, reader.size, (own,)))
        number = len(files)
        lazy = from_source(number, shape, None if dense else strides)
        files.append((file, own))
        if not part.is_whole:
            lazy = _sliced(part, lazy, from_source(number + 1, part.shape))
            elsewhere[number + 1] = number
            files.append((file, StoredTensor(key, dtype, part.shape, reader.size)))  # past the end: never read
        sources[key] = SourceTensor(key, dtype, lazy, MODEL_IN_MEMORY)
    return InMemorySource(format, sources, tuple(files), elsewhere)


def _sliced(part: Slice, own: LazyTensor, other: LazyTensor) -> LazyTensor:
    """A tensor of which this process has a part, and others the rest."""
    tiles = []
    for origin, shape, local in part.regions():
        tiles += _moved(_box(own, local, shape), origin)
    for origin, shape in part.outside():
        tiles += _moved(_box(other, origin, shape), origin)
    return LazyTensor(part.shape, tuple(tiles))


def _box(tensor: LazyTensor, origin: Sequence[int], shape: Sequence[int]) -> LazyTensor:
    for axis, (start, size) in enumerate(zip(origin, shape, strict=True)):
        tensor = tensor.narrow(axis, start, size)
    return tensor


def _moved(tensor: LazyTensor, by: Sequence[int]) -> list[Tile]:
    return [
        tile._replace(origin=tuple(start + step for start, step in zip(tile.origin, by, strict=True)))
        for tile in tensor.tiles
    ]


class MemoryReaders(Mapping[SourceFile, RangeReader]):
    """The tensors as sources of a plan that was made for others of the same signature; each made as it is asked for."""

    def __init__(self, tensors: Mapping[str, Owned]) -> None:
        self._tensors = tensors

    def __getitem__(self, source: SourceFile) -> RangeReader:
        key = memory_key(source)
        if key is None or key not in self._tensors:
            raise KeyError(source)
        return MemoryReader(key, self._tensors[key].tensor)

    def __iter__(self) -> Iterator[SourceFile]:
        return map(memory_source, self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same memory: tied weights under two keys."""
    one, other = local_of(one), local_of(other)
    return (
        one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.storage_offset() == other.storage_offset()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.device == other.device
    )


def _state_of(model: Model) -> Iterator[tuple[str, Any, bool]]:
    """Each entry of the state dict: its plain key, the value, and whether it belongs to a wrapper."""
    if not isinstance(model, nn.Module | Mapping):
        raise UsageError(f"model: expected a module, or its state dict, found a {type(model).__name__}")
    return _state_of_module(model) if isinstance(model, nn.Module) else _state_of_mapping(model)


def _state_of_module(model: nn.Module) -> Iterator[tuple[str, Any, bool]]:
    _refuse_sharded(model)
    state = [(*_plain(model, name), value) for name, value in model.state_dict(keep_vars=True).items()]
    live: Mapping[str, torch.Tensor] = {}
    if detached_copies(model, {key: value for key, _, value in state if isinstance(value, torch.Tensor)}):
        # FullyShardedDataParallel's state dict has copies, also where nothing is sharded.
        members = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        live = {_plain(model, name)[0]: one for name, one in members}
    for key, own, value in state:
        member = live.get(key, value)
        same = isinstance(value, torch.Tensor) and (member.shape, member.dtype) == (value.shape, value.dtype)
        yield key, member if same else value, own


def _state_of_mapping(state: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    keys = {name: without_wrappers(name) for name in state}
    module = all(parts[0] == HOLDER for parts in keys.values() if parts != [_COUNT])
    for name, parts in keys.items():
        own = module and parts == [_COUNT]
        yield ".".join(parts[1:] if module and not own else parts), state[name], own


def _plain(model: nn.Module, name: str) -> tuple[str, bool]:
    """A key without the parts that wrappers have added, and whether it is that of a wrapper's own tensor.

    A wrapper whose state dict leaves its part out of the keys is seen through all the same.
    """
    parts = []
    module: nn.Module | None = model
    own = False
    for part in name.split("."):
        while (inner := _wrapped(module)) and module is not None and part not in {**module._modules, **module._buffers}:
            module = module._modules[inner]
        if part != inner and without_wrappers(part):
            own = inner is not None
            parts.append(part)
        module = module._modules.get(part) if module is not None else None
    return ".".join(parts), own


def _wrapped(module: nn.Module | None) -> str | None:
    """The attribute in which a wrapper keeps the wrapped module; None for any other module."""
    kind: type = type(module)
    return _wrapped_by(kind)


@lru_cache(maxsize=1024)  # it is asked for each part of each key, at each save
def _wrapped_by(kind: type) -> str | None:
    bases = [base.__name__ for base in kind.__mro__ if base.__module__.partition(".")[0] == "torch"]
    return next((_WRAPPED[name] for name in bases if name in _WRAPPED), None)


def _refuse_sharded(model: nn.Module) -> None:
    """Raise UsageError for FullyShardedDataParallel (FSDP1) that shards or flattens, before its state dict gathers."""
    for module in model.modules():
        if _wrapped(module) != _WRAPPED["FullyShardedDataParallel"]:
            continue
        if module.sharding_strategy.name != "NO_SHARD":  # type: ignore[union-attr]
            raise UsageError(
                f"{MODEL_IN_MEMORY}: FullyShardedDataParallel shards its parameters over processes{_GATHER}"
            )
        if not module._use_orig_params:
            raise UsageError(
                f"{MODEL_IN_MEMORY}: FullyShardedDataParallel has flattened its parameters; make it with "
                "use_orig_params=True"
            )


def _extent(tensor: torch.Tensor) -> tuple[tuple[object, ...], tuple[int, int]]:
    """The storage of a tensor, and the byte range that the tensor covers in it."""
    tensor = local_of(tensor)
    if not tensor.numel():
        return (), (0, 0)
    try:
        storage = tensor.device, tensor.untyped_storage().data_ptr()
        start = int(tensor.storage_offset())
        last = start + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    except (RuntimeError, NotImplementedError):  # a subclass of tensors that has no storage
        return (id(tensor),), (0, 1)
    return storage, (start * tensor.element_size(), (last + 1) * tensor.element_size())


def _check(key: str, tensor: torch.Tensor) -> None:
    name = torch_name(tensor.dtype)
    if tensor.is_meta:
        raise UsageError(
            f"{key}: is on the meta device, so there is nothing to load into or to save; use model.to_empty()"
        )
    if local_of(tensor).layout != torch.strided or tensor.is_quantized:
        raise UsageError(f"{key}: expected a dense tensor, found {tensor.layout}, quantized: {tensor.is_quantized}")
    slice_of(key, tensor)
    if name not in FROM_TORCH:
        raise UsageError(f"{key}: dtype {name} is not known; known: {', '.join(sorted(FROM_TORCH))}")
