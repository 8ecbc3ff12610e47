"""Llama 4: experts in every layer or every second one, and (except in "llama4_text") a vision model.

The RoPE layout is interleaved in all columns, so no rows are reordered. The logical rows are matrices [out, in] as
everywhere, one for each expert; Hugging Face and native store experts as [in, out], stacked.

hf: what transformers 5.23 saves. meta: the model in llama-models 0.3.0 (``llama4``), whose released files have the
names that its load hooks expect: QKV is fused per rank, and so are gate and up of a dense layer. native: the converter
of torchtune's development head (commit bd2a0fc; no release has Llama 4), which has no text model alone.
"""

from __future__ import annotations

from ckpt_convert.models.core.builders import layer_norm, linear, rms_norm
from ckpt_convert.models.core.params import Params
from ckpt_convert.models.core.picking import prefixed
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.llama4 import config, params, releases

_QKV = Key("layers.{layer}.attention.wqkv.weight", tp_dim=0, fused=0)
_ROTATED = _QKV.replace(rope="interleaved")
_GATE_UP = Key("layers.{layer}.feed_forward.mlp.fc1_weight", tp_dim=0, fused=0)
_EXPERTS = "language_model.model.layers.{layer}.feed_forward.experts"

TEXT = (
    Row(
        "tok_embeddings",
        ("vocab_size", "dim"),
        hf=Key("language_model.model.embed_tokens.weight"),
        meta=Key("tok_embeddings.weight", tp_dim=0),
        native=Key("decoder.tok_embeddings.weight"),
    ),
    Row(
        "attention_norm",
        ("dim",),
        hf=Key("language_model.model.layers.{layer}.input_layernorm.weight"),
        meta=Key("layers.{layer}.attention.wqkv.layer_norm_weight"),
        native=Key("decoder.layers.{layer}.sa_norm.scale"),
    ),
    Row(
        "attention.q",
        ("n_heads*head_dim", "dim"),
        heads="n_heads",
        hf=Key("language_model.model.layers.{layer}.self_attn.q_proj.weight", rope="interleaved"),
        meta=_ROTATED,
        native=Key("decoder.layers.{layer}.attn.q_proj.weight", rope="interleaved"),
    ),
    Row(
        "attention.k",
        ("n_kv_heads*head_dim", "dim"),
        heads="n_kv_heads",
        hf=Key("language_model.model.layers.{layer}.self_attn.k_proj.weight", rope="interleaved"),
        meta=_ROTATED,
        native=Key("decoder.layers.{layer}.attn.k_proj.weight", rope="interleaved"),
    ),
    Row(
        "attention.v",
        ("n_kv_heads*head_dim", "dim"),
        hf=Key("language_model.model.layers.{layer}.self_attn.v_proj.weight"),
        meta=_QKV,
        native=Key("decoder.layers.{layer}.attn.v_proj.weight"),
    ),
    *linear(
        "attention.o",
        ("dim", "n_heads*head_dim"),
        hf="language_model.model.layers.{layer}.self_attn.o_proj",
        meta=Key("layers.{layer}.attention.wo", tp_dim=1),
        native="decoder.layers.{layer}.attn.output_proj",
    ),
    # Biases exist only in Hugging Face's layout, if the config says so; no release has them.
    Row(
        "attention.q.bias",
        ("n_heads*head_dim",),
        heads="n_heads",
        enabled_by="attention_bias",
        hf=Key("language_model.model.layers.{layer}.self_attn.q_proj.bias", rope="interleaved"),
    ),
    Row(
        "attention.k.bias",
        ("n_kv_heads*head_dim",),
        heads="n_kv_heads",
        enabled_by="attention_bias",
        hf=Key("language_model.model.layers.{layer}.self_attn.k_proj.bias", rope="interleaved"),
    ),
    Row(
        "attention.v.bias",
        ("n_kv_heads*head_dim",),
        enabled_by="attention_bias",
        hf=Key("language_model.model.layers.{layer}.self_attn.v_proj.bias"),
    ),
    Row(
        "attention.o.bias",
        ("dim",),
        enabled_by="attention_bias",
        hf=Key("language_model.model.layers.{layer}.self_attn.o_proj.bias"),
    ),
    Row(
        "ffn_norm",
        ("dim",),
        layer_set="dense",
        hf=Key("language_model.model.layers.{layer}.post_attention_layernorm.weight"),
        meta=Key("layers.{layer}.feed_forward.mlp.layer_norm_weight"),
        native=Key("decoder.layers.{layer}.mlp_norm.scale"),
    ),
    Row(
        "ffn.gate",
        ("dense_dim", "dim"),
        layer_set="dense",
        hf=Key("language_model.model.layers.{layer}.feed_forward.gate_proj.weight"),
        meta=_GATE_UP,
        native=Key("decoder.layers.{layer}.mlp.w1.weight"),
    ),
    Row(
        "ffn.up",
        ("dense_dim", "dim"),
        layer_set="dense",
        hf=Key("language_model.model.layers.{layer}.feed_forward.up_proj.weight"),
        meta=_GATE_UP,
        native=Key("decoder.layers.{layer}.mlp.w3.weight"),
    ),
    Row(
        "ffn.down",
        ("dim", "dense_dim"),
        layer_set="dense",
        hf=Key("language_model.model.layers.{layer}.feed_forward.down_proj.weight"),
        meta=Key("layers.{layer}.feed_forward.mlp.fc2_weight", tp_dim=1),
        native=Key("decoder.layers.{layer}.mlp.w2.weight"),
    ),
    *rms_norm(
        "moe.norm",
        layer_set="moe",
        hf="language_model.model.layers.{layer}.post_attention_layernorm",
        meta="layers.{layer}.feed_forward.norm",
        native="decoder.layers.{layer}.mlp_norm",
    ),
    Row(
        "moe.router",
        ("n_experts", "dim"),
        layer_set="moe",
        hf=Key("language_model.model.layers.{layer}.feed_forward.router.weight"),
        meta=Key("layers.{layer}.feed_forward.router_DE", transposed=True),
        native=Key("decoder.layers.{layer}.mlp.router.gate.weight"),
    ),
    Row(
        "experts.gate",
        ("ffn_dim", "dim"),
        layer_set="moe",
        stacked_over="expert",
        hf=Key(f"{_EXPERTS}.gate_up_proj", transposed=True, fused=1),
        meta=Key("layers.{layer}.feed_forward.experts.moe_w_in_eD_F", transposed=True, flatten_stacked=True, tp_dim=1),
        native=Key("decoder.layers.{layer}.mlp.experts.gate_proj", transposed=True),
    ),
    Row(
        "experts.up",
        ("ffn_dim", "dim"),
        layer_set="moe",
        stacked_over="expert",
        hf=Key(f"{_EXPERTS}.gate_up_proj", transposed=True, fused=1),
        meta=Key(
            "layers.{layer}.feed_forward.experts.moe_w_swiglu_eD_F", transposed=True, flatten_stacked=True, tp_dim=1
        ),
        native=Key("decoder.layers.{layer}.mlp.experts.up_proj", transposed=True),
    ),
    Row(
        "experts.down",
        ("dim", "ffn_dim"),
        layer_set="moe",
        stacked_over="expert",
        hf=Key(f"{_EXPERTS}.down_proj", transposed=True),
        meta=Key("layers.{layer}.feed_forward.experts.moe_w_out_eF_D", transposed=True, flatten_stacked=True, tp_dim=0),
        native=Key("decoder.layers.{layer}.mlp.experts.down_proj", transposed=True),
    ),
    *linear(
        "shared.gate",
        ("ffn_dim", "dim"),
        layer_set="moe",
        hf="language_model.model.layers.{layer}.feed_forward.shared_expert.gate_proj",
        meta=Key("layers.{layer}.feed_forward.w_in_shared_FD", tp_dim=0),
        native="decoder.layers.{layer}.mlp.shared_expert.w1",
    ),
    *linear(
        "shared.down",
        ("dim", "ffn_dim"),
        layer_set="moe",
        hf="language_model.model.layers.{layer}.feed_forward.shared_expert.down_proj",
        meta=Key("layers.{layer}.feed_forward.w_out_shared_DF", tp_dim=1),
        native="decoder.layers.{layer}.mlp.shared_expert.w2",
    ),
    *linear(
        "shared.up",
        ("ffn_dim", "dim"),
        layer_set="moe",
        hf="language_model.model.layers.{layer}.feed_forward.shared_expert.up_proj",
        meta=Key("layers.{layer}.feed_forward.w_swiglu_FD", tp_dim=0),
        native="decoder.layers.{layer}.mlp.shared_expert.w3",
    ),
    # Counters of Meta's training, which its inference code does not use.
    *(
        Row(
            f"moe.{name}",
            shape,
            layer_set="moe",
            optional=True,
            meta=Key(f"layers.{{layer}}.feed_forward.{key}"),
        )
        for name, key, shape in (
            ("gate_stats", "global_gate_stats_3E", ("3", "n_experts")),
            ("running_gate_stats", "running_gate_stats_3E", ("3", "n_experts")),
            ("activation", "expert_activation_DE", ("dim", "n_experts")),
        )
    ),
    *rms_norm("norm", hf="language_model.model.norm", meta="norm", native="decoder.norm"),
    *linear(
        "output",
        ("vocab_size", "dim"),
        hf="language_model.lm_head",
        meta=Key("output", tp_dim=0),
        native="decoder.output",
    ),
    Row("rotary.freqs", ("head_dim/2",), derived=True, meta=Key("rope.freqs")),
)


