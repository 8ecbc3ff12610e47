"""Keys as they are stored, read as the keys of a format: without what wrappers, nestings and releases made of them.

A table knows the keys of a format. A key that it does not know may be one of them all the same: behind the names that
torch.compile, DistributedDataParallel and the like put into it, below the entry of a file in which a training loop has
its weights, or with a prefix that another release of transformers has elsewhere. It is read as the one key of the table
that it can be; where it can be several, or two keys can be the same one, nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ckpt_convert.formats import ALL
from ckpt_convert.models.core.table import Family

HOLDER = "module"
"""What DistributedDataParallel and others that hold a whole model put before its keys."""

WRAPPERS = {
    # class of torch's: part of the keys, who puts it there
    "OptimizedModule": ("_orig_mod", "torch.compile"),
    "FullyShardedDataParallel": ("_fsdp_wrapped_module", "FullyShardedDataParallel"),
    "ActivationWrapper": ("_checkpoint_wrapped_module", "activation checkpointing"),
}
"""What a wrapper around a module puts before the keys of the module, wherever it stands in the model."""

_WRAPPED_BY = dict(WRAPPERS.values())
_NESTS = ("model", HOLDER, "state_dict", "state", "language_model")
"""Parts that may stand before keys: DistributedDataParallel's, entries of a file, and modules that hold the model."""

_PREFIXES = ("", "model.", "language_model.", "language_model.model.", "model.language_model.")
"""What the tables have before the keys of a model of texts, or of the other parts of a model that holds one."""

# fmt: off
_OTHER = frozenset((
    "algorithms", "amp", "args", "callbacks", "cuda_rng_state", "dataloader", "dataset_state", "epoch",
    "eval_metrics", "global_step", "grad_scaler", "hyper_parameters", "iteration", "loops", "loss_scaler",
    "lr_scheduler", "lr_scheduler_state_dict", "lr_schedulers", "metrics", "optim", "optim_state_dict", "optimizer",
    "optimizer_state", "optimizer_state_dict", "optimizer_states", "optimizers", "random_state", "rng", "rng_state",
    "rng_state_dict", "rng_states", "scaler", "scheduler", "scheduler_state_dict", "schedulers", "step", "timestamp",
    "torch_rng_state", "train_metrics", "train_state", "trainer_state", "training_state",
))
"""What training loops call the entries that they keep beside the weights."""
# fmt: on

_Former = Sequence[tuple[str, str]]
"""Parts of keys as a format called them, and as it calls them now."""

_DIGITS = dict.fromkeys(map(ord, "0123456789"))
_NUMBER = re.compile(r"(?<![^.\n])(?:0|[1-9][0-9]*)(?![^.\n])")


@dataclass(frozen=True)
class KeyNames:
    """What stored keys are called in their format.

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
        """Whether every key is called what it is called in the files."""
        return not (self.canonical or self.non_weights)

    @cached_property
    def stored(self) -> dict[str, str]:
        """The key in the files of each that is called otherwise in the format."""
        return {name: key for key, name in self.canonical.items()}

    def of(self, key: str) -> str:
        """What a stored key is called in the format."""
        return self.canonical.get(key, key)

    def is_weight(self, key: str) -> bool:
        """Whether a stored key is one of the model's."""
        return key not in self.non_weights


PLAIN = KeyNames()


@dataclass(frozen=True)
class _Reading:
    """How a key is read: without wrappers, so many parts at its beginning, and with another beginning instead.

    ``renamed`` is a part that the format called otherwise, and what it calls it now.
    """

    parts: int = 0
    prefix: str = ""
    renamed: tuple[str, str] | None = None

    def of(self, key: str) -> str:
        name = self.prefix + ".".join(without_wrappers(key)[self.parts :])
        return name if self.renamed is None else name.replace(*self.renamed)


@dataclass(frozen=True)
class _Readings:
    """How the keys of each pattern (a key with 0 for every number) are read by a table."""

    by_pattern: Mapping[str, Sequence[_Reading]]
    unknown: frozenset[str]

    @property
    def unread(self) -> int:
        return len(self.unknown)


def loose_scalars(tensors: Iterable[tuple[str, Sequence[int]]]) -> frozenset[str]:
    """Keys of single numbers that stand beside nested ones, as a loop's best loss beside a model's state dict does."""
    found = list(tensors)
    nested = any("." in key for key, _ in found)
    return frozenset(key for key, shape in found if nested and not len(shape) and "." not in key)


def read_keys(
    keys: Iterable[str], families: Iterable[Family], format: str, scalars: Collection[str] = frozenset()
) -> KeyNames:
    """Read the keys of a checkpoint as those of a format; ``scalars`` are no weights where no table knows them.

    ``families`` are those that it may be of; the keys are read by the table that knows most of them, and are left as
    they are where two tables that know as many would read them differently.
    """
    stored = list(keys)
    tables = [_table(family, format) for family in families]
    if not stored or not tables:
        return PLAIN
    # The usual case in no time: of 100,000 keys only a few dozen are different without their digits.
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
    """Whether a family has all the keys as they are stored, in this format."""
    return format in family.formats and _without_digits(keys) <= _without_digits(_table(family, format))


def matching_formats(keys: Iterable[str], families: Iterable[Family], *, former: bool = False) -> set[str]:
    """The formats all of whose weights are known, once the keys are read; ``former`` names count as well if asked."""
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
    """Sets of numbers, all of them empty: only patterns are asked for."""

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
    """The parts of a key that no wrapper has put there."""
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
    """Every way to read a key as one that the table has; different readings are of different keys.

    What it has as it stands comes before what was called otherwise.
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
    """What a key that no table knows belongs to: its first part that is none of those that weights are nested in."""
    return next((part for part in without_wrappers(key) if part not in _NESTS), "")


def is_training_entry(key: str, scalars: Collection[str] = frozenset()) -> bool:
    """Whether a key that no table knows is of an entry of a training run that is no weight."""
    return top_level_entry(key) in _OTHER or key in scalars


def _names(keys: Sequence[str], readings: _Readings, scalars: Collection[str]) -> KeyNames:
    canonical: dict[str, str] = {}
    other = set()
    said = _Said()
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
            said.add(key, ways[0])
    return KeyNames(canonical, frozenset(other), tuple(clashes), tuple(said.lines()))


class _Said:
    """What is to be said of the keys that are read as others."""

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
