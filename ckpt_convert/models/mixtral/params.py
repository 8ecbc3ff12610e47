"""Mixtral: mistral-inference's params.json (with ``moe``), from and to Hugging Face's config.json.

Everything except the experts is as for dense Mistral models. The params.json of December 2023 has Hugging Face's names
instead; it can only be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.config import (
    CONFIG,
    PARAMS,
    ConfigOptions,
    Translated,
    optional_int,
    optional_mapping,
    require_int,
)
from ckpt_convert.models.core.params import Weights
from ckpt_convert.models.core.rope import read_rope
from ckpt_convert.models.mistral import params as mistral_params
from ckpt_convert.models.mixtral.config import dims

CLASS_PER_TOKEN = 2


CLASS_THETA = 1e6
"""Defaults of transformers' MixtralConfig; the releases have the same theta."""


NAMES_2023 = {
    "hidden_size": "dim", "num_hidden_layers": "n_layers", "head_dim": "head_dim", "intermediate_size": "hidden_dim",
    "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "rms_norm_eps": "norm_eps",
    "vocab_size": "vocab_size", "rope_theta": "rope_theta", "sliding_window": "sliding_window",
    "max_position_embeddings": "max_position_embeddings",
}  # fmt: skip
"""Keys of the params.json of December 2023, and those of later ones."""


def hf_to_params(
    config: Mapping[str, Any], options: ConfigOptions | None = None, *, vocab_size: int | None = None
) -> Translated:
    """The params.json for this config.json; raises ConfigError as for a dense Mistral."""
    theta = {} if read_rope(config).theta is not None else {"rope_theta": CLASS_THETA}
    dense = mistral_params.hf_to_params({"sliding_window": None, **config, **theta}, options, vocab_size=vocab_size)
    moe = {
        "num_experts_per_tok": optional_int(config, "num_experts_per_tok", CONFIG, CLASS_PER_TOKEN),
        "num_experts": dims(config)["n_experts"],
    }
    return Translated({**dense.content, "moe": moe}, dense.notices)


def params_to_hf(params: Mapping[str, Any], weights: Weights, options: ConfigOptions | None = None) -> Translated:
    """The config.json for a Mixtral params.json, of either spelling.

    Without rope_theta it is 1e6, as in all releases, with a notice. Raises ConfigError.
    """
    options = options or ConfigOptions()
    content, moe = _experts(params)
    notices: tuple[str, ...] = ()
    if content.get("rope_theta") is None and options.rope_theta is None:
        content["rope_theta"] = CLASS_THETA
        notices = (f"{PARAMS} does not hold rope_theta: took 1e+06, as in the releases; pass `rope_theta=` to differ",)
    dense = mistral_params.params_to_hf(content, weights, options)
    config = {
        **dense.content,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_experts_per_tok": optional_int(moe, "num_experts_per_tok", f"{PARAMS}: moe", CLASS_PER_TOKEN),
        "num_local_experts": require_int(moe, "num_experts", f"{PARAMS}: moe"),
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
    }
    return Translated(dict(sorted(config.items())), (*notices, *dense.notices))


def is_params(params: Mapping[str, Any]) -> str | None:
    """The evidence that a params.json is Mixtral's, in words, or None."""
    content, moe = _experts(params)
    return f"{PARAMS} has moe" if "dim" in params and moe and mistral_params.is_params(content) else None


def is_params_2023(params: Mapping[str, Any]) -> str | None:
    """The evidence that a params.json is Mixtral's of December 2023, in words, or None."""
    ours = all(params.get(key) is not None for key in ("num_local_experts", "hidden_size", "num_hidden_layers"))
    return f"{PARAMS} has num_local_experts" if ours else None


def _experts(params: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The params of a dense Mistral, and those of the experts, with today's keys."""
    if params.get("hidden_size") is None:
        content = {key: value for key, value in params.items() if key != "moe"}
        return content, optional_mapping(params, "moe", PARAMS)
    of_experts = {"num_local_experts": "num_experts", "num_experts_per_tok": "num_experts_per_tok"}
    content = {NAMES_2023.get(key, key): value for key, value in params.items() if key not in of_experts}
    return content, {name: params[key] for key, name in of_experts.items() if key in params}
