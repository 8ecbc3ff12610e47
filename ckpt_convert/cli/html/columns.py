"""Tensors as columns, so that a page with 91,000 of them is small: values that many share are stored once.

A key is a template and its indices; template, shape, dtype and size together are a kind, of which there are few; the
offset of a piece is stored as the gap after the piece before it, nearly always 0.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from ckpt_convert.cli import tree

_STATS = ("min", "max", "mean", "std", "nan", "inf", "zero_fraction", "checksum")
_DELTA = ("count", "differing", "max_abs", "mean_abs", "relative_norm", "max_ulp", "nan_mismatch", "where", "first")
_FILE = ("name", "bytes", "tensors", "rank")
_DIGITS = 6
"""Significant digits of a statistic; the page shows fewer."""

Document = Mapping[str, Any]


class _Pool:
    """Distinct values, each with a number."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def add(self, value: Hashable) -> int:
        """The number of a value."""
        return self._numbers.setdefault(value, len(self._numbers))

    @property
    def values(self) -> list[Hashable]:
        """The values in the order of their numbers."""
        return [*self._numbers]


class _Keys:
    """A column of keys: the number of each key's template (-1 for no key), and the indices of all keys."""

    def __init__(self, templates: _Pool) -> None:
        self._templates = templates
        self.template: list[int] = []
        self.numbers: list[int] = []

    def add(self, key: str | None) -> int:
        """Append a key, and give the number of its template."""
        template, numbers = tree.split(key) if key is not None else ((), ())
        self.template.append(self._templates.add(template) if key is not None else -1)
        self.numbers.extend(numbers)
        return self.template[-1]


def of_checkpoint(document: Document) -> dict[str, Any]:
    """The data of the page of one checkpoint, with tensors in the natural order of their keys."""
    tensors = sorted(document["tensors"], key=lambda tensor: tree.natural(tensor["key"]))
    templates, shapes, dtypes, kinds = _Pool(), _Pool(), _Pool(), _Pool()
    keys = _Keys(templates)
    kind = [
        kinds.add((keys.add(tensor["key"]), *_type(tensor, shapes, dtypes), tensor["nbytes"])) for tensor in tensors
    ]
    with_stats = any("stats" in tensor for tensor in tensors)
    return {
        "facts": {name: _finite(value) for name, value in document.items() if name not in ("tensors", "files")},
        "files": [{name: file[name] for name in _FILE} for file in document["files"]],
        "templates": templates.values,
        "shapes": shapes.values,
        "types": dtypes.values,
        "kinds": kinds.values,
        "kind": kind,
        "numbers": keys.numbers,
        "pieces": _pieces(document["files"], tensors),
        "stats": _columns([tensor.get("stats") for tensor in tensors], _STATS) if with_stats else None,
    }


def of_difference(document: Document) -> dict[str, Any]:
    """The data of the page of two checkpoints, with tensors in the natural order of their keys in A, else in B."""
    tensors = sorted(document["tensors"], key=lambda pair: tree.natural(_either(pair)))
    templates, shapes, dtypes, statuses = _Pool(), _Pool(), _Pool(), _Pool()
    sides: dict[str, dict[str, list[int]]] = {}
    for side in ("a", "b"):
        keys = _Keys(templates)
        for pair in tensors:
            keys.add(pair[f"key_{side}"])
        sides[side] = {
            "template": keys.template,
            "numbers": keys.numbers,
            "shape": [shapes.add(_shape(pair[f"shape_{side}"])) for pair in tensors],
            "type": [dtypes.add(pair[f"dtype_{side}"]) for pair in tensors],
        }
    # Most of B equals A; what B leaves out is taken from A.
    sides["b"] = {name: column for name, column in sides["b"].items() if column != sides["a"][name]}
    return {
        "facts": {name: _finite(value) for name, value in document.items() if name not in ("tensors", "config")},
        "config": [{name: _finite(value) for name, value in entry.items()} for entry in document["config"]],
        "status": [statuses.add(pair["status"]) for pair in tensors],
        "statuses": statuses.values,
        "notes": {number: pair["note"] for number, pair in enumerate(tensors) if pair.get("note")},
        "templates": templates.values,
        "shapes": shapes.values,
        "types": dtypes.values,
        "sides": sides,
        "nbytes": [pair["nbytes"] for pair in tensors],
        "delta": _columns([pair["delta"] for pair in tensors], _DELTA),
    }


def _either(pair: Document) -> str:
    return str(pair["key_a"] if pair["key_a"] is not None else pair["key_b"])


def _type(tensor: Document, shapes: _Pool, dtypes: _Pool) -> tuple[int, int]:
    return shapes.add(_shape(tensor["shape"])), dtypes.add(tensor["dtype"])


def _shape(shape: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if shape is None else tuple(shape)


def _pieces(files: Sequence[Document], tensors: Sequence[Document]) -> dict[str, Any]:
    """The pieces of tensors in each file, in the order of their offsets.

    ``counts`` are the pieces per file, ``tensor`` is the tensor of each piece. ``gap`` is the distance from the end of
    the piece before (of the file's start for the first), None where no place in the file is known. ``nbytes`` is None
    where every piece is a whole tensor.
    """
    at = {file["name"]: number for number, file in enumerate(files)}
    found: list[list[tuple[float, int, int]]] = [[] for _ in files]
    is_cut = False
    for number, tensor in enumerate(tensors):
        is_cut = is_cut or "parts" in tensor
        for part in tensor.get("parts") or [tensor]:
            offset = part.get("offset")
            found[at[part["file"]]].append((math.inf if offset is None else offset, number, part["nbytes"]))
    tensor_column, gap, nbytes = [], [], []
    for pieces in found:
        pieces.sort()
        end = 0
        for offset, number, size in pieces:
            tensor_column.append(number)
            nbytes.append(size)
            gap.append(None if math.isinf(offset) else int(offset) - end)
            end = end if math.isinf(offset) else int(offset) + size
    return {
        "counts": [len(pieces) for pieces in found],
        "tensor": tensor_column,
        "gap": gap,
        "nbytes": nbytes if is_cut else None,
    }


def _columns(entries: Sequence[Document | None], names: Iterable[str]) -> dict[str, list[Any]]:
    return {name: [_short(None if entry is None else entry.get(name)) for entry in entries] for name in names}


def _short(value: object) -> object:
    """A value with the digits that the page can show."""
    if isinstance(value, float) and math.isfinite(value):
        short = float(f"{value:.{_DIGITS}g}")
        return int(short) if short.is_integer() and abs(short) < 10**_DIGITS else short
    return value.removeprefix("xxh3_64:") if isinstance(value, str) else _finite(value)


def _finite(value: Any) -> Any:
    """The value with infinities and NaN, which JSON lacks, as JavaScript's names for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value
