"""Models of a family without a table: their checkpoints can be re-sharded, but not converted to another format.

A table is made from the headers, with one literal row for the tensors of each shape, so that everything that walks a
table (plans, the checkpointer, verification) needs no second path. The tensors have no meaning: no row is tied, none
is optional, and keys stay as stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ckpt_convert.checkpoint.model import Model
from ckpt_convert.checkpoint.tensor_info import SourceTensor
from ckpt_convert.models import FAMILIES, Family
from ckpt_convert.models.core.config import type_of
from ckpt_convert.models.core.table import Dims, Key, Row

NAME = "unknown"


def generic_model(config: Mapping[str, Any], scheme: str | None, tensors: Iterable[SourceTensor]) -> Model:
    """The model of a Hugging Face checkpoint of an unknown family; ``scheme`` names an unknown quantization, if any."""
    why = _why(config) if scheme is None else f"quantized ({scheme}), which no table reads"
    made = generic_family(tensors)
    tied = config.get("tie_word_embeddings") is True  # for the record only: no row is tied
    dims = Dims({"tied": int(tied)}).with_embedding_axis(0)
    return Model(made, why, config, dims, tied, (f"{why}: keys are taken as they are",))


def verbatim_model(tensors: Iterable[SourceTensor]) -> Model:
    """The model of which nothing is known but its tensors, as they are stored."""
    return Model(generic_family(tensors), "keys as stored", {}, Dims({"tied": 0}).with_embedding_axis(0), False)


def generic_family(tensors: Iterable[SourceTensor]) -> Family:
    """The table of exactly these tensors, in Hugging Face's format alone."""
    rows: dict[tuple[int, ...], Row] = {}  # of 100,000 tensors only a few shapes are different
    literal = {}
    for tensor in tensors:
        row = rows.get(tensor.shape)
        if row is None:
            row = rows[tensor.shape] = Row("tensor", tuple(map(str, tensor.shape)), hf=Key("", is_literal_key=True))
        literal[tensor.key] = row
    return Family(
        name=NAME,
        title="any other model",
        model_types=(),
        rows=tuple(rows.values()),
        dims=_dims,
        indices={},
        literal=literal,
    )


def _dims(config: Mapping[str, Any]) -> dict[str, int]:
    return {"tied": 0}


def _why(config: Mapping[str, Any]) -> str:
    model_type = type_of(config)
    if model_type is None:
        return "config.json names no model_type"
    if not FAMILIES.has_type(model_type):
        return f"{'model_type' if 'model_type' in config else '_class_name'} {model_type!r} has no table"
    architectures = config.get("architectures") or [None]
    return f"architectures is {architectures[0]!r}, which has no table"
