"""Llama 3.2 Vision: sizes and layers in Hugging Face's config.json, and its translation from and to params.json.

What params.json says of the text model it says as a Llama's does, so Llama's translation does that part. Of the vision
model it says only the size of a tile and how many there are: the rest is written into Meta's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import (
    CONFIG,
    MAX_SIZE,
    PARAMS,
    ConfigOptions,
    Translated,
    agreed_vocab,
    base_dims,
    check_not_quantized,
    optional_bool,
    optional_int,
    optional_mapping,
    require_int,
)
from ckpt_convert.models.core.params import Weights, flat
from ckpt_convert.models.llama import config as llama_config
from ckpt_convert.models.llama import params as llama_params

TEXT = f"{CONFIG}: text_config"
VISION = f"{CONFIG}: vision_config"
TARGET = "a Llama 3.2 Vision params.json"

NEW_TOKENS = 8
"""Embeddings that Hugging Face's model and Meta's have beside those of the vocabulary."""

MOST_LAYERS = 10_000
MOST_TILES = 64
"""What nobody has more of: sizes are believed before any list of that length is made."""

VISION_KEYS = ("vision_chunk_size", "vision_max_num_chunks", "vision_num_cross_attention_layers")

_TEXT_DEFAULTS = {
    "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "hidden_act": "silu", "rope_theta": 500000.0,
}  # fmt: skip
"""What transformers' MllamaTextConfig takes for keys that are absent."""

_CROSS_DEFAULT = (3, 8, 13, 18, 23, 28, 33, 38)

_RATIOS_DEFAULT = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


@dataclass(frozen=True)
class VisionModel:
    """What Meta's code has no setting for; the fields are called as in Hugging Face's vision_config."""

    hidden_size: int = 1280
    num_hidden_layers: int = 32
    num_global_layers: int = 8
    attention_heads: int = 16
    intermediate_size: int = 5120
    num_channels: int = 3
    patch_size: int = 14
    intermediate_layers_indices: tuple[int, ...] = (3, 7, 15, 23, 30)

    @property
    def vision_output_dim(self) -> int:
        """The width of what the projection takes: the last layer and those in between."""
        return self.hidden_size * (len(self.intermediate_layers_indices) + 1)


WIRED = VisionModel()
"""As in Meta's code (``llama3/multimodal/model.py``), and as MllamaVisionConfig takes what is absent."""

