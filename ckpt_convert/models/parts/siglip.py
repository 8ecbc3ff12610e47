"""SigLIP's vision tower, which other models contain: a patch embedding, layers with biases, an optional head.

hf: what transformers 5.23 saves. Nothing in it rotates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_convert.models.core.builders import layer_norm, linear
from ckpt_convert.models.core.config import optional_bool, optional_int
from ckpt_convert.models.core.table import Key, Row

_LAYER = "encoder.layers.{vision_layer}"


def rows(tower: str) -> tuple[Row, ...]:
    """The rows of a tower whose keys start with ``tower``; the placeholder {vision_layer} counts to n_vision_layers."""
    return tuple(_rows(tower))


def _rows(tower: str) -> Iterator[Row]:
    patch = ("vision_dim", "vision_channels", "vision_patch", "vision_patch")
    yield Row("vision.patch", patch, hf=Key(f"{tower}.embeddings.patch_embedding.weight"))
    yield Row("vision.patch.bias", ("vision_dim",), hf=Key(f"{tower}.embeddings.patch_embedding.bias"))
    square = ("vision_dim", "vision_dim")
    positions = ("vision_side*vision_side", "vision_dim")
    yield Row("vision.positions", positions, hf=Key(f"{tower}.embeddings.position_embedding.weight"))
    yield from layer_norm("vision.attention_norm", "vision_dim", hf=f"{tower}.{_LAYER}.layer_norm1")
    yield from linear("vision.attention.q", square, bias=True, hf=f"{tower}.{_LAYER}.self_attn.q_proj")
    yield from linear("vision.attention.k", square, bias=True, hf=f"{tower}.{_LAYER}.self_attn.k_proj")
    yield from linear("vision.attention.v", square, bias=True, hf=f"{tower}.{_LAYER}.self_attn.v_proj")
    yield from linear("vision.attention.o", square, bias=True, hf=f"{tower}.{_LAYER}.self_attn.out_proj")
    yield from layer_norm("vision.ffn_norm", "vision_dim", hf=f"{tower}.{_LAYER}.layer_norm2")
    yield from linear("vision.ffn.up", ("vision_ffn_dim", "vision_dim"), bias=True, hf=f"{tower}.{_LAYER}.mlp.fc1")
    yield from linear("vision.ffn.down", ("vision_dim", "vision_ffn_dim"), bias=True, hf=f"{tower}.{_LAYER}.mlp.fc2")
    yield from layer_norm("vision.norm", "vision_dim", hf=f"{tower}.post_layernorm")
    head = f"{tower}.head"
    yield Row("vision.head.probe", ("1", "1", "vision_dim"), enabled_by="vision_head", hf=Key(f"{head}.probe"))
    qkv = "3*vision_dim"
    yield Row(
        "vision.head.qkv", (qkv, "vision_dim"), enabled_by="vision_head", hf=Key(f"{head}.attention.in_proj_weight")
    )
    yield Row("vision.head.qkv.bias", (qkv,), enabled_by="vision_head", hf=Key(f"{head}.attention.in_proj_bias"))
    yield from linear("vision.head.o", square, bias=True, hf=f"{head}.attention.out_proj", enabled_by="vision_head")
    yield from layer_norm("vision.head.norm", "vision_dim", hf=f"{head}.layernorm", enabled_by="vision_head")
    yield from linear(
        "vision.head.up", ("vision_ffn_dim", "vision_dim"), bias=True, hf=f"{head}.mlp.fc1", enabled_by="vision_head"
    )
    yield from linear(
        "vision.head.down", ("vision_dim", "vision_ffn_dim"), bias=True, hf=f"{head}.mlp.fc2", enabled_by="vision_head"
    )


def dims(config: Mapping[str, Any], where: str) -> dict[str, int]:
    """The tower's dimensions from its own config (``where`` in messages); defaults are SiglipVisionConfig's."""
    patch = optional_int(config, "patch_size", where, 16)
    return {
        "vision_dim": optional_int(config, "hidden_size", where, 768),
        "vision_ffn_dim": optional_int(config, "intermediate_size", where, 3072),
        "n_vision_layers": optional_int(config, "num_hidden_layers", where, 12),
        "vision_channels": optional_int(config, "num_channels", where, 3),
        "vision_patch": patch,
        "vision_side": optional_int(config, "image_size", where, 224) // patch,
        "vision_head": int(optional_bool(config, "vision_use_head", where, True)),
    }
