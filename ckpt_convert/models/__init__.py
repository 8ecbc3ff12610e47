"""The model families: one table each, and the translation of their configs. Reads no files, imports no torch."""

from __future__ import annotations

from ckpt_convert.models.core.table import FORMATS, Family
from ckpt_convert.models.registry import FAMILIES, grouped, register

__all__ = ["FAMILIES", "FORMATS", "Family", "grouped", "register"]
