"""All families, and what a config has to say to be of one: a table is imported when a checkpoint may be of its family.

``GROUPS`` lists the built-in families without importing their tables; tests compare the two. Families of other
distributions (``entry_points``) are loaded when no built-in one fits, or when all families are listed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

from ckpt_convert import log
from ckpt_convert.models.core.table import Family
from ckpt_convert.values import frozen


@frozen()
class Listed:
    """A built-in family before its table is imported: its name, its module, and which configs may be of it.

    The ``Family`` has its name in capitals. ``model_types`` (default: the name) and ``architectures`` are those of the
    table; every params.json of the family has one of the keys ``params``; ``from_shapes`` marks a family whose files
    may come without a config.
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
        """Import the table and return the family."""
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
        Listed("mistral3", "mistral3.table", params=("vision_encoder",)),
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
"""The built-in families by group. Of several that fit a config and its keys equally well, the first one is taken."""


UNLISTED = frozenset({"flex_olmo", "olmo", "olmoe"})
"""Model types without a table whose layout is known to be Llama's: what does not fit in them is an error."""


OUTSIDE = "from other packages"
"""The group of the families that are not built in."""


class Families(Mapping[str, Family]):
    """Families by name; a lookup imports one table, iterating over the values imports all of them.

    ``registered`` are those from outside, ``origins`` the distributions of those that came as entry points. A built-in
    family wins: those from outside are only considered where no built-in family has the name, the model_type, the
    params.json or the keys.
    """

    def __init__(self, listed: Iterable[Listed]) -> None:
        self._listed = {each.name: each for each in listed}
        self.registered: dict[str, Family] = {}
        self.origins: dict[str, str] = {}
        self._loaded = False
        self._lock = threading.RLock()

    def __getitem__(self, name: str) -> Family:
        return self._listed[name].load() if name in self._listed else self.outside[name]

    def __contains__(self, name: object) -> bool:
        return name in self._listed or name in self.outside

    def __iter__(self) -> Iterator[str]:
        yield from self._listed
        yield from self.outside

    def __len__(self) -> int:
        return len(self._listed) + len(self.outside)

    @property
    def built_in(self) -> Iterator[Family]:
        """The built-in families, imported one by one."""
        return (each.load() for each in self._listed.values())

    @property
    def outside(self) -> Mapping[str, Family]:
        """The registered families; the first call loads the entry points, and logs a warning for each that fails."""
        with self._lock:
            if not self._loaded:
                self._loaded = True  # first, for plugins that look up families while they are imported
                self._load()
        return self.registered

    def _load(self) -> None:
        from ckpt_convert.models.entry_points import plugins

        for plugin in plugins():
            problems = [plugin.problem] if plugin.problem is not None else []
            for family in plugin.families:
                try:
                    self.add(family)
                except ValueError as error:
                    problems.append(str(error))
                else:
                    self.origins[family.name] = plugin.origin
            for problem in problems:
                log.warning("the family %r of the package %s is left out: %s", plugin.name, plugin.origin, problem)

    def add(self, family: Family) -> None:
        """As ``register``."""
        if self.registered.get(family.name) is family:
            return
        if family.name in self._listed or family.name in self.registered:
            raise ValueError(f"{family.name}: there is a family of this name")
        taken = [each.name for each in self._listed.values() if set(each.model_types) & set(family.model_types)]
        if taken:
            raise ValueError(
                f"{family.name}: its model_types are those of the built-in family {taken[0]}, which would always be "
                "taken; give model_types=() and choose the family by its name"
            )
        from ckpt_convert.models.core.table_check import check_table

        check_table(family)
        self.registered[family.name] = family

    def of_type(self, model_type: object, architectures: Iterable[str]) -> list[Family]:
        """The families with this model_type; one with ``architectures`` only if the config names one of them."""
        classes = set(architectures)
        return [
            self[each.name]
            for each in self._with_type(model_type)
            if not each.architectures or classes & set(each.architectures)
        ]

    def has_type(self, model_type: object) -> bool:
        """Whether any family has this model_type."""
        return bool(self._with_type(model_type))

    def _with_type(self, model_type: object) -> list[Listed] | list[Family]:
        listed = [each for each in self._listed.values() if model_type in each.model_types]
        return listed or [family for family in self.outside.values() if model_type in family.model_types]

    def of_params(self, params: Mapping[str, Any]) -> list[Family]:
        """The families that a params.json may belong to by its keys; ``Params.evidence`` decides."""
        inner = params.get("model")
        keys = {*params, *(inner if isinstance(inner, Mapping) else ())}
        likely = [each.load() for each in self._listed.values() if not keys.isdisjoint(each.params)]
        if not params or any(family.params is not None and family.params.evidence(params) for family in likely):
            return likely
        return [*likely, *(family for family in self.outside.values() if family.params is not None)]

    @property
    def with_params(self) -> list[str]:
        """The names of the families with a params.json."""
        listed = [name for name, each in self._listed.items() if each.params]
        return [*listed, *(name for name, family in self.outside.items() if family.params is not None)]

    @property
    def with_shapes(self) -> list[Family]:
        """The built-in families whose files may come without a config, which the tensor shapes then give."""
        return [each.load() for each in self._listed.values() if each.from_shapes]


FAMILIES = Families(listed for group in GROUPS.values() for listed in group)


def grouped() -> dict[str, tuple[Family, ...]]:
    """All families by group, all tables imported; those from outside are a group of their own, where there are any."""
    built_in = {group: tuple(listed.load() for listed in families) for group, families in GROUPS.items()}
    outside = tuple(FAMILIES.outside.values())
    return {**built_in, OUTSIDE: outside} if outside else built_in


def register(family: Family) -> None:
    """Add a family from outside to this process: it then takes part in everything that goes by name, config or keys.

    An installed package does it for every process, with an entry point of the group ``ckpt_convert.families``.

    Raises ValueError for a name or a model_type that a family has, and for a table that makes no sense, naming its row
    and column.
    """
    FAMILIES.add(family)
