"""Llama 3.2 Vision (Hugging Face's "mllama"): a Llama with cross-attention layers to image features.

{layer} is Hugging Face's index, which counts self- and cross-attention layers together. Meta has a list of each; native
has a cross-attention layer under the index of the self-attention layer that follows it. Only the self-attention layers
of the text model have RoPE.

hf: what transformers 5.23 saves; meta: the model in llama-models 0.3.0 (``llama3/multimodal``), whose column-parallel
layers are split on axis 0 and row-parallel ones on axis 1; native: the converters of torchtune 0.6.1.
"""

from __future__ import annotations

from ckpt_convert.models.core.builders import layer_norm, linear, rms_norm
from ckpt_convert.models.core.params import Params
from ckpt_convert.models.core.picking import prefixed
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.llama.table import LLAMA
from ckpt_convert.models.mllama import config, params, releases


def _text(row: Row) -> Row:
    """Llama's row in the text model; rows with {layer} exist in self-attention layers only."""
    native = row.native and _numbered(row.native).prefixed("decoder.")
    return row.replace(
        hf=row.hf and row.hf.prefixed("language_model.").replace(omitted_if_tied=False),
        meta=row.meta and _numbered(row.meta).prefixed("text_model."),
        native=native and native.replace(omitted_if_tied=False),
        torchtitan=None,
        layer_set="self" if row.placeholders else None,
        tied_to=None,
    )


def _numbered(key: Key) -> Key:
    """The key of a layer by its index among the self-attention layers."""
    return key.renamed("{layer}", "{layer:self}") if key.placeholders else key


_Q, _KV = ("n_heads*head_dim", "dim"), ("n_kv_heads*head_dim", "dim")
_CROSS = prefixed(
    (
        *rms_norm("cross.attention_norm", hf="input_layernorm", meta="attention_norm", native="ca_norm"),
        *linear("cross.q", _Q, hf="cross_attn.q_proj", meta=Key("attention.wq", tp_dim=0), native="attn.q_proj"),
        *linear("cross.k", _KV, hf="cross_attn.k_proj", meta=Key("attention.wk", tp_dim=0), native="attn.k_proj"),
        *linear("cross.v", _KV, hf="cross_attn.v_proj", meta=Key("attention.wv", tp_dim=0), native="attn.v_proj"),
        *linear(
            "cross.o", _Q[::-1], hf="cross_attn.o_proj", meta=Key("attention.wo", tp_dim=1), native="attn.output_proj"
        ),
        *rms_norm("cross.q_norm", "head_dim", hf="cross_attn.q_norm", meta="attention.q_norm", native="attn.q_norm"),
        *rms_norm("cross.k_norm", "head_dim", hf="cross_attn.k_norm", meta="attention.k_norm", native="attn.k_norm"),
        Row(
            "cross.attention_gate",
            ("1",),
            hf=Key("cross_attn_attn_gate"),
            meta=Key("gate_attn"),
            native=Key("ca_scale.scale"),
        ),
        *rms_norm("cross.ffn_norm", hf="post_attention_layernorm", meta="ffn_norm", native="mlp_norm"),
        *linear(
            "cross.ffn.gate",
            ("ffn_dim", "dim"),
            hf="mlp.gate_proj",
            meta=Key("feed_forward.w1", tp_dim=0),
            native="mlp.w1",
        ),
        *linear(
            "cross.ffn.down",
            ("dim", "ffn_dim"),
            hf="mlp.down_proj",
            meta=Key("feed_forward.w2", tp_dim=1),
            native="mlp.w2",
        ),
        *linear(
            "cross.ffn.up", ("ffn_dim", "dim"), hf="mlp.up_proj", meta=Key("feed_forward.w3", tp_dim=0), native="mlp.w3"
        ),
        Row(
            "cross.ffn_gate",
            ("1",),
            hf=Key("cross_attn_mlp_gate"),
            meta=Key("gate_ffwd"),
            native=Key("mlp_scale.scale"),
        ),
    ),
    hf="language_model.model.layers.{layer}.",
    meta="text_model.cross_attention_layers.{layer:cross}.",
    native="decoder.layers.{layer:self}.fusion_layer.",
)
"""A cross-attention layer."""

