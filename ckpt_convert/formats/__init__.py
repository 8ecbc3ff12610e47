"""The directories of each format: which files hold weights, what they are called, and what lies beside them."""

from __future__ import annotations

from ckpt_convert.formats import hf, meta, native, torchtitan
from ckpt_convert.formats.base import Directory, Format, WeightName

ALL: dict[str, Format] = {format.name: format for format in (hf.FORMAT, meta.FORMAT, native.FORMAT, torchtitan.FORMAT)}

__all__ = ["ALL", "Directory", "Format", "WeightName"]
