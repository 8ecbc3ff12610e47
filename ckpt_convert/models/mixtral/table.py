"""Mixtral: Mistral's attention, and experts instead of its MLP.

hf: what transformers 5.23 saves for mixtral; meta: the modules of mistral-inference 1.6.0 (a gate, and experts with w1,
w2, w3 each). The weights of the first Hugging Face release (December 2023) are in another layout, ``MIXTRAL_2023``:
their consolidated.00.pt to 07.pt each hold some of the whole tensors, and the experts of a layer are concatenated along
the rows of one matrix, w2 transposed. This follows the converter that transformers 4 had for it.
"""

from __future__ import annotations

from dataclasses import replace

from ckpt_convert.models.core.picking import columns, named, replaced
from ckpt_convert.models.core.table import Key, Row
from ckpt_convert.models.mistral.table import MISTRAL, MISTRAL_PARAMS
from ckpt_convert.models.mixtral import config, params
from ckpt_convert.models.parts.experts import INDICES

_MISTRAL = columns(MISTRAL.rows, "hf", "meta")

ATTENTION = named(_MISTRAL, "attention_norm", "attention.q", "attention.k", "attention.v", "attention.o", "ffn_norm")
ROTARY = named(_MISTRAL, "rotary.inv_freq", "rotary.layer_freqs", "rotary.freqs")

EXPERTS = (
    Row(
        "moe.router",
        ("n_experts", "dim"),
        hf=Key("model.layers.{layer}.block_sparse_moe.gate.weight"),
        meta=Key("layers.{layer}.feed_forward.gate.weight"),
        in_memory=Key("model.layers.{layer}.mlp.gate.weight"),
    ),
    Row(
        "moe.experts.gate",
        ("ffn_dim", "dim"),
        hf=Key("model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight"),
        meta=Key("layers.{layer}.feed_forward.experts.{expert}.w1.weight"),
        in_memory=Key("model.layers.{layer}.mlp.experts.gate_up_proj", fused=0),
    ),
    Row(
        "moe.experts.down",
        ("dim", "ffn_dim"),
        hf=Key("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"),
        meta=Key("layers.{layer}.feed_forward.experts.{expert}.w2.weight"),
        in_memory=Key("model.layers.{layer}.mlp.experts.down_proj"),
    ),
    Row(
        "moe.experts.up",
        ("ffn_dim", "dim"),
        hf=Key("model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight"),
        meta=Key("layers.{layer}.feed_forward.experts.{expert}.w3.weight"),
        in_memory=Key("model.layers.{layer}.mlp.experts.gate_up_proj", fused=0),
    ),
)

META_2023 = {
    "moe.router": Key("layers.{layer}.block_sparse_moe.gate.weight"),
    "moe.experts.gate": Key("layers.{layer}.block_sparse_moe.w1", flatten_stacked=True),
    "moe.experts.down": Key("layers.{layer}.block_sparse_moe.w2", flatten_stacked=True, transposed=True),
    "moe.experts.up": Key("layers.{layer}.block_sparse_moe.w3", flatten_stacked=True),
}

MIXTRAL = MISTRAL.replace(
    name="mixtral",
    title="Mixtral",
    model_types=("mixtral",),
    dims=config.dims,
    indices=INDICES,
    params=replace(
        MISTRAL_PARAMS,
        evidence=params.is_params,
        from_hf=params.hf_to_params,
        to_hf=params.params_to_hf,
    ),
    rows=(
        *named(_MISTRAL, "tok_embeddings"),
        *ATTENTION,
        *EXPERTS,
        *named(_MISTRAL, "norm", "output"),
        *ROTARY,
    ),
)

MIXTRAL_2023 = MIXTRAL.replace(
    name="mixtral_2023",
    title="Mixtral as of December 2023",
    params=replace(
        MISTRAL_PARAMS,
        evidence=params.is_params_2023,
        from_hf=params.hf_to_params,
        to_hf=params.params_to_hf,
    ),
    rows=lambda rows: replaced(rows, meta=META_2023),
)
