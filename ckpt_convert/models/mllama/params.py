"""Llama 3.2 Vision: Meta's params.json, from and to Hugging Face's config.json.

The text model is described as in a Llama's params.json, so Llama's translation is used for it. Of the vision model,
params.json has only the size and the number of tiles: the rest are constants of Meta's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import (
    CONFIG,
    MAX_SIZE,
    PARAMS,
    ConfigOptions,
    Translated,
    agreed_vocab,
    check_not_quantized,
    optional_int,
    require_int,
)
from ckpt_convert.models.core.params import Weights, flat
from ckpt_convert.models.llama import params as llama_params
from ckpt_convert.models.mllama.config import (
    MOST_LAYERS,
    MOST_TILES,
    TEXT,
    VISION,
    WIRED,
    aspect_ratios,
    at_most,
    cross_part,
    dims,
    ratios_part,
    text_part,
    vision_part,
)

TARGET = "a Llama 3.2 Vision params.json"


VISION_KEYS = ("vision_chunk_size", "vision_max_num_chunks", "vision_num_cross_attention_layers")


def is_params(params: Mapping[str, Any]) -> str | None:
    """The evidence that a params.json is of Llama 3.2 Vision, in words, or None."""
    key = "vision_num_cross_attention_layers"
    params = flat(params)
    cross = params.get(key)
    return f"{PARAMS} has {key}" if isinstance(cross, int) and cross > 0 and "dim" in params else None


def hf_to_params(
    config: Mapping[str, Any], options: ConfigOptions | None = None, *, vocab_size: int | None = None
) -> Translated:
    """The params.json for this config.json; notices name what it cannot hold.

    Raises ConfigError for what Meta's code cannot run: other cross-attention layers, another vision model.
    """
    sizes = dims(config)
    text, vision = text_part(config), vision_part(config)
    check_not_quantized(config, ("quantization_config",), CONFIG, TARGET)
    _check_vision(vision, sizes)
    cross = cross_part(text, sizes["n_layers"])
    own = sizes["n_layers"] - len(cross)
    places = cross_layers(own, len(cross))
    if not cross or cross != places:
        raise ConfigError(
            f"{TEXT}: cross_attention_layers must be {places} for {TARGET} with {own} self-attention and {len(cross)} "
            f"cross-attention layers, found {cross}; Meta's code puts them there"
        )
    llama = llama_params.hf_to_params({**text, "num_hidden_layers": own}, options, vocab_size=vocab_size)
    content = {
        **llama.content,
        "vision_chunk_size": require_int(vision, "image_size", VISION),
        "vision_max_num_chunks": sizes["tiles"],
        "vision_num_cross_attention_layers": len(cross),
    }
    return Translated(content, llama.notices)


def params_to_hf(params: Mapping[str, Any], weights: Weights, options: ConfigOptions | None = None) -> Translated:
    """The config.json for a params.json of Llama 3.2 Vision, which is never tied; raises ConfigError."""
    params = flat(params)
    check_not_quantized(params, ("quantization_args", "lora_args"), PARAMS, "a Llama conversion")
    most = {"vision_max_num_chunks": MOST_TILES, "vision_num_cross_attention_layers": MOST_LAYERS}
    sizes = {key: at_most(params, key, PARAMS, most.get(key, MAX_SIZE)) for key in VISION_KEYS}
    at_most(params, "n_layers", PARAMS, MOST_LAYERS)
    llama = llama_params.params_to_hf(
        {key: value for key, value in params.items() if key not in VISION_KEYS},
        Weights(weights.vocab_size, weights.ffn_dim),
        options,
    )
    own, count = llama.content["num_hidden_layers"], sizes["vision_num_cross_attention_layers"]
    if count > own:
        raise ConfigError(
            f"{PARAMS}: vision_num_cross_attention_layers must be at most n_layers ({own}), found {count}; "
            f"correct {PARAMS}"
        )
    cross = cross_layers(own, count)
    text = {key: value for key, value in llama.content.items() if key not in _LLAMA_ONLY}
    text |= {
        "model_type": "mllama_text_model",
        "num_hidden_layers": own + count,
        "cross_attention_layers": cross,
        "dropout": 0.0,
        "pad_token_id": 128004 if llama.content["vocab_size"] > 128004 else None,
    }
    vision = {
        "model_type": "mllama_vision_model",
        **{key: value for key, value in vars(WIRED).items() if key != "intermediate_layers_indices"},
        "intermediate_layers_indices": list(WIRED.intermediate_layers_indices),
        "vision_output_dim": WIRED.vision_output_dim,
        "hidden_act": "gelu",
        "image_size": sizes["vision_chunk_size"],
        "initializer_range": 0.02,
        "max_num_tiles": sizes["vision_max_num_chunks"],
        "norm_eps": 1e-5,
        "supported_aspect_ratios": [list(ratio) for ratio in aspect_ratios(sizes["vision_max_num_chunks"])],
    }
    config = {
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": agreed_vocab(params, weights.vocab_size, PARAMS),
        "model_type": "mllama",
        "text_config": dict(sorted(text.items())),
        "vision_config": dict(sorted(vision.items())),
    }
    return Translated(config, llama.notices)


def cross_layers(own: int, cross: int) -> list[int]:
    """The indices of the cross-attention layers among all layers in Meta's code, given the numbers of both.

    There is one before every k-th self-attention layer, counted from the last; k is own/cross rounded up.
    """
    step = -(-own // max(cross, 1))
    before = list(range(own))[::-1][::step][:cross][::-1]
    return [layer + number for number, layer in enumerate(before)]


_LLAMA_ONLY = ("architectures", "attention_bias", "attention_dropout", "head_dim", "mlp_bias", "pretraining_tp")
"""Keys of a Llama's config.json that MllamaTextConfig lacks."""


def _check_vision(vision: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Raise ConfigError unless this is the only vision model that Meta's code has."""
    for key, value in {**vars(WIRED), "vision_output_dim": WIRED.vision_output_dim}.items():
        alias = "num_attention_heads" if key == "attention_heads" else key
        found = vision.get(alias, vision.get(key))
        if (list(found) if isinstance(found, list | tuple) else found) != (
            list(value) if isinstance(value, tuple) else value
        ):
            raise ConfigError(
                f"{VISION}: {key} must be {list(value) if isinstance(value, tuple) else value} for {TARGET}, found "
                f"{found}; Meta's code has only this vision model"
            )
    ratios = ratios_part(vision, sizes["tiles"])
    if sorted(ratios) != sorted(aspect_ratios(sizes["tiles"])):
        raise ConfigError(
            f"{VISION}: supported_aspect_ratios must be all of at most {sizes['tiles']} tiles for {TARGET}, found "
            f"{str([list(ratio) for ratio in ratios])[:80]}"
        )
    optional_int(vision, "image_size", VISION, 448)
