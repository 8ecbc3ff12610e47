"""Llama 4: Meta's params.json, from and to Hugging Face's config.json.

params.json has both feed-forward widths only as a rule (``llama4.widths``), and neither max_position_embeddings nor,
for the released models, the RoPE factor (``llama4.releases``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import (
    CONFIG,
    PARAMS,
    ConfigOptions,
    Translated,
    agreed_vocab,
    check_groups,
    check_not_quantized,
    check_silu,
    divided_head_dim,
    optional_bool,
    optional_int,
    optional_mapping,
    optional_number,
    require_int,
    require_number,
    unused_keys,
)
from ckpt_convert.models.core.params import Weights, check_head_dim, flat, lost_positions, took_positions
from ckpt_convert.models.core.rope import Rope, expressible, rope_keys, rope_of_params, scaling_problem
from ckpt_convert.models.llama4 import releases
from ckpt_convert.models.llama4.config import MOE_ARGS, TARGET, dims, moe_layers, number_of_layers, text_part
from ckpt_convert.models.llama4.vision import vision_args, vision_config
from ckpt_convert.models.llama4.widths import width_rule, widths_of_params

THETA = 500000.0
"""The default RoPE base, in transformers and in Meta's code."""

SCALING = {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 8192}
"""The default parameters of ``use_scaled_rope`` in Meta's code."""

_KEYS = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "multiple_of", "ffn_dim_multiplier",
    "ffn_exp", "norm_eps", "attention_chunk_size", "rope_theta", "use_scaled_rope", "rope_scaling_factor",
    "rope_high_freq_factor", "nope_layer_interval", "use_qk_norm", "attn_temperature_tuning", "floor_scale",
    "attn_scale", "vision_args", "moe_args",
)  # fmt: skip
"""The fields of Meta's ModelArgs that describe the model, in their order."""

_KNOWN = frozenset((*_KEYS, "quantization_args", "lora_args", "max_batch_size", "max_seq_len"))


def is_params(params: Mapping[str, Any]) -> str | None:
    """The evidence that a params.json is of Llama 4 with its vision model, in words, or None."""
    params = flat(params)
    return f"{PARAMS} has vision_args" if _is_ours(params) and params.get("vision_args") is not None else None


def is_text_params(params: Mapping[str, Any]) -> str | None:
    """The evidence that a params.json is of Llama 4 without a vision model, in words, or None."""
    params = flat(params)
    if not _is_ours(params) or params.get("vision_args") is not None:
        return None
    found = next(key for key in ("moe_args", "nope_layer_interval") if params.get(key) is not None)
    return f"{PARAMS} has {found} and no vision_args"


def hf_to_params(
    config: Mapping[str, Any], options: ConfigOptions | None = None, *, vocab_size: int | None = None
) -> Translated:
    """The params.json for this config.json; notices name what it cannot hold.

    Raises ConfigError, naming the field, for a config that Meta's code cannot run.
    """
    options = options or ConfigOptions()
    sizes = dims(config)
    text, where = text_part(config)
    if sizes["attention_bias"]:
        raise ConfigError(f"{where}: attention_bias must be false for {TARGET}, found true; Meta's code has no biases")
    check_head_dim(sizes, where, TARGET)
    check_silu(text, "hidden_act", where, TARGET)
    check_not_quantized(config, ("quantization_config",), CONFIG, TARGET)
    rope, notices = expressible(text, options, TARGET, _rope_problem, where)
    moe = _moe_args(text, where, sizes)
    widths = width_rule(sizes, moe is not None)
    scaled = rope.kind != "default"
    content: dict[str, Any] = {
        "dim": sizes["dim"],
        "n_layers": sizes["n_layers"],
        "n_heads": sizes["n_heads"],
        "n_kv_heads": sizes["n_kv_heads"],
        "vocab_size": agreed_vocab(text, vocab_size, where),
        "multiple_of": widths.multiple_of,
        "ffn_dim_multiplier": widths.multiplier,
        "ffn_exp": widths.expansion,
        "norm_eps": require_number(text, "rms_norm_eps", where),
        "attention_chunk_size": _chunk(text, where),
        "rope_theta": THETA if rope.theta is None else rope.theta,
        "use_scaled_rope": scaled,
        "nope_layer_interval": _nope_interval(text, where, sizes["n_layers"]),
        "use_qk_norm": optional_bool(text, "use_qk_norm", where, True),
        "attn_temperature_tuning": optional_bool(text, "attn_temperature_tuning", where, True),
        "floor_scale": require_number(text, "floor_scale", where),
        "attn_scale": require_number(text, "attn_scale", where),
    }
    if scaled:
        for key, name in (("rope_scaling_factor", "factor"), ("rope_high_freq_factor", "high_freq_factor")):
            if rope.parameters.get(name) != SCALING[name]:
                content[key] = rope.parameters.get(name)
    if moe is not None:
        content["moe_args"] = {**moe, "auto_scale_F": widths.is_scaled}
    if config.get("model_type") != "llama4_text":
        content["vision_args"] = vision_args(config)
    ordered = {key: content[key] for key in _KEYS if content.get(key) is not None}
    positions = optional_int(text, "max_position_embeddings", where, 131072)
    ruled, _ = _positions(sizes, ConfigOptions())
    return Translated(ordered, (*rope.notices, *notices, *lost_positions(positions, ruled)))


