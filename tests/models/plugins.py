"""Distributions with families, as an installer leaves them: modules beside a dist-info directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from ckpt_convert.models import FAMILIES


def write_distribution(root: Path, name: str, modules: Mapping[str, str], points: Mapping[str, str]) -> Path:
    """A distribution ``name`` 1.0 below ``root`` with these modules and entry points; returns ``root``."""
    info = root / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[ckpt_convert.families]", *lines, ""]))
    for module, source in modules.items():
        (root / f"{module}.py").write_text(source)
    return root


def without_outside_families(patch: pytest.MonkeyPatch) -> None:
    """Families as they are when a process starts: none from outside, no entry point loaded."""
    patch.setattr(FAMILIES, "registered", {})
    patch.setattr(FAMILIES, "origins", {})
    patch.setattr(FAMILIES, "_loaded", False)
