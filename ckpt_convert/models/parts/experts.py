"""Rows that mixtures of experts share (router, experts, dense layers), and which layers have experts.

hf: one key for each expert's matrix, as transformers 5.23 saves qwen2_moe and similar models; in memory, the experts of
a layer are stacked in two tensors. torchtitan: GroupedExperts of torchtitan 0.3.0, which stacks them in three.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.builders import linear
from ckpt_convert.models.core.config import CONFIG, optional_int, require_int
from ckpt_convert.models.core.picking import named
from ckpt_convert.models.core.table import Key, Row
from ckpt_convert.models.parts.decoder import FFN

NORM = named(FFN, "ffn_norm")

DENSE_FFN = tuple(row.replace(layer_set="dense", native=None) for row in named(FFN, "ffn.gate", "ffn.down", "ffn.up"))
"""The feed-forward network of the layers without experts."""

ROUTER = (
    *linear(
        "moe.router",
        ("n_experts", "dim"),
        layer_set="moe",
        hf="model.layers.{layer}.mlp.gate",
        torchtitan="layers.{layer}.moe.router.gate",
    ),
)

EXPERTS = (
    Row(
        "moe.experts.gate",
        ("expert_dim", "dim"),
        layer_set="moe",
        hf=Key("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"),
        torchtitan=Key("layers.{layer}.moe.routed_experts.inner_experts.w1_EFD"),
        in_memory=Key("model.layers.{layer}.mlp.experts.gate_up_proj", fused=0),
    ),
    Row(
        "moe.experts.up",
        ("expert_dim", "dim"),
        layer_set="moe",
        hf=Key("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"),
        torchtitan=Key("layers.{layer}.moe.routed_experts.inner_experts.w3_EFD"),
        in_memory=Key("model.layers.{layer}.mlp.experts.gate_up_proj", fused=0),
    ),
    Row(
        "moe.experts.down",
        ("dim", "expert_dim"),
        layer_set="moe",
        hf=Key("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"),
        torchtitan=Key("layers.{layer}.moe.routed_experts.inner_experts.w2_EDF"),
        in_memory=Key("model.layers.{layer}.mlp.experts.down_proj"),
    ),
)

LOAD_BALANCE = (
    Row(
        "moe.balance",
        ("n_experts",),
        layer_set="moe",
        zeros="F32",
        torchtitan=Key("layers.{layer}.moe.expert_bias_E"),
    ),
)
"""torchtitan's load-balancing bias, for families that have none: a persistent buffer of float32 zeros (torchtitan
0.3.0, models/common/moe.py), without which its loader refuses a checkpoint."""

INDICES = {"layer": "n_layers", "expert": "n_experts"}


def by_step(config: Mapping[str, Any], n_experts: int) -> dict[str, list[int]]:
    """The layers with and without experts, by the config keys of qwen2_moe and qwen3_moe.

    Every decoder_sparse_step-th layer has experts (the default is 1: all of them), but not those in mlp_only_layers.
    """
    step = optional_int(config, "decoder_sparse_step", CONFIG, 1)
    dense = _layers(config, "mlp_only_layers")
    layers = range(require_int(config, "num_hidden_layers", CONFIG))
    return split(layers, [at for at in layers if n_experts and at not in dense and (at + 1) % step == 0])


def split(layers: range, moe: list[int]) -> dict[str, list[int]]:
    """The two sets that the tables name: the layers with experts, and the others."""
    return {"moe": moe, "dense": sorted(set(layers) - set(moe))}


def _layers(config: Mapping[str, Any], key: str) -> frozenset[int]:
    """The layer indices under ``key``; none if it is absent or null."""
    found = config.get(key)
    if found is None:
        return frozenset()
    if not isinstance(found, list) or any(isinstance(at, bool) or not isinstance(at, int) for at in found):
        raise ConfigError(f"{CONFIG}: {key} must be a list of layer indices, found {found!r:.80}; correct {CONFIG}")
    return frozenset(found)
