"""Llama 3.2 Vision (Hugging Face's "mllama"): a Llama that looks at images through cross-attention layers.

{layer} is Hugging Face's number, which counts self- and cross-attention layers together. Meta has a list of each;
native has a cross-attention layer under the number of the self-attention layer that follows it. Queries and keys of the
self-attention layers are rotated, those of the others are not, nor is anything in the vision model.

hf: what transformers 5.23 saves; meta: the model in llama-models 0.3.0 (``llama3/multimodal``), whose column-parallel
layers are cut on axis 0 and row-parallel ones on axis 1; native: the converters of torchtune 0.6.1.
"""

from __future__ import annotations

from ckpt_convert.models.core.params import Params
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.llama.table import LLAMA
from ckpt_convert.models.mllama import config, params, releases


def _text(row: Row) -> Row:
    """Llama's row as the text model has it, those of the layers in self-attention layers only."""
    native = row.native and _numbered(row.native).prefixed("decoder.")
    return row.replace(
        hf=row.hf and row.hf.prefixed("language_model.").replace(omitted_if_tied=False),
        meta=row.meta and _numbered(row.meta).prefixed("text_model."),
        native=native and native.replace(omitted_if_tied=False),
        torchtitan=None,
        only="self" if row.placeholders else None,
        tied_to=None,
    )


def _numbered(key: Key) -> Key:
    """The key of a layer by its number among the self-attention layers."""
    return key.renamed("{layer}", "{layer:self}") if key.placeholders else key


def _cross(name: str, shape: tuple[str, ...], hf: str, meta: str, native: str, tp: int | None = None) -> Row:
    """A row of the cross-attention layers."""
    return Row(
        f"cross.{name}",
        shape,
        only="cross",
        hf=Key(f"language_model.model.layers.{{layer}}.{hf}"),
        meta=Key(f"text_model.cross_attention_layers.{{layer:cross}}.{meta}", tp=tp),
        native=Key(f"decoder.layers.{{layer:self}}.fusion_layer.{native}"),
    )


def _block(name: str, shape: tuple[str, ...], hf: str, meta: str, native: str, tp: int | None = None) -> Row:
    """A row of the vision model's transformer, whose layers look at one tile."""
    return Row(
        f"vision.{name}",
        shape,
        hf=Key(f"vision_model.transformer.layers.{{block}}.{hf}"),
        meta=Key(f"vision_model.vision_encoder.transformer.resblocks.{{block}}.{meta}", tp=tp),
        native=Key(f"encoder.clip.layers.{{block}}.{native}"),
    )


def _global(row: Row) -> Row:
    """The same row of the transformer behind it, whose layers look at all tiles."""
    return row.replace(
        name=f"vision.global.{row.name.removeprefix('vision.')}",
        hf=row.hf and row.hf.renamed(".transformer.layers.{block}", ".global_transformer.layers.{global}"),
        meta=row.meta and row.meta.renamed("transformer.resblocks.{block}", "global_transformer.resblocks.{global}"),
        native=row.native and row.native.renamed("encoder.clip.layers.{block}", "encoder.projection.layers.{global}"),
    )


def _vision(name: str, shape: tuple[str, ...], hf: str, meta: str, native: str) -> Row:
    """A row of the vision model outside of its layers, which every rank holds whole."""
    return Row(
        f"vision.{name}",
        shape,
        hf=Key(f"vision_model.{hf}"),
        meta=Key(f"vision_model.vision_encoder.{meta}"),
        native=Key(f"encoder.clip.{native}"),
    )


def _tiles(name: str, tokens: str, hf: str, meta: str, native: str) -> Row:
    """Embeddings of the places in the grid of tiles.

    Hugging Face has, for each aspect ratio (and first for none), a row of those of its tiles, zeros behind them.
    """
    grid = ("tiles", "tiles", tokens, "vision_dim")
    return Row(
        f"vision.{name}",
        ("tiles*tiles", tokens, "vision_dim"),
        hf=Key(f"vision_model.{hf}.weight", cells="tiles", shape=("ratios", f"tiles*{tokens}*vision_dim")),
        meta=Key(f"vision_model.vision_encoder.{meta}", shape=grid),
        native=Key(f"encoder.clip.{native}", shape=grid),
    )


