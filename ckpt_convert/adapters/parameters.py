"""LoRA and DoRA parameters in a training model: which tensors they are, and which modules they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ckpt_convert.adapters.config import AdapterConfig, plain_pattern
from ckpt_convert.adapters.modules import Modules
from ckpt_convert.errors import CkptConvertError, ConfigError, KeyMismatchError, ShapeMismatchError
from ckpt_convert.wording import indented_list

if TYPE_CHECKING:
    import torch

PEFT_PREFIX = "base_model.model."
"""The prefix that PEFT's wrapper adds to every key."""

_A, _B, _MAGNITUDE = "A", "B", "magnitude"
_SPELLINGS = {
    **{f".lora_{letter}{ending}": _A for letter in "aA" for ending in ("", ".weight")},
    **{f".lora_{letter}{ending}": _B for letter in "bB" for ending in ("", ".weight")},
    ".lora_A.default.weight": _A,
    ".lora_B.default.weight": _B,
    ".magnitude": _MAGNITUDE,
    ".magnitude.weight": _MAGNITUDE,
    **{f".lora_magnitude_vector{ending}": _MAGNITUDE for ending in ("", ".weight", ".default", ".default.weight")},
}
_WRAPPED = ("base_layer", "linear", "base")
"""The names under which a module with an adapter may keep the layer that it adapts."""

KNOWN = "lora_a, lora_A (.weight, .default.weight), the same with b, and magnitude or lora_magnitude_vector"


class Adapter(NamedTuple):
    """The adapter of one linear layer: ``a`` [rank, in], ``b`` [out, rank], and with DoRA ``magnitude`` [out]."""

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None = None


@dataclass(frozen=True)
class SplitTensors:
    """The tensors of a model, split into base weights and adapters; no copies.

    base: the base weights by plain key (layers.0.attn.q_proj.weight); names: the keys that the model has for them.
    adapters: by module (layers.0.attn.q_proj), in the order of the model. trained_whole: weights that are trained whole
    (modules_to_save) by plain key; if PEFT wraps the model, ``base`` has the frozen weight, otherwise the same tensor.
    """

    base: dict[str, torch.Tensor]
    adapters: dict[str, Adapter]
    trained_whole: dict[str, torch.Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


class _Problems:
    """Problems by kind of error."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.shapes: list[str] = []

    def raise_if_any(self, what: str) -> None:
        kind: type[CkptConvertError] = KeyMismatchError if self.keys else ShapeMismatchError
        if lines := [*self.keys, *self.shapes]:
            raise kind(f"{what}: the adapter does not fit:{indented_list(lines)}")


def split_adapters(
    tensors_by_key: Mapping[str, torch.Tensor],
    config: AdapterConfig | None,
    modules: Modules,
    *,
    what: str = "the model in memory",
    has_base: bool = True,
) -> SplitTensors:
    """Tell base weights and adapter parameters apart, and check the adapters against the table and the config.

    ``modules`` are those of the training layout. ``has_base=False`` is for a file without base weights. Base weights
    are only checked for presence. Raises KeyMismatchError or ShapeMismatchError, which list all problems, and
    ConfigError for words in the config that match no module.
    """
    problems = _Problems()
    prefix = PEFT_PREFIX if tensors_by_key and all(key.startswith(PEFT_PREFIX) for key in tensors_by_key) else ""
    tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors_by_key.items()}
    kinds, unknown = group_parameters(tensors)
    problems.keys += unknown
    found = _assembled(kinds, tensors, prefix, problems)
    order = {module: at for at, module in enumerate(modules.linear)}
    adapters = {module: found.adapters[module] for module in sorted(found.adapters, key=lambda m: order.get(m, -1))}
    for module in adapters:
        if module not in modules.linear:
            problems.keys.append(
                f"{module}: is no linear layer of {modules.family.name} in the {modules.format} layout"
                f"{modules.suggestion(module)}"
            )
        elif has_base and f"{module}.weight" not in found.base and not _is_omitted(module, modules):
            problems.keys.append(f"{module}: has an adapter, but there is no {module}.weight to adapt")
    base, saved = dict(found.base), dict(found.trained_whole)
    if not has_base:
        saved |= {key: base.pop(key) for key in found.base if found.names[key].removeprefix(PEFT_PREFIX) == key}
    if config is not None:
        _check_config(config, modules)
        saved |= _whole_modules(config, modules, found, problems) if has_base else {}
        problems.keys += _against_targets(config, modules, adapters, saved)
        if not adapters and not saved and not problems.keys:
            problems.keys.append(f"there is none: no key ends as an adapter's does: {KNOWN}")
    for key in saved:
        if (name := key.removesuffix(".weight")) in adapters:
            problems.keys.append(f"{name}: is trained whole (modules_to_save) and has an adapter")
    for module, adapter in adapters.items():
        problems.shapes += _shapes(module, adapter, config, modules)
        if config is not None and config.use_dora != (adapter.magnitude is not None):
            has = "has no magnitude" if config.use_dora else "has a magnitude"
            problems.keys.append(f"{module}: {has}, but the config says use_dora={config.use_dora}")
    problems.raise_if_any(what)
    return SplitTensors(base, adapters, saved, found.names)


def translate_adapters(
    adapters: Mapping[str, Adapter], modules: Modules, *, source: str, target: str
) -> Iterator[tuple[str, Adapter]]:
    """(name in the target layout, adapter) with rows in the target's RoPE layout; A never changes.

    ``modules`` and the names of ``adapters`` are those of the source layout. Tensors whose rows keep their order share
    memory with the source's.
    """
    for module, (a, b, magnitude) in adapters.items():
        instance = modules.linear[module]
        yield (
            str(instance.key(target)).removesuffix(".weight"),
            Adapter(
                a.detach(),
                modules.reorder_rows(b, instance, source, target),
                None if magnitude is None else modules.reorder_rows(magnitude, instance, source, target),
            ),
        )


def group_parameters(keys: Iterable[str]) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
    """By module and kind ("A", "B", "magnitude"), the keys of adapter parameters; and what is wrong with other keys."""
    parts: dict[str, dict[str, list[str]]] = {}
    unknown = []
    for key in keys:
        module, kind = parsed_parameter(key)
        if kind is not None:
            parts.setdefault(module, {}).setdefault(kind, []).append(key)
        elif is_parameter(key):
            hint = "; adapters of embeddings are not supported" if "lora_embedding" in key else ""
            unknown.append(f"{key}: is no adapter parameter that is known ({KNOWN}){hint}")
    return parts, unknown


def parsed_parameter(key: str) -> tuple[str, str | None]:
    """The module and the kind of an adapter's parameter; the key and None for any other."""
    for suffix, kind in _SPELLINGS.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), kind
    return key, None


