"""DeepSeek-V2 and V3, and Kimi K2, which has V3's architecture.

Multi-head latent attention (MLA): q_a and kv_a project down to latents, q_b and kv_b project up to every head. kv_a
also has the shared key rows that rotate (qk_rope_head_dim); in q_b the rotating rows are the last ones of every head,
and in kv_b the rows of a head's value follow those of its key. Every layout has interleaved RoPE, so nothing is
permuted. The first layers are dense; the others have routed experts and shared ones. Layers after the last one predict
further tokens (MTP).

hf: what transformers 5.23 saves for deepseek_v2 and deepseek_v3, and for MTP what its MtpModel reads and the releases
store; torchtitan: the state-dict adapter for deepseek_v3 of torchtitan 0.3.0, whose flavors "16B" and "236B" are
DeepSeek-V2-Lite and DeepSeek-V2: their routers choose by softmax and have a balancing bias, of zeros in what V2 saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ckpt_convert.models.core.builders import linear, rms_norm
from ckpt_convert.models.core.config import (
    CONFIG,
    base_dims,
    optional_bool,
    optional_count,
    optional_int,
    optional_str,
    require_int,
)
from ckpt_convert.models.core.picking import columns, named
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.parts.decoder import ATTENTION as PLAIN_ATTENTION
from ckpt_convert.models.parts.decoder import EMBEDDING, OUTPUT
from ckpt_convert.models.parts.experts import DENSE_FFN, EXPERTS, INDICES, LOAD_BALANCE, NORM, ROUTER, split

ATTENTION = (
    *named(PLAIN_ATTENTION, "attention_norm"),
    *linear(
        "attention.q_a",
        ("q_rank", "dim"),
        enabled_by="q_rank",
        hf="model.layers.{layer}.self_attn.q_a_proj",
        torchtitan="layers.{layer}.attention.wq_a",
    ),
    *rms_norm(
        "attention.q_norm",
        "q_rank",
        enabled_by="q_rank",
        hf="model.layers.{layer}.self_attn.q_a_layernorm",
        torchtitan="layers.{layer}.attention.q_norm",
    ),
    *linear(
        "attention.q_b",
        ("n_heads*qk_dim", "q_rank"),
        enabled_by="q_rank",
        hf="model.layers.{layer}.self_attn.q_b_proj",
        torchtitan="layers.{layer}.attention.wq_b",
    ),
    # V2-Lite projects queries without a latent.
    *linear(
        "attention.q",
        ("n_heads*qk_dim", "dim"),
        enabled_by="whole_q",
        hf="model.layers.{layer}.self_attn.q_proj",
        torchtitan="layers.{layer}.attention.wq",
    ),
    *linear(
        "attention.kv_a",
        ("kv_a_dim", "dim"),
        hf="model.layers.{layer}.self_attn.kv_a_proj_with_mqa",
        torchtitan="layers.{layer}.attention.wkv_a",
    ),
    *rms_norm(
        "attention.kv_norm",
        "kv_rank",
        hf="model.layers.{layer}.self_attn.kv_a_layernorm",
        torchtitan="layers.{layer}.attention.kv_norm",
    ),
    *linear(
        "attention.kv_b",
        ("n_heads*kv_b_dim", "kv_rank"),
        hf="model.layers.{layer}.self_attn.kv_b_proj",
        torchtitan="layers.{layer}.attention.wkv_b",
    ),
    *linear(
        "attention.o",
        ("dim", "n_heads*v_dim"),
        hf="model.layers.{layer}.self_attn.o_proj",
        torchtitan="layers.{layer}.attention.wo",
    ),
    Row(
        "attention.q_a.bias",
        ("q_rank",),
        enabled_by="q_a_bias",
        hf=Key("model.layers.{layer}.self_attn.q_a_proj.bias"),
    ),
    Row(
        "attention.kv_a.bias",
        ("kv_a_dim",),
        enabled_by="attention_bias",
        hf=Key("model.layers.{layer}.self_attn.kv_a_proj_with_mqa.bias"),
    ),
    Row(
        "attention.o.bias", ("dim",), enabled_by="attention_bias", hf=Key("model.layers.{layer}.self_attn.o_proj.bias")
    ),
    Row(
        "rotary.inv_freq",
        ("rope_dim/2",),
        derived=True,
        hf=Key("model.layers.{layer}.self_attn.rotary_emb.inv_freq"),
    ),
)

SHARED = (
    *linear(
        "moe.shared.gate",
        ("shared_dim", "dim"),
        layer_set="moe",
        enabled_by="shared_dim",
        hf="model.layers.{layer}.mlp.shared_experts.gate_proj",
        torchtitan="layers.{layer}.moe.shared_experts.w1",
    ),
    *linear(
        "moe.shared.up",
        ("shared_dim", "dim"),
        layer_set="moe",
        enabled_by="shared_dim",
        hf="model.layers.{layer}.mlp.shared_experts.up_proj",
        torchtitan="layers.{layer}.moe.shared_experts.w3",
    ),
    *linear(
        "moe.shared.down",
        ("dim", "shared_dim"),
        layer_set="moe",
        enabled_by="shared_dim",
        hf="model.layers.{layer}.mlp.shared_experts.down_proj",
        torchtitan="layers.{layer}.moe.shared_experts.w2",
    ),
)

BALANCE = (
    Row(
        "moe.balance",
        ("n_experts",),
        layer_set="moe",
        enabled_by="balanced",
        hf=Key("model.layers.{layer}.mlp.gate.e_score_correction_bias"),
        torchtitan=Key("layers.{layer}.moe.expert_bias_E"),
    ),
)
"""The load-balancing bias that is added to the router's scores when experts are chosen."""

