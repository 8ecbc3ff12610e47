"""Llama 3.2 Vision: the sizes and layers in Hugging Face's config.json; ``mllama.params`` translates it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import CONFIG, base_dims, optional_bool, optional_mapping, require_int

TEXT = f"{CONFIG}: text_config"
VISION = f"{CONFIG}: vision_config"

NEW_TOKENS = 8
"""Embedding rows for special tokens in addition to the vocabulary, in Hugging Face's and Meta's model."""

MOST_LAYERS = 10_000
MOST_TILES = 64
"""A limit on sizes from an untrusted file, before lists of that length are made."""


_TEXT_DEFAULTS = {
    "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "hidden_act": "silu", "rope_theta": 500000.0,
}  # fmt: skip
"""Defaults of transformers' MllamaTextConfig."""

_CROSS_DEFAULT = (3, 8, 13, 18, 23, 28, 33, 38)

_RATIOS_DEFAULT = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


@dataclass(frozen=True)
class VisionModel:
    """The constants of Meta's vision model; field names are those of Hugging Face's vision_config."""

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
        """The input width of the projection: the last layer's and the intermediate layers' outputs."""
        return self.hidden_size * (len(self.intermediate_layers_indices) + 1)


WIRED = VisionModel()
"""As in Meta's code (``llama3/multimodal/model.py``), which are also the defaults of MllamaVisionConfig."""


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of both models; raises ConfigError for missing or invalid values."""
    text = text_part(config)
    if optional_bool(text, "tie_word_embeddings", TEXT, False):
        raise ConfigError(
            f"{TEXT}: tie_word_embeddings must be false for Llama 3.2 Vision, found true; its output has no rows for "
            f"the {NEW_TOKENS} tokens that the embedding has beside the vocabulary; correct {CONFIG}"
        )
    vision = vision_part(config)
    tiles = at_most(vision, "max_num_tiles", VISION, MOST_TILES)
    patch, image = require_int(vision, "patch_size", VISION), require_int(vision, "image_size", VISION)
    return {
        **base_dims(text, where=TEXT),
        "new_tokens": NEW_TOKENS,
        "tiles": tiles,
        "ratios": len(ratios_part(vision, tiles)) + 1,
        "patch": patch,
        "n_tokens": (image // patch) ** 2 + 1,
        "channels": require_int(vision, "num_channels", VISION),
        "vision_dim": require_int(vision, "hidden_size", VISION),
        "vision_ffn": require_int(vision, "intermediate_size", VISION),
        "vision_layers": require_int(vision, "num_hidden_layers", VISION),
        "vision_global_layers": require_int(vision, "num_global_layers", VISION),
        "vision_out": require_int(vision, "vision_output_dim", VISION),
    }


def tokens(dims: Mapping[str, int]) -> int:
    """The number of embedding rows: the vocabulary and the additional special tokens."""
    return dims["vocab_size"] + dims["new_tokens"]


def sets(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The layer sets with self- and with cross-attention, and the positions of tiles for each aspect ratio.

    The tile at row r and column c of the grid is cell r*tiles + c; aspect ratio i has the positions from (i + 1)*tiles
    on, those before are for "no image".
    """
    text, vision = text_part(config), vision_part(config)
    layers = at_most(text, "num_hidden_layers", TEXT, MOST_LAYERS)
    cross = cross_part(text, layers)
    tiles = at_most(vision, "max_num_tiles", VISION, MOST_TILES)
    places = []
    for number, (height, width) in enumerate(ratios_part(vision, tiles), start=1):
        for at in range(height * width):
            row, column = divmod(at, width)
            places.append((number * tiles + at) * tiles**2 + row * tiles + column)
    return {"self": [layer for layer in range(layers) if layer not in cross], "cross": cross, "tiles": places}


def aspect_ratios(tiles: int) -> list[tuple[int, int]]:
    """All aspect ratios of at most ``tiles`` tiles, in the order of transformers' image processor."""
    sides = range(1, tiles + 1)
    return [(height, width) for height in sides for width in sides if height * width <= tiles]


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's config, with transformers' defaults."""
    text = optional_mapping(config, "text_config", CONFIG)
    theta = {"rope_theta"} if text.get("rope_parameters") or text.get("rope_scaling") else set()
    inner = {**optional_mapping(text, "rope_parameters", TEXT), **optional_mapping(text, "rope_scaling", TEXT)}
    left_out = theta if "rope_theta" in inner else set()
    return {**{key: value for key, value in _TEXT_DEFAULTS.items() if key not in left_out}, **text}


def vision_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The vision model's config, with transformers' defaults."""
    defaults = {**vars(WIRED), "vision_output_dim": WIRED.vision_output_dim, "image_size": 448, "max_num_tiles": 4}
    return {**defaults, **optional_mapping(config, "vision_config", CONFIG)}


def at_most(content: Mapping[str, Any], key: str, where: str, most: int) -> int:
    value = require_int(content, key, where)
    if value > most:
        raise ConfigError(f"{where}: {key} must be a whole number from 1 to {most}, found {value}; correct {where}")
    return value


def cross_part(text: Mapping[str, Any], layers: int) -> list[int]:
    said = text.get("cross_attention_layers")
    cross = list(_CROSS_DEFAULT) if said is None else said
    sound = isinstance(cross, list) and all(type(layer) is int and 0 <= layer < layers for layer in cross)
    if not sound or len(set(cross)) < len(cross):
        raise ConfigError(
            f"{TEXT}: cross_attention_layers must be numbers of layers from 0 to {layers - 1}, each once, found "
            f"{str(cross)[:80]}; correct {CONFIG}"
        )
    return sorted(cross)


def ratios_part(vision: Mapping[str, Any], tiles: int) -> list[tuple[int, int]]:
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
