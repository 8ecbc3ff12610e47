"""SigLIP's vision tower, a part of other models: a patch embedding, layers with biases everywhere, an optional head.

hf: what transformers saves. Nothing in it rotates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_convert.models.core.config import optional_bool, optional_int
from ckpt_convert.models.core.table import Key, Row

_LAYER = "encoder.layers.{vision_layer}"


def rows(tower: str) -> tuple[Row, ...]:
    """The rows of a tower whose keys begin with ``tower``; the placeholder {vision_layer} counts to n_vision_layers."""
    return tuple(_rows(tower))


def _rows(tower: str) -> Iterator[Row]:
    patch = ("vision_dim", "vision_channels", "vision_patch", "vision_patch")
    yield Row("vision.patch", patch, hf=Key(f"{tower}.embeddings.patch_embedding.weight"))
    yield Row("vision.patch.bias", ("vision_dim",), hf=Key(f"{tower}.embeddings.patch_embedding.bias"))
    positions = ("vision_side*vision_side", "vision_dim")
    yield Row("vision.positions", positions, hf=Key(f"{tower}.embeddings.position_embedding.weight"))
    yield from _norm("vision.attention_norm", f"{tower}.{_LAYER}.layer_norm1")
    yield from _linear("vision.attention.q", "vision_dim", "vision_dim", f"{tower}.{_LAYER}.self_attn.q_proj")
    yield from _linear("vision.attention.k", "vision_dim", "vision_dim", f"{tower}.{_LAYER}.self_attn.k_proj")
    yield from _linear("vision.attention.v", "vision_dim", "vision_dim", f"{tower}.{_LAYER}.self_attn.v_proj")
    yield from _linear("vision.attention.o", "vision_dim", "vision_dim", f"{tower}.{_LAYER}.self_attn.out_proj")
    yield from _norm("vision.ffn_norm", f"{tower}.{_LAYER}.layer_norm2")
    yield from _linear("vision.ffn.up", "vision_ffn_dim", "vision_dim", f"{tower}.{_LAYER}.mlp.fc1")
    yield from _linear("vision.ffn.down", "vision_dim", "vision_ffn_dim", f"{tower}.{_LAYER}.mlp.fc2")
    yield from _norm("vision.norm", f"{tower}.post_layernorm")
    head = f"{tower}.head"
    yield Row("vision.head.probe", ("1", "1", "vision_dim"), when="vision_head", hf=Key(f"{head}.probe"))
    qkv = "3*vision_dim"
    yield Row("vision.head.qkv", (qkv, "vision_dim"), when="vision_head", hf=Key(f"{head}.attention.in_proj_weight"))
    yield Row("vision.head.qkv.bias", (qkv,), when="vision_head", hf=Key(f"{head}.attention.in_proj_bias"))
    yield from _linear("vision.head.o", "vision_dim", "vision_dim", f"{head}.attention.out_proj", "vision_head")
    yield from _norm("vision.head.norm", f"{head}.layernorm", "vision_head")
    yield from _linear("vision.head.up", "vision_ffn_dim", "vision_dim", f"{head}.mlp.fc1", "vision_head")
    yield from _linear("vision.head.down", "vision_dim", "vision_ffn_dim", f"{head}.mlp.fc2", "vision_head")


def dims(config: Mapping[str, Any], where: str) -> dict[str, int]:
    """The tower's symbols, of its own config (``where`` in messages); what is absent is as in SiglipVisionConfig."""
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


def _linear(name: str, rows: str, columns: str, key: str, when: str | None = None) -> Iterator[Row]:
    yield Row(name, (rows, columns), when=when, hf=Key(f"{key}.weight"))
    yield Row(f"{name}.bias", (rows,), when=when, hf=Key(f"{key}.bias"))


def _norm(name: str, key: str, when: str | None = None) -> Iterator[Row]:
    yield Row(name, ("vision_dim",), when=when, hf=Key(f"{key}.weight"))
    yield Row(f"{name}.bias", ("vision_dim",), when=when, hf=Key(f"{key}.bias"))
