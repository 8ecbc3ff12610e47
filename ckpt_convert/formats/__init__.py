"""The directories of each format: which files hold weights, what they are called, and what lies beside them."""

from __future__ import annotations

from ckpt_convert.errors import option_error
from ckpt_convert.formats import hf, meta, native, torchtitan
from ckpt_convert.formats.base import Format, WeightDirectory, WeightName

ALL: dict[str, Format] = {format.name: format for format in (hf.FORMAT, meta.FORMAT, native.FORMAT, torchtitan.FORMAT)}

__all__ = ["ALL", "Format", "WeightDirectory", "WeightName", "check_format_name"]


def check_format_name(name: str | None, option: str) -> None:
    """Raise UsageError for what is no format; ``option`` is what it was given as."""
    if name is not None and name not in ALL:
        raise option_error(option, name, f"no such format; known: {', '.join(ALL)}")
