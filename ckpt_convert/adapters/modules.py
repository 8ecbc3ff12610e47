"""The modules of a model that may have an adapter, under their names in each layout."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from ckpt_convert.adapters.config import ALL_LINEAR, is_module_name
from ckpt_convert.errors import UnsupportedFamilyError
from ckpt_convert.models.core.table import Family, Instance
from ckpt_convert.tensors.lazy import from_source

if TYPE_CHECKING:
    import torch

_WEIGHT = ".weight"


class Modules:
    """The modules of a model of this family and size, in a training layout (``format``) and in Hugging Face's.

    The name of a module is its key in the layout without ".weight": layers.0.attn.q_proj. Raises UnsupportedFamilyError
    if the family has no such layout.
    """

    def __init__(self, family: Family, format: str, dims: Mapping[str, int]) -> None:
        for wanted in (format, "hf"):
            if wanted not in family.formats:
                raise UnsupportedFamilyError(
                    f"{family.name}: has no {wanted} layout; known: {', '.join(family.formats)}"
                )
        self.family = family
        self.format = format
        self.dims = dims

    def as_hf(self) -> Modules:
        """The same modules, in Hugging Face's layout."""
        return self if self.format == "hf" else Modules(self.family, "hf", self.dims)

    @cached_property
    def keys(self) -> dict[str, Instance]:
        """Every key of the layout."""
        return {entry.key: entry.first for entry in self.family.stored_specs(self.format, self.dims) if entry.is_single}

    @cached_property
    def linear(self) -> dict[str, Instance]:
        """The linear layers by name, which can have a LoRA adapter, in the order of the model."""
        embeddings = {row.tied_to for row in self.family.rows}
        apart = {entry.first for entry in self.family.stored_specs("hf", self.dims) if entry.is_single}
        return {
            key.removesuffix(_WEIGHT): one
            for key, one in self.keys.items()
            if key.endswith(_WEIGHT) and len(one.row.shape) == 2 and one in apart and one.row.name not in embeddings
        }

    @property
    def is_tied(self) -> bool:
        """Whether the output layer is the embedding, as the config says."""
        return bool(self.dims.get("tied"))

    def hf_key(self, key: str) -> str | None:
        """Hugging Face's key for a key of this layout."""
        return one.key("hf") if (one := self.keys.get(key)) is not None else None

    def hf_name(self, module: str) -> str:
        """Hugging Face's name of a linear layer."""
        return str(self.linear[module].key("hf")).removesuffix(_WEIGHT)

    def both_names(self, module: str) -> tuple[str, str]:
        """Both names of a linear layer."""
        return self.hf_name(module), module

    def sizes(self, module: str) -> tuple[int, int]:
        """(out, in) of a linear layer."""
        rows, columns = self.linear[module].row.sizes(self.dims)
        return rows, columns

    def match_linear(self, words: Iterable[str] | str) -> tuple[list[str], list[str]]:
        """The linear layers that the words of a config match, and the words that match none."""
        if words == ALL_LINEAR:
            return [module for module, one in self.linear.items() if one.row.tied_to is None], []
        words = list(words)
        found = {
            word: [module for module in self.linear if is_module_name(word, *self.both_names(module))] for word in words
        }
        chosen = {module for modules in found.values() for module in modules}
        return [module for module in self.linear if module in chosen], [word for word in words if not found[word]]

    def match_any(self, words: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
        """For each word, the keys of the modules that it matches, linear or not."""
        for word in words:
            yield (
                word,
                [key for key in self.keys if is_module_name(word, *map(_module, (key, self.hf_key(key) or key)))],
            )

    def suggestion(self, module: str) -> str:
        """A hint with the nearest name, for a module that does not exist."""
        near = difflib.get_close_matches(module, self.linear, 1, 0.8)
        return f"; the nearest linear layer is {near[0]}" if near else ""

    def reorder_rows(self, tensor: torch.Tensor, instance: Instance, source: str, target: str) -> torch.Tensor:
        """A tensor with its rows in the RoPE layout of another format; it shares memory if both layouts agree."""
        from ckpt_convert.convert.state_dict import materialize  # not before: it needs torch

        here, there = instance.row.column(source), instance.row.column(target)
        if here is None or there is None:
            raise UnsupportedFamilyError(f"{self.family.name}: {instance.name} has no place in {source} or in {target}")
        lazy = from_source(0, tuple(tensor.shape), tensor.stride())
        turned = instance.row.rotation(self.dims)
        moved = there.rows_to_stored(here.rows_to_logical(lazy, *turned), *turned) if turned else lazy
        return tensor.detach() if moved.contiguous_source == (0, 0) else materialize(moved, [tensor], tensor.dtype)


def _module(key: str) -> str:
    return key.rpartition(".")[0]
