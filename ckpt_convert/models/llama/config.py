"""Llama 1 to 3.3: the sizes in Hugging Face's config.json, and Meta's params.json for it.

The other direction, params.json to config.json, is in ``llama.params``; the known releases in ``llama.releases``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import (
    CONFIG,
    PARAMS,
    ConfigOptions,
    MetaStyle,
    Translated,
    agreed_vocab,
    base_dims,
    check_not_quantized,
    check_silu,
    optional_bool,
    optional_int,
    require_number,
)
from ckpt_convert.models.core.params import Weights, check_head_dim, flat, lost_positions
from ckpt_convert.models.core.rope import (
    DEFAULT_THETA,
    Rope,
    expressible,
    read_rope,
    scaling_problem,
)
from ckpt_convert.models.llama.params import HARD_WIRED, params_to_hf
from ckpt_convert.models.llama.releases import CODE, L1, L3_1, RELEASES, Release, ffn_width, matching

TARGET = "a Llama params.json"


FACTORS = (8.0, 32.0)


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes in a Llama config.json under the tables' symbols; flags (tied, attention_bias, mlp_bias) are 0 or 1.

    Raises ConfigError for a missing or unusable size, and for sizes that do not divide.
    """
    return {
        **base_dims(config),
        "attention_bias": int(optional_bool(config, "attention_bias", CONFIG, False)),
        "mlp_bias": int(optional_bool(config, "mlp_bias", CONFIG, False)),
    }


def hf_to_params(
    config: Mapping[str, Any], options: ConfigOptions | None = None, *, vocab_size: int | None = None
) -> Translated:
    """The params.json that Meta's code needs for this config.json, as the matching release spells it if there is one.

    Notices name what params.json cannot hold. ``vocab_size`` is the number of the embedding's rows, if known.
    Raises ConfigError for a config that Meta's code cannot run, naming the field.
    """
    options = options or ConfigOptions()
    sizes = dims(config)
    vocab = agreed_vocab(config, vocab_size, CONFIG)
    _check_expressible(config, sizes)
    rope, notices = expressible(config, options, TARGET, _rope_problem)
    theta = DEFAULT_THETA if rope.theta is None else rope.theta
    found, style = matching(config), style_of(config, options)
    scaled = rope.kind != "default"
    if scaled and style == "llama2" and options.drop_rope_scaling:
        rope, scaled = Rope(theta), False
        notices = (*notices, f"{CONFIG}: the RoPE scaling was left out as asked; Llama 2's code has none")
    if scaled and style == "llama2":
        raise ConfigError(
            f"{CONFIG}: rope_scaling must be null for the params.json of Llama 1, 2 and Code, found {rope.kind!r}; "
            "pass --meta-style llama3, or --drop-rope-scaling"
        )
    multiple_of, multiplier = _ffn_pair(sizes["dim"], sizes["ffn_dim"], found, style)
    values = {
        "dim": sizes["dim"],
        "n_layers": sizes["n_layers"],
        "n_heads": sizes["n_heads"],
        "n_kv_heads": sizes["n_kv_heads"] if style == "llama3" or sizes["n_kv_heads"] != sizes["n_heads"] else None,
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": require_number(config, "rms_norm_eps", CONFIG),
        "vocab_size": vocab if style == "llama3" else -1,
        "rope_theta": _spelled_theta(theta, found) if style == "llama3" or theta != DEFAULT_THETA else None,
        "use_scaled_rope": True if scaled else None,
    }
    params = _ordered(values, _key_order(found, style, theta))
    return Translated(params, (*rope.notices, *notices, *_lost_on_the_way_back(config, params, rope, vocab)))


def release(config: Mapping[str, Any]) -> str | None:
    """The name of the known release with the shape of this config.json ("Llama 3.2 1B"), several joined by " / "."""
    return " / ".join(row.name for row in matching(config)) or None


def model_parallel(config: Mapping[str, Any]) -> int | None:
    """How many files the release with this shape came in (its model-parallel degree), None for an unknown shape."""
    degrees = {row.mp for row in matching(config)}
    return degrees.pop() if len(degrees) == 1 else None


def style_of(config: Mapping[str, Any], options: ConfigOptions | None = None) -> MetaStyle:
    """Whose code Meta's files are for: as asked for, else as the release with this shape has it, else Llama 3's."""
    found = matching(config)
    return (options.meta_style if options else None) or (found[0].spelling.style if found else "llama3")


