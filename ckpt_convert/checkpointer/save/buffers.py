"""Copies of tensors for a background save, in buffers that are reused at the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ckpt_convert.checkpointer.distributed.claims import Owned
from ckpt_convert.checkpointer.live.selection import MODEL
from ckpt_convert.checkpointer.state.serialize import SerializedState
from ckpt_convert.checkpointer.state.shared_state import SharedState

State = Mapping[str, SerializedState] | SharedState
"""A training state: all of it, or what this process writes of one that several ranks write."""


_LARGE = 1 << 18
"""Bytes from which numpy copies: by libc's memcpy, which does not read what it overwrites, as torch's loop does; two to
three times as fast where it was measured, but it takes a few microseconds to begin."""


class CopyBuffers:
    """One buffer per name, reused while shape and dtype are the same; pinned if there is an accelerator."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._pin = torch.accelerator.is_available()

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Contiguous copies of the current values on the CPU; those of the previous call are overwritten.

        Names whose tensors are one and the same get one copy.
        """
        out: dict[str, torch.Tensor] = {}
        done: dict[tuple[object, ...], torch.Tensor] = {}
        devices = set()
        with torch.no_grad():
            for name, tensor in tensors.items():
                place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
                if tensor.numel() and place in done:
                    out[name] = done[place]
                    continue
                buffer = self._buffer(name, tensor)
                _copy(buffer, tensor, self._pin)
                if tensor.device.type != "cpu":
                    devices.add(tensor.device)
                out[name] = done[place] = buffer
        for device in devices:
            torch.accelerator.synchronize(device)
        for name in self._buffers.keys() - {name for name in out if out[name] is self._buffers.get(name)}:
            del self._buffers[name]
        return out

    def clear(self) -> None:
        """Free the memory."""
        self._buffers.clear()

    def _buffer(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pin)
            self._buffers[name] = buffer
        return buffer


def _copy(buffer: torch.Tensor, tensor: torch.Tensor, pinned: bool) -> None:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not (tensor.is_conj() or tensor.is_neg())
    if plain and tensor.is_cpu and tensor.is_contiguous() and tensor.nbytes >= _LARGE:
        np.copyto(_bytes(buffer), _bytes(tensor))
    else:
        buffer.copy_(tensor, non_blocking=pinned)


def _bytes(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def stage(
    owned: Mapping[str, Owned], state: State | None, buffers: CopyBuffers
) -> tuple[dict[str, Owned], State | None]:
    """Copies of all tensors in the reused buffers; shared tensors are copied once."""
    names = {f"{MODEL}/{key}": tensor for key, (tensor, _) in owned.items()}
    if isinstance(state, SharedState):
        names |= {f"state/{key}": tensor for key, (tensor, _) in state.tensors.items()}
    else:
        for part, packed in (state or {}).items():
            names |= {f"state/{part}/{at}": tensor for at, tensor in packed.tensors.items()}
    copies = buffers.copy(names)
    staged: State | None = None
    if isinstance(state, SharedState):
        held = {key: Owned(copies[f"state/{key}"], part) for key, (_, part) in state.tensors.items()}
        staged = replace(state, tensors=held)
    elif state is not None:
        staged = {
            part: SerializedState(packed.skeleton, {at: copies[f"state/{part}/{at}"] for at in packed.tensors})
            for part, packed in state.items()
        }
    return {key: Owned(copies[f"{MODEL}/{key}"], part) for key, (_, part) in owned.items()}, staged
