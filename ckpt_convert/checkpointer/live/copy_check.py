"""Detecting a state dict of copies, which training does not update.

Saves of copies would hold the initial weights at every step. In-place updates increase torch's version counter, even if
the values stay the same (a learning rate of 0). If no version changed, some values of each tensor are compared. It is
an error only if the optimizer's parameters have changed meanwhile; without an optimizer, only if nothing else shares
the memory of the tensors.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ckpt_convert.checkpointer.distributed.slices import local_of
from ckpt_convert.checkpointer.live.tensors import MemoryRanges
from ckpt_convert.errors import UsageError

_SAMPLES = 256
"""Values that are compared per tensor."""


class CopyCheck:
    """Checks whether the tensors of ``model`` are trained; ``parameters`` are the optimizer's, if any."""

    def __init__(self, model: Mapping[str, Any], parameters: Iterable[torch.Tensor] | None) -> None:
        self._model = model
        self._trained = None if parameters is None else [one for one in parameters if one.requires_grad]
        tensors = list(_tensors(model).values())
        memory = MemoryRanges(map(local_of, tensors))
        self._live = (
            any(tensor.requires_grad or isinstance(tensor, DTensor) for tensor in tensors)
            or (self._trained is None and _are_shared(tensors))
            or (self._trained is not None and not self._is_trained_apart(tensors, memory))
        )
        self.restart(0)

    def restart(self, step: int) -> None:
        """From this step on the tensors have to change."""
        self._step = step
        self._before = {} if self._live else {key: _Look(one) for key, one in _tensors(self._model).items()}
        self._trained_before = [] if self._live else [_coarse(one) for one in self._trained or ()]

    def refuse_copies(self, step: int) -> None:
        """Raise UsageError if the steps since ``restart`` show that these are copies."""
        now, steps = _tensors(self._model), step - self._step
        if self._live or not steps or now.keys() != self._before.keys():
            return
        if not all(look.is_of(now[key]) for key, look in self._before.items()):
            self._live = True
            return
        if self._trained is None:
            apart = steps > 1  # after one step it may be a trial of saving
            why = "and nothing else has their memory"
        else:
            pairs = zip(self._trained, self._trained_before, strict=True)
            apart = not all(torch.equal(_coarse(one), before) for one, before in pairs)
            why = "while the parameters of the optimizer have"
        if apart:
            raise UsageError(
                f"model=: none of its {len(now)} tensors has changed in {steps} steps, {why}: these are copies, so "
                "this step would hold the initial weights; pass the module itself, or tensors that "
                "training changes in place (module.state_dict()). What has to be gathered is gathered anew for every "
                "save: register(model=THEM, progress=checkpointer.progress), then save()"
            )

    def _is_trained_apart(self, tensors: list[torch.Tensor], memory: MemoryRanges) -> bool:
        """Whether the optimizer's parameters have the size or shapes of the model, but other memory.

        A small module that is trained with a frozen model is no reason to suspect copies.
        """
        trained = self._trained or []
        if not trained or any(local_of(one) in memory for one in trained):
            return False
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        shapes = {tensor.shape for tensor in tensors if tensor.dim() > 1}
        size = sum(tensor.numel() for tensor in tensors)
        whole = 2 * processes * sum(one.numel() for one in trained) >= size  # some are sharded and flattened
        return whole or any(one.shape in shapes for one in trained)


class _Look:
    """A snapshot of a tensor's version and some values, without a reference to it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._version = _version(tensor)
        self._samples = _samples(tensor)

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether it is the same tensor object, unchanged."""
        same = self._tensor() is tensor and self._version == _version(tensor)
        return same and torch.equal(_bytes(self._samples), _bytes(_samples(tensor)))


def _tensors(model: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    tensors = {key: one for key, one in model.items() if isinstance(one, torch.Tensor)}
    return {key: one for key, one in tensors.items() if one.layout == torch.strided and not one.is_meta}


def _samples(tensor: torch.Tensor) -> torch.Tensor:
    local = local_of(tensor)
    flat = local.as_strided((local.numel(),), (1,), local.storage_offset())  # in the order of the memory
    return flat[:: max(1, local.numel() // _SAMPLES)][:_SAMPLES].to("cpu", copy=True)


def _coarse(tensor: torch.Tensor) -> torch.Tensor:
    """Samples in the precision of weights that are rounded from these: a smaller change need not show in them."""
    return _bytes(_samples(tensor).bfloat16())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _are_shared(tensors: list[torch.Tensor]) -> bool:
    """Whether other tensors share the memory of some of them, as a module shares that of its state dict."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return True
    known = Counter(tensor.untyped_storage().data_ptr() for tensor in {id(one): one for one in tensors}.values())
    return any(
        count(storage._cdata) > known[storage.data_ptr()] + 1  # itself
        for storage in (tensor.untyped_storage() for tensor in tensors)
    )
