"""GLM-4.5 and 4.6: Llama's attention, with biases on q, k and v and norms over the heads of q and k if the config says
so, and DeepSeek-V3's MLPs: dense layers first, then routed and shared experts.

Layers after the last one predict further tokens (MTP), as in DeepSeek-V3. RoPE rotates the first half of each head; as
there is no other column, the rows are not marked as rotating.

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
    """The config dimensions of the table; defaults are those of transformers' Glm4MoeConfig."""
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
    """The layer sets: the model's own layers, the MTP layers, and those of both with experts."""
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