LAYER = (*ATTENTION, *NORM, *DENSE_FFN, *ROUTER, *BALANCE, *EXPERTS, *SHARED)

MTP = (
    *rms_norm(
        "mtp.embedding_norm",
        layer_set="mtp",
        optional="mtp",
        hf="model.layers.{layer}.enorm",
        torchtitan="mtp_layers.{layer:mtp}.enorm",
    ),
    *rms_norm(
        "mtp.hidden_norm",
        layer_set="mtp",
        optional="mtp",
        hf="model.layers.{layer}.hnorm",
        torchtitan="mtp_layers.{layer:mtp}.hnorm",
    ),
    *linear(
        "mtp.projection",
        ("dim", "2*dim"),
        layer_set="mtp",
        optional="mtp",
        hf="model.layers.{layer}.eh_proj",
        torchtitan="mtp_layers.{layer:mtp}.eh_proj",
    ),
    *rms_norm(
        "mtp.norm",
        layer_set="mtp",
        optional="mtp",
        hf="model.layers.{layer}.shared_head.norm",
        torchtitan="mtp_layers.{layer:mtp}.mtp_norm",
    ),
    # Copies of the model's own embedding and output, which neither torchtitan nor transformers use.
    Row(
        "mtp.tok_embeddings",
        ("vocab_size", "dim"),
        layer_set="mtp",
        optional=True,
        hf=Key("model.layers.{layer}.embed_tokens.weight"),
    ),
    *linear(
        "mtp.output", ("vocab_size", "dim"), layer_set="mtp", optional=True, hf="model.layers.{layer}.shared_head.head"
    ),
)
"""The further tensors of an MTP layer, whose index continues the model's layers in hf and starts at 0 in torchtitan.

transformers reads these layers but does not save them, so each may be absent as a whole.
"""


