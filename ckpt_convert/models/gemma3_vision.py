"""Gemma 3 with vision: Gemma 3's text under ``language_model.``, SigLIP's tower, and a projector between them.

hf: the released checkpoints, as transformers 4 also writes them; transformers 5.23 saves new models with the tower's
keys without ``vision_model.``, which is a family of its own, recognized by its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.models.core.builders import rms_norm
from ckpt_convert.models.core.config import CONFIG, optional_bool, optional_mapping
from ckpt_convert.models.core.picking import prefixed
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.gemma import GEMMA3_TEXT, dims3
from ckpt_convert.models.parts import siglip

_TEXT, _VISION = "text_config", "vision_config"

_PROJECTOR = (
    *rms_norm("projector.norm", "vision_dim", hf="multi_modal_projector.mm_soft_emb_norm"),
    # Not a linear layer: the matrix is [in, out].
    Row("projector", ("vision_dim", "dim"), hf=Key("multi_modal_projector.mm_input_projection_weight")),
)


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The config dimensions of text and tower; tie_word_embeddings is at the top level, not in text_config."""
    text = optional_mapping(config, _TEXT, CONFIG)
    tied = optional_bool({"tie_word_embeddings": True, **config}, "tie_word_embeddings", CONFIG, False)
    vision = optional_mapping(config, _VISION, CONFIG)
    return {
        **dims3(text, f"{CONFIG}: {_TEXT}"),
        **siglip.dims(vision, f"{CONFIG}: {_VISION}"),
        "tied": int(tied),
    }


def _family(name: str, title: str, tower: str) -> Family:
    return Family(
        name=name,
        title=title,
        model_types=("gemma3",),
        dims=dims,
        indices={"layer": "n_layers", "vision_layer": "n_vision_layers"},
        rows=(*prefixed(GEMMA3_TEXT.rows, hf="language_model."), *_PROJECTOR, *siglip.rows(tower)),
    )


GEMMA3 = _family("gemma3", "Gemma 3 with vision", "vision_tower.vision_model")
GEMMA3_V5 = _family("gemma3_v5", "Gemma 3 with vision, as transformers 5 has it", "vision_tower")
