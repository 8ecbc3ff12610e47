"""Converting the adapters of a training model to and from PEFT's adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_convert.adapters.config import AdapterConfig
from ckpt_convert.adapters.modules import Modules
from ckpt_convert.adapters.parameters import PEFT_PREFIX, Adapter, SplitTensors, split_adapters, translate_adapters
from ckpt_convert.adapters.stored import refuse_objects
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.checkpoint.tensor import CheckpointTensor
from ckpt_convert.containers import safetensors
from ckpt_convert.dtypes import FROM_TORCH, torch_name
from ckpt_convert.errors import CheckpointNotFoundError, ConfigError, KeyMismatchError, ShapeMismatchError
from ckpt_convert.formats.base import render_json
from ckpt_convert.formats.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ckpt_convert.storage.place import Place
from ckpt_convert.wording import indented_list


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter read from a file, under the training layout's names and in its RoPE layout.

    adapters: by module. trained_whole: weights that replace those of the base, by key (PEFT's modules_to_save, and a
    resized embedding). base: base weights in the file of modules that also have an adapter, by key (PEFT adds lm_head).
    config: the content of adapter_config.json.
    """

    adapters: dict[str, Adapter]
    trained_whole: dict[str, torch.Tensor]
    base: dict[str, torch.Tensor]
    config: AdapterConfig


def to_peft(
    parts: SplitTensors, config: AdapterConfig, modules: Modules, *, base_model: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of adapter_model.safetensors by key, and the content of adapter_config.json.

    ``found`` is what ``split`` made of the training model with this ``config`` and ``modules``. Tensors keep dtype and
    device, and share memory with the model's where the rows are in the same order. ``base_model`` is what the file
    calls its base, where the config does not say it.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b, magnitude) in translate_adapters(parts.adapters, modules, source=modules.format, target="hf"):
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = b
        if magnitude is not None:
            tensors[f"{PEFT_PREFIX}{name}.lora_magnitude_vector"] = magnitude
    whole = []
    for key, tensor in parts.trained_whole.items():
        _check_whole(key, tensor, modules)
        theirs = str(modules.hf_key(key))
        whole.append(theirs.rpartition(".")[0])
        tensors[PEFT_PREFIX + theirs] = modules.reorder_rows(tensor, modules.keys[key], modules.format, "hf")
    return tensors, _config(list(parts.adapters), whole, config, modules, base_model)


def render_files(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, bytes]:
    """The two files by name, in memory, byte for byte as PEFT writes the same tensors."""
    described = [(key, FROM_TORCH[torch_name(one.dtype)].name, tuple(one.shape)) for key, one in tensors.items()]
    layout = safetensors.build(safetensors.serialized_order(described), {"format": "pt"})
    parts = [content for _, content in layout.literals]
    parts += [_bytes(tensors[stored.key]) for stored in layout.header.tensors]
    return {ADAPTER_WEIGHTS[0]: b"".join(parts), ADAPTER_CONFIG: render_json(config, sort_keys=True)}