def of_main(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows of the model's own layers."""
    return tuple(row.replace(layer_set=row.layer_set or "main") for row in rows)


def of_mtp(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The same rows in the layers that predict further tokens."""
    out = []
    for row in rows:
        torchtitan = row.torchtitan and row.torchtitan.renamed("{layer}", "{layer:mtp}").prefixed("mtp_")
        only = "mtp" if row.layer_set is None else f"mtp_{row.layer_set}"
        optional = row.optional if row.derived else "mtp"
        out.append(row.replace(name=f"mtp.{row.name}", layer_set=only, optional=optional, torchtitan=torchtitan))
    return tuple(out)


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The dimensions in a config.json; defaults are those of transformers' DeepseekV3Config.

    q_rank, kv_rank: the widths of the latents (q_rank 0: queries have none). qk_dim: the rows of a head of q, of which
    the last rope_dim rotate. v_dim: the rows of a head of v. kv_a_dim: the rows of kv_a. kv_b_dim: of a head in kv_b.
    """
    return {
        **_dims(config, n_experts=256, expert_dim=2048, n_shared=1),
        "balanced": int(optional_str(config, "topk_method", CONFIG, "noaux_tc") == "noaux_tc"),
        "n_all_layers": require_int(config, "num_hidden_layers", CONFIG) + n_mtp(config),
    }


def dims_v2(config: Mapping[str, Any]) -> dict[str, int]:
    """As ``dims``, with the defaults of transformers' DeepseekV2Config."""
    return _dims(config, n_experts=64, expert_dim=1407, n_shared=2)


def sets(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The model's own layers and the MTP layers, and which of both have experts."""
    return sets_with_mtp(config, dense=3)


def sets_with_mtp(config: Mapping[str, Any], *, dense: int) -> dict[str, list[int]]:
    """As ``sets``; ``dense`` is the number of dense layers if the config has none."""
    n_layers = require_int(config, "num_hidden_layers", CONFIG)
    main, mtp = range(n_layers), range(n_layers, n_layers + n_mtp(config))
    return {
        "main": list(main),
        **split(main, _with_experts(config, main, dense=dense)),
        "mtp": list(mtp),
        **{f"mtp_{name}": at for name, at in split(mtp, _with_experts(config, mtp, dense=dense)).items()},
    }


def sets_v2(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Which layers have experts."""
    layers = range(require_int(config, "num_hidden_layers", CONFIG))
    return split(layers, _with_experts(config, layers, dense=0))


def _dims(config: Mapping[str, Any], *, n_experts: int, expert_dim: int, n_shared: int) -> dict[str, int]:
    rope_dim = optional_int(config, "qk_rope_head_dim", CONFIG, 64)
    nope_dim = optional_int(config, "qk_nope_head_dim", CONFIG, 128)
    v_dim = optional_int(config, "v_head_dim", CONFIG, 128)
    q_rank = _or_none(config, "q_lora_rank", 1536)
    kv_rank = optional_int(config, "kv_lora_rank", CONFIG, 512)
    width = optional_int(config, "moe_intermediate_size", CONFIG, expert_dim)
    bias = int(optional_bool(config, "attention_bias", CONFIG, False))
    return {
        # MLA has no head_dim and no key/value heads: these keys of the config have no effect.
        **base_dims({**config, "head_dim": rope_dim, "num_key_value_heads": None}),
        "rope_dim": rope_dim,
        "qk_dim": nope_dim + rope_dim,
        "v_dim": v_dim,
        "q_rank": q_rank,
        "whole_q": int(not q_rank),
        "kv_rank": kv_rank,
        "kv_a_dim": kv_rank + rope_dim,
        "kv_b_dim": nope_dim + v_dim,
        "attention_bias": bias,
        "q_a_bias": int(bias and q_rank > 0),
        "n_experts": _or_none(config, "n_routed_experts", n_experts),
        "expert_dim": width,
        "shared_dim": width * _or_none(config, "n_shared_experts", n_shared),
    }


def n_mtp(config: Mapping[str, Any]) -> int:
    """The number of MTP layers; one if the config does not have it."""
    return optional_count(config, "num_nextn_predict_layers", CONFIG, 1)


def _with_experts(config: Mapping[str, Any], layers: range, *, dense: int) -> list[int]:
    """The layers that have experts: every moe_layer_freq-th after the first, dense ones."""
    first = optional_count(config, "first_k_dense_replace", CONFIG, dense)
    step = optional_int(config, "moe_layer_freq", CONFIG, 1)
    if not _or_none(config, "n_routed_experts", 1):
        return []
    return [at for at in layers if at >= first and at % step == 0]


def _or_none(config: Mapping[str, Any], key: str, default: int) -> int:
    """The number under ``key``: 0 if it is null, ``default`` if there is no such key."""
    return 0 if key in config and config[key] is None else optional_count(config, key, CONFIG, default)


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    title="DeepSeek-V3 and R1",
    model_types=("deepseek_v3",),
    dims=dims,
    sets=sets,
    indices={"layer": "n_all_layers", "expert": "n_experts"},
    rows=columns((*EMBEDDING, *of_main(LAYER), *of_mtp(LAYER), *MTP, *OUTPUT), "hf", "torchtitan"),
)

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    title="DeepSeek-V2",
    model_types=("deepseek_v2",),
    dims=dims_v2,
    sets=sets_v2,
    indices=INDICES,
    rows=columns(
        (*EMBEDDING, *ATTENTION, *NORM, *DENSE_FFN, *ROUTER, *LOAD_BALANCE, *EXPERTS, *SHARED, *OUTPUT),
        "hf",
        "torchtitan",
    ),
)

KIMI_K2 = DEEPSEEK_V3.replace(
    name="kimi_k2",
    title="Kimi K2",
    model_types=("kimi_k2",),
    unverified={
        "hf": "transformers has no kimi_k2 of its own; the releases' config.json names DeepSeek-V3's code",
    },
)
