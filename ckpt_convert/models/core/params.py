"""What a family needs for the meta format, its params.json above all, and what translations of params.json share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field, replace
from typing import Any, Literal

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import AXES, PARAMS, ConfigOptions, MetaStyle, Translated
from ckpt_convert.values import frozen


@frozen()
class Weights:
    """What a params.json leaves open and the stored tensors show.

    ``vocab_size`` is the number of rows of the whole embedding, ``ffn_dim`` that of the whole w1, None if unknown;
    ``tied`` is whether the output shares the embedding; ``shapes`` are those of the source's keys.
    """

    vocab_size: int | None = None
    ffn_dim: int | None = None
    tied: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@frozen()
class Styles:
    """How to tell two generations of Meta's code apart, which split the embedding on different axes.

    ``of_params`` gives the style of a params.json and the reason; ``of_config`` that of the known releases of a config,
    if no style is asked for; ``tokenizers`` that of each kind of tokenizer; ``unscaled`` are the styles whose code has
    no scaled RoPE. ``default`` is the style where nothing decides, ``default_reason`` says so. ``split_names`` describe
    a split of the embedding, by its axis.
    """

    of_params: Callable[[Mapping[str, Any]], tuple[MetaStyle, str] | None]
    of_config: Callable[[Mapping[str, Any], ConfigOptions], MetaStyle]
    tokenizers: Mapping[str, MetaStyle]
    unscaled: frozenset[MetaStyle]
    default: MetaStyle
    default_reason: str
    split_names: tuple[str, str]

    def options_for(self, options: ConfigOptions, axis: int) -> ConfigOptions:
        """The options with the style whose ranks split the embedding on this axis, unless that is the default."""
        style = next(style for style, its in AXES.items() if its == axis)
        return options if style == self.default else replace(options, meta_style=style)


# Defaults are functions with a name, so that a family can be sent to another process.
def _unknown(config: Mapping[str, Any]) -> None:
    """No known release has these sizes."""


def _unchanged(params: dict[str, Any], dims: Mapping[str, int], ranks: int) -> Translated:
    """A params.json that does not depend on the number of ranks."""
    return Translated(params)


@frozen()
class Params:
    """What the meta format of a family needs besides the table: its params.json, its file names, its ranks.

    ``evidence`` gives the reason why a params.json is this family's, in words, or None. ``sharded`` is whether ranks
    split the weights at all; ``container`` is the default one; ``options`` are the fields of ConfigOptions that it
    uses. ``release`` is the name of the known release with this shape, ``model_parallel`` the number of ranks that it
    came in. ``for_ranks`` gives the params.json for so many ranks. ``styles`` tells generations of Meta's code apart
    that split the embedding on different axes.
    """

    evidence: Callable[[Mapping[str, Any]], str | None]
    from_hf: Callable[[Mapping[str, Any], ConfigOptions], Translated]
    to_hf: Callable[[Mapping[str, Any], Weights, ConfigOptions], Translated]
    sharded: bool
    container: Literal["pth", "safetensors"]
    options: frozenset[str]
    release: Callable[[Mapping[str, Any]], str | None] = _unknown
    model_parallel: Callable[[Mapping[str, Any]], int | None] = _unknown
    for_ranks: Callable[[dict[str, Any], Mapping[str, int], int], Translated] = _unchanged
    styles: Styles | None = None


def flat(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters, which some files nest under "model"."""
    inner = params.get("model")
    return inner if isinstance(inner, Mapping) and "dim" not in params else params


def check_head_dim(sizes: Mapping[str, int], where: str, target: str) -> None:
    """Raise ConfigError for a head_dim other than the one that Meta's code computes."""
    if sizes["head_dim"] * sizes["n_heads"] != sizes["dim"]:
        raise ConfigError(
            f"{where}: head_dim must be hidden_size / num_attention_heads ({sizes['dim']} / {sizes['n_heads']}) for "
            f"{target}, found {sizes['head_dim']}; Meta's code has no other head_dim"
        )


def took_positions(positions: int, source: str) -> tuple[str, ...]:
    """A notice of where max_position_embeddings is from, of a params.json that does not say it."""
    return (
        f"{PARAMS} does not hold max_position_embeddings: took {positions}{source}; "
        "pass `max_positions=` to say otherwise",
    )


def lost_positions(positions: int, default: int) -> tuple[str, ...]:
    """A notice if converting back would give another max_position_embeddings, the ``default`` for these params."""
    if positions == default:
        return ()
    return (
        f"{PARAMS} does not hold max_position_embeddings, and the default for it is {default}, not {positions}: to "
        f"convert back, pass `max_positions={positions}`",
    )