def is_parameter(key: str) -> bool:
    """Whether a key names a parameter of an adapter, also one of an unknown kind."""
    return parsed_parameter(key)[1] is not None or any(part.startswith("lora_") for part in key.split("."))


def incomplete_parameters(module: str, kinds: Mapping[str, list[str]]) -> list[str]:
    """What is wrong with the parameters of one module: there twice, or A without B."""
    twice = [keys for keys in kinds.values() if len(keys) > 1]
    problems = [f"{module}: has one parameter under {len(keys)} names: {', '.join(keys)}" for keys in twice]
    lacking = [kind for kind in (_A, _B) if kind not in kinds]
    if lacking:
        named = ", ".join(key for keys in kinds.values() for key in keys)
        problems.append(f"{module}: has no LoRA {' and no '.join(lacking)} beside {named}")
    return problems


def _assembled(
    parts: Mapping[str, Mapping[str, list[str]]],
    tensors: Mapping[str, torch.Tensor],
    prefix: str,
    problems: _Problems,
) -> SplitTensors:
    adapters: dict[str, Adapter] = {}
    for module, kinds in parts.items():
        wrong = incomplete_parameters(module, kinds)
        problems.keys += wrong
        if not wrong:
            chosen = {kind: tensors[keys[0]] for kind, keys in kinds.items()}
            adapters[module] = Adapter(chosen[_A], chosen[_B], chosen.get(_MAGNITUDE))
    base: dict[str, torch.Tensor] = {}
    saved: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    for key, tensor in tensors.items():
        if is_parameter(key):
            continue
        plain, trained = plain_key(key, parts)
        into = saved if trained else base
        if plain in into:
            problems.keys.append(f"{plain}: is there twice, as {key} too")
        into[plain] = tensor
        if not trained:
            names[plain] = prefix + key
    return SplitTensors(base, adapters, saved, names)


