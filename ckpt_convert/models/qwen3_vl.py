"""Qwen3-VL, dense: Qwen3's text, and Qwen3.5's vision encoder with additional (deepstack) mergers, whose outputs feed
the first text layers.

hf: what transformers 5.23 saves for qwen3_vl: the keys of the releases, which are also those in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.builders import layer_norm, linear
from ckpt_convert.models.core.config import CONFIG, base_dims, optional_bool, optional_mapping
from ckpt_convert.models.core.picking import columns, with_rope
from ckpt_convert.models.core.table import Family, Row
from ckpt_convert.models.parts.decoder import ATTENTION, EMBEDDING, FFN, OUTPUT
from ckpt_convert.models.qwen3 import QK_NORM, QKVO_BIAS
from ckpt_convert.models.qwen3_5.config import VISION, vision_dims
from ckpt_convert.models.qwen3_5.table import under_language_model, vision

_TEXT = "text_config"
_DEEPSTACK = "deepstack_visual_indexes"


def _deepstack() -> Iterator[Row]:
    """The deepstack mergers, whose norm comes after merging."""
    merger = "model.visual.deepstack_merger_list.{merger}"
    yield from layer_norm("vision.deepstack.norm", "v_merged", hf=f"{merger}.norm")
    yield from linear("vision.deepstack.up", ("v_merged", "v_merged"), bias=True, hf=f"{merger}.linear_fc1")
    yield from linear("vision.deepstack.down", ("v_out", "v_merged"), bias=True, hf=f"{merger}.linear_fc2")


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of text and vision; defaults are those of transformers' Qwen3VLConfig."""
    text, where = optional_mapping(config, _TEXT, CONFIG), f"{CONFIG}: {_TEXT}"
    return {
        **base_dims({"head_dim": 128, **text}, kv_heads_default=32, where=where),
        **vision_dims(config),
        "attention_bias": int(optional_bool(text, "attention_bias", where, False)),
        "tied": int(optional_bool(config, "tie_word_embeddings", CONFIG, False)),
        "n_mergers": _n_mergers(optional_mapping(config, "vision_config", CONFIG)),
    }


def _n_mergers(part: Mapping[str, Any]) -> int:
    """The number of vision blocks with their own merger; three if the config does not say."""
    found = part.get(_DEEPSTACK, (8, 16, 24))
    if not isinstance(found, list | tuple):
        raise ConfigError(
            f"{VISION}: {_DEEPSTACK} must be a list of block numbers, found {found!r:.80}; correct {CONFIG}"
        )
    return len(found)


QWEN3_VL = Family(
    name="qwen3_vl",
    title="Qwen3-VL, dense",
    model_types=("qwen3_vl",),
    dims=dims,
    indices={"layer": "n_layers", "block": "n_blocks", "merger": "n_mergers"},
    rows=columns(
        (
            *under_language_model(with_rope((*EMBEDDING, *ATTENTION, *QK_NORM, *QKVO_BIAS, *FFN, *OUTPUT), "half")),
            *vision(),
            *_deepstack(),
        ),
        "hf",
    ),
)
