"""On which axis the ranks of a Meta output cut the embedding, and what says so.

Meta's code for Llama 1 and 2 cuts its columns, that of Llama 3 its rows; each takes the params.json and the tokenizer
that are written for it. Where no file says it, the releases do.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from ckpt_convert.checkpoint.checkpoint import Checkpoint
from ckpt_convert.checkpoint.model import Model
from ckpt_convert.convert import configs, sidefiles
from ckpt_convert.convert.request import Request
from ckpt_convert.models.core.rope import read_rope
from ckpt_convert.storage.reader import read_file

_TOKENIZER_LIMIT = 1 << 28


class Cut(NamedTuple):
    """The axis, and why it is that one, in words."""

    axis: int
    why: str


def cut_of(source: Checkpoint, request: Request, like: Checkpoint | None, model: Model) -> Cut | None:
    """What the output's embedding is cut by; None where the family, or the target, leaves no choice.

    What is asked for, --like, and how the source is cut come first; then the params.json that goes with the output, the
    record, the release of these sizes, and the tokenizer.
    """
    params = model.family.params
    if request.to != "meta" or params is None or params.style_of is None:
        return None
    axes = {"llama2": 1, "llama3": 0}
    if request.config.meta_style is not None:
        return Cut(axes[request.config.meta_style], "as asked for")
    if like is not None:
        return Cut(like.model.dims["embedding_cut"], "as --like has it")
    if source.format == "meta" and len(source.ranks) > 1:
        return Cut(model.dims["embedding_cut"], f"as its {len(source.ranks)} ranks have it")
    own = None if request.config.drop_rope_scaling else configs.recorded_params(source)
    if own is not None and (said := params.style_of(json.loads(own))) is not None:
        return Cut(axes[said[0]], f"as {said[1]}")
    recorded = source.record.manifest.get("dims", {}).get("embedding_cut") if source.record is not None else None
    if recorded in (0, 1):
        return Cut(int(recorded), "as recorded")
    if model.release is not None:
        return Cut(params.embedding_cut(model.config, request.config), f"as in {model.release}")
    style = params.tokenizers.get(kind := _tokenizer(source) or "")
    if style is not None and (style == "llama3" or read_rope(model.config).kind == "default"):
        return Cut(axes[style], f"as its tokenizer is a {kind} one")
    return Cut(0, "as in Llama 3, for nothing says otherwise; --meta-style llama2 is the other way")


def _tokenizer(source: Checkpoint) -> str | None:
    """The kind of the tokenizer beside the weights."""
    from ckpt_convert.tokenizer import tokenizer

    here = sidefiles.beside(source)
    restored = source.record.carried_side_files if source.record is not None else {}
    for name in ("tokenizer.model", "tokenizer.json"):
        path = here.get(name) or restored.get(name)
        if path is not None:
            data = read_file(path, _TOKENIZER_LIMIT)
            return tokenizer.kind_of_json(data) if name == "tokenizer.json" else tokenizer.kind(data)
    return None