_IMAGE = ("vision_dim", "vision_dim")
_BLOCK = (
    *layer_norm("attention_norm", "vision_dim", hf="input_layernorm", meta="ln_1", native="sa_norm"),
    *linear("q", _IMAGE, hf="self_attn.q_proj", meta=Key("attn.wq", tp_dim=0), native="attn.q_proj"),
    *linear("k", _IMAGE, hf="self_attn.k_proj", meta=Key("attn.wk", tp_dim=0), native="attn.k_proj"),
    *linear("v", _IMAGE, hf="self_attn.v_proj", meta=Key("attn.wv", tp_dim=0), native="attn.v_proj"),
    *linear("o", _IMAGE, hf="self_attn.o_proj", meta=Key("attn.wo", tp_dim=1), native="attn.output_proj"),
    *layer_norm("mlp_norm", "vision_dim", hf="post_attention_layernorm", meta="ln_2", native="mlp_norm"),
    *linear(
        "mlp.in", ("vision_ffn", "vision_dim"), bias=True, hf="mlp.fc1", meta=Key("mlp.c_fc", tp_dim=0), native="mlp.w1"
    ),
    *linear(
        "mlp.out",
        ("vision_dim", "vision_ffn"),
        bias=True,
        hf="mlp.fc2",
        meta=Key("mlp.c_proj", tp_dim=1),
        native="mlp.w2",
    ),
)
_GATES = (
    Row("attention_gate", ("1",), hf=Key("gate_attn"), meta=Key("gate_attn"), native=Key("sa_scale.scale")),
    Row("mlp_gate", ("1",), hf=Key("gate_ffn"), meta=Key("gate_ffn"), native=Key("mlp_scale.scale")),
)
_LOCAL = prefixed(
    (row.replace(name=f"vision.{row.name}") for row in _BLOCK),
    hf="vision_model.transformer.layers.{block}.",
    meta="vision_model.vision_encoder.transformer.resblocks.{block}.",
    native="encoder.clip.layers.{block}.",
)
"""The keys of the vision model's first (local) transformer, which attends within one tile."""

_GLOBAL = prefixed(
    (row.replace(name=f"vision.global.{row.name}") for row in (*_BLOCK, *_GATES)),
    hf="vision_model.global_transformer.layers.{global}.",
    meta="vision_model.vision_encoder.global_transformer.resblocks.{global}.",
    native="encoder.projection.layers.{global}.",
)
"""The keys of the second (global) transformer, which attends to all tiles."""


def _tiles(name: str, tokens: str, hf: str, meta: str, native: str) -> Row:
    """Position embeddings of the grid of tiles.

    Hugging Face has a row for each aspect ratio (the first is "none"), with its tiles' embeddings padded with zeros.
    """
    grid = ("tiles", "tiles", tokens, "vision_dim")
    return Row(
        f"vision.{name}",
        ("tiles*tiles", tokens, "vision_dim"),
        hf=Key(f"{hf}.weight", scatter_index="tiles", shape=("ratios", f"tiles*{tokens}*vision_dim")),
        meta=Key(meta, shape=grid),
        native=Key(native, shape=grid),
    )


def _gate(name: str, hf: str, meta: str, native: str) -> Row:
    """The gate of such an embedding."""
    return Row(f"vision.{name}.gate", ("1",), hf=Key(hf), meta=Key(meta), native=Key(native))


