"""An adapter in files, PEFT's or torchtune's, opened from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckpt_convert.adapters.config import AdapterConfig
from ckpt_convert.adapters.parameters import (
    KNOWN,
    PEFT_PREFIX,
    group_parameters,
    incomplete_parameters,
    is_parameter,
    plain_key,
)
from ckpt_convert.checkpoint import locate
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.mapping import LogicalTensor
from ckpt_convert.errors import CheckpointNotFoundError, KeyMismatchError, UsageError, option_error
from ckpt_convert.formats.names import ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ckpt_convert.storage.base import Entry
from ckpt_convert.storage.place import Location, Place
from ckpt_convert.wording import first_few, indented_list

_TORCHTUNE_SUFFIX = ".pt"


@dataclass(frozen=True)
class MergedWeight:
    """A weight of the base and its adapter: rows of base + scale · b · a; ``magnitude`` with DoRA. Logical layout."""

    base: LogicalTensor
    a: LogicalTensor
    b: LogicalTensor
    scale: float
    magnitude: LogicalTensor | None = None


@dataclass(frozen=True, eq=False)
class StoredAdapter:
    """An adapter's open file, its config, and its keys by what they are.

    config: of adapter_config.json; None where there is none, and ``alpha`` is given. parameters: by module and kind
    ("A", "B", "magnitude"), the key in the file. whole: for the key of a weight of the base, the key of the tensor that
    replaces it (modules_to_save, and the base weights that PEFT saves with an adapter of an output layer).
    """

    file: Identified
    config: AdapterConfig | None
    alpha: float | None
    parameters: Mapping[str, Mapping[str, str]]
    whole: Mapping[str, str]
    is_peft: bool
    identities: Mapping[Place, Entry]

    def close(self) -> None:
        self.file.close()

    def scale(self, rank: int, *names: str) -> float:
        """The factor of B · A for the module that has these names, one per layout."""
        if self.config is not None:
            return self.config.scale_of(*names)
        return (self.alpha or 0) / rank


def open_adapter(location: Location, alpha: float | None = None, revision: str | None = None) -> StoredAdapter:
    """Open an adapter: the directory of PEFT's files, or the file of an adapter beside its adapter_config.json.

    ``alpha`` is for a file without that config. Raises CheckpointNotFoundError, ConfigError, KeyMismatchError for keys
    that are none of an adapter's, UnsafeFileError, and UsageError for an alpha that is missing or contradicts the file.
    """
    place = _weights_file(locate.locate_checkpoint(location, revision))
    config = place.parent / ADAPTER_CONFIG
    if config.is_regular_file() == (alpha is not None):
        raise (
            UsageError(f"{place}: has no {ADAPTER_CONFIG} beside it, which says the adapter's scale; give `alpha=`")
            if alpha is None
            else option_error("alpha", alpha, f"{config} says it already")
        )
    identities = {config: config.identity()} if alpha is None else {}
    stated = AdapterConfig.of(config) if alpha is None else None
    file = open_identified(place)
    try:
        refuse_objects(file)
        is_peft = all(key.startswith(PEFT_PREFIX) for key in file.tensors)
        parameters, whole = _by_kind(file, PEFT_PREFIX if is_peft else "")
    except BaseException:
        file.close()
        raise
    return StoredAdapter(file, stated, alpha, parameters, whole, is_peft, {**identities, **file.identities})


def refuse_objects(file: Identified) -> None:
    """Raise UnsafeFileError or KeyMismatchError for an adapter's file that holds more than tensors."""
    file.refuse_foreign()
    others = [f"{key}: {kind}" for one in file.files for key, kind in one.header.objects.items()]
    if others:
        raise KeyMismatchError(f"{file.place}: holds more than tensors:{indented_list(others)}")


def _weights_file(place: Place) -> Place:
    """The file with the adapter's weights: PEFT's before torchtune's, of which a run has one for each epoch."""
    if place.is_regular_file():
        return place
    if not place.is_folder():
        raise CheckpointNotFoundError(f"{place}: is neither a file nor a directory")
    for name in ADAPTER_WEIGHTS:
        if (place / name).is_regular_file():
            return place / name
    others = sorted(one.name for one in place.files() if _is_torchtunes(one.name))
    if len(others) == 1:
        return place / others[0]
    if others:
        raise CheckpointNotFoundError(f"{place}: has several adapters; give one of them: {first_few(others, 8, ' …')}")
    raise CheckpointNotFoundError(
        f"{place}: has no adapter: no {' or '.join(ADAPTER_WEIGHTS)}, and no {ADAPTER}_0{_TORCHTUNE_SUFFIX}"
    )


def _is_torchtunes(name: str) -> bool:
    return name.startswith(f"{ADAPTER}_") and name.endswith(_TORCHTUNE_SUFFIX)


def _by_kind(file: Identified, prefix: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """``StoredAdapter.parameters`` and ``whole``; raises KeyMismatchError that lists all problems."""
    stored = {key.removeprefix(prefix): key for key in file.tensors}
    kinds, problems = group_parameters(stored)
    for module, keys in kinds.items():
        problems += incomplete_parameters(module, keys)
    whole: dict[str, str] = {}
    for key in stored:
        if is_parameter(key):
            continue
        plain, _ = plain_key(key, kinds)
        if plain in whole:
            problems.append(f"{plain}: is there twice, as {key} too")
        whole[plain] = stored[key]
    if not kinds and not problems:
        problems.append(f"there is no adapter: no key ends as an adapter's does: {KNOWN}")
    if problems:
        raise KeyMismatchError(f"{file.place}: the adapter's keys do not fit:{indented_list(problems)}")
    return {module: {kind: stored[keys[0]] for kind, keys in by.items()} for module, by in kinds.items()}, whole
