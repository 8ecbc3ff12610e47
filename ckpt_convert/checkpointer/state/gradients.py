"""Accumulated gradients that the optimizer has not used yet.

Gradients that exist right after an optimizer step were used, and the loop clears them before the next batch: they are
not saved. A zero gradient differs from none, since weight decay and momentum still act on its parameter: of these the
names are saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch

Tree = dict[str, Any]
Parameters = Mapping[str, torch.Tensor]


class PendingGradients:
    """Tracks which gradients were used; the others are pending."""

    def __init__(self) -> None:
        self._used: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}

    def mark_used(self, parameters: Iterable[torch.Tensor]) -> None:
        """Mark the current gradients as used."""
        gradients = [one.grad for one in parameters if one.grad is not None]
        self._used = {id(one): (weakref.ref(one), one._version) for one in gradients}

    def get_state(self, parameters: Parameters) -> Tree:
        """The pending gradients, as a tree for ``serialize``; {} if there are none."""
        gradients = {name: one.grad for name, one in parameters.items() if one.grad is not None}
        pending = {name: one for name, one in gradients.items() if not self._is_used(one)}
        zeros = [name for name, one in pending.items() if not one.is_sparse and not one.any()]
        values = {name: _taken(one) for name, one in pending.items() if name not in zeros}
        return {"zeros": zeros, "values": values} if pending else {}

    def compare_state(self, parameters: Parameters, tree: Tree) -> list[str]:
        """The mismatches between a state and the parameters."""
        problems = []
        for name, value in tree["values"].items():
            shape = _shape(value)
            if name not in parameters:
                problems.append(f"gradients: {name} is in the checkpoint, but there is no such parameter")
            elif tuple(parameters[name].shape) != shape:
                found = list(parameters[name].shape)
                problems.append(f"gradients: {name} is of shape {found}, but {list(shape)} in the checkpoint")
        return problems

    def set_state(self, parameters: Parameters, tree: Tree) -> list[str]:
        """Set the pending gradients of the parameters; returns what did not fit."""
        for name, one in parameters.items():
            if not one.requires_grad:
                continue
            if name in tree["zeros"]:
                one.grad = torch.zeros_like(one)
            elif name in tree["values"] and _shape(tree["values"][name]) == tuple(one.shape):
                one.grad = _given(tree["values"][name]).to(one.device)
        return self.compare_state(parameters, tree)

    def _is_used(self, gradient: torch.Tensor) -> bool:
        known, version = self._used.get(id(gradient), (None, 0))
        return known is not None and known() is gradient and version == gradient._version


def _taken(gradient: torch.Tensor) -> Any:
    if not gradient.is_sparse:
        return gradient
    whole = gradient.coalesce()
    return {"indices": whole.indices(), "values": whole.values(), "shape": whole.shape}


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value["shape"] if isinstance(value, dict) else value.shape)


def _given(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return torch.sparse_coo_tensor(value["indices"], value["values"], value["shape"], is_coalesced=True)
