"""What every family's config translation shares: the result, the options, typed readers, and both spellings of RoPE.

The content of Hugging Face's ``config.json`` (a dict) is the common language for configs: each family translates
between it and the ``params.json`` of its own original format.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ckpt_convert.errors import ConfigError, UsageError

CONFIG = "config.json"
PARAMS = "params.json"

MAX_SIZE = 2**31
"""No size in a config may be larger: a size from a file is checked before anything is computed from it."""

DEFAULT_THETA = 10000.0
"""The RoPE base of a model that does not say one, in transformers and in Meta's Llama 1 and 2 code alike."""

SCALING_PARAMS_CANNOT_SAY = "remove the scaling from the model, or pass --drop-rope-scaling to leave it out"


@dataclass(frozen=True)
class Translated:
    """A generated config and what its reader should know: facts that no file held, or that the target cannot hold."""

    content: dict[str, Any]
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConfigOptions:
    """What a caller may decide about a generated config; None leaves the decision to the documented rule.

    rope_factor: the factor of Llama 3.x's RoPE scaling, which params.json does not hold.
    max_positions: max_position_embeddings, which params.json does not hold.
    meta_style: which generation's params.json to write for Llama.
    drop_rope_scaling: leave out a RoPE scaling that the target cannot say, instead of refusing it.
    rope_theta: the RoPE base where params.json does not say one (early Mistral releases).

    Raises UsageError for a number that is not positive.
    """

    rope_factor: float | None = None
    max_positions: int | None = None
    meta_style: Literal["llama2", "llama3"] | None = None
    drop_rope_scaling: bool = False
    rope_theta: float | None = None

    def __post_init__(self) -> None:
        for name in ("rope_factor", "max_positions", "rope_theta"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"--{name.replace('_', '-')} must be a positive number, found {value}")
        if self.meta_style not in (None, "llama2", "llama3"):
            raise UsageError(f"--meta-style must be llama2 or llama3, found {self.meta_style}")

    @property
    def given(self) -> tuple[str, ...]:
        """The names of the options that say something."""
        return tuple(field.name for field in dataclasses.fields(self) if getattr(self, field.name))


