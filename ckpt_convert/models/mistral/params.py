"""Dense Mistral models: between Hugging Face's config.json and mistral-inference's params.json.

Mistral's params.json has head_dim and the feed-forward width. It may lack the RoPE base and the maximum position; a
documented rule gives both, with a notice.
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
    even_head_dim,
    optional_bool,
    optional_int,
    optional_mapping,
    optional_str,
    require_int,
    require_number,
    unused_keys,
)
from ckpt_convert.models.core.params import Weights, lost_positions, took_positions
from ckpt_convert.models.core.rope import DEFAULT_THETA, Rope, expressible, rope_keys, theta_of_params
from ckpt_convert.models.mistral.config import dims

TARGET = "a Mistral params.json"


CLASS_WINDOW = 4096
"""The default of transformers' MistralConfig for sliding_window."""


MAX_POSITIONS = 32768
"""max_position_embeddings in what transformers' converter writes for a params.json without it."""


OTHER_FAMILY = (
    "multiple_of", "moe", "vision_encoder", "multimodal", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim",
)  # fmt: skip
"""Keys of Llama, Mixtral, Pixtral, Voxtral and Mistral's models with latent attention."""


KNOWN = frozenset((
    *OTHER_FAMILY, "dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size",
    "rope_theta", "sliding_window", "_sliding_window", "max_position_embeddings", "max_seq_len", "tied_embeddings",
    "yarn", "llama_4_scaling", "use_biases", "activation", "model_type", "quantization", "lora",
    # Run-time settings of mistral-inference, no properties of the model; causal is checked.
    "max_batch_size", "causal",
))  # fmt: skip


def hf_to_params(
    config: Mapping[str, Any], options: ConfigOptions | None = None, *, vocab_size: int | None = None
) -> Translated:
    """The params.json that mistral-inference needs for this config.json.

    Notices name what params.json cannot hold. ``vocab_size`` is the number of the embedding's rows, if known.
    Raises ConfigError for a config that mistral-inference cannot run, naming the field.
    """
    options = options or ConfigOptions()
    sizes = dims(config)
    check_silu(config, "hidden_act", CONFIG, TARGET)
    check_not_quantized(config, ("quantization_config",), CONFIG, TARGET)
    _check_one_layer_type(config)
    rope, rope_notices = expressible(config, options, TARGET, _rope_problem)
    window, window_notices = _window_of_config(config)
    params: dict[str, Any] = {
        "dim": sizes["dim"],
        "n_layers": sizes["n_layers"],
        "head_dim": sizes["head_dim"],
        "hidden_dim": sizes["ffn_dim"],
        "n_heads": sizes["n_heads"],
        "n_kv_heads": sizes["n_kv_heads"],
        "norm_eps": require_number(config, "rms_norm_eps", CONFIG),
        "vocab_size": agreed_vocab(config, vocab_size, CONFIG),
        # Always written: if absent, it is 1e6 in mistral-inference and 1e4 elsewhere.
        "rope_theta": DEFAULT_THETA if rope.theta is None else rope.theta,
    }
    if window is not None:
        params["sliding_window"] = window
    if sizes["tied"]:
        params["tied_embeddings"] = True
    return Translated(params, (*rope.notices, *rope_notices, *window_notices, *_lost_positions(config)))


def params_to_hf(params: Mapping[str, Any], weights: Weights, options: ConfigOptions | None = None) -> Translated:
    """The config.json for a Mistral params.json, with RoPE in both forms; the caller adds the dtype.

    It is also tied if tied_embeddings is true. The default of rope_theta is 1e4 with a sliding window and 1e6 without,
    as in the releases of that time (mistral-inference's rule before it dropped windows); that of the maximum position
    is 32768; both with a notice.

    Raises ConfigError for a params.json of another family, for what MistralConfig cannot express (windows that differ
    by layer, YaRN, biases) and for sizes that disagree with the shapes; UsageError for a rope_theta against the file's.
    """
    options = options or ConfigOptions()
    _check_ours(params)
    window = _window_of_params(params)
    theta, theta_notices = _theta(params, options, window)
    positions, position_notices = _positions(params, options)
    config = {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": positions,
        "model_type": "mistral",
        "rms_norm_eps": require_number(params, "norm_eps", PARAMS),
        "sliding_window": window,
        "tie_word_embeddings": weights.tied or optional_bool(params, "tied_embeddings", PARAMS, False),
        "use_cache": True,
        "vocab_size": agreed_vocab(params, weights.vocab_size, PARAMS),
        **_sizes_of_params(params, weights.ffn_dim),
        **rope_keys(Rope(theta)),
    }
    notices = (
        *theta_notices,
        *_dropped_yarn(params, options),
        *position_notices,
        *unused_keys(params, KNOWN, PARAMS, CONFIG),
    )
    return Translated(dict(sorted(config.items())), notices)


def is_params(params: Mapping[str, Any]) -> str | None:
    """The reason why a params.json is a dense Mistral's, in words, or None.

    None for those of Llama, Mixtral, Pixtral, Voxtral and Mamba.
    """
    ours = all(params.get(key) is not None for key in ("dim", "n_layers", "n_heads", "hidden_dim"))
    if not ours or any(params.get(key) is not None for key in OTHER_FAMILY):
        return None
    return f"{PARAMS} has hidden_dim" if params.get("model_type") in (None, "transformer") else None


def _check_one_layer_type(config: Mapping[str, Any]) -> None:
    layer_types = config.get("layer_types")
    if isinstance(layer_types, list) and any(each != layer_types[0] for each in layer_types):
        raise ConfigError(
            f"{CONFIG}: layer_types must be the same for all layers, found several; MistralConfig ignores them, "
            f"and {TARGET} has one window for all"
        )


