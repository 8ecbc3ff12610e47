"""What the config translations of all families share: the result, the options, typed readers, decoder sizes.

The content of Hugging Face's ``config.json`` (a dict) is the common form: each family translates between it and the
``params.json`` of its original format.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from ckpt_convert.errors import ConfigError, UsageError
from ckpt_convert.values import frozen
from ckpt_convert.wording import short_repr

CONFIG = "config.json"
PARAMS = "params.json"

MAX_SIZE = 2**31
"""The largest size that a config may have: sizes from files are checked before anything is computed from them."""


@frozen()
class Translated:
    """A generated config and notices: facts that no file of the source holds, or that the target cannot hold."""

    content: dict[str, Any]
    notices: tuple[str, ...] = ()


MetaStyle = Literal["llama2", "llama3"]
"""The generation of Meta's code that files are for: Llama 1, 2 and Code, or 3 and later."""

AXES: Mapping[MetaStyle, int] = {"llama2": 1, "llama3": 0}
"""The axis on which the ranks of each style split the embedding."""


@frozen()
class ConfigOptions:
    """What a caller may set in a generated config; None leaves the decision to the documented rule.

    rope_factor: the factor of Llama 3.x's RoPE scaling, which params.json does not hold.
    max_positions: max_position_embeddings, which params.json does not hold.
    meta_style: which generation's params.json to write for Llama.
    drop_rope_scaling: leave out a RoPE scaling that the target cannot express, instead of refusing it.
    rope_theta: the RoPE base where params.json has none (early Mistral releases).

    Raises UsageError for a number that is not positive.
    """

    rope_factor: float | None = None
    max_positions: int | None = None
    meta_style: MetaStyle | None = None
    drop_rope_scaling: bool = False
    rope_theta: float | None = None

    def __post_init__(self) -> None:
        for name in ("rope_factor", "max_positions", "rope_theta"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"`{name}=` must be a positive number, found {value}")
        if self.meta_style not in (None, *AXES):
            raise UsageError(f"`meta_style=` must be {' or '.join(AXES)}, found {self.meta_style}")

    @property
    def given(self) -> tuple[str, ...]:
        """The names of the options that are set."""
        return tuple(field.name for field in dataclasses.fields(self) if getattr(self, field.name))


def type_of(config: Mapping[str, Any]) -> Any:
    """The model_type of a config.json, or the _class_name of one of diffusers; None if it has neither."""
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
    """As ``optional_int``, but zero is allowed: a number of layers or experts that there are none of."""
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
    ``where`` is the name of the config in messages, if it is a part of the file.
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
    """dim / n_heads; ConfigError if that is not a whole number or is odd, as RoPE rotates pairs of rows."""
    if dim % n_heads:
        raise ConfigError(
            f"{where}: without head_dim, {keys[0]} must be a multiple of {keys[1]}, found {dim} and {n_heads}; "
            f"correct {where}"
        )
    return even_head_dim(dim // n_heads, where)


def even_head_dim(head_dim: int, where: str) -> int:
    """The given head_dim; ConfigError where it is odd."""
    if head_dim % 2:
        raise ConfigError(f"{where}: head_dim must be even, as RoPE rotates pairs of rows, found {head_dim}")
    return head_dim


def agreed_vocab(content: Mapping[str, Any], vocab_size: int | None, where: str) -> int:
    """The vocabulary size, from the file or from the embedding's shape (``vocab_size``), which have to agree.

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


def check_silu(content: Mapping[str, Any], key: str, where: str, target: str) -> None:
    """Raise ConfigError unless the activation is SiLU (which transformers also calls swish), the only one there is."""
    found = optional_str(content, key, where, "silu")
    if found not in ("silu", "swish"):
        raise ConfigError(f'{where}: {key} must be "silu" for {target}, found {found!r}; {target} has no word for it')


def check_not_quantized(content: Mapping[str, Any], keys: tuple[str, ...], where: str, target: str) -> None:
    """Raise ConfigError for a config that describes quantized weights, whose keys and shapes are others."""
    for key in keys:
        if content.get(key):
            found = short_repr(content[key])
            raise ConfigError(
                f"{where}: {key} must be absent for {target}, found {found}; dequantize the weights first"
            )


def unused_keys(content: Mapping[str, Any], known: frozenset[str], where: str, target: str) -> tuple[str, ...]:
    """A notice naming the keys that the translation does not use, or none."""
    extra = sorted(str(key) for key, value in content.items() if key not in known and value is not None)
    if not extra:
        return ()
    return (f"{where}: {', '.join(extra)} {'has' if len(extra) == 1 else 'have'} no counterpart in {target}; left out",)


def _unfit(config: Mapping[str, Any], key: str, where: str, expected: str) -> ConfigError:
    found = short_repr(config[key]) if key in config else "no such key"
    return ConfigError(f"{where}: {key} must be {expected}, found {found}; correct {where}")


def _head_dim(config: Mapping[str, Any], dim: int, n_heads: int, where: str) -> int:
    if config.get("head_dim") is None:
        return divided_head_dim(dim, n_heads, where, ("hidden_size", "num_attention_heads"))
    return even_head_dim(require_int(config, "head_dim", where), where)
