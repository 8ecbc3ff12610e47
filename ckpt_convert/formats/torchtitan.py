"""torchtitan's checkpoints: a directory of torch.distributed.checkpoint with the model's keys at the top, no config.

A training checkpoint also holds other state, which is skipped; the names of its entries are those of torchtitan 0.3.0
(torchtitan/components/checkpoint.py). Keys are written as in 0.3.0; those of 0.2, whose modules and dimensions had
other names but the same order and shapes, can be read, too.
"""

from __future__ import annotations

from ckpt_convert.formats.base import (
    Format,
    WeightDirectory,
    WeightName,
    dcp_directory,
    plain_weights,
)
from ckpt_convert.formats.names import SUFFIXES, common_file_names, numbered_names
from ckpt_convert.storage.place import Place


def find(directory: Place) -> WeightDirectory | None:
    """A directory of torch.distributed.checkpoint, else every plain torch file."""
    found = dcp_directory(directory)
    if found is not None:
        return found
    names = plain_weights(directory, (".pt",))
    return WeightDirectory(tuple(WeightName(name) for name in names)) if names else None


def file_names(count: int, container: str) -> list[str]:
    return common_file_names(count, container) or numbered_names(count, "model", SUFFIXES[container])


FORMAT = Format(
    "torchtitan",
    find,
    file_names,
    ("dcp", "pt"),
    None,
    lambda name: name != "config.json",
    ignored_prefixes=("optimizer.", "lr_scheduler.", "dataloader.", "train_state."),
    renamed_key_parts=(
        ("attention.w", "attention.qkv_linear.w"),
        ("output.weight", "lm_head.weight"),
        ("moe.experts.w1", "moe.routed_experts.inner_experts.w1_EFD"),
        ("moe.experts.w2", "moe.routed_experts.inner_experts.w2_EDF"),
        ("moe.experts.w3", "moe.routed_experts.inner_experts.w3_EFD"),
        ("moe.experts.mlp1_weight", "moe.routed_experts.inner_experts.mlp1_weight_EGD"),
        ("moe.experts.mlp1_bias", "moe.routed_experts.inner_experts.mlp1_bias_EG"),
        ("moe.experts.mlp2_weight", "moe.routed_experts.inner_experts.mlp2_weight_EDF"),
        ("moe.experts.mlp2_bias", "moe.routed_experts.inner_experts.mlp2_bias_ED"),
        ("moe.expert_bias", "moe.expert_bias_E"),
    ),
)
