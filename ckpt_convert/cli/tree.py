"""Many keys on few lines: indices in keys are collapsed, as in ``layers.{0..15}.attention.wq.weight``.

Keys are collapsed only where shape and dtype agree; what differs gets its own line, and indices that are missing
between others are reported.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import field
from functools import cached_property
from itertools import chain, pairwise, product, zip_longest
from math import prod
from typing import NamedTuple

from ckpt_convert.cli.text import plural
from ckpt_convert.values import frozen

_MOST_RUNS = 24
"""The most runs of indices that a pattern shows; ``--full`` shows the rest."""

_MOST_GAPS = 6
_MOST_NAMED = 8
_DIGITS = re.compile(r"[0-9]+")

# Nine digits are more than any layer or expert has; longer ones are somebody's hash.
# The part before the index is matched by a lookbehind after its first digit: a pattern that begins with digits is twice
# as fast.
_NUMBER = re.compile(r"([0-9](?<![^.].)(?:(?<!0)[0-9]{1,8})?)(?![^.])")

Template = tuple[str, ...]
"""The texts around the indices of a key, dots included: one more than there are indices."""

Index = tuple[int, ...]
_Run = tuple[int, int]
_Kind = tuple[tuple[int, ...], str, int, str]  # what has to agree: shape, dtype, nbytes, note


class Entry(NamedTuple):
    """One tensor; tensors on one line also agree in ``note``."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    note: str = ""


@frozen()
class Row:
    """One line: ``count`` tensors of this shape and dtype, ``nbytes`` bytes together.

    ``pattern`` is the key with indices collapsed (not escaped); ``missing`` are the gaps in its indices, in words, or
    empty.
    """

    pattern: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    nbytes: int
    note: str = ""
    missing: str = ""
    template: Template = field(default=(), compare=False)
    axes: tuple[Index, ...] = field(default=(), compare=False)

    def members(self) -> Iterator[str]:
        """The keys of the line."""
        return (_key(self.template, map(str, values)) for values in product(*self.axes))


class Numbering:
    """The indices that exist at each place of each kind of key; a missing one between others is a gap.

    ``expected`` are the keys of the family's table: an index that the table lacks is no gap.
    """

    def __init__(self, keys: Collection[str], expected: Callable[[], Collection[str] | None] | None = None) -> None:
        self._keys = keys
        self._expected = expected
        self._gaps: dict[Template, list[dict[Index, list[_Run]]]] = {}

    # Both are only needed when some indices are not consecutive, which is rare.
    @cached_property
    def _indices(self) -> dict[Template, set[Index]]:
        return _by_template(self._keys)

    @cached_property
    def _wanted(self) -> dict[Template, set[Index]] | None:
        keys = self._expected() if self._expected is not None else None
        return None if keys is None else _by_template(keys)

    def missing(self, template: Template, axes: Sequence[Index]) -> str:
        """The gaps between the indices of a line, in words: "4", "5..7, 9", or "experts.3" where it has several."""
        names = _names(template)
        out = []
        for place, values in enumerate(axes):
            if values[-1] - values[0] + 1 == len(values):
                continue
            gaps = self._of(template)[place]
            runs = {run for before in product(*axes[:place]) for run in gaps.get(before, ())} if gaps else set()
            prefix = f"{names[place]}." if len(axes) > 1 and names[place] else ""
            out += [prefix + _run_text(run) for run in sorted(runs) if values[0] < run[0] < values[-1]]
        return _listed(out)

    def _of(self, template: Template) -> list[dict[Index, list[_Run]]]:
        if template not in self._gaps:
            gaps = _gaps(self._indices.get(template, set()), len(template) - 1)
            if self._wanted is not None:
                gaps = _only(gaps, self._wanted.get(template, set()))
            self._gaps[template] = gaps
        return self._gaps[template]


def in_short(keys: Iterable[str]) -> str:
    """Keys on one line, indices collapsed; of many kinds the first ones, and the number of the other keys."""
    rows = collapse(Entry(key, (), "", 0) for key in keys)
    rest = sum(row.count for row in rows[_MOST_NAMED:])
    return ", ".join(row.pattern for row in rows[:_MOST_NAMED]) + (f" and {rest} more" if rest else "")


def collapse(entries: Iterable[Entry], numbering: Numbering | None = None) -> list[Row]:
    """Collapse tensors (each key once) into rows, in the natural order of their first keys.

    ``numbering`` is that of all keys, where ``entries`` are some of them: the others are not missing.
    """
    keys = []
    groups: dict[Template, dict[_Kind, list[Index]]] = defaultdict(lambda: defaultdict(list))
    for key, shape, dtype, nbytes, note in entries:
        keys.append(key)
        template, index = split(key)
        groups[template][shape, dtype, nbytes, note].append(index)
    numbering = numbering or Numbering(keys)
    found = [
        (template, axes, kind)
        for template, kinds in groups.items()
        for kind, indices in kinds.items()
        for axes in _products(indices)
    ]
    found.sort(key=lambda row: natural(_key(row[0], [str(axis[0]) for axis in row[1]])))
    return [_row(template, axes, kind, numbering) for template, axes, kind in found]


def split(key: str) -> tuple[Template, Index]:
    """A key's template and its indices; "007" is no index, since its zeros have to be kept."""
    parts = _NUMBER.split(key)
    return tuple(parts[::2]), tuple(map(int, parts[1::2]))