def for_ranks(params: dict[str, Any], dims: Mapping[str, int], ranks: int) -> Translated:
    """The params.json for so many ranks: n_kv_heads counts the key/value heads of every rank, copies as well.

    Meta's code has at least one on each rank; where the model has fewer, neighbouring ranks hold the same one (as in
    the release of Llama 3.1 405B for 16 ranks).
    """
    heads = dims["n_kv_heads"]
    wanted = ranks if ranks > heads and ranks % heads == 0 else heads
    inner = flat(params)
    if (inner.get("n_kv_heads") or dims["n_heads"]) == wanted:
        return Translated(params)
    changed = {**inner, "n_kv_heads": wanted}
    said = f"{PARAMS} counts {ranks} key/value heads, one for each rank: copies of the model's {heads}"
    return Translated(changed if inner is params else {**params, "model": changed}, (said,) if ranks > heads else ())


def ffn_pair(dim: int, ffn_dim: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier (None: not written) for which Meta's rule gives this width.

    The largest power of two up to 256 that divides the width; then the first round multiplier that fits, else the
    middle of the range that does. Raises ConfigError if there is none.
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


# HF to Meta


def _check_expressible(config: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    check_head_dim(sizes, CONFIG, TARGET)
    for key in ("attention_bias", "mlp_bias"):
        if sizes[key]:
            raise ConfigError(f"{CONFIG}: {key} must be false for {TARGET}, found true; Meta's code has no biases")
    check_silu(config, "hidden_act", CONFIG, TARGET)
    check_not_quantized(config, ("quantization_config",), CONFIG, TARGET)


def _rope_problem(rope: Rope) -> str | None:
    """Why params.json cannot say this RoPE, in words, or None."""
    factor = rope.parameters.get("factor")
    problem = scaling_problem(rope, HARD_WIRED, TARGET)
    if problem is None and rope.kind == "llama3" and factor not in FACTORS:
        return f"rope_scaling's factor must be 8 or 32, as in the releases, found {factor!r}"
    return problem


def _ffn_pair(dim: int, ffn_dim: int, found: tuple[Release, ...], style: MetaStyle) -> tuple[int, float | None]:
    same_style = [row for row in RELEASES if row.spelling.style == style]
    for row in (*found, *same_style, *RELEASES):
        if (row.dim, row.ffn_dim) == (dim, ffn_dim):
            return row.multiple_of, row.multiplier
    return ffn_pair(dim, ffn_dim)


def _spelled_theta(theta: float, found: tuple[Release, ...]) -> float:
    """theta as the release wrote it: Code Llama's is an integer."""
    return next((row.theta for row in found if row.theta == theta), theta)


def _key_order(found: tuple[Release, ...], style: MetaStyle, theta: float) -> tuple[str, ...]:
    for row in found:
        if row.spelling.style == style:
            return row.spelling.keys
    if style == "llama3":
        return L3_1.keys
    # Llama 2's own code rejects a rope_theta; who has one needs Code Llama's, whose files have no vocab_size.
    return L1.keys if theta == DEFAULT_THETA else CODE.keys


def _ordered(values: Mapping[str, Any], order: tuple[str, ...]) -> dict[str, Any]:
    """The values that are there in the given order; what the order does not know follows, but for a needless -1."""
    keys = (*order, *(key for key in values if key not in order))
    return {
        key: values[key]
        for key in keys
        if values[key] is not None and not (key == "vocab_size" and values[key] == -1 and key not in order)
    }


def _lost_on_the_way_back(
    config: Mapping[str, Any], params: Mapping[str, Any], rope: Rope, vocab: int
) -> tuple[str, ...]:
    """Notices of what the way back would put differently, by going that way."""
    back = params_to_hf(params, Weights(vocab_size=vocab)).content
    notices = []
    theirs, ours = read_rope(back).parameters.get("factor"), rope.parameters.get("factor")
    if theirs is not None and ours is not None and theirs != ours:
        notices.append(
            f"{PARAMS} does not hold the RoPE factor, and {theirs:g} is what this shape stands for, not "
            f"{ours:g}: on the way back, pass --rope-factor {ours:g}"
        )
    ruled = back["max_position_embeddings"]
    positions = optional_int(config, "max_position_embeddings", CONFIG, ruled)
    return (*notices, *lost_positions(positions, ruled, "this shape stands"))


# Releases
