"""The families: one table each, and what translates their configs. No files, no torch."""

from __future__ import annotations

from ckpt_convert.models.llama import LLAMA
from ckpt_convert.models.mistral import MISTRAL
from ckpt_convert.models.table import FORMATS, Family

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, MISTRAL)}

__all__ = ["FAMILIES", "FORMATS", "Family"]