_IMAGE = ("vision_dim", "vision_dim")
_BLOCK = prefixed(
    (
        *layer_norm("vision.attention_norm", "vision_dim", hf="input_layernorm", meta="ln_1", native="sa_norm"),
        *linear(
            "vision.q", _IMAGE, bias=True, hf="self_attn.q_proj", meta=Key("attn.wq", tp_dim=0), native="attn.q_proj"
        ),
        *linear(
            "vision.k", _IMAGE, bias=True, hf="self_attn.k_proj", meta=Key("attn.wk", tp_dim=0), native="attn.k_proj"
        ),
        *linear(
            "vision.v", _IMAGE, bias=True, hf="self_attn.v_proj", meta=Key("attn.wv", tp_dim=0), native="attn.v_proj"
        ),
        *linear(
            "vision.o",
            _IMAGE,
            bias=True,
            hf="self_attn.o_proj",
            meta=Key("attn.wo", tp_dim=1),
            native="attn.output_proj",
        ),
        *layer_norm("vision.mlp_norm", "vision_dim", hf="post_attention_layernorm", meta="ln_2", native="mlp_norm"),
        *linear(
            "vision.mlp.in",
            ("vision_ffn", "vision_dim"),
            bias=True,
            hf="mlp.fc1",
            meta=Key("mlp.c_fc", tp_dim=0),
            native="mlp.w1",
        ),
        *linear(
            "vision.mlp.out",
            ("vision_dim", "vision_ffn"),
            bias=True,
            hf="mlp.fc2",
            meta=Key("mlp.c_proj", tp_dim=1),
            native="mlp.w2",
        ),
    ),
    hf="vision_model.model.layers.{block}.",
    meta="vision_embeddings.vision_encoder.transformer.resblocks.{block}.",
    native="encoders.vision.clip.layers.{block}.",
)
"""A layer of the vision model."""

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
            hf=Key("positional_embedding_vlm"),
            meta=Key("positional_embedding_vlm"),
            native=Key("token_pos_embedding.positional_embedding"),
        ),
        *layer_norm("vision.norm_before", "vision_dim", hf="layernorm_pre", meta="ln_pre", native="ln_pre"),
        *layer_norm("vision.norm_after", "vision_dim", hf="layernorm_post", meta="ln_post", native="ln_post"),
    ),
    hf="vision_model.",
    meta="vision_embeddings.vision_encoder.",
    native="encoders.vision.clip.",
)
"""The vision model's tensors outside its layers, which are replicated on every rank."""

