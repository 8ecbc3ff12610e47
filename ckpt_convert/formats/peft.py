"""PEFT's adapters: an adapter_config.json and the adapter's weights, which are no model by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.formats.base import is_number, load_json
from ckpt_convert.formats.names import ADAPTER_CONFIG
from ckpt_convert.storage.place import Place

KIND = "peft"


def read_adapter_config(directory: Place) -> dict[str, Any] | None:
    """The content of adapter_config.json; None if it is missing or unreadable."""
    try:
        return load_json(directory / ADAPTER_CONFIG) if (directory / ADAPTER_CONFIG).is_regular_file() else None
    except ConfigError:
        return None


def describe_adapter(said: Mapping[str, Any]) -> str:
    """One line about the adapter: its type, rank and alpha if it has them, and its base model."""
    sizes = [
        f"{label}={said[name]}" for name, label in (("r", "r"), ("lora_alpha", "alpha")) if is_number(said.get(name))
    ]
    kind = str(said.get("peft_type") or "of unknown type")
    what = f"PEFT adapter ({kind}{' ' if sizes else ''}{', '.join(sizes)})"
    base = said.get("base_model_name_or_path")
    return f"{what} for {base}" if isinstance(base, str) and base else what


def adapter_facts(directory: Place) -> list[tuple[str, str]]:
    """Facts about an adapter, as (label, text)."""
    said = read_adapter_config(directory)
    if said is None:
        return []
    found = [("adapter", describe_adapter(said))]
    modules = said.get("target_modules")
    if isinstance(modules, str) and modules:
        found.append(("targets", modules))
    elif isinstance(modules, list) and modules:
        found.append(("targets", ", ".join(sorted(map(str, modules)))))
    return found