def _rope_problem(rope: Rope) -> str | None:
    """Why params.json cannot express this RoPE, in words, or None."""
    return None if rope.kind == "default" else f'rope_type must be "default" for {TARGET}, found {rope.kind!r}'


def _window_of_config(config: Mapping[str, Any]) -> tuple[int | None, tuple[str, ...]]:
    if "sliding_window" not in config:
        notice = f"{CONFIG} has no sliding_window: took {CLASS_WINDOW}, as transformers does; add null to have none"
        return CLASS_WINDOW, (notice,)
    if config["sliding_window"] is None:
        return None, ()
    return require_int(config, "sliding_window", CONFIG), ()


def _lost_positions(config: Mapping[str, Any]) -> tuple[str, ...]:
    positions = optional_int(config, "max_position_embeddings", CONFIG, MAX_POSITIONS)
    return lost_positions(positions, MAX_POSITIONS)


def _check_ours(params: Mapping[str, Any]) -> None:
    for key in OTHER_FAMILY:
        if params.get(key) is not None:
            raise ConfigError(f"{PARAMS}: {key} must be absent for a dense Mistral, found it; name the right family")
    kind = optional_str(params, "model_type", PARAMS, "transformer")
    if kind != "transformer":
        raise ConfigError(f'{PARAMS}: model_type must be "transformer" for a dense Mistral, found {kind!r}')
    check_silu(params, "activation", PARAMS, "MistralConfig")
    check_not_quantized(params, ("quantization", "lora"), PARAMS, "a Mistral conversion")
    if optional_bool(params, "use_biases", PARAMS, False):
        raise ConfigError(f"{PARAMS}: use_biases must be false for MistralConfig, found true; it has no biases")
    if not optional_bool(params, "causal", PARAMS, True):
        raise ConfigError(f"{PARAMS}: causal must be true for MistralConfig, found false; it is a decoder")
    if params.get("llama_4_scaling"):
        raise ConfigError(
            f"{PARAMS}: llama_4_scaling must be null for MistralConfig, found it; MistralConfig cannot scale queries "
            "by position"
        )


def _dropped_yarn(params: Mapping[str, Any], options: ConfigOptions) -> tuple[str, ...]:
    if not optional_mapping(params, "yarn", PARAMS):
        return ()
    if not options.drop_rope_scaling:
        raise ConfigError(
            f"{PARAMS}: yarn must be null for a conversion to MistralConfig, found it; "
            "pass `drop_rope_scaling=True` to leave it out"
        )
    return (f"{PARAMS}: yarn was left out as asked",)


def _sizes_of_params(params: Mapping[str, Any], ffn_dim: int | None) -> dict[str, int]:
    dim = require_int(params, "dim", PARAMS)
    n_heads = require_int(params, "n_heads", PARAMS)
    n_kv_heads = optional_int(params, "n_kv_heads", PARAMS, n_heads)
    check_groups(n_heads, n_kv_heads, PARAMS, ("n_heads", "n_kv_heads"))
    if params.get("head_dim") is None:
        head_dim = divided_head_dim(dim, n_heads, PARAMS, ("dim", "n_heads"))
    else:
        head_dim = even_head_dim(require_int(params, "head_dim", PARAMS), PARAMS)
    width = require_int(params, "hidden_dim", PARAMS)
    if ffn_dim is not None and width != ffn_dim:
        raise ConfigError(
            f"{PARAMS}: hidden_dim is {width}, but w1 has {ffn_dim} rows; "
            "use the params.json that belongs to the weights"
        )
    return {
        "hidden_size": dim,
        "intermediate_size": width,
        "num_hidden_layers": require_int(params, "n_layers", PARAMS),
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
    }


def _window_of_params(params: Mapping[str, Any]) -> int | None:
    """The sliding window, on which both keys have to agree if both are there."""
    windows = {
        key: _one_window(params[key], key)
        for key in ("sliding_window", "_sliding_window")
        if params.get(key) is not None
    }
    if len(set(windows.values())) > 1:
        raise ConfigError(
            f"{PARAMS}: sliding_window and _sliding_window must agree, found {windows['sliding_window']} and "
            f"{windows['_sliding_window']}; keep one of them"
        )
    return next(iter(windows.values()), None)


def _one_window(value: object, key: str) -> int | None:
    """A window in any form that files have it in: a number, a string of digits, or a list over the layers."""
    if isinstance(value, list):
        each = [_one_window(item, key) for item in value]
        if len(set(each)) > 1:
            raise ConfigError(
                f"{PARAMS}: {key} must be one window for all layers, found {len(set(each))} different ones; "
                "MistralConfig cannot say windows that differ by layer"
            )
        return each[0] if each else None
    if value is None:
        return None
    # isascii: isdigit alone lets other scripts' digits and superscripts through.
    digits = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10
    return require_int({key: int(str(value)) if digits else value}, key, PARAMS)


def _theta(params: Mapping[str, Any], options: ConfigOptions, window: int | None) -> tuple[float, tuple[str, ...]]:
    said = theta_of_params(params, options)
    if said is not None:
        return float(said), ()
    theta, source = (1e6, "without a sliding window") if window is None else (1e4, "with a sliding window")
    return theta, (
        f"{PARAMS} does not hold rope_theta: took {theta:g}, as in the releases {source}; "
        "pass `rope_theta=` to say otherwise",
    )


def _positions(params: Mapping[str, Any], options: ConfigOptions) -> tuple[int, tuple[str, ...]]:
    if options.max_positions is not None:
        return options.max_positions, ()
    for key in ("max_position_embeddings", "max_seq_len"):
        if params.get(key) is not None:
            return require_int(params, key, PARAMS), ()
    return MAX_POSITIONS, took_positions(MAX_POSITIONS, "")
