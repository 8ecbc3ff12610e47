"""What weights are that nothing can use as they are, and what to do about it: one cause instead of its symptoms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckpt_convert.convert.checkpoint import Checkpoint

_BASE = ".base_layer."
_ADAPTERS = (".lora_A.", ".lora_embedding_A.", ".lora_", ".ia3_", ".vera_", ".hada_", ".lokr_", ".oft_", ".boft_")


def unmerged(checkpoint: Checkpoint) -> str | None:
    """That an adapter's weights are stored beside those of its base model, which PEFT's wrappers renamed; else None."""
    keys = [tensor.key for file in checkpoint.files for tensor in file.header.tensors]
    base = next((key for key in keys if _BASE in key), None)
    adapter = next((key for part in _ADAPTERS for key in keys if part in key), None)
    if base is None or adapter is None:
        return None
    return (
        f"the weights are those of a PEFT model that was saved whole, its adapter not merged ({base}, {adapter}); "
        "where it was saved, merge it and save that: model.merge_and_unload().save_pretrained(DIR); or save the "
        "adapter alone: model.save_pretrained(DIR)"
    )


def config_above(directory: Path) -> Path | None:
    """A config.json in the directory above: a Trainer's, whose weights are in a directory of their own (FSDP)."""
    path = directory.absolute().parent / "config.json"
    return path if directory.is_dir() and path.is_file() else None