def params_to_hf(params: Mapping[str, Any], weights: Weights, options: ConfigOptions | None = None) -> Translated:
    """The config.json for a params.json of Llama 4.

    Raises ConfigError for invalid values. Of ``weights`` only vocab_size is used: embeddings are never tied, and both
    widths must follow from the rule.
    """
    options = options or ConfigOptions()
    params = flat(params)
    check_not_quantized(params, ("quantization_args", "lora_args"), PARAMS, "a Llama 4 conversion")
    dim, n_heads = require_int(params, "dim", PARAMS), require_int(params, "n_heads", PARAMS)
    n_kv_heads = optional_int(params, "n_kv_heads", PARAMS, n_heads)
    check_groups(n_heads, n_kv_heads, PARAMS, ("n_heads", "n_kv_heads"))
    head_dim = divided_head_dim(dim, n_heads, PARAMS, ("dim", "n_heads"))
    layers = number_of_layers(params, "n_layers", PARAMS)
    moe = optional_mapping(params, "moe_args", PARAMS)
    step = optional_int(moe, "interleave_moe_layer_step", MOE_ARGS, 1) if moe else 0
    experts = require_int(moe, "num_experts", MOE_ARGS) if moe else 0
    interval = optional_int(params, "nope_layer_interval", PARAMS, 0)
    rope, notices = _rope_of_params(params, options)
    dense, expert = widths_of_params(params, dim, moe)
    sizes = {"dim": dim, "n_layers": layers, "n_experts": experts}
    positions, said = _positions(sizes, options)
    chunk = None if params.get("attention_chunk_size") is None else require_int(params, "attention_chunk_size", PARAMS)
    vocab = agreed_vocab(params, weights.vocab_size, PARAMS)
    text = {
        "architectures": ["Llama4ForCausalLM"],
        "attention_bias": False,
        "attention_chunk_size": chunk,
        "attention_dropout": 0.0,
        "attn_scale": optional_number(params, "attn_scale", PARAMS) or 0.1,
        "attn_temperature_tuning": optional_bool(params, "attn_temperature_tuning", PARAMS, False),
        "bos_token_id": 200000,
        "eos_token_id": 200001,
        "floor_scale": int(optional_number(params, "floor_scale", PARAMS) or 8192),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": step,
        "intermediate_size": expert,
        "intermediate_size_mlp": dense,
        "max_position_embeddings": positions,
        "model_type": "llama4_text",
        "moe_layers": list(range(step - 1, layers, step)) if moe else [],
        "no_rope_layer_interval": interval or layers + 1,
        "no_rope_layers": [int(not _is_nope(layer, interval)) for layer in range(layers)],
        "num_attention_heads": n_heads,
        "num_experts_per_tok": optional_int(moe, "top_k", MOE_ARGS, 1),
        "num_hidden_layers": layers,
        "num_key_value_heads": n_kv_heads,
        "num_local_experts": experts,
        "pad_token_id": 200018 if vocab > 200018 else None,
        "rms_norm_eps": require_number(params, "norm_eps", PARAMS) if params.get("norm_eps") is not None else 1e-5,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_qk_norm": optional_bool(params, "use_qk_norm", PARAMS, False),
        "vocab_size": vocab,
        **rope_keys(rope),
    }
    text = dict(sorted(text.items()))
    notices = (*notices, *said, *unused_keys(params, _KNOWN, PARAMS, CONFIG))
    if params.get("vision_args") is None:
        return Translated(text, notices)
    del text["architectures"]
    config = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "boi_token_index": 200080,
        "eoi_token_index": 200081,
        "image_token_index": 200092,
        "model_type": "llama4",
        "text_config": text,
        "tie_word_embeddings": False,
        "vision_config": vision_config(optional_mapping(params, "vision_args", PARAMS)),
    }
    return Translated(config, notices)


