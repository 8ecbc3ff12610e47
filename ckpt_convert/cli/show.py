"""``show``: the values of one tensor, or of a slice of one, read from the files and nothing else of them."""

from __future__ import annotations

import cmath
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import click

from ckpt_convert.cli import colors, options
from ckpt_convert.cli.commands import FORMAT_TITLES, SUMMARIES
from ckpt_convert.cli.notices import on_stderr
from ckpt_convert.cli.text import columns, echo, echo_json, escape, shape_text, terminal_width
from ckpt_convert.dtypes import DEQUANTIZED_DTYPES, DTYPES, nbytes
from ckpt_convert.errors import InputError, KeyMismatchError, UsageError
from ckpt_convert.storage.place import StorageOptions, with_options
from ckpt_convert.wording import did_you_mean, first_few, human_bytes, short_repr

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ckpt_convert.checkpoint.identify import Identified
    from ckpt_convert.tensors.blocks import TypedTensor
    from ckpt_convert.tensors.lazy import LazyTensor

SCHEMA = 1
_MAX_PRINTED = 10_000
_MAX_JSON = 100_000
"""Values that are printed: of a large tensor the edges alone, but it may have many short axes."""

_MAX_NEAR = 1000
"""Keys among which one that is like a mistyped one is looked for, first those with its numbers; that takes a while."""

_NUMBERS = re.compile(r"\d+")

_SLICED = re.compile(r"(?P<key>.+)\[(?P<index>[^\[\]]*)\]", re.DOTALL)
_NUMBER = r"\s*([+-]?\d{1,18})?\s*"
_INDEX = re.compile(f"{_NUMBER}(?:(:){_NUMBER}(?::{_NUMBER})?)?")


@dataclass(frozen=True)
class _Shown:
    """A tensor, or a slice of one, to be printed: ``index`` is the slice as it was asked for, ``whole`` its shape."""

    key: str
    index: str | None
    whole: tuple[int, ...]
    tensor: LazyTensor
    dtype: str

    @property
    def name(self) -> str:
        return self.key if self.index is None else f"{self.key}[{self.index}]"


