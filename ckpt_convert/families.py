"""What the table of a family is written with, for one that does not come with this package: docs/adding-a-family.md.

    from ckpt_convert.families import Family, Key, Row, register

    register(Family("mine", "My architecture", ("my_model_type",), rows=(...), dims=...))

``Family``, ``Row`` and ``Key`` are the table itself. ``linear``, ``layer_norm`` and ``rms_norm`` make the rows of a
layer; ``columns``, ``fused``, ``named``, ``prefixed``, ``replaced`` and ``with_rope`` take rows of one table over into
another. ``base_dims`` and the ``optional_…`` and ``require_…`` functions read config.json, ``rotary_dim`` how much of a
head rotates. ``Params`` is what a family with a meta column says of its params.json; its functions are given
``ConfigOptions`` and ``Weights`` and return ``Translated``.
"""

from __future__ import annotations

from ckpt_convert.models.core.builders import layer_norm, linear, rms_norm
from ckpt_convert.models.core.config import (
    CONFIG,
    PARAMS,
    ConfigOptions,
    Translated,
    base_dims,
    optional_bool,
    optional_count,
    optional_int,
    optional_mapping,
    optional_number,
    optional_str,
    require_int,
    require_number,
)
from ckpt_convert.models.core.params import Params, Weights
from ckpt_convert.models.core.picking import columns, fused, named, prefixed, replaced, with_rope
from ckpt_convert.models.core.rope import rotary_dim
from ckpt_convert.models.core.rows import Key, Row
from ckpt_convert.models.core.table import Family
from ckpt_convert.models.registry import register

__all__ = [
    "CONFIG",
    "PARAMS",
    "ConfigOptions",
    "Family",
    "Key",
    "Params",
    "Row",
    "Translated",
    "Weights",
    "base_dims",
    "columns",
    "fused",
    "layer_norm",
    "linear",
    "named",
    "optional_bool",
    "optional_count",
    "optional_int",
    "optional_mapping",
    "optional_number",
    "optional_str",
    "prefixed",
    "register",
    "replaced",
    "require_int",
    "require_number",
    "rms_norm",
    "rotary_dim",
    "with_rope",
]