@dataclass(frozen=True)
class Rope:
    """The rotary embedding that a config.json describes.

    theta: the base, None where the config does not say one. kind: "default", "linear", "llama3", "yarn", …
    parameters: what else the config says of it (factor, low_freq_factor, …), without theta and kind.
    notices: what a reader should know, such as two different thetas in one file.
    """

    theta: float | None
    kind: str = "default"
    parameters: dict[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def type_of(config: Mapping[str, Any]) -> Any:
    """What a config.json says that the model is: its model_type, or in diffusers' its _class_name; None in others."""
    return config.get("model_type", config.get("_class_name"))


def require_int(config: Mapping[str, Any], key: str, where: str) -> int:
    """The size under ``key``, a whole number from 1 to 2**31.

    Raises ConfigError where it is missing or anything else: a bool, 32.0, "32", zero, a negative or an absurd number.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_SIZE:
        raise _unfit(config, key, where, f"a whole number from 1 to {MAX_SIZE}")
    return value


def optional_int(config: Mapping[str, Any], key: str, where: str, default: int) -> int:
    """As ``require_int``, but ``default`` where the key is absent or null."""
    return default if config.get(key) is None else require_int(config, key, where)


def optional_count(config: Mapping[str, Any], key: str, where: str, default: int) -> int:
    """As ``optional_int``, but zero is a number too: of layers that are not there."""
    if type(config.get(key)) is int and config[key] == 0:
        return 0
    return optional_int(config, key, where, default)


def require_number(config: Mapping[str, Any], key: str, where: str) -> float:
    """The positive finite number under ``key``, as a float.

    Raises ConfigError where it is missing or anything else.
    """
    value = config.get(key)
    expected = "a positive finite number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _unfit(config, key, where, expected)
    try:
        number = float(value)
    except OverflowError as error:
        raise _unfit(config, key, where, expected) from error
    if not (math.isfinite(number) and number > 0):
        raise _unfit(config, key, where, expected)
    return number


def optional_number(config: Mapping[str, Any], key: str, where: str) -> float | None:
    """As ``require_number``, but None where the key is absent or null."""
    return None if config.get(key) is None else require_number(config, key, where)


def optional_bool(config: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    """The bool under ``key``, ``default`` where it is absent or null; ConfigError for anything else (0, "false")."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _unfit(config, key, where, "true or false")
    return value


def optional_str(config: Mapping[str, Any], key: str, where: str, default: str) -> str:
    """The string under ``key``, ``default`` where it is absent or null; ConfigError for anything else."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise _unfit(config, key, where, "a string")
    return value


def optional_mapping(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The object under ``key``, empty where it is absent or null; ConfigError for anything else."""
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _unfit(config, key, where, "an object or null")
    return value


def base_dims(config: Mapping[str, Any], *, kv_heads_default: int | None = None, where: str = CONFIG) -> dict[str, int]:
    """The sizes of a Llama-like decoder, read from a config.json, under the symbols that the tables use.

    ``kv_heads_default`` is what the model's transformers class takes where num_key_value_heads is absent; null, and
    absent without such a default, means as many as attention heads. Without head_dim it is dim / n_heads.
    ``where`` is what messages call the config, where that is a part of the file.
    Raises ConfigError for a missing or unusable size, and for sizes that do not divide.
    """
    dim = require_int(config, "hidden_size", where)
    n_heads = require_int(config, "num_attention_heads", where)
    absent = n_heads if kv_heads_default is None or "num_key_value_heads" in config else kv_heads_default
    n_kv_heads = optional_int(config, "num_key_value_heads", where, absent)
    check_groups(n_heads, n_kv_heads, where, ("num_attention_heads", "num_key_value_heads"))
    return {
        "dim": dim,
        "n_layers": require_int(config, "num_hidden_layers", where),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": _head_dim(config, dim, n_heads, where),
        "ffn_dim": require_int(config, "intermediate_size", where),
        "vocab_size": require_int(config, "vocab_size", where),
        "tied": int(optional_bool(config, "tie_word_embeddings", where, False)),
    }


def check_groups(n_heads: int, n_kv_heads: int, where: str, keys: tuple[str, str]) -> None:
    """Raise ConfigError unless every key/value head serves the same number of query heads."""
    if n_heads % n_kv_heads:
        raise ConfigError(
            f"{where}: {keys[0]} must be a multiple of {keys[1]}, found {n_heads} and {n_kv_heads}; correct {where}"
        )


def divided_head_dim(dim: int, n_heads: int, where: str, keys: tuple[str, str]) -> int:
    """dim / n_heads; ConfigError where that is not a whole number or is odd, as RoPE turns pairs of rows."""
    if dim % n_heads:
        raise ConfigError(
            f"{where}: without head_dim, {keys[0]} must be a multiple of {keys[1]}, found {dim} and {n_heads}; "
            f"correct {where}"
        )
    return even_head_dim(dim // n_heads, where)


def even_head_dim(head_dim: int, where: str) -> int:
    """The given head_dim; ConfigError where it is odd."""
    if head_dim % 2:
        raise ConfigError(f"{where}: head_dim must be even, as RoPE turns pairs of rows, found {head_dim}")
    return head_dim


def agreed_vocab(content: Mapping[str, Any], vocab_size: int | None, where: str) -> int:
    """The vocabulary's size, from the file or from the embedding's shape (``vocab_size``), which have to agree.

    In params.json, -1 and an absent or null key leave it to the embedding, as Meta's Llama 1, 2 and Code do.
    Raises ConfigError where the two disagree, or where neither says it.
    """
    found = content.get("vocab_size")
    if found is None or (where == PARAMS and found == -1 and not isinstance(found, bool)):
        if vocab_size is None:
            raise ConfigError(f"{where}: vocab_size is {found!r}; it has to come from the shape of the embedding")
        return vocab_size
    said = require_int(content, "vocab_size", where)
    if vocab_size is not None and said != vocab_size:
        raise ConfigError(
            f"{where}: vocab_size is {said}, but the embedding has {vocab_size} rows; "
            f"correct {where}, or use the weights that belong to it"
        )
    return said


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
    """Which part of each head rotates, where a config (or its text_config) says that it is not all of it."""
    for part in (config, config.get("text_config")):
        for said in _rope_settings(part):
            factor = said.get("partial_rotary_factor")
            if isinstance(factor, int | float) and factor != 1:
                return float(factor)
    return None


def _rope_settings(config: object) -> Iterator[Mapping[str, Any]]:
    """Where a config may say something of its RoPE: at the top, or in either spelling, for all layers or some."""
    if not isinstance(config, Mapping):
        return
    yield config
    for name in ("rope_parameters", "rope_scaling"):
        inner = config.get(name)
        if isinstance(inner, Mapping):
            yield inner
            yield from (one for one in inner.values() if isinstance(one, Mapping))


def rotary_dim(config: Mapping[str, Any], head_dim: int, default: float = 1.0) -> int:
    """How many rows of a head rotate: as transformers 5 has it, int(head_dim * partial_rotary_factor).

    ``default`` is the factor of the model's config class. Raises ConfigError for a number that is odd, as RoPE turns
    pairs of rows, or beyond the head.
    """
    stated = read_rope(config).parameters.get("partial_rotary_factor")
    size = int(head_dim * (default if stated is None else require_number({"factor": stated}, "factor", CONFIG)))
    if size % 2 or not 0 < size <= head_dim:
        raise ConfigError(f"{CONFIG}: partial_rotary_factor {stated} of head_dim {head_dim} is no even part of it")
    return size


def rope_keys(rope: Rope) -> dict[str, Any]:
    """The keys of a generated config.json that say ``rope`` in both spellings.

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


def check_plain_rope_parts(rope: Rope, target: str) -> None:
    """Raise ConfigError for a RoPE that turns only a part of each head, which neither family's code can do."""
    part = optional_number(rope.parameters, "partial_rotary_factor", CONFIG)
    if part not in (None, 1.0):
        raise ConfigError(
            f"{CONFIG}: partial_rotary_factor must be 1 for {target}, found {part}; the target turns whole heads"
        )


def check_silu(content: Mapping[str, Any], key: str, where: str, target: str) -> None:
    """Raise ConfigError unless the activation is SiLU (which transformers also calls swish), the only one there is."""
    found = optional_str(content, key, where, "silu")
    if found not in ("silu", "swish"):
        raise ConfigError(f'{where}: {key} must be "silu" for {target}, found {found!r}; {target} has no word for it')


def check_not_quantized(content: Mapping[str, Any], keys: tuple[str, ...], where: str, target: str) -> None:
    """Raise ConfigError for a config that describes quantized weights, whose keys and shapes are others."""
    for key in keys:
        if content.get(key):
            found = _short(content[key])
            raise ConfigError(
                f"{where}: {key} must be absent for {target}, found {found}; dequantize the weights first"
            )


def unused_keys(content: Mapping[str, Any], known: frozenset[str], where: str, target: str) -> tuple[str, ...]:
    """A notice naming the keys that the translation has no use for, or nothing."""
    extra = sorted(str(key) for key, value in content.items() if key not in known and value is not None)
    if not extra:
        return ()
    return (f"{where}: {', '.join(extra)} {'has' if len(extra) == 1 else 'have'} no counterpart in {target}; left out",)


def _unfit(config: Mapping[str, Any], key: str, where: str, expected: str) -> ConfigError:
    found = _short(config[key]) if key in config else "no such key"
    return ConfigError(f"{where}: {key} must be {expected}, found {found}; correct {where}")


def _short(value: object) -> str:
    """A value for a message: a hostile file must not fill the terminal."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print an integer of thousands of digits
        return "a very large number"
    return text if len(text) <= 80 else text[:77] + "..."


def _head_dim(config: Mapping[str, Any], dim: int, n_heads: int, where: str) -> int:
    if config.get("head_dim") is None:
        return divided_head_dim(dim, n_heads, where, ("hidden_size", "num_attention_heads"))
    return even_head_dim(require_int(config, "head_dim", where), where)


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