def plain_key(key: str, adapted: Mapping[str, object]) -> tuple[str, bool]:
    """A base weight's key without wrapper parts, and whether it is PEFT's copy that is trained whole."""
    parts = key.split(".")
    if len(parts) > 2 and parts[-2] in _WRAPPED and ".".join(parts[:-2]) in adapted:
        return ".".join((*parts[:-2], parts[-1])), False
    if len(parts) > 2 and parts[-2] == "original_module":
        return ".".join((*parts[:-2], parts[-1])), False
    if len(parts) > 3 and parts[-3:-1] == ["modules_to_save", "default"]:
        return ".".join((*parts[:-3], parts[-1])), True
    return key, False


def _is_omitted(module: str, modules: Modules) -> bool:
    """Whether the layer is tied to the embedding, so that the model may lack its key."""
    return modules.is_tied and modules.linear[module].row.tied_to is not None


def _check_config(config: AdapterConfig, modules: Modules) -> None:
    words = [] if config.target_modules is None else modules.match_linear(config.target_modules)[1]
    lost = [f"target_modules: {word!r} names no linear layer{modules.suggestion(word)}" for word in words]
    for name, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        unknown = modules.match_linear([plain_pattern(key) or key for key in pattern or {}])[1]
        lost += [f"{name}: {word!r} names no linear layer{modules.suggestion(word)}" for word in unknown]
    lost += [
        f"modules_to_save: {word!r} names no module"
        for word, keys in modules.match_any(config.modules_to_save)
        if not keys
    ]
    if lost:
        raise ConfigError(
            f"the adapter's config does not fit {modules.family.name} in the {modules.format} layout:"
            f"{indented_list(lost)}"
        )


def _whole_modules(
    config: AdapterConfig, modules: Modules, found: SplitTensors, problems: _Problems
) -> dict[str, torch.Tensor]:
    """The weights that modules_to_save names; in a model without PEFT's wrapper these are base weights."""
    out: dict[str, torch.Tensor] = {}
    for word, keys in modules.match_any(config.modules_to_save):
        have = [key for key in keys if key in found.trained_whole or key in found.base]
        if not have:
            problems.keys.append(f"{word}: is to be saved whole (modules_to_save), but the model has no {keys[0]}")
        for key in have:
            if key not in found.trained_whole:
                out[key] = found.base[key]
                row = modules.keys[key].row
                if modules.is_tied and (row.tied_to or any(other.tied_to == row.name for other in modules.family.rows)):
                    problems.keys.append(
                        f"{key}: cannot be saved whole (modules_to_save): it is tied, and PEFT would load it into the "
                        "embedding or the output layer, but not into both"
                    )
    return out


def _against_targets(
    config: AdapterConfig, modules: Modules, adapters: Iterable[str], saved: Iterable[str]
) -> Iterator[str]:
    if config.target_modules is None:
        return
    wanted = [name for name in modules.match_linear(config.target_modules)[0] if f"{name}.weight" not in saved]
    for module in wanted:
        if module not in adapters:
            yield f"{module}: has no adapter, but the config's target_modules name it"
    for module in adapters:
        if module in modules.linear and module not in wanted and f"{module}.weight" not in saved:
            yield f"{module}: has an adapter, but the config's target_modules do not name it"


def _shapes(module: str, adapter: Adapter, config: AdapterConfig | None, modules: Modules) -> Iterator[str]:
    if module not in modules.linear:
        return
    rows, columns = modules.sizes(module)
    a, b, magnitude = adapter
    rank = config.rank_of(*modules.both_names(module)) if config is not None else a.shape[0] if a.dim() else 0
    expected: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {"A": (a, (rank, columns)), "B": (b, (rows, rank))}
    if magnitude is not None:
        expected["magnitude"] = (magnitude, (rows,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            why = f" (the config says rank {rank})" if config is not None and name != "magnitude" else ""
            yield f"{module}: {name}: expected {list(shape)}{why}, found {list(tensor.shape)}"
    kinds = sorted({str(tensor.dtype) for tensor, _ in expected.values() if not tensor.is_floating_point()})
    if kinds:
        yield f"{module}: expected floating-point numbers, found {', '.join(kinds)}"
