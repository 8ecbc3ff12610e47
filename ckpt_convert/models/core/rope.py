"""RoPE, the rotary embedding: the two layouts of a head's rows, and the settings of a config.json in either form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from typing import Any, Literal

from ckpt_convert.errors import ConfigError, UsageError
from ckpt_convert.models.core.config import (
    CONFIG,
    PARAMS,
    ConfigOptions,
    optional_bool,
    optional_mapping,
    optional_number,
    optional_str,
    require_number,
)
from ckpt_convert.tensors.lazy import LazyTensor, concat
from ckpt_convert.values import frozen

RopeOrder = Literal["half", "interleaved"]
"""The RoPE layout of a head's rows: pairs (i, i + head_dim/2) rotate in ``half`` (half-split, GPT-NeoX style, Hugging
Face's rotate_half), pairs (2i, 2i + 1) in ``interleaved`` (GPT-J style, Meta's complex numbers)."""

DEFAULT_THETA = 10000.0
"""The default RoPE base, in transformers as in Meta's Llama 1 and 2 code."""


def reordered(tensor: LazyTensor, heads: int, rotary: int | None, *, inverse: bool) -> LazyTensor:
    """Permute rows from the half-split to the interleaved layout, or back."""
    rows, *rest = tensor.shape
    head_dim = rows // heads
    if rotary is None or rotary == head_dim:
        pairs = (head_dim // 2, 2) if inverse else (2, head_dim // 2)
        return tensor.reorder(0, (heads, *pairs), (0, 2, 1))
    by_head = tensor.reshape((heads, head_dim, *rest))
    first = by_head.narrow(1, 0, rotary).reshape((heads * rotary, *rest))
    first = reordered(first, heads, None, inverse=inverse).reshape((heads, rotary, *rest))
    return concat([first, by_head.narrow(1, rotary, head_dim - rotary)], 1).reshape(tensor.shape)


@frozen()
class Rope:
    """The rotary embedding that a config.json describes.

    theta: the base, None where the config does not say one. kind: "default", "linear", "llama3", "yarn", …
    parameters: what else the config says of it (factor, low_freq_factor, …), without theta and kind.
    notices: such as two different thetas in one file.
    """

    theta: float | None
    kind: str = "default"
    parameters: dict[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def read_rope(config: Mapping[str, Any]) -> Rope:
    """The rotary embedding of a config.json, in the v4 spelling (rope_theta, rope_scaling) or v5's (rope_parameters).

    Follows transformers 5 (``RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`` and ``standardize_rope_params``
    in 5.23): a non-empty rope_scaling replaces rope_parameters whole; rope_theta inside the one that counts wins over
    the top-level rope_theta (transformers 4 reads only the latter, hence a notice where they differ), as does
    partial_rotary_factor; ``type`` stands in for a missing ``rope_type``; for llama3, yarn and longrope a top-level
    original_max_position_embeddings wins over the inner one, and max_position_embeddings stands in for both.

    Raises ConfigError for values of the wrong type and for parameters nested per layer type.
    """
    scaling = optional_mapping(config, "rope_scaling", CONFIG)
    key = "rope_scaling" if scaling else "rope_parameters"
    inner = scaling or optional_mapping(config, "rope_parameters", CONFIG)
    nested = sorted(name for name, value in inner.items() if isinstance(value, Mapping))
    if nested:
        raise ConfigError(f"{CONFIG}: {key} must hold one set of RoPE parameters, found one each for {nested}")
    inside = f"{CONFIG}: {key}"
    outer_theta = optional_number(config, "rope_theta", CONFIG)
    inner_theta = optional_number(inner, "rope_theta", inside)
    kind = optional_str(inner, "rope_type" if inner.get("rope_type") is not None else "type", inside, "default")
    parameters = {name: value for name, value in inner.items() if name not in ("rope_theta", "rope_type", "type")}
    if config.get("partial_rotary_factor") is not None:
        parameters.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if kind in ("llama3", "yarn", "longrope"):
        _fill_original_positions(config, parameters)
    return Rope(
        theta=outer_theta if inner_theta is None else inner_theta,
        kind=kind,
        parameters=parameters,
        notices=_theta_conflict(outer_theta, inner_theta, key),
    )


def partial_rotary_factor(config: Mapping[str, Any]) -> float | None:
    """The part of each head that rotates, if a config (or its text_config) says that it is not all of it."""
    for part in (config, config.get("text_config")):
        for settings in _rope_settings(part):
            factor = settings.get("partial_rotary_factor")
            if isinstance(factor, int | float) and factor != 1:
                return float(factor)
    return None


def _rope_settings(config: object) -> Iterator[Mapping[str, Any]]:
    """The mappings in which a config may set RoPE: at the top, or in either form, for all layers or some."""
    if not isinstance(config, Mapping):
        return
    yield config
    for name in ("rope_parameters", "rope_scaling"):
        inner = config.get(name)
        if isinstance(inner, Mapping):
            yield inner
            yield from (one for one in inner.values() if isinstance(one, Mapping))


def rotary_dim(config: Mapping[str, Any], head_dim: int, default: float = 1.0) -> int:
    """How many rows of a head rotate: int(head_dim * partial_rotary_factor), as in transformers 5.

    ``default`` is the factor of the model's config class. Raises ConfigError for an odd number, as RoPE rotates
    pairs of rows, or one beyond the head.
    """
    stated = read_rope(config).parameters.get("partial_rotary_factor")
    size = int(head_dim * (default if stated is None else require_number({"factor": stated}, "factor", CONFIG)))
    if size % 2 or not 0 < size <= head_dim:
        raise ConfigError(f"{CONFIG}: partial_rotary_factor {stated} of head_dim {head_dim} is no even part of it")
    return size


def rope_keys(rope: Rope) -> dict[str, Any]:
    """The keys of a generated config.json for ``rope``, in the form of transformers 4 and in that of 5.

    transformers 4.57 reads rope_theta and rope_scaling and takes a lone rope_parameters for theta 10000 unscaled,
    without a warning; 5 reads all three to the same effect. Without a theta none is written.
    """
    theta = {} if rope.theta is None else {"rope_theta": rope.theta}
    scaling = {"rope_type": rope.kind, **rope.parameters}
    return {
        **theta,
        # 4.57 warns of keys in rope_scaling that the kind does not know, so theta stays outside.
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": {**theta, **scaling},
    }


def expressible(
    config: Mapping[str, Any],
    options: ConfigOptions,
    target: str,
    problem: Callable[[Rope], str | None],
    where: str = CONFIG,
) -> tuple[Rope, tuple[str, ...]]:
    """The RoPE of a config.json as a params.json can express it, with a notice if its scaling was left out as asked.

    ``problem`` returns in words what the params.json cannot express. Raises ConfigError for that, unless it was to be
    left out, and for a RoPE that rotates only a part of each head.
    """
    rope = read_rope(config)
    part = optional_number(rope.parameters, "partial_rotary_factor", CONFIG)
    if part not in (None, 1.0):
        raise ConfigError(
            f"{CONFIG}: partial_rotary_factor must be 1 for {target}, found {part}; the target rotates whole heads"
        )
    said = problem(rope)
    if said is None:
        return rope, ()
    if not options.drop_rope_scaling:
        raise ConfigError(
            f"{where}: {said}; remove the scaling from the model, or pass `drop_rope_scaling=True` to leave it out"
        )
    return Rope(rope.theta, notices=rope.notices), (f"{where}: {said}; the scaling was left out as asked",)


def scaling_problem(rope: Rope, wired: Mapping[str, float], target: str) -> str | None:
    """Why Meta's code, which has these parameters of a scaling written into it, cannot have this RoPE, or None."""
    if rope.kind == "default":
        return None
    if rope.kind != "llama3":
        return f'rope_type must be "default" or "llama3" for {target}, found {rope.kind!r}'
    for key, value in wired.items():
        if rope.parameters.get(key) != value:
            return f"rope_scaling's {key} must be {value:g}, as in Meta's code, found {rope.parameters.get(key)!r}"
    return None


def theta_of_params(params: Mapping[str, Any], options: ConfigOptions) -> float | None:
    """The base that a params.json or an option says, None where neither does; UsageError where they differ."""
    said = optional_number(params, "rope_theta", PARAMS)
    if said is not None and options.rope_theta not in (None, said):
        raise UsageError(f"`rope_theta={options.rope_theta:g}` contradicts {PARAMS}, whose rope_theta is {said:g}")
    return options.rope_theta if said is None else said


def rope_of_params(
    params: Mapping[str, Any],
    options: ConfigOptions,
    theta: float,
    scaling: Callable[[], tuple[dict[str, Any], tuple[str, ...]]],
) -> tuple[Rope, tuple[str, ...]]:
    """The RoPE that Meta's code makes of a params.json; ``scaling`` gives its parameters where it is scaled.

    Raises UsageError for a rope_factor where RoPE is not scaled.
    """
    if not optional_bool(params, "use_scaled_rope", PARAMS, False):
        if options.rope_factor is not None:
            raise UsageError(
                f"`rope_factor={options.rope_factor:g}` has no use: {PARAMS} does not say use_scaled_rope, "
                "so RoPE is not scaled"
            )
        return Rope(theta), ()
    if options.drop_rope_scaling:
        return Rope(theta), (f"{PARAMS}: use_scaled_rope is true; the scaling was left out as asked",)
    parameters, notices = scaling()
    return Rope(theta, "llama3", parameters), notices


def _fill_original_positions(config: Mapping[str, Any], parameters: dict[str, Any]) -> None:
    key = "original_max_position_embeddings"
    if config.get(key) is not None:
        parameters[key] = config[key]
    elif config.get("max_position_embeddings") is not None:
        parameters.setdefault(key, config["max_position_embeddings"])


def _theta_conflict(outer: float | None, inner: float | None, key: str) -> tuple[str, ...]:
    if outer is None or inner is None or outer == inner:
        return ()
    return (
        f"{CONFIG}: rope_theta is {outer:g} at the top and {inner:g} in {key}; took {inner:g}, as transformers 5 does "
        "(transformers 4 takes the other)",
    )
