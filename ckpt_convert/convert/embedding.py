"""The axis on which tensor-parallel ranks of a Meta output split the embedding, and the evidence for it.

Meta's Llama 2 code splits its columns, the Llama 3 code its rows (``Params.styles``); each expects its own params.json
and tokenizer. Where no file shows it, the known releases do.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.model import Model
from ckpt_convert.convert import auxiliary_files, config_files
from ckpt_convert.convert.request import Request
from ckpt_convert.models.core.config import AXES
from ckpt_convert.models.core.params import Styles
from ckpt_convert.models.core.rope import read_rope
from ckpt_convert.models.core.rows import recorded_embedding_axis

_TOKENIZER_LIMIT = 1 << 28


class EmbeddingSplit(NamedTuple):
    """The axis, the evidence for it, and a description of this split."""

    axis: int
    reason: str
    description: str


def embedding_split(
    source: Identified, request: Request, like: Identified | None, model: Model
) -> EmbeddingSplit | None:
    """The split of the output's embedding; None where the family, or the target, leaves no choice."""
    styles = model.family.params.styles if model.family.params is not None else None
    if request.to != "meta" or styles is None:
        return None
    axis, why = _axis(source, request, like, model, styles)
    return EmbeddingSplit(axis, why, styles.split_names[axis])


def _axis(
    source: Identified, request: Request, like: Identified | None, model: Model, styles: Styles
) -> tuple[int, str]:
    """The axis, and the evidence for it.

    In this order: the request, ``like``, the source's own split, the params.json of the output, the record, the release
    with these sizes, and the tokenizer.
    """
    if request.config.meta_style is not None:
        return AXES[request.config.meta_style], "as asked for"
    if like is not None:
        return like.model.dims.embedding_axis, "as `like=` has it"
    if source.format == "meta" and len(source.ranks) > 1:
        return model.dims.embedding_axis, f"as its {len(source.ranks)} ranks have it"
    own = None if request.config.drop_rope_scaling else config_files.recorded_params(source)
    if own is not None and (said := styles.of_params(json.loads(own))) is not None:
        return AXES[said[0]], f"as {said[1]}"
    recorded = recorded_embedding_axis(source.record.manifest.get("dims", {})) if source.record is not None else None
    if recorded is not None:
        return recorded, "as recorded"
    if model.release is not None:
        return AXES[styles.of_config(model.config, request.config)], f"as in {model.release}"
    style = styles.tokenizers.get(kind := _tokenizer(source) or "")
    if style is not None and (style not in styles.unscaled or read_rope(model.config).kind == "default"):
        return AXES[style], f"as its tokenizer is a {kind} one"
    return AXES[styles.default], styles.default_reason


def _tokenizer(source: Identified) -> str | None:
    """The kind of the source's tokenizer."""
    from ckpt_convert.tokenizer import translation

    here = auxiliary_files.find_auxiliary(source)
    restored = source.record.passthrough_files if source.record is not None else {}
    for name in ("tokenizer.model", "tokenizer.json"):
        path = here.get(name) or restored.get(name)
        if path is not None:
            data = path.read(_TOKENIZER_LIMIT)
            return (
                translation.tokenizer_json_kind(data) if name == "tokenizer.json" else translation.tokenizer_kind(data)
            )
    return None
