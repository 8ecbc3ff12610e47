"""GLM-4.5 and 4.6: Llama's attention, with biases on q, k and v and norms over the heads of q and k where the config
says so, and DeepSeek-V3's feed-forward parts: dense layers first, then experts beside shared ones.

Layers after the last one predict further tokens (MTP), as DeepSeek-V3's do. RoPE turns the first half of each head,
which no other column needs to know: the rows are not said to rotate.

hf: what transformers 5.23 saves for glm4_moe, and for MTP what its MtpModel reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.config import CONFIG, base_dims, optional_bool, optional_count, optional_int, require_int
from ckpt_convert.models.core.picking import columns, named, with_rope
from ckpt_convert.models.core.table import Family
from ckpt_convert.models.deepseek import BALANCE, MTP, SHARED, n_mtp, of_main, of_mtp, sets_with_mtp
from ckpt_convert.models.parts.decoder import ATTENTION, ATTENTION_BIAS, EMBEDDING, OUTPUT
from ckpt_convert.models.parts.experts import DENSE_FFN, EXPERTS, NORM, ROUTER
from ckpt_convert.models.qwen3 import QK_NORM

_LAYER = (
    *ATTENTION,
    *named(ATTENTION_BIAS, "attention.q.bias", "attention.k.bias", "attention.v.bias"),
    *(row.replace(enabled_by="qk_norm") for row in QK_NORM),
    *NORM,
    *DENSE_FFN,
    *ROUTER,
    *(row.replace(enabled_by=None) for row in BALANCE),
    *EXPERTS,
    *SHARED,
)


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The symbols that the table's shapes are made of; what is absent is as in transformers' Glm4MoeConfig."""
    width = optional_int(config, "moe_intermediate_size", CONFIG, 1408)
    return {
        **base_dims(config, kv_heads_default=8),
        "attention_bias": int(optional_bool(config, "attention_bias", CONFIG, False)),
        "qk_norm": int(optional_bool(config, "use_qk_norm", CONFIG, False)),
        "n_experts": optional_int(config, "n_routed_experts", CONFIG, 128),
        "expert_dim": width,
        "shared_dim": width * optional_count(config, "n_shared_experts", CONFIG, 1),
        "n_all_layers": require_int(config, "num_hidden_layers", CONFIG) + n_mtp(config),
    }


def sets(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The model's own layers and the MTP layers, and which of both have experts."""
    return sets_with_mtp(config, dense=1)


GLM4_MOE = Family(
    name="glm4_moe",
    title="GLM-4.5 and 4.6",
    model_types=("glm4_moe",),
    dims=dims,
    sets=sets,
    indices={"layer": "n_all_layers", "expert": "n_experts"},
    rows=columns(with_rope((*EMBEDDING, *of_main(_LAYER), *of_mtp(_LAYER), *MTP, *OUTPUT), None), "hf"),
)