def is_number(part: str) -> bool:
    """Whether a part of a key is an index."""
    return _NUMBER.fullmatch(part) is not None


def pattern(template: Template, axes: Sequence[Index]) -> str:
    """The key with these indices, collapsed: ``layers.{0..15}.wq.weight``."""
    return _key(template, map(numbers_text, axes))


def natural(key: str) -> str:
    """A sort key that puts ``layers.2`` before ``layers.10`` and ``conv2`` before ``conv10``."""
    # Longer numbers are larger, so the length goes first; nothing comes before a dot.
    return _DIGITS.sub(_number_order, key.replace(".", "\0"))


def _row(template: Template, axes: Sequence[Index], kind: _Kind, numbering: Numbering) -> Row:
    shape, dtype, nbytes, note = kind
    count = prod(map(len, axes))
    missing = numbering.missing(template, axes)
    return Row(pattern(template, axes), shape, dtype, count, count * nbytes, note, missing, template, tuple(axes))


def _products(indices: list[Index]) -> list[tuple[Index, ...]]:
    """The indices as few products of sets: layers with the same experts share one."""
    if not indices or not indices[0]:
        return [()]
    by_prefix: dict[Index, list[int]] = {}
    for *prefix, last in indices:
        by_prefix.setdefault(tuple(prefix), []).append(last)
    prefixes: dict[Index, list[Index]] = {}
    for head, lasts in by_prefix.items():
        prefixes.setdefault(tuple(sorted(set(lasts))), []).append(head)
    return [(*axes, lasts) for lasts, heads in prefixes.items() for axes in _products(heads)]


def _gaps(indices: set[Index], places: int) -> list[dict[Index, list[_Run]]]:
    """For each place, the indices before it → the gaps between the indices at it, if any."""
    out = []
    for place in range(places):
        values: dict[Index, set[int]] = {}
        for index in indices:
            values.setdefault(index[:place], set()).add(index[place])
        found = {before: _between(sorted(numbers)) for before, numbers in values.items()}
        out.append({before: runs for before, runs in found.items() if runs})
    return out


def _by_template(keys: Collection[str]) -> dict[Template, set[Index]]:
    out: dict[Template, set[Index]] = {}
    for key in keys:
        template, index = split(key)
        if index:
            out.setdefault(template, set()).add(index)
    return out


def _only(gaps: list[dict[Index, list[_Run]]], wanted: Collection[Index]) -> list[dict[Index, list[_Run]]]:
    """The gaps that contain some of these indices."""
    out = []
    for place, found in enumerate(gaps):
        starts = {index[: place + 1] for index in wanted}
        kept = {
            before: [run for run in runs if any((*before, number) in starts for number in range(run[0], run[1] + 1))]
            for before, runs in found.items()
        }
        out.append({before: runs for before, runs in kept.items() if runs})
    return out


def missing_between(values: Sequence[int]) -> str:
    """The gaps between these indices, in words."""
    return _listed([_run_text(run) for run in _between(values)])


def _listed(gaps: list[str]) -> str:
    more = f" and {plural(len(gaps) - _MOST_GAPS, 'more gap')}" if len(gaps) > _MOST_GAPS else ""
    return ", ".join(gaps[:_MOST_GAPS]) + more


def _between(values: Sequence[int]) -> list[_Run]:
    # Hybrid models have a kind of layer at every second or fifth place: nothing is missing there.
    if _step(values) is not None:
        return []
    return [(a + 1, b - 1) for a, b in pairwise(values) if b - a > 1]


def _step(values: Sequence[int]) -> int | None:
    """The step between evenly spaced indices; None if they are uneven, few, or without gaps."""
    steps = {b - a for a, b in pairwise(values)}
    return steps.pop() if len(values) > 2 and len(steps) == 1 and 1 not in steps else None


def _key(template: Template, values: Iterable[str]) -> str:
    return "".join(chain.from_iterable(zip_longest(template, values, fillvalue="")))


def numbers_text(values: Sequence[int]) -> str:
    """The indices as shell braces: "7", "{0..15}", "{0..3,5..15}", "{3..38..5}"."""
    if len(values) == 1:
        return str(values[0])
    step = _step(values)
    if step is not None and len(values) > 4:
        return f"{{{values[0]}..{values[-1]}..{step}}}"
    runs = [_run_text(run) for run in _runs(values)]
    if len(runs) > _MOST_RUNS:
        runs = [*runs[: _MOST_RUNS - 1], "…", runs[-1]]
    return f"{{{','.join(runs)}}}"


def _runs(values: Iterable[int]) -> Iterator[_Run]:
    start = end = None
    for value in values:
        if start is None or end is None:
            start = value
        elif value != end + 1:
            yield start, end
            start = value
        end = value
    if start is not None and end is not None:
        yield start, end


def _run_text(run: _Run) -> str:
    start, end = run
    return str(start) if start == end else f"{start},{end}" if end == start + 1 else f"{start}..{end}"


def _names(template: Template) -> list[str]:
    """What each index counts: the part of the key before it."""
    return [before.removesuffix(".").rpartition(".")[2] for before in template[:-1]]


def _number_order(match: re.Match[str]) -> str:
    digits = match[0].lstrip("0")
    return f"{len(digits)}{digits}" if len(digits) < 10 else f":{len(digits):09}{digits}"