def from_peft(directory: Place, modules: Modules, config: AdapterConfig | None = None) -> LoadedAdapter:
    """Read a PEFT adapter from a directory into the layout of ``modules``; safetensors take precedence over .bin.

    ``config`` is that of the training model: a file with another scale does not fit it. Raises CheckpointNotFoundError,
    ConfigError, KeyMismatchError or ShapeMismatchError, which list all problems.
    """
    path = next((directory / name for name in ADAPTER_WEIGHTS if (directory / name).is_regular_file()), None)
    if path is None or not (directory / ADAPTER_CONFIG).is_regular_file():
        raise CheckpointNotFoundError(
            f"{directory}: is no PEFT adapter, which has {ADAPTER_WEIGHTS[0]} and {ADAPTER_CONFIG}"
        )
    said = AdapterConfig.of(directory / ADAPTER_CONFIG)
    with open_identified(path) as checkpoint:
        refuse_objects(checkpoint)
        tensors = {key: CheckpointTensor(checkpoint, info).torch() for key, info in checkpoint.tensors.items()}
    foreign = sorted(key for key in tensors if not key.startswith(PEFT_PREFIX))
    if foreign:
        raise KeyMismatchError(f"{path}: not all keys start with {PEFT_PREFIX}, as PEFT's do:{indented_list(foreign)}")
    theirs = modules.as_hf()
    found = split_adapters(tensors, _without_strangers(said, theirs), theirs, what=str(path), has_base=False)
    adapters = dict(translate_adapters(found.adapters, theirs, source="hf", target=modules.format))
    if config is not None:
        _check_scales(adapters, said, config, modules, str(path))
    unknown = sorted(key for key in (*found.trained_whole, *found.base) if _ours(key, theirs, modules) is None)
    if unknown:
        raise KeyMismatchError(
            f"{path}: has weights that the {modules.format} layout has no place for:{indented_list(unknown)}"
        )
    whole = []
    for weights in (found.trained_whole, found.base):
        moved = {}
        for key, tensor in weights.items():
            _check_whole(key, tensor, theirs)
            moved[str(_ours(key, theirs, modules))] = modules.reorder_rows(
                tensor, theirs.keys[key], "hf", modules.format
            )
        whole.append(moved)
    return LoadedAdapter(adapters, whole[0], whole[1], said)


def load_into(
    parts: SplitTensors,
    loaded: LoadedAdapter,
    copy: Callable[[torch.Tensor, torch.Tensor], object] = torch.Tensor.copy_,
) -> list[str]:
    """Copy an adapter into the tensors of a training model, in place; returns notices about casts and unused weights.

    ``copy`` is called with a tensor of the model and the whole one that belongs into it.

    Weights of ``loaded.saved`` go where ``found.saved`` has them, those of ``loaded.base`` into the base. Raises
    KeyMismatchError or ShapeMismatchError, before anything is copied, with all problems.
    """
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    base = {key: tensor for key, tensor in parts.base.items() if key in loaded.base}
    here, there = _flat(parts) | base, _flat(loaded) | {key: loaded.base[key] for key in base}
    problems = [f"{key}: the model has it, the adapter does not" for key in here if key not in there]
    problems += [f"{key}: the adapter has it, the model does not" for key in there if key not in here]
    if problems:
        raise KeyMismatchError(f"the adapter does not fit the model:{indented_list(problems)}")
    for key, tensor in here.items():
        pairs[key] = tensor, there[key]
        if tensor.shape != there[key].shape:
            problems.append(f"{key}: expected {list(tensor.shape)}, found {list(there[key].shape)}")
    if problems:
        raise ShapeMismatchError(f"the adapter does not fit the model:{indented_list(problems)}")
    with torch.no_grad():
        for target, source in pairs.values():
            copy(target, source)
    left = [
        f"the model has no {key}, which the adapter's file holds too; left out"
        for key in loaded.base
        if key not in base
    ]
    casts = sorted({(str(source.dtype), str(target.dtype)) for target, source in pairs.values()})
    return left + [f"the adapter's {source} is held as {target}" for source, target in casts if source != target]


def _flat(of: SplitTensors | LoadedAdapter) -> dict[str, torch.Tensor]:
    out = dict(of.trained_whole)
    for module, (a, b, magnitude) in of.adapters.items():
        out |= {f"{module}: A": a, f"{module}: B": b}
        if magnitude is not None:
            out[f"{module}: magnitude"] = magnitude
    return out


