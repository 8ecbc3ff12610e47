"""T5's encoder, alone or with the decoder.

hf: T5EncoderModel and T5ForConditionalGeneration of transformers 5.23; native: T5Encoder of torchtune 0.6.1, with the
keys of its converter. Native has only the encoder, and that of T5 1.1: the decoder is passed through, and an MLP
without a gate (T5 1.0) cannot be stored. ``shared.weight`` is the embedding of both sides; copies of it under the
encoder's or the decoder's key have equal values. There is no RoPE: positions are an attention bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.builders import linear, rms_norm
from ckpt_convert.models.core.config import CONFIG, optional_int, optional_str
from ckpt_convert.models.core.table import Family, Key, Row


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes in a T5 config.json; defaults are those of transformers' T5Config.

    The embeddings of encoder and decoder are always tied; tie_word_embeddings refers to lm_head.
    """
    n_layers = optional_int(config, "num_layers", CONFIG, 6)
    gated = optional_str(config, "feed_forward_proj", CONFIG, "relu").startswith("gated-")
    return {
        "vocab_size": optional_int(config, "vocab_size", CONFIG, 32128),
        "dim": optional_int(config, "d_model", CONFIG, 512),
        "n_layers": n_layers,
        "n_decoder_layers": optional_int(config, "num_decoder_layers", CONFIG, n_layers),
        "n_heads": optional_int(config, "num_heads", CONFIG, 8),
        "head_dim": optional_int(config, "d_kv", CONFIG, 64),
        "ffn_dim": optional_int(config, "d_ff", CONFIG, 2048),
        "n_buckets": optional_int(config, "relative_attention_num_buckets", CONFIG, 32),
        "gated": int(gated),
        "plain": int(not gated),
        "tied": 1,
    }


_SELF = "encoder.block.{layer}.layer.0"
_FFN = "encoder.block.{layer}.layer.1"
_IN, _OUT = ("n_heads*head_dim", "dim"), ("dim", "n_heads*head_dim")

_ENCODER = (
    Row("tok_embeddings", ("vocab_size", "dim"), hf=Key("shared.weight"), native=Key("token_embedding.weight")),
    Row(
        "tok_embeddings.encoder",
        ("vocab_size", "dim"),
        tied_to="tok_embeddings",
        hf=Key("encoder.embed_tokens.weight", omitted_if_tied=True),
    ),
    Row(
        "attention.position_bias",  # the first layer's is every layer's
        ("n_buckets", "n_heads"),
        hf=Key("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        native=Key("relative_position_bias.embedding.weight"),
    ),
    *rms_norm("attention_norm", hf=f"{_SELF}.layer_norm", native="layers.{layer}.sa_norm"),
    Row("attention.q", _IN, hf=Key(f"{_SELF}.SelfAttention.q.weight"), native=Key("layers.{layer}.attn.q_proj.weight")),
    Row("attention.k", _IN, hf=Key(f"{_SELF}.SelfAttention.k.weight"), native=Key("layers.{layer}.attn.k_proj.weight")),
    Row("attention.v", _IN, hf=Key(f"{_SELF}.SelfAttention.v.weight"), native=Key("layers.{layer}.attn.v_proj.weight")),
    Row(
        "attention.o",
        _OUT,
        hf=Key(f"{_SELF}.SelfAttention.o.weight"),
        native=Key("layers.{layer}.attn.output_proj.weight"),
    ),
    *rms_norm("ffn_norm", hf=f"{_FFN}.layer_norm", native="layers.{layer}.mlp_norm"),
    *linear(
        "ffn.gate",
        ("ffn_dim", "dim"),
        enabled_by="gated",
        hf=f"{_FFN}.DenseReluDense.wi_0",
        native="layers.{layer}.mlp.w1",
    ),
    *linear("ffn.down", ("dim", "ffn_dim"), hf=f"{_FFN}.DenseReluDense.wo", native="layers.{layer}.mlp.w2"),
    *linear(
        "ffn.up",
        ("ffn_dim", "dim"),
        enabled_by="gated",
        hf=f"{_FFN}.DenseReluDense.wi_1",
        native="layers.{layer}.mlp.w3",
    ),
    *linear("ffn.in", ("ffn_dim", "dim"), enabled_by="plain", hf=f"{_FFN}.DenseReluDense.wi"),
    *rms_norm("norm", hf="encoder.final_layer_norm", native="final_norm"),
)


def _decoder_row(name: str, shape: tuple[str, ...], hf: str, when: str | None = None) -> Row:
    """A row of the decoder, which is optional as a whole, layer by layer."""
    (row,) = linear(name, shape, optional="decoder" if "{decoder_layer}" in hf else True, enabled_by=when, hf=hf)
    return row


def _decoder_attention(name: str, hf: str) -> tuple[Row, ...]:
    return (
        _decoder_row(f"{name}.q", _IN, f"{hf}.q"),
        _decoder_row(f"{name}.k", _IN, f"{hf}.k"),
        _decoder_row(f"{name}.v", _IN, f"{hf}.v"),
        _decoder_row(f"{name}.o", _OUT, f"{hf}.o"),
    )


_BLOCK = "decoder.block.{decoder_layer}"
_BIAS = ("n_buckets", "n_heads")

_DECODER = (
    Row(
        "tok_embeddings.decoder",
        ("vocab_size", "dim"),
        tied_to="tok_embeddings",
        hf=Key("decoder.embed_tokens.weight", omitted_if_tied=True),
    ),
    _decoder_row("decoder.position_bias", _BIAS, "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
    # Releases before transformers 3 also have a bias here, which was never used.
    _decoder_row("decoder.cross_bias", _BIAS, "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias"),
    _decoder_row("decoder.attention_norm", ("dim",), f"{_BLOCK}.layer.0.layer_norm"),
    *_decoder_attention("decoder.attention", f"{_BLOCK}.layer.0.SelfAttention"),
    _decoder_row("decoder.cross_norm", ("dim",), f"{_BLOCK}.layer.1.layer_norm"),
    *_decoder_attention("decoder.cross", f"{_BLOCK}.layer.1.EncDecAttention"),
    _decoder_row("decoder.ffn_norm", ("dim",), f"{_BLOCK}.layer.2.layer_norm"),
    _decoder_row("decoder.ffn.gate", ("ffn_dim", "dim"), f"{_BLOCK}.layer.2.DenseReluDense.wi_0", "gated"),
    _decoder_row("decoder.ffn.up", ("ffn_dim", "dim"), f"{_BLOCK}.layer.2.DenseReluDense.wi_1", "gated"),
    _decoder_row("decoder.ffn.in", ("ffn_dim", "dim"), f"{_BLOCK}.layer.2.DenseReluDense.wi", "plain"),
    _decoder_row("decoder.ffn.down", ("dim", "ffn_dim"), f"{_BLOCK}.layer.2.DenseReluDense.wo"),
    _decoder_row("decoder.norm", ("dim",), "decoder.final_layer_norm"),
    _decoder_row("output", ("vocab_size", "dim"), "lm_head"),
)

T5 = Family(
    name="t5",
    title="T5's encoder, also in a whole T5; native: T5 1.1",
    model_types=("t5",),
    rows=(*_ENCODER, *_DECODER),
    dims=dims,
    indices={"layer": "n_layers", "decoder_layer": "n_decoder_layers"},
)