RELEASES = {(4096, 32, 8): ("Llama 3.2 11B Vision", 1), (8192, 80, 20): ("Llama 3.2 90B Vision", 8)}
"""Name and number of files, by dim, self-attention layers and cross-attention layers."""


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of both models under the table's symbols; raises ConfigError for what is missing or unusable."""
    text = _text(config)
    if optional_bool(text, "tie_word_embeddings", TEXT, False):
        raise ConfigError(
            f"{TEXT}: tie_word_embeddings must be false for Llama 3.2 Vision, found true; its output has no rows for "
            f"the {NEW_TOKENS} tokens that the embedding has beside the vocabulary; correct {CONFIG}"
        )
    vision = _vision(config)
    tiles = _at_most(vision, "max_num_tiles", VISION, MOST_TILES)
    patch, image = require_int(vision, "patch_size", VISION), require_int(vision, "image_size", VISION)
    return {
        **base_dims(text, where=TEXT),
        "new_tokens": NEW_TOKENS,
        "tiles": tiles,
        "ratios": len(_ratios(vision, tiles)) + 1,
        "patch": patch,
        "n_tokens": (image // patch) ** 2 + 1,
        "channels": require_int(vision, "num_channels", VISION),
        "vision_dim": require_int(vision, "hidden_size", VISION),
        "vision_ffn": require_int(vision, "intermediate_size", VISION),
        "vision_layers": require_int(vision, "num_hidden_layers", VISION),
        "vision_global_layers": require_int(vision, "num_global_layers", VISION),
        "vision_out": require_int(vision, "vision_output_dim", VISION),
    }


def sets(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The numbers of the self- and the cross-attention layers, and the places of tiles in a row of each aspect ratio.

    A tile that is in the grid at row r and column c is cell r*tiles + c; the aspect ratio number i has the places from
    (i + 1)*tiles on, those before are for no image at all.
    """
    text, vision = _text(config), _vision(config)
    layers = _at_most(text, "num_hidden_layers", TEXT, MOST_LAYERS)
    cross = _cross(text, layers)
    tiles = _at_most(vision, "max_num_tiles", VISION, MOST_TILES)
    places = []
    for number, (height, width) in enumerate(_ratios(vision, tiles), start=1):
        for at in range(height * width):
            row, column = divmod(at, width)
            places.append((number * tiles + at) * tiles**2 + row * tiles + column)
    return {"self": [layer for layer in range(layers) if layer not in cross], "cross": cross, "tiles": places}


def is_params(params: Mapping[str, Any]) -> str | None:
    """What in a params.json says that it is a Llama 3.2 Vision, in words, or None."""
    key = "vision_num_cross_attention_layers"
    params = flat(params)
    cross = params.get(key)
    return f"{PARAMS} has {key}" if isinstance(cross, int) and cross > 0 and "dim" in params else None


def hf_to_params(
    config: Mapping[str, Any], options: ConfigOptions | None = None, *, vocab_size: int | None = None
) -> Translated:
    """The params.json that Meta's code needs for this config.json; notices name what it cannot hold.

    Raises ConfigError for what Meta's code cannot run: other cross-attention layers, another vision model.
    """
    sizes = dims(config)
    text, vision = _text(config), _vision(config)
    check_not_quantized(config, ("quantization_config",), CONFIG, TARGET)
    _check_vision(vision, sizes)
    cross = _cross(text, sizes["n_layers"])
    own = sizes["n_layers"] - len(cross)
    places = cross_layers(own, len(cross))
    if not cross or cross != places:
        raise ConfigError(
            f"{TEXT}: cross_attention_layers must be {places} for {TARGET} with {own} self-attention and {len(cross)} "
            f"cross-attention layers, found {cross}; Meta's code puts them there"
        )
    llama = llama_config.hf_to_params({**text, "num_hidden_layers": own}, options, vocab_size=vocab_size)
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
    sizes = {key: _at_most(params, key, PARAMS, most.get(key, MAX_SIZE)) for key in VISION_KEYS}
    _at_most(params, "n_layers", PARAMS, MOST_LAYERS)
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


def release(config: Mapping[str, Any]) -> str | None:
    """The name of the release with the shape of this config.json."""
    found = _release(config)
    return found[0] if found else None


def model_parallel(config: Mapping[str, Any]) -> int | None:
    """How many files the release with this shape came in."""
    found = _release(config)
    return found[1] if found else None


def cross_layers(own: int, cross: int) -> list[int]:
    """The numbers of the cross-attention layers among all, where Meta's code has so many of each.

    One stands before every k-th self-attention layer, counted from the last, where k is own/cross rounded up.
    """
    step = -(-own // max(cross, 1))
    before = list(range(own))[::-1][::step][:cross][::-1]
    return [layer + number for number, layer in enumerate(before)]


def aspect_ratios(tiles: int) -> list[tuple[int, int]]:
    """Every shape of an image of at most so many tiles, in the order of transformers' image processor."""
    sides = range(1, tiles + 1)
    return [(height, width) for height in sides for width in sides if height * width <= tiles]


_LLAMA_ONLY = ("architectures", "attention_bias", "attention_dropout", "head_dim", "mlp_bias", "pretraining_tp")
"""What a Llama's config.json has and MllamaTextConfig has not."""


def _release(config: Mapping[str, Any]) -> tuple[str, int] | None:
    text = _text(config)
    layers = require_int(text, "num_hidden_layers", TEXT)
    cross = len(_cross(text, layers))
    return RELEASES.get((require_int(text, "hidden_size", TEXT), layers - cross, cross))


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's part, with transformers' defaults."""
    text = optional_mapping(config, "text_config", CONFIG)
    theta = {"rope_theta"} if text.get("rope_parameters") or text.get("rope_scaling") else set()
    inner = {**optional_mapping(text, "rope_parameters", TEXT), **optional_mapping(text, "rope_scaling", TEXT)}
    left_out = theta if "rope_theta" in inner else set()
    return {**{key: value for key, value in _TEXT_DEFAULTS.items() if key not in left_out}, **text}


def _vision(config: Mapping[str, Any]) -> dict[str, Any]:
    """The vision model's part, with transformers' defaults."""
    defaults = {**vars(WIRED), "vision_output_dim": WIRED.vision_output_dim, "image_size": 448, "max_num_tiles": 4}
    return {**defaults, **optional_mapping(config, "vision_config", CONFIG)}


def _at_most(content: Mapping[str, Any], key: str, where: str, most: int) -> int:
    value = require_int(content, key, where)
    if value > most:
        raise ConfigError(f"{where}: {key} must be a whole number from 1 to {most}, found {value}; correct {where}")
    return value


def _cross(text: Mapping[str, Any], layers: int) -> list[int]:
    said = text.get("cross_attention_layers")
    cross = list(_CROSS_DEFAULT) if said is None else said
    sound = isinstance(cross, list) and all(type(layer) is int and 0 <= layer < layers for layer in cross)
    if not sound or len(set(cross)) < len(cross):
        raise ConfigError(
            f"{TEXT}: cross_attention_layers must be numbers of layers from 0 to {layers - 1}, each once, found "
            f"{str(cross)[:80]}; correct {CONFIG}"
        )
    return sorted(cross)


def _ratios(vision: Mapping[str, Any], tiles: int) -> list[tuple[int, int]]:
    said = vision.get("supported_aspect_ratios")
    ratios = list(_RATIOS_DEFAULT) if said is None else said
    sound = isinstance(ratios, list) and all(
        isinstance(ratio, list | tuple)
        and len(ratio) == 2
        and all(type(side) is int and side > 0 for side in ratio)
        and ratio[0] * ratio[1] <= tiles
        for ratio in ratios
    )
    if not sound:
        raise ConfigError(
            f"{VISION}: supported_aspect_ratios must be pairs of numbers of tiles, of at most {tiles} together, found "
            f"{str(ratios)[:80]}; correct {CONFIG}"
        )
    return [(ratio[0], ratio[1]) for ratio in ratios]


def _check_vision(vision: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Raise ConfigError unless this is the one vision model of Meta's code."""
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
    ratios = _ratios(vision, sizes["tiles"])
    if sorted(ratios) != sorted(aspect_ratios(sizes["tiles"])):
        raise ConfigError(
            f"{VISION}: supported_aspect_ratios must be all of at most {sizes['tiles']} tiles for {TARGET}, found "
            f"{str([list(ratio) for ratio in ratios])[:80]}"
        )
    optional_int(vision, "image_size", VISION, 448)
