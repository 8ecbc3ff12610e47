"""The description of a format's directories, and what the formats share: JSON, indexes, plain weight files."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any, Literal, TypeGuard

from ckpt_convert.containers.dcp import DCP_INDEX
from ckpt_convert.errors import ConfigError
from ckpt_convert.formats.names import is_plain_weights
from ckpt_convert.storage.base import Entry
from ckpt_convert.storage.place import Place
from ckpt_convert.values import frozen

FormatName = Literal["hf", "meta", "native", "torchtitan"]
ContainerName = Literal["safetensors", "bin", "pth", "pt", "dcp"]

JSON_LIMIT = 1 << 28
TEXT_LIMIT = 1 << 24
"""Size limits in bytes, of a JSON file and of a text or checksum file."""

_MOST_DIGITS = 100
"""Longest integer in JSON, in digits; tokenizer_config.json has one of 31 (int(1e30), for "no limit")."""


@frozen()
class WeightName:
    """A weight file of a checkpoint and its tensor-parallel rank (0 if files are not ranks)."""

    name: str
    rank: int = 0


@frozen()
class WeightDirectory:
    """The weight files of a directory, the name of their index, and its ``weight_map``.

    ``kind`` is "dcp" for torch.distributed.checkpoint's directories, whose own metadata names the files (``weights`` is
    empty then); "peft" for an adapter, which has no format.
    """

    weights: tuple[WeightName, ...]
    index: str | None = None
    weight_map: Mapping[str, str] | None = None
    kind: str | None = None


@frozen()
class Format:
    """The directory layout of one format.

    find_weights: lists the weight files of a directory; None if it has none of this format.
    file_names: the names of n new files in a container.
    containers: the containers it may use, the default first.
    config: the config file at the root, None if the format has none there.
    uses_auxiliary: whether readers of the format use an auxiliary file of this name.
    has_ranks: whether each file holds one tensor-parallel rank.
    ignored_prefixes: prefixes of keys that are not weights but other state of a training run.
    renamed_key_parts: (old, new) parts of keys that earlier releases named differently.
    """

    name: str
    find_weights: Callable[[Place], WeightDirectory | None]
    file_names: Callable[[int, str], list[str]]
    containers: tuple[str, ...]
    config: str | None
    uses_auxiliary: Callable[[str], bool]
    has_ranks: bool = False
    ignored_prefixes: tuple[str, ...] = ()
    renamed_key_parts: tuple[tuple[str, str], ...] = ()


def load_json(path: Place, *, expected: Entry | None = None) -> dict[str, Any]:
    """Read the object in a JSON file; raises ConfigError if the file is missing or is not a JSON object.

    Raises as ``Place.read`` does if the system fails to read the file.
    """
    if not path.is_present():
        raise ConfigError(f"{path}: cannot be read: there is no such file")
    try:
        content = parse_json(path.read(JSON_LIMIT, expected=expected))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is no readable JSON: {error}; download or copy it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def parse_json(data: bytes) -> Any:
    """Parse JSON, with or without a byte order mark; raises ValueError, or RecursionError.

    Integers are limited to 100 digits, because parsing longer ones takes quadratic time.
    """
    return json.loads(data.removeprefix(codecs.BOM_UTF8).decode(), parse_int=_integer)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is a number, which a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"it has an integer of {len(text):,} digits ({text[:20]}…)")
    return int(text)


def render_json(content: Mapping[str, Any], *, sort_keys: bool = False) -> bytes:
    """JSON as Hugging Face's libraries write it: indented by two spaces, with a final newline."""
    return (json.dumps(content, indent=2, sort_keys=sort_keys) + "\n").encode()


def render_index(weight_map: Mapping[str, str], total_size: int, total_parameters: int) -> bytes:
    """The index of a sharded checkpoint, as ``save_pretrained`` writes it."""
    metadata = {"total_parameters": total_parameters, "total_size": total_size}
    empty = render_json({"metadata": metadata, "weight_map": {}}, sort_keys=True)
    if not weight_map:
        return empty
    # Line by line: with indentation, json keeps a list of all fragments, for 100,000 keys. Into a buffer
    # of the right size: one that grows is copied, and so is a bytearray at the end.
    quoted = json.encoder.encode_basestring_ascii
    before, _, after = empty.partition(b"{}")
    size = sum(len(quoted(key)) + len(quoted(name)) + len("\n    : ,") for key, name in weight_map.items())
    out = BytesIO()
    out.seek(len(before) + size + len("\n  }") + len(after) - 1)
    out.write(b"\n")
    out.seek(0)
    out.write(before)
    start = b"{"
    for key in sorted(weight_map):
        out.write(start + f"\n    {quoted(key)}: {quoted(weight_map[key])}".encode())
        start = b","
    out.write(b"\n  }" + after)
    return out.getvalue()


def dcp_directory(directory: Place) -> WeightDirectory | None:
    """The directory as torch.distributed.checkpoint's, None if it is not one."""
    from ckpt_convert.containers.dcp import dcp  # imported here, since most directories do not need it

    if not dcp.is_dcp_directory(directory):
        return None
    index = DCP_INDEX if (directory / DCP_INDEX).is_regular_file() else None
    return WeightDirectory((), index, kind=dcp.KIND)


def plain_weights(directory: Place, suffixes: Sequence[str]) -> list[str]:
    """Weight files at the root that belong to no consolidated or adapter checkpoint, sorted by name."""
    return sorted(
        entry.name for entry in directory.files() if entry.suffix in suffixes and is_plain_weights(entry.name)
    )
