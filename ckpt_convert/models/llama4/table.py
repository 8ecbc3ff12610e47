"""Llama 4: layers with experts, or every second one, and (but for "llama4_text") a vision model in front.

All columns turn neighbouring rows of queries and keys, so none of them are put in another order. The logical rows are
matrices [out, in] as everywhere, one for each expert; Hugging Face and native store experts as [in, out], stacked.

hf: what transformers 5.23 saves. meta: the model in llama-models 0.3.0 (``llama4``), whose released files have the
names that its load hooks take: a layer's queries, keys and values of one rank are one tensor, and so are gate and up of
a dense layer. native: the converter of torchtune's development head (commit bd2a0fc; no release has Llama 4), which has
no text model alone.
"""

from __future__ import annotations

from ckpt_convert.models.core.params import Params
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.llama4 import config, params, releases

_QKV = Key("layers.{layer}.attention.wqkv.weight", tp=0, fused=0)
_ROTATED = _QKV.replace(rope="interleaved")
_GATE_UP = Key("layers.{layer}.feed_forward.mlp.fc1_weight", tp=0, fused=0)
_EXPERTS = "language_model.model.layers.{layer}.feed_forward.experts"

TEXT = (
    Row(
        "tok_embeddings",
        ("vocab_size", "dim"),
        hf=Key("language_model.model.embed_tokens.weight"),
        meta=Key("tok_embeddings.weight", tp=0),
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
    Row(
        "attention.o",
        ("dim", "n_heads*head_dim"),
        hf=Key("language_model.model.layers.{layer}.self_attn.o_proj.weight"),
        meta=Key("layers.{layer}.attention.wo.weight", tp=1),
        native=Key("decoder.layers.{layer}.attn.output_proj.weight"),
    ),
    # Biases exist only in Hugging Face's layout, where its config says so; no release has them.
    Row(
        "attention.q.bias",
        ("n_heads*head_dim",),
        heads="n_heads",
        when="attention_bias",
        hf=Key("language_model.model.layers.{layer}.self_attn.q_proj.bias", rope="interleaved"),
    ),
    Row(
        "attention.k.bias",
        ("n_kv_heads*head_dim",),
        heads="n_kv_heads",
        when="attention_bias",
        hf=Key("language_model.model.layers.{layer}.self_attn.k_proj.bias", rope="interleaved"),
    ),
    Row(
        "attention.v.bias",
        ("n_kv_heads*head_dim",),
        when="attention_bias",
        hf=Key("language_model.model.layers.{layer}.self_attn.v_proj.bias"),
    ),
    Row(
        "attention.o.bias",
        ("dim",),
        when="attention_bias",
        hf=Key("language_model.model.layers.{layer}.self_attn.o_proj.bias"),
    ),
    Row(
        "ffn_norm",
        ("dim",),
        only="dense",
        hf=Key("language_model.model.layers.{layer}.post_attention_layernorm.weight"),
        meta=Key("layers.{layer}.feed_forward.mlp.layer_norm_weight"),
        native=Key("decoder.layers.{layer}.mlp_norm.scale"),
    ),
    Row(
        "ffn.gate",
        ("dense_dim", "dim"),
        only="dense",
        hf=Key("language_model.model.layers.{layer}.feed_forward.gate_proj.weight"),
        meta=_GATE_UP,
        native=Key("decoder.layers.{layer}.mlp.w1.weight"),
    ),
    Row(
        "ffn.up",
        ("dense_dim", "dim"),
        only="dense",
        hf=Key("language_model.model.layers.{layer}.feed_forward.up_proj.weight"),
        meta=_GATE_UP,
        native=Key("decoder.layers.{layer}.mlp.w3.weight"),
    ),
    Row(
        "ffn.down",
        ("dim", "dense_dim"),
        only="dense",
        hf=Key("language_model.model.layers.{layer}.feed_forward.down_proj.weight"),
        meta=Key("layers.{layer}.feed_forward.mlp.fc2_weight", tp=1),
        native=Key("decoder.layers.{layer}.mlp.w2.weight"),
    ),
    Row(
        "moe.norm",
        ("dim",),
        only="moe",
        hf=Key("language_model.model.layers.{layer}.post_attention_layernorm.weight"),
        meta=Key("layers.{layer}.feed_forward.norm.weight"),
        native=Key("decoder.layers.{layer}.mlp_norm.scale"),
    ),
    Row(
        "moe.router",
        ("n_experts", "dim"),
        only="moe",
        hf=Key("language_model.model.layers.{layer}.feed_forward.router.weight"),
        meta=Key("layers.{layer}.feed_forward.router_DE", transposed=True),
        native=Key("decoder.layers.{layer}.mlp.router.gate.weight"),
    ),
    Row(
        "experts.gate",
        ("ffn_dim", "dim"),
        only="moe",
        each="expert",
        hf=Key(f"{_EXPERTS}.gate_up_proj", transposed=True, fused=1),
        meta=Key("layers.{layer}.feed_forward.experts.moe_w_in_eD_F", transposed=True, flat=True, tp=1),
        native=Key("decoder.layers.{layer}.mlp.experts.gate_proj", transposed=True),
    ),
    Row(
        "experts.up",
        ("ffn_dim", "dim"),
        only="moe",
        each="expert",
        hf=Key(f"{_EXPERTS}.gate_up_proj", transposed=True, fused=1),
        meta=Key("layers.{layer}.feed_forward.experts.moe_w_swiglu_eD_F", transposed=True, flat=True, tp=1),
        native=Key("decoder.layers.{layer}.mlp.experts.up_proj", transposed=True),
    ),
    Row(
        "experts.down",
        ("dim", "ffn_dim"),
        only="moe",
        each="expert",
        hf=Key(f"{_EXPERTS}.down_proj", transposed=True),
        meta=Key("layers.{layer}.feed_forward.experts.moe_w_out_eF_D", transposed=True, flat=True, tp=0),
        native=Key("decoder.layers.{layer}.mlp.experts.down_proj", transposed=True),
    ),
    Row(
        "shared.gate",
        ("ffn_dim", "dim"),
        only="moe",
        hf=Key("language_model.model.layers.{layer}.feed_forward.shared_expert.gate_proj.weight"),
        meta=Key("layers.{layer}.feed_forward.w_in_shared_FD.weight", tp=0),
        native=Key("decoder.layers.{layer}.mlp.shared_expert.w1.weight"),
    ),
    Row(
        "shared.down",
        ("dim", "ffn_dim"),
        only="moe",
        hf=Key("language_model.model.layers.{layer}.feed_forward.shared_expert.down_proj.weight"),
        meta=Key("layers.{layer}.feed_forward.w_out_shared_DF.weight", tp=1),
        native=Key("decoder.layers.{layer}.mlp.shared_expert.w2.weight"),
    ),
    Row(
        "shared.up",
        ("ffn_dim", "dim"),
        only="moe",
        hf=Key("language_model.model.layers.{layer}.feed_forward.shared_expert.up_proj.weight"),
        meta=Key("layers.{layer}.feed_forward.w_swiglu_FD.weight", tp=0),
        native=Key("decoder.layers.{layer}.mlp.shared_expert.w3.weight"),
    ),
    # What Meta's training counted; its own code has no use for it any more.
    *(
        Row(
            f"moe.{name}",
            shape,
            only="moe",
            optional=True,
            meta=Key(f"layers.{{layer}}.feed_forward.{key}"),
        )
        for name, key, shape in (
            ("gate_stats", "global_gate_stats_3E", ("3", "n_experts")),
            ("running_gate_stats", "running_gate_stats_3E", ("3", "n_experts")),
            ("activation", "expert_activation_DE", ("dim", "n_experts")),
        )
    ),
    Row(
        "norm",
        ("dim",),
        hf=Key("language_model.model.norm.weight"),
        meta=Key("norm.weight"),
        native=Key("decoder.norm.scale"),
    ),
    Row(
        "output",
        ("vocab_size", "dim"),
        hf=Key("language_model.lm_head.weight"),
        meta=Key("output.weight", tp=0),
        native=Key("decoder.output.weight"),
    ),
    Row("rotary.freqs", ("head_dim/2",), derived=True, meta=Key("rope.freqs")),
)


def _block(name: str, shape: tuple[str, ...], hf: str, meta: str, native: str, tp: int | None = None) -> Row:
    """A row of the vision model's layers."""
    return Row(
        f"vision.{name}",
        shape,
        hf=Key(f"vision_model.model.layers.{{block}}.{hf}"),
        meta=Key(f"vision_embeddings.vision_encoder.transformer.resblocks.{{block}}.{meta}", tp=tp),
        native=Key(f"encoders.vision.clip.layers.{{block}}.{native}"),
    )


def _vision(name: str, shape: tuple[str, ...], hf: str, meta: str, native: str) -> Row:
    """A row of the vision model outside of its layers, which every rank holds whole."""
    return Row(
        f"vision.{name}",
        shape,
        hf=Key(f"vision_model.{hf}"),
        meta=Key(f"vision_embeddings.vision_encoder.{meta}"),
        native=Key(f"encoders.vision.clip.{native}"),
    )


VISION = (
    Row(
        "vision.patches",
        ("vision_dim", "channels*patch*patch"),
        hf=Key("vision_model.patch_embedding.linear.weight"),
        meta=Key("vision_embeddings.vision_encoder.conv1._linear.weight", tp=0),
        native=Key("encoders.vision.clip.conv.weight", shape=("vision_dim", "channels", "patch", "patch")),
    ),
    _vision("class", ("vision_dim",), "class_embedding", "class_embedding", "cls_token_embedding.weight"),
    _vision(
        "positions",
        ("n_tokens", "vision_dim"),
        "positional_embedding_vlm",
        "positional_embedding_vlm",
        "token_pos_embedding.positional_embedding",
    ),
    _vision("norm_before", ("vision_dim",), "layernorm_pre.weight", "ln_pre.weight", "ln_pre.weight"),
    _vision("norm_before.bias", ("vision_dim",), "layernorm_pre.bias", "ln_pre.bias", "ln_pre.bias"),
    _vision("norm_after", ("vision_dim",), "layernorm_post.weight", "ln_post.weight", "ln_post.weight"),
    _vision("norm_after.bias", ("vision_dim",), "layernorm_post.bias", "ln_post.bias", "ln_post.bias"),
    _block("attention_norm", ("vision_dim",), "input_layernorm.weight", "ln_1.weight", "sa_norm.weight"),
    _block("attention_norm.bias", ("vision_dim",), "input_layernorm.bias", "ln_1.bias", "sa_norm.bias"),
    _block("q", ("vision_dim", "vision_dim"), "self_attn.q_proj.weight", "attn.wq.weight", "attn.q_proj.weight", 0),
    _block("q.bias", ("vision_dim",), "self_attn.q_proj.bias", "attn.wq.bias", "attn.q_proj.bias", 0),
    _block("k", ("vision_dim", "vision_dim"), "self_attn.k_proj.weight", "attn.wk.weight", "attn.k_proj.weight", 0),
    _block("k.bias", ("vision_dim",), "self_attn.k_proj.bias", "attn.wk.bias", "attn.k_proj.bias", 0),
    _block("v", ("vision_dim", "vision_dim"), "self_attn.v_proj.weight", "attn.wv.weight", "attn.v_proj.weight", 0),
    _block("v.bias", ("vision_dim",), "self_attn.v_proj.bias", "attn.wv.bias", "attn.v_proj.bias", 0),
    _block(
        "o", ("vision_dim", "vision_dim"), "self_attn.o_proj.weight", "attn.wo.weight", "attn.output_proj.weight", 1
    ),
    _block("o.bias", ("vision_dim",), "self_attn.o_proj.bias", "attn.wo.bias", "attn.output_proj.bias"),
    _block("mlp_norm", ("vision_dim",), "post_attention_layernorm.weight", "ln_2.weight", "mlp_norm.weight"),
    _block("mlp_norm.bias", ("vision_dim",), "post_attention_layernorm.bias", "ln_2.bias", "mlp_norm.bias"),
    _block("mlp.in", ("vision_ffn", "vision_dim"), "mlp.fc1.weight", "mlp.c_fc.weight", "mlp.w1.weight", 0),
    _block("mlp.in.bias", ("vision_ffn",), "mlp.fc1.bias", "mlp.c_fc.bias", "mlp.w1.bias", 0),
    _block("mlp.out", ("vision_dim", "vision_ffn"), "mlp.fc2.weight", "mlp.c_proj.weight", "mlp.w2.weight", 1),
    _block("mlp.out.bias", ("vision_dim",), "mlp.fc2.bias", "mlp.c_proj.bias", "mlp.w2.bias"),
    # What puts four neighbouring patches together, and what makes tokens of them.
    Row(
        "vision.adapter.in",
        ("adapter_dim", "vision_ffn"),
        hf=Key("vision_model.vision_adapter.mlp.fc1.weight"),
        meta=Key("vision_embeddings.vision_adapter.mlp.c_fc.weight", tp=0),
        native=Key("encoders.vision.projection.output.0.weight"),
    ),
    Row(
        "vision.adapter.out",
        ("adapter_dim", "adapter_dim"),
        hf=Key("vision_model.vision_adapter.mlp.fc2.weight"),
        meta=Key("vision_embeddings.vision_adapter.mlp.c_proj.weight", tp=1),
        native=Key("encoders.vision.projection.output.2.weight"),
    ),
    # A layer that Meta's code can put behind the adapter and no released config asks for.
    Row(
        "vision.adapter.fc",
        ("adapter_dim", "adapter_dim"),
        optional=True,
        meta=Key("vision_embeddings.vision_adapter.fc.weight", tp=0),
    ),
    Row(
        "vision.projection",
        ("dim", "projected_dim"),
        hf=Key("multi_modal_projector.linear_1.weight"),
        meta=Key("vision_projection.weight", tp=0),
        native=Key("encoders.vision.projection.output.4.weight"),
    ),
)


def _alone(row: Row) -> Row:
    """A row of the text model as Hugging Face has it where there is no vision model; there is no native column."""
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
