"""Llama 1, 2, Code Llama, 3, 3.1, 3.2 (text) and 3.3, and other models of type "llama".

hf: what transformers 5.23 saves; meta: the model and its tensor parallelism in llama-models 0.3.0 (``llama3/model.py``;
column-parallel layers split axis 0, row-parallel ones axis 1 of [out, in]), and the code published with Llama 2;
native: the converters of torchtune 0.6.1; torchtitan: the state-dict adapter for llama3 of torchtitan 0.3.0. The RoPE
layout of the last three is interleaved, Hugging Face's half-split.
"""

from __future__ import annotations

from ckpt_convert.models.core.params import Params, Styles
from ckpt_convert.models.core.rows import EMBEDDING_AXIS
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.llama import config, params, releases

LLAMA = Family(
    name="llama",
    title="Llama 1, 2, Code Llama, 3, 3.1, 3.2 text, 3.3",
    model_types=("llama",),
    dims=config.dims,
    params=Params(
        evidence=params.is_params,
        from_hf=params.hf_to_params,
        to_hf=params.params_to_hf,
        sharded=True,
        container="pth",
        options=frozenset({"rope_factor", "rope_theta", "max_positions", "meta_style", "drop_rope_scaling"}),
        release=releases.release,
        model_parallel=releases.model_parallel,
        for_ranks=params.for_ranks,
        styles=Styles(
            of_params=params.style_of,
            of_config=releases.style_for,
            tokenizers={"sentencepiece": "llama2", "tiktoken": "llama3"},
            unscaled=frozenset({"llama2"}),
            default="llama3",
            default_reason="as in Llama 3, for nothing says otherwise; `meta_style='llama2'` is the other way",
            split_names=("rows, Llama 3's way", "columns, Llama 2's way"),
        ),
    ),
    rows=(
        Row(
            "tok_embeddings",
            ("vocab_size", "dim"),
            hf=Key("model.embed_tokens.weight"),
            meta=Key("tok_embeddings.weight", tp_dim=EMBEDDING_AXIS),
            native=Key("tok_embeddings.weight"),
            torchtitan=Key("tok_embeddings.weight"),
        ),
        Row(
            "attention_norm",
            ("dim",),
            hf=Key("model.layers.{layer}.input_layernorm.weight"),
            meta=Key("layers.{layer}.attention_norm.weight"),
            native=Key("layers.{layer}.sa_norm.scale"),
            torchtitan=Key("layers.{layer}.attention_norm.weight"),
        ),
        Row(
            "attention.q",
            ("n_heads*head_dim", "dim"),
            heads="n_heads",
            hf=Key("model.layers.{layer}.self_attn.q_proj.weight", rope="half"),
            meta=Key("layers.{layer}.attention.wq.weight", rope="interleaved", tp_dim=0),
            native=Key("layers.{layer}.attn.q_proj.weight", rope="interleaved"),
            torchtitan=Key("layers.{layer}.attention.qkv_linear.wq.weight", rope="interleaved"),
        ),
        Row(
            "attention.k",
            ("n_kv_heads*head_dim", "dim"),
            heads="n_kv_heads",
            hf=Key("model.layers.{layer}.self_attn.k_proj.weight", rope="half"),
            meta=Key("layers.{layer}.attention.wk.weight", rope="interleaved", tp_dim=0, replicated_heads="n_kv_heads"),
            native=Key("layers.{layer}.attn.k_proj.weight", rope="interleaved"),
            torchtitan=Key("layers.{layer}.attention.qkv_linear.wk.weight", rope="interleaved"),
        ),
        Row(
            "attention.v",
            ("n_kv_heads*head_dim", "dim"),
            hf=Key("model.layers.{layer}.self_attn.v_proj.weight"),
            meta=Key("layers.{layer}.attention.wv.weight", tp_dim=0, replicated_heads="n_kv_heads"),
            native=Key("layers.{layer}.attn.v_proj.weight"),
            torchtitan=Key("layers.{layer}.attention.qkv_linear.wv.weight"),
        ),
        Row(
            "attention.o",
            ("dim", "n_heads*head_dim"),
            hf=Key("model.layers.{layer}.self_attn.o_proj.weight"),
            meta=Key("layers.{layer}.attention.wo.weight", tp_dim=1),
            native=Key("layers.{layer}.attn.output_proj.weight"),
            torchtitan=Key("layers.{layer}.attention.wo.weight"),
        ),
        Row(
            "ffn_norm",
            ("dim",),
            hf=Key("model.layers.{layer}.post_attention_layernorm.weight"),
            meta=Key("layers.{layer}.ffn_norm.weight"),
            native=Key("layers.{layer}.mlp_norm.scale"),
            torchtitan=Key("layers.{layer}.ffn_norm.weight"),
        ),
        Row(
            "ffn.gate",
            ("ffn_dim", "dim"),
            hf=Key("model.layers.{layer}.mlp.gate_proj.weight"),
            meta=Key("layers.{layer}.feed_forward.w1.weight", tp_dim=0),
            native=Key("layers.{layer}.mlp.w1.weight"),
            torchtitan=Key("layers.{layer}.feed_forward.w1.weight"),
        ),
        Row(
            "ffn.down",
            ("dim", "ffn_dim"),
            hf=Key("model.layers.{layer}.mlp.down_proj.weight"),
            meta=Key("layers.{layer}.feed_forward.w2.weight", tp_dim=1),
            native=Key("layers.{layer}.mlp.w2.weight"),
            torchtitan=Key("layers.{layer}.feed_forward.w2.weight"),
        ),
        Row(
            "ffn.up",
            ("ffn_dim", "dim"),
            hf=Key("model.layers.{layer}.mlp.up_proj.weight"),
            meta=Key("layers.{layer}.feed_forward.w3.weight", tp_dim=0),
            native=Key("layers.{layer}.mlp.w3.weight"),
            torchtitan=Key("layers.{layer}.feed_forward.w3.weight"),
        ),
        # Biases exist only in Hugging Face's layout: Meta's and torchtune's Llama have none.
        Row(
            "attention.q.bias",
            ("n_heads*head_dim",),
            heads="n_heads",
            enabled_by="attention_bias",
            hf=Key("model.layers.{layer}.self_attn.q_proj.bias", rope="half"),
        ),
        Row(
            "attention.k.bias",
            ("n_kv_heads*head_dim",),
            heads="n_kv_heads",
            enabled_by="attention_bias",
            hf=Key("model.layers.{layer}.self_attn.k_proj.bias", rope="half"),
        ),
        Row(
            "attention.v.bias",
            ("n_kv_heads*head_dim",),
            enabled_by="attention_bias",
            hf=Key("model.layers.{layer}.self_attn.v_proj.bias"),
        ),
        Row(
            "attention.o.bias",
            ("dim",),
            enabled_by="attention_bias",
            hf=Key("model.layers.{layer}.self_attn.o_proj.bias"),
        ),
        Row("ffn.gate.bias", ("ffn_dim",), enabled_by="mlp_bias", hf=Key("model.layers.{layer}.mlp.gate_proj.bias")),
        Row("ffn.up.bias", ("ffn_dim",), enabled_by="mlp_bias", hf=Key("model.layers.{layer}.mlp.up_proj.bias")),
        Row("ffn.down.bias", ("dim",), enabled_by="mlp_bias", hf=Key("model.layers.{layer}.mlp.down_proj.bias")),
        # RoPE frequencies, which older releases stored although the config determines them.
        Row(
            "rotary.layer_freqs",
            ("head_dim/2",),
            derived=True,
            meta=Key("layers.{layer}.attention.inner_attention.rope.freqs"),
        ),
        Row(
            "norm",
            ("dim",),
            hf=Key("model.norm.weight"),
            meta=Key("norm.weight"),
            native=Key("norm.scale"),
            torchtitan=Key("norm.weight"),
        ),
        Row(
            "output",
            ("vocab_size", "dim"),
            tied_to="tok_embeddings",
            hf=Key("lm_head.weight", omitted_if_tied=True),
            meta=Key("output.weight", tp_dim=0),
            native=Key("output.weight", omitted_if_tied=True),
            torchtitan=Key("lm_head.weight"),
        ),
        Row("rotary.freqs", ("head_dim/2",), derived=True, meta=Key("rope.freqs")),
    ),
)