def _complete_key(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The keys of a local checkpoint that begin so; no shell waits for a download."""
    from click.shell_completion import CompletionItem

    from ckpt_convert.checkpoint.checkpoint import open_identified
    from ckpt_convert.errors import CkptConvertError

    path = context.params.get("path")
    if not path or not os.path.exists(path):
        return []
    try:
        with open_identified(path) as checkpoint:
            return [
                CompletionItem(key) for key in checkpoint.tensors if key.startswith(incomplete) and key.isprintable()
            ]
    except (CkptConvertError, OSError):
        return []


@click.command(
    short_help=SUMMARIES["show"],
    epilog="""\b
Examples:
  ckpt-convert show Llama-3.2-1B model.norm.weight
  ckpt-convert show Llama-3.2-1B 'model.embed_tokens.weight[0:2, :8]'
  ckpt-convert show Llama-3-70B/original 'layers.0.attention.wq.weight[-1]'
  ckpt-convert show Llama-3.2-1B layers.0.attention.wq.weight --as meta
  ckpt-convert show step-1000.pt 'optimizer.state.0.exp_avg[..., 0]'
  ckpt-convert show Llama-3.2-1B 'model.norm.weight[0:4]' --json | jq .values
  ckpt-convert show Llama-3.2-1B model.norm.weight --npy norm.npy

\b
Values are printed as torch prints them; of more than 1000 only the edges
are read. In most shells KEY[...] has to be quoted. Exit codes: 0 shown,
2 usage, 3 no readable checkpoint, or no such tensor in it.""",
)
@options.Argument("path")
@click.argument("key", metavar="KEY[SLICE]", shell_complete=_complete_key)
@click.option(
    "--as",
    "as_format",
    type=click.Choice(list(FORMAT_TITLES)),
    help="KEY is one of this format, and its values are as that stores them.",
)
@click.option(
    "--dequantize", type=click.Choice(list(DEQUANTIZED_DTYPES)), help="Show the values of fp8 and MXFP4 weights."
)
@click.option(
    "--npy", metavar="FILE", type=click.Path(), help="Write all the values to a .npy file (- : standard output)."
)
@options.JSON
@options.from_format()
@options.FAMILY
@options.config()
@options.revision()
@options.CACHE
@options.STORE_OPTIONS
def show(
    path: str,
    key: str,
    as_format: str | None,
    dequantize: str | None,
    npy: str | None,
    as_json: bool,
    from_format: str | None,
    family: str | None,
    config: str | None,
    revision: str | None,
    cache: bool,
    storage_options: StorageOptions | None,
) -> None:
    """Print the values of the tensor KEY, or of a slice of it such as KEY[0:2, -1].

    PATH is a directory, one weight file, a URL or a Hub id (org/name), in any format. Tensors of several ranks or
    pieces are joined. A slice has integers, ranges (2:5) and an ellipsis (...), as in torch; only its range is read.
    With --as meta, or another format, it is the tensor that a conversion to that format would write under KEY.
    """
    from ckpt_convert.checkpoint.checkpoint import open_identified
    from ckpt_convert.checkpoint.dequantize import dequantize_if_asked

    if npy is not None:
        from ckpt_convert.cli.npy import check_npy

        check_npy(npy, with_json=as_json)
    with on_stderr():
        place, given = with_options(storage_options, options.in_cache(path, revision, from_format, cache=cache), config)
        opened = open_identified(place, format=from_format, family=family, config=given, revision=revision)
    with on_stderr(), opened:
        source = dequantize_if_asked(opened, dequantize)
        shown = _find(source, key, as_format)
        if npy is not None:
            from ckpt_convert.cli.npy import write_npy
            from ckpt_convert.tensors.blocks import TypedTensor

            write_npy(npy, TypedTensor(shown.tensor, shown.dtype), source.stored)
        if as_json:
            echo_json(_document(source, shown, as_format))
        elif npy is None:
            echo(_text(source, shown))


def _find(source: Identified, given: str, as_format: str | None) -> _Shown:
    """The tensor that was asked for; a key that ends in brackets is tried as it is first."""
    from ckpt_convert.checkpoint.tensor import narrowed

    rekeyed = _rekeyed(source, as_format)
    found, key, index = _tensor(source, given, rekeyed), given, None
    if found is None and (match := _SLICED.fullmatch(given)) is not None:
        key, index = match.groups()
        found = _tensor(source, key, rekeyed)
    if found is None:
        raise _unknown_key(source, key, rekeyed)
    if DTYPES[found.dtype].bits < 8:
        raise InputError(f"{source.place}: {key} is {found.dtype}, which packs several values into a byte")
    if index is None:
        return _Shown(key, None, found.tensor.shape, found.tensor, found.dtype)
    try:
        return _Shown(key, index, found.tensor.shape, narrowed(found.tensor, _parsed(index)), found.dtype)
    except IndexError as error:
        raise UsageError(f"{given}: {error}") from None


def _rekeyed(source: Identified, as_format: str | None) -> Mapping[str, TypedTensor] | None:
    if as_format is None:
        return None
    from ckpt_convert.convert.rekeyed import tensors_as

    return tensors_as(source, as_format)


def _tensor(source: Identified, key: str, rekeyed: Mapping[str, TypedTensor] | None) -> TypedTensor | None:
    from ckpt_convert.tensors.blocks import TypedTensor

    if rekeyed is not None:
        return rekeyed.get(key)
    return TypedTensor(*source.joined(key)) if key in source.tensors or key in source.names.stored else None


def _unknown_key(source: Identified, key: str, rekeyed: Mapping[str, TypedTensor] | None) -> KeyMismatchError:
    keys = [*source.tensors] if rekeyed is None else [*rekeyed]
    if rekeyed is not None and key in source.tensors:
        stored = {tile.source for tile in source.joined(key)[0].tiles}
        there = [other for other, held in rekeyed.items() if stored & {tile.source for tile in held.tensor.tiles}]
        if there:
            return KeyMismatchError(
                f"{source.place}: {short_repr(key)} is a key of the checkpoint's own format; with --as, give "
                f"{first_few(there, 3)}"
            )
    numbers = _NUMBERS.findall(key)
    alike = [other for other in keys if _NUMBERS.findall(other) == numbers]
    near = did_you_mean(key, (alike or keys)[:_MAX_NEAR])
    listed = near or (f"; its keys are such as {keys[0]!r}" if keys else "")
    return KeyMismatchError(f"{source.place}: has no tensor {short_repr(key)}{listed}")


def _parsed(text: str) -> tuple[Any, ...]:
    """A slice as Python's indices; raises UsageError for anything else."""
    return tuple(_index(part.strip()) for part in text.split(","))


def _index(part: str) -> Any:
    if part == "...":
        return ...
    match = _INDEX.fullmatch(part)
    if match is None or not part:
        raise UsageError(f"[{part}]: expected integers, ranges such as 2:5, or ..., separated by commas")
    first, is_range, *rest = match.groups()
    if is_range is None:
        return int(first)
    return slice(*(None if number is None else int(number) for number in (first, *rest)))


def _text(source: Identified, shown: _Shown) -> str:
    from ckpt_convert.cli.tensor_text import printed_part, torch_text

    part = printed_part(shown.tensor)
    if part.size > _MAX_PRINTED:
        raise UsageError(f"{shown.name}: {part.size:,} values would be printed; give a slice, or a file with --npy")
    size = shape_text(shown.tensor.shape)
    row = (
        escape(shown.name),
        size if shown.index is None else f"{size} of {shape_text(shown.whole)}",
        escape(shown.dtype),
        human_bytes(nbytes(shown.dtype, shown.tensor.shape)),
    )
    heading = columns([row], styles={0: colors.label, 2: colors.dtype}, width=terminal_width())
    return "\n".join([*heading, torch_text(_values(source, part, shown.dtype), shown.tensor.shape, shown.dtype)])


def _document(source: Identified, shown: _Shown, as_format: str | None) -> dict[str, Any]:
    """The values as JSON; docs/json.md explains every field."""
    tensor = shown.tensor
    if tensor.size > _MAX_JSON:
        raise UsageError(
            f"{shown.name}: has {tensor.size:,} values, of which --json prints {_MAX_JSON:,} at most; give a slice, or "
            "a file with --npy"
        )
    values = _values(source, tensor, shown.dtype)
    return {
        "schema": SCHEMA,
        "path": str(source.place),
        "format": source.format,
        "as": as_format,
        "key": shown.key,
        "slice": shown.index,
        "dtype": shown.dtype,
        "whole": list(shown.whole),
        "shape": list(tensor.shape),
        "nan": sum(cmath.isnan(value) for value in values),
        "inf": sum(cmath.isinf(value) for value in values),
        "values": _nested(map(_plain, values), tensor.shape) if values else [],
    }


def _nested(values: Iterator[Any], shape: Sequence[int]) -> Any:
    """The next values as lists of lists; a number for the empty shape."""
    return [_nested(values, shape[1:]) for _ in range(shape[0])] if shape else next(values)


def _plain(value: Any) -> Any:
    """A number as JSON has it: a complex one as a pair, infinity and NaN as null."""
    if isinstance(value, complex):
        return [_plain(value.real), _plain(value.imag)]
    return None if isinstance(value, float) and not isfinite(value) else value


def _values(source: Identified, tensor: LazyTensor, dtype: str) -> list[Any]:
    from ckpt_convert.cli.tensor_text import values_of
    from ckpt_convert.tensors.gather import StridedReader

    return values_of(StridedReader(source.stored).read(tensor, dtype), dtype)