# Layers


def _moe_args(text: Mapping[str, Any], where: str, sizes: Mapping[str, int]) -> dict[str, Any] | None:
    """The ``moe_args`` of params.json, None if no layer has experts."""
    layers = sizes["n_layers"]
    moe = moe_layers(text, where, layers)
    if not moe:
        return None
    step = moe[0] + 1
    if moe != list(range(step - 1, layers, step)):
        raise ConfigError(
            f"{where}: moe_layers must be all layers, or the last of every so many, for {TARGET}, found {moe}; Meta's "
            "code has no others"
        )
    out = {
        "num_experts": sizes["n_experts"],
        "capacity_factor": 1.0,
        "auto_scale_F": True,
        "top_k": optional_int(text, "num_experts_per_tok", where, 1),
    }
    return out if step == 1 else {**out, "interleave_moe_layer_step": step}


def _nope_interval(text: Mapping[str, Any], where: str, layers: int) -> int | None:
    """The interval of layers without RoPE; None if all have it."""
    said = text.get("no_rope_layers")
    if not said:
        interval: int | None = require_int(text, "no_rope_layer_interval", where)
        return interval if interval is not None and interval <= layers else None
    if not isinstance(said, list):
        raise ConfigError(f"{where}: no_rope_layers must be a list, found {str(said)[:80]}; correct {CONFIG}")
    without = [layer for layer, has_rope in enumerate(said[:layers]) if not has_rope]
    interval = without[0] + 1 if without else None
    if without != [layer for layer in range(layers) if _is_nope(layer, interval or 0)]:
        raise ConfigError(
            f"{where}: no_rope_layers must be 0 at every so many layers for {TARGET}, found it at {without}; Meta's "
            "code has no others"
        )
    return interval


def _is_nope(layer: int, interval: int) -> bool:
    return interval > 0 and (layer + 1) % interval == 0


def _chunk(text: Mapping[str, Any], where: str) -> int | None:
    return None if text.get("attention_chunk_size") is None else require_int(text, "attention_chunk_size", where)


# RoPE


def _rope_problem(rope: Rope) -> str | None:
    """Why params.json cannot express this RoPE, or None."""
    wired = {key: SCALING[key] for key in ("original_max_position_embeddings", "low_freq_factor")}
    return scaling_problem(rope, wired, TARGET)


def _rope_of_params(params: Mapping[str, Any], options: ConfigOptions) -> tuple[Rope, tuple[str, ...]]:
    def scaling() -> tuple[dict[str, Any], tuple[str, ...]]:
        said = {
            "factor": options.rope_factor or optional_number(params, "rope_scaling_factor", PARAMS),
            "high_freq_factor": optional_number(params, "rope_high_freq_factor", PARAMS),
        }
        parameters = {**SCALING, **{key: value for key, value in said.items() if value is not None}}
        if said["factor"] is not None:
            return parameters, ()
        return parameters, (
            f"{PARAMS} does not hold the RoPE factor: took {SCALING['factor']:g}, as in Meta's code; pass "
            "`rope_factor=` to say otherwise",
        )

    return rope_of_params(params, options, optional_number(params, "rope_theta", PARAMS) or THETA, scaling)


def _positions(sizes: Mapping[str, int], options: ConfigOptions) -> tuple[int, tuple[str, ...]]:
    if options.max_positions is not None:
        return options.max_positions, ()
    found = releases.find(sizes)
    positions, source = (found.max_positions, f"as in the base model of {found.name}") if found else (
        262144, "as in the base models of Llama 4")  # fmt: skip
    return positions, took_positions(positions, f", {source}")


def _is_ours(params: Mapping[str, Any]) -> bool:
    sizes = all(key in params for key in ("dim", "n_layers", "n_heads"))
    return sizes and any(params.get(key) is not None for key in ("moe_args", "nope_layer_interval"))
