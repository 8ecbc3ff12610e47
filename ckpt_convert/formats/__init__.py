"""The directory layout of each format: which files hold weights, their names, and the auxiliary files."""

from __future__ import annotations

from ckpt_convert.errors import option_error
from ckpt_convert.formats import hf, meta, native, torchtitan
from ckpt_convert.formats.base import Format, WeightDirectory, WeightName

ALL: dict[str, Format] = {format.name: format for format in (hf.FORMAT, meta.FORMAT, native.FORMAT, torchtitan.FORMAT)}

__all__ = ["ALL", "Format", "WeightDirectory", "WeightName", "check_format_name"]


def check_format_name(name: str | None, option: str) -> None:
    """Raise UsageError unless ``name`` is a format or None; ``option`` is the option that it was given as."""
    if name is not None and name not in ALL:
        raise option_error(option, name, f"no such format; known: {', '.join(ALL)}")
