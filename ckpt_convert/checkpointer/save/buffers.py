"""Copies of tensors for a background save, in buffers that are reused at the next one."""

from __future__ import annotations

from collections.abc import Mapping

import torch


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
                buffer.copy_(tensor, non_blocking=self._pin)
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
