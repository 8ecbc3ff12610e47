"""Reading stored keys as keys of a format, without the prefixes of wrappers, nested state dicts and old releases.

A table has the keys of a format. A stored key that it lacks may be one of them with the prefix of a wrapper
(torch.compile, DistributedDataParallel), below the entry in which a training loop saves its weights, or with a prefix
that another release of transformers uses. It is read as the only key of the table that it can be; a key that can be
several, and two keys that can be the same one, are errors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import field
from functools import cached_property

from ckpt_convert.formats import ALL
from ckpt_convert.models.core.table import Family
from ckpt_convert.values import frozen

HOLDER = "module"
"""The prefix of DistributedDataParallel, and of other classes that wrap a whole model."""

WRAPPERS = {
    # torch's class: (part of the key, what inserts it)
    "OptimizedModule": ("_orig_mod", "torch.compile"),
    "FullyShardedDataParallel": ("_fsdp_wrapped_module", "FullyShardedDataParallel"),
    "ActivationWrapper": ("_checkpoint_wrapped_module", "activation checkpointing"),
}
"""The prefix that each wrapper inserts before the keys of its module, anywhere in the model."""

_WRAPPED_BY = dict(WRAPPERS.values())
_NESTS = ("model", HOLDER, "state_dict", "state", "language_model")
"""Possible prefixes: of DistributedDataParallel, of entries in a file, and of modules that contain the model."""

_PREFIXES = ("", "model.", "language_model.", "language_model.model.", "model.language_model.")
"""Prefixes of the tables' keys: of a language model alone, and of the parts of a multimodal model."""

# fmt: off
_OTHER = frozenset((
    "algorithms", "amp", "args", "callbacks", "cuda_rng_state", "dataloader", "dataset_state", "epoch",
    "eval_metrics", "global_step", "grad_scaler", "hyper_parameters", "iteration", "loops", "loss_scaler",
    "lr_scheduler", "lr_scheduler_state_dict", "lr_schedulers", "metrics", "optim", "optim_state_dict", "optimizer",
    "optimizer_state", "optimizer_state_dict", "optimizer_states", "optimizers", "random_state", "rng", "rng_state",
    "rng_state_dict", "rng_states", "scaler", "scheduler", "scheduler_state_dict", "schedulers", "step", "timestamp",
    "torch_rng_state", "train_metrics", "train_state", "trainer_state", "training_state",
))
"""Names of the entries that training loops save beside the weights."""
# fmt: on

_Former = Sequence[tuple[str, str]]
"""(old, new) parts of keys that a format has renamed."""

_DIGITS = dict.fromkeys(map(ord, "0123456789"))
_NUMBER = re.compile(r"(?<![^.\n])(?:0|[1-9][0-9]*)(?![^.\n])")


