"""The families that there are, and what tells them: a table is imported when a checkpoint may be of its family.

A start knows this list and no table. Tests hold it against the tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ckpt_convert.models.core.table import Family
from ckpt_convert.models.core.table_check import check


@dataclass(frozen=True)
class Listed:
    """A family before its table is imported: its name, its module, and what a config of it says.

    The table has the family's name, in capitals. ``model_types`` (the name itself where nothing else is said) and
    ``architectures`` are as the table has them; ``params`` are keys of which every params.json of the family has one;
    ``from_shapes`` marks a family whose files may come without a config.
    """

    name: str
    module: str
    model_types: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    from_shapes: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_types", self.model_types or (self.name,))

    def load(self) -> Family:
        """The family, its table imported."""
        family: Family = getattr(import_module(f"{__package__}.{self.module}"), self.name.upper())
        return family


GROUPS: dict[str, tuple[Listed, ...]] = {
    "language models": (
        Listed("cohere2", "cohere2"),
        Listed("exaone4", "exaone4"),
        Listed("gemma", "gemma"),
        Listed("gemma2", "gemma"),
        Listed("gemma3_text", "gemma"),
        Listed("glm4", "glm4"),
        Listed("granite", "granite"),
        Listed("llama", "llama.table", params=("multiple_of",)),
        Listed("mistral", "mistral.table", params=("hidden_dim",)),
        Listed("olmo2", "olmo2"),
        Listed("olmo3", "olmo3"),
        Listed("phi3", "phi3"),
        Listed("qwen2", "qwen2"),
        Listed("qwen3", "qwen3"),
        Listed("qwen3_5_text", "qwen3_5.table"),
        Listed("smollm3", "smollm3"),
    ),
    "mixtures of experts": (
        Listed("deepseek_v2", "deepseek"),
        Listed("deepseek_v3", "deepseek"),
        Listed("glm4_moe", "glm4_moe"),
        Listed("gpt_oss", "gpt_oss"),
        Listed("kimi_k2", "deepseek"),
        Listed("llama4_text", "llama4.table", params=("moe_args", "nope_layer_interval")),
        Listed("mixtral", "mixtral.table", params=("moe", "num_local_experts", "num_experts_per_tok")),
        Listed("mixtral_2023", "mixtral.table", ("mixtral",), params=("num_local_experts",)),
        Listed("qwen2_moe", "qwen2_moe"),
        Listed("qwen3_moe", "qwen3_moe"),
        Listed("qwen3_next", "qwen3_next"),
    ),
    "with vision": (
        Listed("gemma3", "gemma3_vision"),
        Listed("gemma3_v5", "gemma3_vision", ("gemma3",)),
        Listed("llama4", "llama4.table", params=("moe_args", "nope_layer_interval")),
        Listed("mllama", "mllama.table", params=("vision_num_cross_attention_layers",)),
        Listed("qwen2_5_vl", "qwen2_5_vl"),
        Listed("qwen3_5", "qwen3_5.table"),
        Listed("qwen3_5_moe", "qwen3_5.table"),
        Listed("qwen3_5_moe_split", "qwen3_5.table", ("qwen3_5_moe",)),
        Listed("qwen3_vl", "qwen3_vl"),
    ),
    "reward models and classifiers": (
        Listed("llama_reward", "reward", ("llama",), ("LlamaForSequenceClassification",)),
        Listed("mistral_reward", "reward", ("mistral",), ("MistralForSequenceClassification",)),
    ),
    "text encoders and image generation": (
        Listed("clip", "clip", ("clip", "clip_text_model")),
        Listed("clip_text", "clip", ("clip_text_model",)),
        Listed("t5", "t5"),
        Listed("flux", "flux", ("FluxTransformer2DModel",)),
        Listed("flux_vae", "flux_autoencoder", ("AutoencoderKL",)),
        Listed("flux_autoencoder", "flux_autoencoder", ("AutoEncoder", "AutoencoderKL"), from_shapes=True),
    ),
}
"""All families, by what they are. Of several that a config and the keys fit alike, the first one is taken."""


UNLISTED = frozenset({"flex_olmo", "olmo", "olmoe"})
"""Model types that no table is of, and that are known to be built as Llama is: what misfits in them is an error."""


class Families(Mapping[str, Family]):
    """Families by name: looking one up imports its table, going through their values imports all of them."""

    def __init__(self, listed: Iterable[Listed]) -> None:
        self._listed = {each.name: each for each in listed}
        self.registered: dict[str, Family] = {}

    def __getitem__(self, name: str) -> Family:
        return self._listed[name].load() if name in self._listed else self.registered[name]

    def __contains__(self, name: object) -> bool:
        return name in self._listed or name in self.registered

    def __iter__(self) -> Iterator[str]:
        yield from self._listed
        yield from self.registered

    def __len__(self) -> int:
        return len(self._listed) + len(self.registered)

    @property
    def _said(self) -> list[Listed | Family]:
        """What says of each family which configs are of it."""
        return [*self._listed.values(), *self.registered.values()]

    def of_type(self, model_type: object, architectures: Iterable[str]) -> list[Family]:
        """The families that have a config's model_type, and one of its classes where they ask for one."""
        classes = set(architectures)
        return [
            self[each.name]
            for each in self._said
            if model_type in each.model_types and (not each.architectures or classes & set(each.architectures))
        ]

    def has_type(self, model_type: object) -> bool:
        """Whether a family has this model_type."""
        return any(model_type in each.model_types for each in self._said)

    def of_params(self, params: Mapping[str, Any]) -> list[Family]:
        """The families that a params.json may be of by its keys; each says for itself whether it is."""
        inner = params.get("model")
        keys = {*params, *(inner if isinstance(inner, Mapping) else ())}
        likely = [each.load() for each in self._listed.values() if not keys.isdisjoint(each.params)]
        return [*likely, *(family for family in self.registered.values() if family.params is not None)]

    @property
    def with_params(self) -> list[str]:
        """The names of the families that have a params.json."""
        listed = [name for name, each in self._listed.items() if each.params]
        return [*listed, *(name for name, family in self.registered.items() if family.params is not None)]

    @property
    def with_shapes(self) -> list[Family]:
        """The families whose files may come without a config: their tensors show it."""
        listed = [each.load() for each in self._listed.values() if each.from_shapes]
        return [*listed, *(family for family in self.registered.values() if family.from_shapes is not None)]


FAMILIES = Families(listed for group in GROUPS.values() for listed in group)


def grouped() -> dict[str, tuple[Family, ...]]:
    """The families of the list by group, all tables imported."""
    return {group: tuple(listed.load() for listed in families) for group, families in GROUPS.items()}


def register(family: Family) -> None:
    """Let a family from outside take part in everything that goes by its name, its config or its keys.

    Raises ValueError for a name that a family has, and for a table that could be read in two ways.
    """
    if family.name in FAMILIES:
        raise ValueError(f"{family.name}: there is a family of this name")
    check(family)
    FAMILIES.registered[family.name] = family