_AROUND = prefixed(
    (
        Row(
            "vision.class",
            ("vision_dim",),
            hf=Key("class_embedding"),
            meta=Key("class_embedding"),
            native=Key("cls_token_embedding.weight"),
        ),
        Row(
            "vision.positions",
            ("n_tokens", "vision_dim"),
            hf=Key("gated_positional_embedding.embedding"),
            meta=Key("positional_embedding"),
            native=Key("token_pos_embedding.local_token_positional_embedding"),
        ),
        _tiles(
            "tiles.positions",
            "n_tokens",
            "gated_positional_embedding.tile_embedding",
            "gated_positional_embedding",
            "token_pos_embedding.global_token_positional_embedding",
        ),
        _gate(
            "tiles.positions",
            "gated_positional_embedding.gate",
            "gated_positional_embedding_gate",
            "token_pos_embedding.gate",
        ),
        _tiles(
            "tiles.before",
            "1",
            "pre_tile_positional_embedding.embedding",
            "pre_tile_pos_embed.embedding",
            "pre_tile_pos_embed.embedding",
        ),
        _gate(
            "tiles.before",
            "pre_tile_positional_embedding.gate",
            "pre_tile_pos_embed.gate",
            "pre_tile_pos_embed.gate",
        ),
        _tiles(
            "tiles.after",
            "1",
            "post_tile_positional_embedding.embedding",
            "post_tile_pos_embed.embedding",
            "post_tile_pos_embed.embedding",
        ),
        _gate(
            "tiles.after",
            "post_tile_positional_embedding.gate",
            "post_tile_pos_embed.gate",
            "post_tile_pos_embed.gate",
        ),
        *layer_norm("vision.norm_before", "vision_dim", hf="layernorm_pre", meta="ln_pre", native="ln_pre"),
        *layer_norm("vision.norm_after", "vision_dim", hf="layernorm_post", meta="ln_post", native="ln_post"),
    ),
    hf="vision_model.",
    meta="vision_model.vision_encoder.",
    native="encoder.clip.",
)
"""The vision model's tensors outside its layers, which are replicated on every rank."""

_ROWS = tuple(_text(row) for row in LLAMA.rows if not row.name.endswith(".bias") and row.name != "rotary.layer_freqs")
_EMBEDDING, *_LAYERS, _NORM, _OUTPUT, _FREQS = _ROWS

MLLAMA = Family(
    name="mllama",
    title="Llama 3.2 Vision",
    model_types=("mllama",),
    dims=config.dims,
    sets=config.sets,
    indices={"layer": "n_layers", "block": "vision_layers", "global": "vision_global_layers"},
    tokens=config.tokens,
    params=Params(
        evidence=params.is_params,
        from_hf=params.hf_to_params,
        to_hf=params.params_to_hf,
        sharded=True,
        container="pth",
        options=frozenset({"rope_factor", "rope_theta", "max_positions", "drop_rope_scaling"}),
        release=releases.release,
        model_parallel=releases.model_parallel,
    ),
    rows=(
        # Hugging Face appends the embeddings of the additional special tokens.
        _EMBEDDING.replace(
            hf=Key("language_model.model.embed_tokens.weight", fused=0),
            meta=Key("text_model.tok_embeddings.weight", tp_dim=0),
        ),
        Row(
            "new_embeddings",
            ("new_tokens", "dim"),
            hf=Key("language_model.model.embed_tokens.weight", fused=0),
            meta=Key("text_model.learnable_embedding.weight", tp_dim=0),
            native=Key("decoder.tok_embeddings.fusion_embedding.weight"),
        ),
        *_LAYERS,
        *(row.replace(layer_set="cross") for row in _CROSS),
        _NORM,
        _OUTPUT,
        _FREQS,
        *linear(
            "vision.patches",
            ("vision_dim", "channels", "patch", "patch"),
            hf="vision_model.patch_embedding",
            meta=Key(
                "vision_model.vision_encoder.conv1._linear", shape=("vision_dim", "channels*patch*patch"), tp_dim=0
            ),
            native="encoder.clip.conv",
        ),
        *_AROUND,
        *_LOCAL,
        *_GLOBAL,
        *linear(
            "vision.projection",
            ("dim", "vision_out"),
            bias=True,
            hf="multi_modal_projector",
            meta=Key("vision_model.vision_projection", tp_dim=0),
            native="encoder.projection.output",
        ),
    ),
)