def _config(
    adapted: list[str], whole: list[str], config: AdapterConfig, modules: Modules, base_model: str | None
) -> dict[str, Any]:
    """The content of adapter_config.json; options that are left out have PEFT's defaults."""
    all_of_them = {modules.hf_name(module): module for module in modules.linear}
    names = [modules.hf_name(module) for module in adapted]
    ranks = {modules.hf_name(module): config.rank_of(*modules.both_names(module)) for module in adapted}
    alphas = {modules.hf_name(module): config.alpha_of(*modules.both_names(module)) for module in adapted}
    return {
        "alpha_pattern": _patterns(alphas, config.alpha),
        "auto_mapping": None,
        "base_model_name_or_path": config.base_model or base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": _whole_names(whole, modules) or None,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": _patterns(ranks, config.rank),
        "revision": config.revision,
        "target_modules": _short(names, all_of_them),
        "task_type": config.task_type,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def _short(names: list[str], every: Iterable[str]) -> list[str]:
    """Last parts (q_proj), if every module with that ending is among the names; else all names in full."""
    short = {_last(name) for name in names}
    return sorted(short if {name for name in every if _last(name) in short} == set(names) else names)


def _patterns(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """Values other than the default, by last part if all modules with that ending agree, else by full name."""
    alike: dict[str, set[float]] = {}
    for name, value in values.items():
        alike.setdefault(_last(name), set()).add(value)
    return {
        (_last(name) if len(alike[_last(name)]) == 1 else name): value
        for name, value in sorted(values.items())
        if value != usual
    }


def _whole_names(whole: list[str], modules: Modules) -> list[str]:
    """Names for modules_to_save, which PEFT matches against the ends of names, even without a dot."""
    every = {str(one.key("hf")).rpartition(".")[0] for one in modules.as_hf().keys.values()}
    out = set()
    for name in whole:
        alone = {other for other in every if other.endswith(_last(name))} == {name}
        out.add(_last(name) if alone else name)
    return sorted(out)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _ours(key: str, theirs: Modules, modules: Modules) -> str | None:
    instance = theirs.keys.get(key)
    return instance.key(modules.format) if instance is not None else None


def _check_whole(key: str, tensor: torch.Tensor, modules: Modules) -> None:
    expected = modules.keys[key].row.sizes(modules.dims)
    if tuple(tensor.shape) != expected:
        raise ShapeMismatchError(
            f"{key}: expected {list(expected)}, found {list(tensor.shape)}; an adapter that resizes the embedding "
            "needs a base model that is resized as well"
        )


def _without_strangers(said: AdapterConfig, theirs: Modules) -> AdapterConfig:
    """A file's config without words that match no module of this model, which PEFT ignores."""

    def known(word: str) -> bool:
        return not theirs.match_linear([word])[1]

    targets = said.target_modules
    return AdapterConfig(
        **{
            **vars(said),
            "target_modules": targets
            if targets is None or isinstance(targets, str)
            else [w for w in targets if known(w)],
            "rank_pattern": {word: value for word, value in (said.rank_pattern or {}).items() if known(word)},
            "alpha_pattern": {word: value for word, value in (said.alpha_pattern or {}).items() if known(word)},
            "modules_to_save": (),
        }
    )


def _check_scales(
    adapters: Mapping[str, Adapter], said: AdapterConfig, config: AdapterConfig, modules: Modules, where: str
) -> None:
    problems = []
    if said.use_dora != config.use_dora:
        problems.append(f"use_dora: the file says {said.use_dora}, the training model's config {config.use_dora}")
    for module in adapters:
        theirs, ours = _scale(said, modules.both_names(module)), _scale(config, modules.both_names(module))
        if theirs != ours:
            problems.append(f"{module}: the file says {theirs[2]}, the training model's config {ours[2]}")
    if problems:
        raise ConfigError(f"{where}: the adapter is not that of the training model:{indented_list(problems)}")


def _scale(config: AdapterConfig, names: tuple[str, str]) -> tuple[int, float, str]:
    """Rank, scale, and a text with both and the settings that they come from."""
    rank, scale = config.rank_of(*names), config.scale_of(*names)
    how = f"alpha {config.alpha_of(*names):g}{', rslora' if config.use_rslora else ''}"
    return rank, scale, f"rank {rank}, scale {scale:g} ({how})"
