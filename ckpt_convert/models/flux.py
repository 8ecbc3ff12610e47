"""Flux's transformer.

hf: FluxTransformer2DModel of diffusers 0.42.1 (the ``transformer`` folder); torchtitan: the state-dict adapter for Flux
of torchtitan 0.3.0, which fuses q, k and v, in the single blocks also with the first MLP layer. Both have the
interleaved RoPE layout. The last norm's shift and scale are one tensor, scale first in diffusers, shift first in
torchtitan, which follows the published code of Flux. torchtitan cannot store the guidance embedding of FLUX.1-dev,
which is passed through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.builders import linear, rms_norm
from ckpt_convert.models.core.config import CONFIG, optional_bool, optional_int
from ckpt_convert.models.core.table import Family, Key, Row


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes in diffusers' config.json; defaults are those of FluxTransformer2DModel."""
    n_heads = optional_int(config, "num_attention_heads", CONFIG, 24)
    head_dim = optional_int(config, "attention_head_dim", CONFIG, 128)
    channels = optional_int(config, "in_channels", CONFIG, 64)
    return {
        "dim": n_heads * head_dim,
        "n_heads": n_heads,
        "head_dim": head_dim,
        "ffn_dim": 4 * n_heads * head_dim,
        "n_layers": optional_int(config, "num_layers", CONFIG, 19),
        "n_single_layers": optional_int(config, "num_single_layers", CONFIG, 38),
        "channels": channels,
        "out_channels": optional_int(config, "out_channels", CONFIG, channels),
        "patch_size": optional_int(config, "patch_size", CONFIG, 1),
        "text_dim": optional_int(config, "joint_attention_dim", CONFIG, 4096),
        "pooled_dim": optional_int(config, "pooled_projection_dim", CONFIG, 768),
        "guidance": int(optional_bool(config, "guidance_embeds", CONFIG, False)),
        "tied": 0,
    }


def _embedder(name: str, size: str, hf: str, torchtitan: str | None, **settings: Any) -> tuple[Row, ...]:
    """A two-layer MLP that embeds a vector in the model's width."""
    first, second = (f"{torchtitan}.in_layer", f"{torchtitan}.out_layer") if torchtitan else (None, None)
    return (
        *linear(
            f"{name}.in", ("dim", size), bias=True, hf=f"time_text_embed.{hf}.linear_1", torchtitan=first, **settings
        ),
        *linear(
            f"{name}.out", ("dim", "dim"), bias=True, hf=f"time_text_embed.{hf}.linear_2", torchtitan=second, **settings
        ),
    )


def _stream(name: str, torchtitan: str, hf: Mapping[str, str]) -> tuple[Row, ...]:
    """One of the two streams of a double block, whose tokens attend to both."""
    here, there = "transformer_blocks.{layer}", f"double_blocks.{{layer}}.{torchtitan}"
    square, qkv = ("dim", "dim"), Key(f"{there}_attn.qkv", fused=0)
    return (
        *linear(
            f"{name}.modulation",
            ("6*dim", "dim"),
            bias=True,
            hf=f"{here}.{hf['norm']}.linear",
            torchtitan=f"{there}_mod.lin",
        ),
        *linear(f"{name}.attention.q", square, bias=True, hf=f"{here}.attn.{hf['q']}", torchtitan=qkv),
        *linear(f"{name}.attention.k", square, bias=True, hf=f"{here}.attn.{hf['k']}", torchtitan=qkv),
        *linear(f"{name}.attention.v", square, bias=True, hf=f"{here}.attn.{hf['v']}", torchtitan=qkv),
        *rms_norm(
            f"{name}.attention.q_norm",
            "head_dim",
            hf=f"{here}.attn.{hf['q_norm']}",
            torchtitan=f"{there}_attn.norm.query_norm",
        ),
        *rms_norm(
            f"{name}.attention.k_norm",
            "head_dim",
            hf=f"{here}.attn.{hf['k_norm']}",
            torchtitan=f"{there}_attn.norm.key_norm",
        ),
        *linear(f"{name}.attention.o", square, bias=True, hf=f"{here}.attn.{hf['o']}", torchtitan=f"{there}_attn.proj"),
        *linear(
            f"{name}.ffn.up",
            ("ffn_dim", "dim"),
            bias=True,
            hf=f"{here}.{hf['ffn']}.net.0.proj",
            torchtitan=f"{there}_mlp.0",
        ),
        *linear(
            f"{name}.ffn.down",
            ("dim", "ffn_dim"),
            bias=True,
            hf=f"{here}.{hf['ffn']}.net.2",
            torchtitan=f"{there}_mlp.2",
        ),
    )


