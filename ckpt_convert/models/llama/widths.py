"""Llama 1 to 3.3: the feed-forward width, which Meta's code computes from params.json by a rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import CONFIG, MAX_SIZE, PARAMS, optional_int, optional_number


def ffn_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The feed-forward width that Meta's code computes from a params.json (``FeedForward.__init__`` in 1, 2 and 3).

    The order of the floating-point operations matters: another order gives other widths.
    """
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of


def ffn_pair(dim: int, ffn_dim: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier (None: not written) for which Meta's rule gives this width.

    multiple_of is the largest power of two up to 256 that divides the width; the multiplier is the first round number
    that fits, else the middle of the range that does. Raises ConfigError if there is none.
    """
    multiple_of = 256
    while ffn_dim % multiple_of:
        multiple_of //= 2
    middle = (ffn_dim - multiple_of // 2 + 0.5) / int(2 * (4 * dim) / 3)
    for multiplier in (None, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, middle):
        if ffn_width(dim, multiple_of, multiplier) == ffn_dim:
            return multiple_of, multiplier
    raise ConfigError(
        f"{CONFIG}: intermediate_size {ffn_dim} cannot be written as multiple_of and ffn_dim_multiplier of {dim}"
    )


def width_of_params(params: Mapping[str, Any], dim: int, ffn_dim: int | None) -> int:
    multiple_of = optional_int(params, "multiple_of", PARAMS, 256)
    multiplier = optional_number(params, "ffn_dim_multiplier", PARAMS)
    width = 0 if (multiplier or 0) > MAX_SIZE else ffn_width(dim, multiple_of, multiplier)
    if not 0 < width <= MAX_SIZE:
        raise ConfigError(
            f"{PARAMS}: ffn_dim_multiplier must give a width from 1 to {MAX_SIZE}, found {multiplier} of dim {dim} "
            f"with multiple_of {multiple_of}; correct {PARAMS}"
        )
    if ffn_dim is not None and width != ffn_dim:
        raise ConfigError(
            f"{PARAMS}: dim {dim}, multiple_of {multiple_of} and ffn_dim_multiplier {multiplier} give a feed-forward "
            f"width of {width}, but w1 has {ffn_dim} rows; use the params.json that belongs to the weights"
        )
    return width
