"""Llama 4: the feed-forward widths, which Meta's code computes from params.json by a rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import (
    MAX_SIZE,
    PARAMS,
    optional_bool,
    optional_int,
    optional_number,
    require_number,
)
from ckpt_convert.models.llama.widths import ffn_width
from ckpt_convert.models.llama4.config import MOE_ARGS, TEXT


@dataclass(frozen=True)
class Widths:
    """The rule for both widths in params.json: multiple_of, ffn_dim_multiplier, ffn_exp and moe_args.auto_scale_F."""

    multiple_of: int
    multiplier: float
    expansion: float
    is_scaled: bool


def dense_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The width of a layer without experts, as Meta's code computes it: Llama 3's rule."""
    return ffn_width(dim, multiple_of, multiplier)


def expert_width(dim: int, rule: Widths, capacity: float = 1.0) -> int:
    """The width of an expert, with the exact floating-point arithmetic of Meta's code (``MoE.__init__``)."""
    hidden = int(2 * int(rule.expansion * dim) / 3)
    hidden = int(rule.multiplier * hidden)
    if rule.is_scaled:
        hidden = int(hidden / (capacity + 1))
    return hidden + -hidden % rule.multiple_of


_RELEASED = Widths(2048, 1.2, 4.0, True)


def width_rule(sizes: Mapping[str, int], has_experts: bool) -> Widths:
    """A rule that gives both widths: that of the releases if it does, else the first one found."""
    dim, dense, expert = sizes["dim"], sizes["dense_dim"], sizes["ffn_dim"]
    for rule in (_RELEASED, *_rules(dim, dense, expert)):
        found = expert_width(dim, rule) if has_experts else expert
        if dense_width(dim, rule.multiple_of, rule.multiplier) == dense and found == expert:
            return rule
    raise ConfigError(
        f"{TEXT}: intermediate_size {expert} and intermediate_size_mlp {dense} cannot be written as one multiple_of, "
        f"ffn_dim_multiplier and ffn_exp of {dim}"
    )


def _rules(dim: int, dense: int, expert: int) -> Iterator[Widths]:
    multiple_of = 2048
    while multiple_of > 1 and (dense % multiple_of or expert % multiple_of):
        multiple_of //= 2
    base = int(2 * (4 * dim) / 3)
    for multiplier in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, (dense - multiple_of // 2 + 0.5) / base):
        # The first is the common expansion; the others give the middle of the range that rounds up to the width.
        middle = (expert - multiple_of // 2 + 0.5) / multiplier
        for expansion in (4.0, 1.5 * (middle + 0.5) / dim, 1.5 * middle / dim):
            yield Widths(multiple_of, multiplier, expansion, False)


def widths_of_params(params: Mapping[str, Any], dim: int, moe: Mapping[str, Any]) -> tuple[int, int]:
    multiple_of = optional_int(params, "multiple_of", PARAMS, 256)
    multiplier = optional_number(params, "ffn_dim_multiplier", PARAMS)
    if multiplier is not None and multiplier > MAX_SIZE:
        raise ConfigError(f"{PARAMS}: ffn_dim_multiplier must be at most {MAX_SIZE}, found {multiplier}")
    dense = dense_width(dim, multiple_of, multiplier)
    if not moe:
        return dense, dense
    expansion = require_number(params, "ffn_exp", PARAMS)
    capacity = optional_number(moe, "capacity_factor", MOE_ARGS) or 1.0
    is_scaled = optional_bool(moe, "auto_scale_F", MOE_ARGS, True)
    if expansion > MAX_SIZE:
        raise ConfigError(f"{PARAMS}: ffn_exp must be at most {MAX_SIZE}, found {expansion}")
    return dense, expert_width(dim, Widths(multiple_of, multiplier or 1.0, expansion, is_scaled), capacity)