_BLOCK = (
    _block("attention_norm", ("vision_dim",), "input_layernorm.weight", "ln_1.weight", "sa_norm.weight"),
    _block("attention_norm.bias", ("vision_dim",), "input_layernorm.bias", "ln_1.bias", "sa_norm.bias"),
    _block("q", ("vision_dim", "vision_dim"), "self_attn.q_proj.weight", "attn.wq.weight", "attn.q_proj.weight", 0),
    _block("k", ("vision_dim", "vision_dim"), "self_attn.k_proj.weight", "attn.wk.weight", "attn.k_proj.weight", 0),
    _block("v", ("vision_dim", "vision_dim"), "self_attn.v_proj.weight", "attn.wv.weight", "attn.v_proj.weight", 0),
    _block(
        "o", ("vision_dim", "vision_dim"), "self_attn.o_proj.weight", "attn.wo.weight", "attn.output_proj.weight", 1
    ),
    _block("mlp_norm", ("vision_dim",), "post_attention_layernorm.weight", "ln_2.weight", "mlp_norm.weight"),
    _block("mlp_norm.bias", ("vision_dim",), "post_attention_layernorm.bias", "ln_2.bias", "mlp_norm.bias"),
    _block("mlp.in", ("vision_ffn", "vision_dim"), "mlp.fc1.weight", "mlp.c_fc.weight", "mlp.w1.weight", 0),
    _block("mlp.in.bias", ("vision_ffn",), "mlp.fc1.bias", "mlp.c_fc.bias", "mlp.w1.bias", 0),
    _block("mlp.out", ("vision_dim", "vision_ffn"), "mlp.fc2.weight", "mlp.c_proj.weight", "mlp.w2.weight", 1),
    _block("mlp.out.bias", ("vision_dim",), "mlp.fc2.bias", "mlp.c_proj.bias", "mlp.w2.bias"),
)

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
        # Hugging Face has the tokens that the text model alone does not know behind the others.
        _EMBEDDING.replace(
            hf=Key("language_model.model.embed_tokens.weight", fused=0),
            meta=Key("text_model.tok_embeddings.weight", tp=0),
        ),
        Row(
            "new_embeddings",
            ("new_tokens", "dim"),
            hf=Key("language_model.model.embed_tokens.weight", fused=0),
            meta=Key("text_model.learnable_embedding.weight", tp=0),
            native=Key("decoder.tok_embeddings.fusion_embedding.weight"),
        ),
        *_LAYERS,
        _cross("attention_norm", ("dim",), "input_layernorm.weight", "attention_norm.weight", "ca_norm.scale"),
        _cross(
            "q", ("n_heads*head_dim", "dim"), "cross_attn.q_proj.weight", "attention.wq.weight", "attn.q_proj.weight", 0
        ),
        _cross(
            "k",
            ("n_kv_heads*head_dim", "dim"),
            "cross_attn.k_proj.weight",
            "attention.wk.weight",
            "attn.k_proj.weight",
            0,
        ),
        _cross(
            "v",
            ("n_kv_heads*head_dim", "dim"),
            "cross_attn.v_proj.weight",
            "attention.wv.weight",
            "attn.v_proj.weight",
            0,
        ),
        _cross(
            "o",
            ("dim", "n_heads*head_dim"),
            "cross_attn.o_proj.weight",
            "attention.wo.weight",
            "attn.output_proj.weight",
            1,
        ),
        _cross("q_norm", ("head_dim",), "cross_attn.q_norm.weight", "attention.q_norm.weight", "attn.q_norm.scale"),
        _cross("k_norm", ("head_dim",), "cross_attn.k_norm.weight", "attention.k_norm.weight", "attn.k_norm.scale"),
        _cross("attention_gate", ("1",), "cross_attn_attn_gate", "gate_attn", "ca_scale.scale"),
        _cross("ffn_norm", ("dim",), "post_attention_layernorm.weight", "ffn_norm.weight", "mlp_norm.scale"),
        _cross("ffn.gate", ("ffn_dim", "dim"), "mlp.gate_proj.weight", "feed_forward.w1.weight", "mlp.w1.weight", 0),
        _cross("ffn.down", ("dim", "ffn_dim"), "mlp.down_proj.weight", "feed_forward.w2.weight", "mlp.w2.weight", 1),
        _cross("ffn.up", ("ffn_dim", "dim"), "mlp.up_proj.weight", "feed_forward.w3.weight", "mlp.w3.weight", 0),
        _cross("ffn_gate", ("1",), "cross_attn_mlp_gate", "gate_ffwd", "mlp_scale.scale"),
        _NORM,
        _OUTPUT,
        _FREQS,
        Row(
            "vision.patches",
            ("vision_dim", "channels", "patch", "patch"),
            hf=Key("vision_model.patch_embedding.weight"),
            meta=Key(
                "vision_model.vision_encoder.conv1._linear.weight", shape=("vision_dim", "channels*patch*patch"), tp=0
            ),
            native=Key("encoder.clip.conv.weight"),
        ),
        _vision("class", ("vision_dim",), "class_embedding", "class_embedding", "cls_token_embedding.weight"),
        _vision(
            "positions",
            ("n_tokens", "vision_dim"),
            "gated_positional_embedding.embedding",
            "positional_embedding",
            "token_pos_embedding.local_token_positional_embedding",
        ),
        _tiles(
            "tiles.positions",
            "n_tokens",
            "gated_positional_embedding.tile_embedding",
            "gated_positional_embedding",
            "token_pos_embedding.global_token_positional_embedding",
        ),
        _vision(
            "tiles.positions.gate",
            ("1",),
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
        _vision(
            "tiles.before.gate",
            ("1",),
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
        _vision(
            "tiles.after.gate",
            ("1",),
            "post_tile_positional_embedding.gate",
            "post_tile_pos_embed.gate",
            "post_tile_pos_embed.gate",
        ),
        _vision("norm_before", ("vision_dim",), "layernorm_pre.weight", "ln_pre.weight", "ln_pre.weight"),
        _vision("norm_before.bias", ("vision_dim",), "layernorm_pre.bias", "ln_pre.bias", "ln_pre.bias"),
        _vision("norm_after", ("vision_dim",), "layernorm_post.weight", "ln_post.weight", "ln_post.weight"),
        _vision("norm_after.bias", ("vision_dim",), "layernorm_post.bias", "ln_post.bias", "ln_post.bias"),
        *_BLOCK,
        *(_global(row) for row in _BLOCK),
        _global(_block("attention_gate", ("1",), "gate_attn", "gate_attn", "sa_scale.scale")),
        _global(_block("mlp_gate", ("1",), "gate_ffn", "gate_ffn", "mlp_scale.scale")),
        Row(
            "vision.projection",
            ("dim", "vision_out"),
            hf=Key("multi_modal_projector.weight"),
            meta=Key("vision_model.vision_projection.weight", tp=0),
            native=Key("encoder.projection.output.weight"),
        ),
        Row(
            "vision.projection.bias",
            ("dim",),
            hf=Key("multi_modal_projector.bias"),
            meta=Key("vision_model.vision_projection.bias", tp=0),
            native=Key("encoder.projection.output.bias"),
        ),
    ),
)
