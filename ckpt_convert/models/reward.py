"""Reward models and other text classifiers: Llama and Mistral with a score head (one row per label) instead of lm_head.

hf: what transformers 5.23 saves of ``LlamaForSequenceClassification`` and the like; some trainers add a bias to the
score head, which transformers ignores. native: the converter for reward models of torchtune 0.6.1, whose output layer
is the score head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ckpt_convert.models.core.builders import linear
from ckpt_convert.models.core.config import CONFIG, optional_int, optional_mapping
from ckpt_convert.models.core.picking import columns
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.llama.table import LLAMA
from ckpt_convert.models.mistral.table import MISTRAL

_SCORE = (
    *linear("score", ("n_labels", "dim"), hf="score", native="output"),
    Row("score.bias", ("n_labels",), optional=True, hf=Key("score.bias")),
)


def _labels(config: Mapping[str, Any]) -> int:
    """The number of labels; transformers' default is two."""
    named = optional_mapping(config, "id2label", CONFIG)
    return len(named) or optional_int(config, "num_labels", CONFIG, 2)


def _dims(of_model: Callable[[Mapping[str, Any]], dict[str, int]], config: Mapping[str, Any]) -> dict[str, int]:
    return {**of_model(config), "n_labels": _labels(config), "tied": 0}


def _reward(model: Family, title: str, architecture: str) -> Family:
    return model.replace(
        name=f"{model.name}_reward",
        title=title,
        architectures=(architecture,),
        dims=partial(_dims, model.dims),
        params=None,
        rows=lambda rows: (*columns((row for row in rows if row.name != "output"), "hf", "native"), *_SCORE),
    )


LLAMA_REWARD = _reward(LLAMA, "Llama as a reward model or classifier", "LlamaForSequenceClassification")
MISTRAL_REWARD = _reward(MISTRAL, "Mistral as a reward model or classifier", "MistralForSequenceClassification")