@frozen()
class KeyNames:
    """The names of stored keys in their format.

    ``canonical`` maps stored keys to the format's keys where they differ; ``non_weights`` are keys of other state;
    ``clashes`` are (key, message) for keys that name the same tensor as another key, or that could name several.
    ``notices`` report which keys were read under other names.
    """

    canonical: Mapping[str, str] = field(default_factory=dict)
    non_weights: frozenset[str] = frozenset()
    clashes: tuple[tuple[str, str], ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def is_identity(self) -> bool:
        """Whether every key is the same in the files and in the format."""
        return not (self.canonical or self.non_weights)

    @cached_property
    def stored(self) -> dict[str, str]:
        """The stored key of each key of the format that differs."""
        return {name: key for key, name in self.canonical.items()}

    def of(self, key: str) -> str:
        """The format's key of a stored key."""
        return self.canonical.get(key, key)

    def is_weight(self, key: str) -> bool:
        """Whether a stored key is one of the model's weights."""
        return key not in self.non_weights


PLAIN = KeyNames()


@frozen()
class _Reading:
    """How a key is read: wrappers and the first ``parts`` parts are removed, and ``prefix`` is put before the rest.

    ``renamed`` is an (old, new) part of the key.
    """

    parts: int = 0
    prefix: str = ""
    renamed: tuple[str, str] | None = None

    def of(self, key: str) -> str:
        name = self.prefix + ".".join(without_wrappers(key)[self.parts :])
        return name if self.renamed is None else name.replace(*self.renamed)


@frozen()
class _Readings:
    """The readings of each pattern (a key with 0 for every number) in a table."""

    by_pattern: Mapping[str, Sequence[_Reading]]
    unknown: frozenset[str]

    @property
    def unread(self) -> int:
        return len(self.unknown)


def loose_scalars(tensors: Iterable[tuple[str, Sequence[int]]]) -> frozenset[str]:
    """Top-level keys of scalars where other keys are nested, such as a best loss beside a model's state dict."""
    found = list(tensors)
    nested = any("." in key for key, _ in found)
    return frozenset(key for key, shape in found if nested and not len(shape) and "." not in key)


def read_keys(
    keys: Iterable[str], families: Iterable[Family], format: str, scalars: Collection[str] = frozenset()
) -> KeyNames:
    """Read the keys of a checkpoint as keys of a format; ``scalars`` are no weights unless a table has them.

    ``families`` are the candidates; the table that knows most keys is used. Keys stay as stored where two tables know
    equally many and read them differently.
    """
    stored = list(keys)
    tables = [_table(family, format) for family in families]
    if not stored or not tables:
        return PLAIN
    # Fast path for the common case: without digits, 100,000 keys are a few dozen.
    shapes = _without_digits(stored)
    if any(shapes <= _without_digits(table) for table in tables):
        return PLAIN
    patterns = _patterns(stored)
    former = ALL[format].renamed_key_parts if format in ALL else ()
    found = [_read(patterns, table, former) for table in tables]
    fewest = min(readings.unread for readings in found)
    best = [readings for readings in found if readings.unread == fewest]
    names = _names(stored, best[0], scalars)
    if any(_names(stored, readings, scalars).canonical != names.canonical for readings in best[1:]):
        return PLAIN
    return names


def knows_all(keys: Iterable[str], family: Family, format: str) -> bool:
    """Whether a family has all stored keys, unchanged, in this format."""
    return format in family.formats and _without_digits(keys) <= _without_digits(_table(family, format))


def matching_formats(keys: Iterable[str], families: Iterable[Family], *, former: bool = False) -> set[str]:
    """The formats in which some table knows every weight; with ``former``, keys of earlier releases count as known."""
    patterns = _patterns(keys)
    out = set()
    for family in families:
        for format in family.formats:
            table = _table(family, format)
            weights = [pattern for pattern in patterns if pattern in table or not is_training_entry(pattern)]
            names = ALL[format].renamed_key_parts if former else ()
            if weights and all(pattern in table or _possible(pattern, table, names) for pattern in weights):
                out.add(format)
    return out


def _table(family: Family, format: str) -> frozenset[str]:
    """The patterns of a column's keys."""
    columns = (row.column(format) for row in family.rows)
    return frozenset(_pattern(column.key(dict.fromkeys(column.placeholders, 0), _ANY)) for column in columns if column)


class _Any(dict[str, tuple[int, ...]]):
    """Layer sets that are all empty: patterns do not depend on them."""

    def __missing__(self, name: str) -> tuple[int, ...]:
        return ()


_ANY = _Any()


def _without_digits(keys: Iterable[str]) -> set[str]:
    return set("\n".join(keys).translate(_DIGITS).split("\n"))


def _patterns(keys: Iterable[str]) -> set[str]:
    return set(_NUMBER.sub("0", "\n".join(keys)).split("\n"))


def _pattern(key: str) -> str:
    return _NUMBER.sub("0", key)


def without_wrappers(key: str) -> list[str]:
    """The parts of a key without those of wrappers."""
    return [part for part in key.split(".") if part not in _WRAPPED_BY]


def _read(patterns: Collection[str], table: Collection[str], former: _Former) -> _Readings:
    by_pattern = {}
    unknown = set()
    for pattern in patterns:
        if pattern in table:
            by_pattern[pattern] = [_Reading()]
        elif readings := _possible(pattern, table, former):
            by_pattern[pattern] = readings
        else:
            unknown.add(pattern)
    return _Readings(by_pattern, frozenset(unknown))


def _possible(pattern: str, table: Collection[str], former: _Former) -> list[_Reading]:
    """Every way to read a key as a key of the table; each reading gives another key.

    Keys of earlier releases are only tried where the key itself does not match.
    """
    for renamed in (None, *former):
        if renamed is None or renamed[0] in pattern:
            found = _under(pattern, table, renamed)
            if found:
                return found
    return []


def _under(pattern: str, table: Collection[str], renamed: tuple[str, str] | None) -> list[_Reading]:
    parts = without_wrappers(pattern if renamed is None else pattern.replace(*renamed))
    if ".".join(parts) in table:
        return [_Reading(renamed=renamed)]
    found: dict[str, _Reading] = {}
    for at in range(len(parts)):
        rest = ".".join(parts[at:])
        for prefix in _PREFIXES:
            if prefix + rest in table:
                found.setdefault(prefix + rest, _Reading(at, prefix, renamed))
        if parts[at] not in _NESTS:
            break
    return list(found.values())


def top_level_entry(key: str) -> str:
    """The entry of a training checkpoint that an unknown key belongs to: its first part that is no known prefix."""
    return next((part for part in without_wrappers(key) if part not in _NESTS), "")


def is_training_entry(key: str, scalars: Collection[str] = frozenset()) -> bool:
    """Whether an unknown key belongs to training state rather than to the weights."""
    return top_level_entry(key) in _OTHER or key in scalars


def _names(keys: Sequence[str], readings: _Readings, scalars: Collection[str]) -> KeyNames:
    canonical: dict[str, str] = {}
    other = set()
    notices = _Notices()
    clashes: list[tuple[str, str]] = []
    owners: dict[str, str] = {}
    for key in dict.fromkeys(keys):
        ways = readings.by_pattern.get(_pattern(key))
        if ways is None:
            if is_training_entry(key, scalars):
                other.add(key)
            continue
        if len(ways) > 1:
            names = " or ".join(reading.of(key) for reading in ways)
            clashes.append((key, f"{key} may be {names}; rename it to the one that is meant"))
            continue
        name = ways[0].of(key)
        if name in owners:
            text = f"{owners[name]} and {key} are both {name}; remove the one that is not meant"
            clashes.append((key, text))
            continue
        owners[name] = key
        if name != key:
            canonical[key] = name
            notices.add(key, ways[0])
    return KeyNames(canonical, frozenset(other), tuple(clashes), tuple(notices.lines()))


class _Notices:
    """Counts the keys that are read under other names, and reports them."""

    def __init__(self) -> None:
        self._wrapped: dict[str, int] = {}
        self._moved: dict[tuple[str, str], int] = {}
        self._renamed = 0

    def add(self, key: str, reading: _Reading) -> None:
        for part in set(key.split(".")) & _WRAPPED_BY.keys():
            self._wrapped[part] = self._wrapped.get(part, 0) + 1
        self._renamed += reading.renamed is not None
        before = "".join(f"{part}." for part in without_wrappers(key)[: reading.parts])
        if before != reading.prefix:
            self._moved[before, reading.prefix] = self._moved.get((before, reading.prefix), 0) + 1

    def lines(self) -> list[str]:
        out = [f"{_keys(self._renamed)} those of an earlier release, read under today's names"] if self._renamed else []
        for part, count in self._wrapped.items():
            out.append(f"{_keys(count)} read without {part!r}, which {_WRAPPED_BY[part]} put there")
        for (before, after), count in self._moved.items():
            how = f"with {after!r} before" if not before else f"without {before!r} before"
            out.append(
                f"{_keys(count)} read {how} {'it' if count == 1 else 'them'}"
                if not (before and after)
                else f"{_keys(count)} read with {after!r} for {before!r}"
            )
        return out


def _keys(count: int) -> str:
    return f"{count:,} keys are" if count != 1 else "1 key is"
