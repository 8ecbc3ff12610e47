"""The config of an adapter: rank, scale and target modules, under our option names and PEFT's."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from ckpt_convert.errors import ConfigError
from ckpt_convert.formats.base import is_number, load_json
from ckpt_convert.formats.names import ADAPTER_CONFIG
from ckpt_convert.storage.place import Place, checked_place
from ckpt_convert.wording import indented_list

T = TypeVar("T")

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer except the output layer."""

_FROM_PEFT = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "base_model_name_or_path": "base_model",
    **{name: name for name in ("target_modules", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern")},
    **{name: name for name in ("modules_to_save", "task_type", "revision")},
}
_NO_MATTER = frozenset(
    (
        *("auto_mapping", "inference_mode", "megatron_core", "peft_version", "qalora_group_size", "runtime_config"),
        # How an adapter is initialized; init_lora_weights says whether that changed the base weights.
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    )
)
_NARROWS = ("exclude_modules", "layers_pattern", "layers_to_transform")
_INNOCENT_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_REGEX = frozenset("*+?[](){}|^$\\")


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA or DoRA adapter: W + scale · B · A, scale = alpha / rank, or alpha / √rank with ``use_rslora``.

    rank: rows of A and columns of B. target_modules: the linear layers that have an adapter, each by its name or the
    end of it in the training layout or Hugging Face's (q_proj, wq, output_proj, layers.3.attn.q_proj), or "all-linear"
    (all but the output layer); None takes those that the model has. rank_pattern, alpha_pattern: another rank or alpha
    for some modules, named in the same way; the first match counts. modules_to_save: modules that are trained whole
    and saved with the adapter. base_model, revision: the base model that the file names. ``dropout`` is only written
    to the file. Raises ConfigError for invalid values.
    """

    rank: int
    alpha: float
    target_modules: Sequence[str] | str | None = None
    dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    modules_to_save: Sequence[str] = ()
    base_model: str | None = None
    task_type: str | None = "CAUSAL_LM"
    revision: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        problems = [*_numbers(self), *_names(self)]
        if problems:
            raise ConfigError(f"the adapter's config does not fit:{indented_list(problems)}")
        if not isinstance(self.target_modules, str | None):
            object.__setattr__(self, "target_modules", tuple(sorted(self.target_modules)))
        object.__setattr__(self, "modules_to_save", tuple(sorted(self.modules_to_save)))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name) or {}))

    @classmethod
    def of(cls, given: object) -> AdapterConfig:
        """The config from an AdapterConfig, a dict, a peft.LoraConfig, or the path of an adapter_config.json.

        A dict may use PEFT's names or ours. target_modules that PEFT reads as a regular expression, and those that
        exclude_modules or layers_to_transform restrict, become None: the tensors show which modules have an adapter.
        Raises ConfigError, which lists all options that neither the files nor the formula above can express.
        """
        if isinstance(given, AdapterConfig):
            return given
        if isinstance(given, str | os.PathLike | Place):
            path = checked_place(given, "adapter")
            path = path / ADAPTER_CONFIG if path.is_folder() else path
            return _of_peft(load_json(path), str(path))
        content = given.to_dict() if hasattr(given, "to_dict") else given
        if not isinstance(content, Mapping):
            raise ConfigError(
                f"adapter: expected an AdapterConfig, a dict, a peft.LoraConfig or a path, found {type(given).__name__}"
            )
        own = {field.name for field in dataclasses.fields(cls)}
        if "rank" in content or "alpha" in content:
            unknown = sorted(str(key) for key in content if key not in own)
            lacking = sorted({"rank", "alpha"} - set(content))
            if unknown or lacking:
                said = [f"{name}: is no option" for name in unknown] + [f"{name}: is missing" for name in lacking]
                raise ConfigError(
                    f"the adapter's config does not fit:{indented_list(said)}\n  known: {', '.join(sorted(own))}"
                )
            return cls(**content)
        return _of_peft(content, "the adapter's config")

    def rank_of(self, *names: str) -> int:
        """The rank of the module that has these names, one per layout."""
        return _pattern(self.rank_pattern or {}, names, self.rank)

    def alpha_of(self, *names: str) -> float:
        """The alpha of the module that has these names."""
        return _pattern(self.alpha_pattern or {}, names, self.alpha)

    def scale_of(self, *names: str) -> float:
        """The factor of B · A for the module that has these names."""
        rank = self.rank_of(*names)
        return self.alpha_of(*names) / (math.sqrt(rank) if self.use_rslora else rank)


def is_module_name(word: str, *names: str) -> bool:
    """Whether a word is one of the names, or the end of one after a dot."""
    return any(name == word or name.endswith(f".{word}") for name in names)


def plain_pattern(pattern: str) -> str | None:
    """The module name in a key of rank_pattern; None for a real regular expression, which PEFT allows."""
    name = pattern.replace("\\.", ".")
    return None if _REGEX & set(name) else name


def _pattern(patterns: Mapping[str, T], names: Sequence[str], default: T) -> T:
    for pattern, value in patterns.items():
        if is_module_name(plain_pattern(pattern) or pattern, *names):
            return value
    return default


def _of_peft(content: Mapping[str, Any], where: str) -> AdapterConfig:
    content = {key: value.value if isinstance(value, Enum) else value for key, value in content.items()}
    kind, start = content.pop("peft_type", "LORA"), content.pop("init_lora_weights", None)
    problems = []
    if kind != "LORA":
        problems.append(f'peft_type: expected "LORA", found {kind!r:.100}')
    if not any(start is one or (isinstance(one, str) and start == one) for one in _INNOCENT_STARTS):
        problems.append(f"init_lora_weights: {start!r:.100} changes the base weights, which PEFT then has to do again")
    if content.pop("bias", "none") != "none":
        problems.append('bias: expected "none"; biases that are trained are no part of the adapter here')
    narrowed = [name for name in _NARROWS if not _is_unset(content.pop(name, None))]
    known = {ours: content.pop(theirs) for theirs, ours in _FROM_PEFT.items() if theirs in content}
    known = {name: value for name, value in known.items() if name == "target_modules" or not _is_unset(value)}
    problems += [
        f"{key}: {value!r:.100} cannot be expressed here"
        for key, value in content.items()
        if key not in _NO_MATTER and not _is_unset(value)
    ]
    if problems:
        raise ConfigError(f"{where}: has options that are not supported:{indented_list(sorted(problems))}")
    targets = known.get("target_modules")
    if narrowed or (isinstance(targets, str) and targets != ALL_LINEAR):
        known["target_modules"] = None
    try:
        return AdapterConfig(**{"rank": 8, "alpha": 8, "task_type": None, **known})  # PEFT's defaults
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _is_unset(value: object) -> bool:
    """Whether an option has no effect: PEFT writes empty lists, tuples, dicts and sets for some."""
    return value is None or value is False or (isinstance(value, Sized) and not len(value))


def _numbers(config: AdapterConfig) -> list[str]:
    problems = []
    ranks = {"rank": config.rank, **_entries("rank_pattern", config.rank_pattern)}
    alphas = {"alpha": config.alpha, **_entries("alpha_pattern", config.alpha_pattern)}
    for name, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            problems.append(f"{name}: expected a whole number from 1 on, found {rank!r:.100}")
    for name, alpha in alphas.items():
        if not _is_finite(alpha) or alpha <= 0:
            problems.append(f"{name}: expected a positive number, found {alpha!r:.100}")
    if not _is_finite(config.dropout) or not 0 <= config.dropout < 1:
        problems.append(f"dropout: expected a number from 0 to below 1, found {config.dropout!r:.100}")
    for name in ("use_dora", "use_rslora"):
        if not isinstance(getattr(config, name), bool):
            problems.append(f"{name}: expected true or false, found {getattr(config, name)!r:.100}")
    return problems


def _names(config: AdapterConfig) -> list[str]:
    problems = []
    for name in ("target_modules", "modules_to_save"):
        value = getattr(config, name)
        if value == ALL_LINEAR and name == "target_modules":
            continue
        if value is not None and (isinstance(value, str) or not _are_strings(value)):
            problems.append(f"{name}: expected a list of names, found {value!r:.100}")
    if config.modules_to_save is None:
        problems.append("modules_to_save: expected a list of names, which may be empty, found None")
    for name in ("rank_pattern", "alpha_pattern"):
        value = getattr(config, name)
        if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
            problems.append(f"{name}: expected numbers by module name, found {value!r:.100}")
        elif value is not None:
            regular = sorted(key for key in value if plain_pattern(key) is None)
            problems += [f"{name}: {key!r:.100} is a regular expression; name the modules" for key in regular]
    for name in ("base_model", "task_type", "revision"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, str):
            problems.append(f"{name}: expected a string or nothing, found {value!r:.100}")
    return problems


def _entries(name: str, pattern: object) -> dict[str, Any]:
    return {f"{name}[{key!r:.100}]": value for key, value in pattern.items()} if isinstance(pattern, Mapping) else {}


def _are_strings(value: object) -> bool:
    return isinstance(value, Sequence | set | frozenset) and all(isinstance(one, str) and one for one in value)


def _is_finite(value: object) -> bool:
    return is_number(value) and -1e38 < value < 1e38  # no NaN
