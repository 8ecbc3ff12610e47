"""What a table of a family is written with, for a family that does not come with this package: docs/adding-a-family.md.

from ckpt_convert.families import Family, Key, Row, register

register(Family("mine", "My architecture", ("my_model_type",), rows=(...), dims=...))
"""

from __future__ import annotations

from ckpt_convert.models.core.picking import (
    affine,
    columns,
    fused,
    half,
    interleaved,
    named,
    prefixed,
    replaced,
    unordered,
)
from ckpt_convert.models.core.rows import Key, Row
from ckpt_convert.models.core.table import Family
from ckpt_convert.models.registry import register

__all__ = [
    "Family",
    "Key",
    "Row",
    "affine",
    "columns",
    "fused",
    "half",
    "interleaved",
    "named",
    "prefixed",
    "register",
    "replaced",
    "unordered",
]