_IMAGE = {
    "norm": "norm1", "q": "to_q", "k": "to_k", "v": "to_v", "q_norm": "norm_q", "k_norm": "norm_k", "o": "to_out.0",
    "ffn": "ff",
}  # fmt: skip
_TEXT = {
    "norm": "norm1_context", "q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj", "q_norm": "norm_added_q",
    "k_norm": "norm_added_k", "o": "to_add_out", "ffn": "ff_context",
}  # fmt: skip
_HF, _TITAN = "single_transformer_blocks.{single}", "single_blocks.{single}"
_LINEAR = Key(f"{_TITAN}.linear1", fused=0)


def _last(name: str, place: int) -> tuple[Row, ...]:
    """Half of the last norm's modulation, with its position in diffusers' tensor."""
    hf, torchtitan = (
        Key("norm_out.linear", fused=0, fused_position=place),
        Key("final_layer.adaLN_modulation.1", fused=0),
    )
    return linear(name, ("dim", "dim"), bias=True, hf=hf, torchtitan=torchtitan)


FLUX = Family(
    name="flux",
    title="FLUX.1's transformer (diffusers)",
    model_types=("FluxTransformer2DModel",),
    stem="diffusion_pytorch_model",
    dims=dims,
    indices={"layer": "n_layers", "single": "n_single_layers"},
    rows=(
        *linear("image_in", ("dim", "channels"), bias=True, hf="x_embedder", torchtitan="img_in"),
        *linear("text_in", ("dim", "text_dim"), bias=True, hf="context_embedder", torchtitan="txt_in"),
        *_embedder("time", "256", "timestep_embedder", "time_in"),
        *_embedder("pooled_text", "pooled_dim", "text_embedder", "vector_in"),
        *_embedder("guidance", "256", "guidance_embedder", None, enabled_by="guidance", zeros="BF16"),
        *_stream("image", "img", _IMAGE),
        *_stream("text", "txt", _TEXT),
        *linear(
            "single.modulation",
            ("3*dim", "dim"),
            bias=True,
            hf=f"{_HF}.norm.linear",
            torchtitan=f"{_TITAN}.modulation.lin",
        ),
        *linear("single.attention.q", ("dim", "dim"), bias=True, hf=f"{_HF}.attn.to_q", torchtitan=_LINEAR),
        *linear("single.attention.k", ("dim", "dim"), bias=True, hf=f"{_HF}.attn.to_k", torchtitan=_LINEAR),
        *linear("single.attention.v", ("dim", "dim"), bias=True, hf=f"{_HF}.attn.to_v", torchtitan=_LINEAR),
        *linear("single.ffn.up", ("ffn_dim", "dim"), bias=True, hf=f"{_HF}.proj_mlp", torchtitan=_LINEAR),
        *rms_norm(
            "single.attention.q_norm", "head_dim", hf=f"{_HF}.attn.norm_q", torchtitan=f"{_TITAN}.norm.query_norm"
        ),
        *rms_norm("single.attention.k_norm", "head_dim", hf=f"{_HF}.attn.norm_k", torchtitan=f"{_TITAN}.norm.key_norm"),
        *linear("single.out", ("dim", "5*dim"), bias=True, hf=f"{_HF}.proj_out", torchtitan=f"{_TITAN}.linear2"),
        *_last("norm_out.shift", 1),
        *_last("norm_out.scale", 0),
        *linear(
            "output",
            ("patch_size*patch_size*out_channels", "dim"),
            bias=True,
            hf="proj_out",
            torchtitan="final_layer.linear",
        ),
    ),
)