VISION = (
    *linear(
        "vision.patches",
        ("vision_dim", "channels*patch*patch"),
        hf="vision_model.patch_embedding.linear",
        meta=Key("vision_embeddings.vision_encoder.conv1._linear", tp_dim=0),
        native=Key("encoders.vision.clip.conv", shape=("vision_dim", "channels", "patch", "patch")),
    ),
    *_AROUND,
    *_BLOCK,
    # The pixel shuffle adapter, and the projection to the text model's width.
    *linear(
        "vision.adapter.in",
        ("adapter_dim", "vision_ffn"),
        hf="vision_model.vision_adapter.mlp.fc1",
        meta=Key("vision_embeddings.vision_adapter.mlp.c_fc", tp_dim=0),
        native="encoders.vision.projection.output.0",
    ),
    *linear(
        "vision.adapter.out",
        ("adapter_dim", "adapter_dim"),
        hf="vision_model.vision_adapter.mlp.fc2",
        meta=Key("vision_embeddings.vision_adapter.mlp.c_proj", tp_dim=1),
        native="encoders.vision.projection.output.2",
    ),
    # An optional layer of Meta's code after the adapter, which no released config uses.
    *linear(
        "vision.adapter.fc",
        ("adapter_dim", "adapter_dim"),
        optional=True,
        meta=Key("vision_embeddings.vision_adapter.fc", tp_dim=0),
    ),
    *linear(
        "vision.projection",
        ("dim", "projected_dim"),
        hf="multi_modal_projector.linear_1",
        meta=Key("vision_projection", tp_dim=0),
        native="encoders.vision.projection.output.4",
    ),
)


def _alone(row: Row) -> Row:
    """A row of the text model with Hugging Face's key of text-only models; there is no native column."""
    return row.replace(native=None, hf=row.hf and row.hf.unprefixed("language_model."))


LLAMA4 = Family(
    name="llama4",
    title="Llama 4",
    model_types=("llama4",),
    dims=config.dims,
    sets=config.sets,
    indices={"layer": "n_layers", "expert": "n_experts", "block": "vision_layers"},
    params=Params(
        evidence=params.is_params,
        from_hf=params.hf_to_params,
        to_hf=params.params_to_hf,
        sharded=True,
        container="pth",
        options=frozenset({"rope_factor", "max_positions", "drop_rope_scaling"}),
        release=releases.release,
        model_parallel=releases.model_parallel,
    ),
    rows=(*TEXT, *VISION),
)

LLAMA4_TEXT = LLAMA4.replace(
    name="llama4_text",
    title="Llama 4 without its vision model",
    model_types=("llama4_text",),
    indices={"layer": "n_layers", "expert": "n_experts"},
    params=Params(
        evidence=params.is_text_params,
        from_hf=params.hf_to_params,
        to_hf=params.params_to_hf,
        sharded=True,
        container="pth",
        options=frozenset({"rope_factor", "max_positions", "drop_rope_scaling"}),
        release=releases.release,
        model_parallel=releases.model_parallel,
    ),
    rows=tuple(_alone(row) for row in TEXT),
)
