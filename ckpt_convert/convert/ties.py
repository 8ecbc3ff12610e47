"""Tied weights: whether the output layer shares the embedding's tensor, and which tensors must be equal for that.

The config states it, or the record of an earlier conversion. Where neither does, a model in memory shows it by having
one tensor or two; for files the bytes decide.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from ckpt_convert.checkpoint.mapping import Equality, LogicalTensors, tied_partner
from ckpt_convert.checkpoint.model import Model
from ckpt_convert.models.core.table import Family, Instance

EqualBytes = Callable[[Equality], bool]
"""Reads two tensors and returns whether their bytes are equal."""


@dataclass(frozen=True)
class Ties:
    """The decision: ``model.tied`` holds it.

    ``is_stated`` is whether a file states it, so that the weights still have to be checked against it. ``undecided`` is
    the pair whose bytes decide, where nothing compared them: the model then counts as not tied, which never reserves
    too little disk.
    """

    model: Model
    is_stated: bool
    undecided: Equality | None = None

    def checks(self, ties: Iterable[Equality]) -> list[Equality]:
        """Those of the pairs that tied weights require to be equal that still have to be checked."""
        return list(ties) if self.is_stated else []


def presumed_untied(model: Model) -> Model:
    """The model that is assumed for reading before it is known whether weights are tied."""
    return model if model.tied is not None else model.with_tied(False)


def tied_in_memory(model: Model, format: str, keys: Collection[str]) -> Model:
    """The model with ties as in memory: tied if the model has no key of this format for its output layer."""
    if model.tied is not None:
        return model
    columns = [row.column(format) for row in model.family.rows if row.tied_to is not None]
    return model.with_tied(any(column is not None and column.template not in keys for column in columns))


def decide_ties(model: Model, logicals: LogicalTensors, equal: EqualBytes | None) -> Ties:
    """Decide whether weights that were read as those of the ``presumed_untied`` model are tied.

    Without ``equal``, no byte is read.
    """
    if model.tied is not None:
        return Ties(model, is_stated=True)
    found = tied_pair(logicals)
    if equal is None or found is None:
        return Ties(model.with_tied(False), found is None, found)
    return Ties(model.with_tied(equal(found)), is_stated=False)


def tied_pair(logicals: LogicalTensors) -> Equality | None:
    """The two stored tensors that are equal if weights are tied, None where only one is stored."""
    for instance, logical in logicals.tensors.items():
        if instance.row.tied_to and instance not in logicals.omitted_ties:
            other = tied_partner(instance, logicals.tensors)
            return Equality(other.tensor, logical.tensor, logical.dtype, "") if other is not None else None
    return None


def tie_checks(instance: Instance, logicals: LogicalTensors) -> list[Equality]:
    """The check for a tied row that is stored all the same; empty where the row it is tied to is missing."""
    logical, other = logicals.tensors[instance], tied_partner(instance, logicals.tensors)
    if other is None:
        return []
    message = (
        f"{logical.key} and {other.key} differ, but the config ties them (tie_word_embeddings: true), and "
        "the target stores tied weights once. If they are not tied, set tie_word_embeddings to false in the "
        "source's config.json (ckpt_convert/config.json where there is no other)."
    )
    return [Equality(other.tensor, logical.tensor, logical.dtype, message, logical.key)]


def kept_tied_keys(family: Family, format: str, keys: Collection[str]) -> frozenset[str]:
    """The subset of these keys that the format omits when weights are tied."""
    columns = [column for row in family.rows if (column := row.column(format)) and column.omitted_if_tied]
    return frozenset(column.template for column in columns if column.template in keys)


def describe_ties(
    ties: Ties, dims: Mapping[str, int], logicals: LogicalTensors, written: Collection[Instance]
) -> list[str]:
    """A line for each tied row on how it is written; ``written`` are the instances that have a key in the output."""
    out = []
    for instance in logicals.tensors:
        if not instance.row.tied_to:
            continue
        if ties.undecided is not None:
            out.append(f"{instance.name} and {instance.row.tied_to}: tied if equal, which the bytes decide")
        elif dims["tied"]:
            how = "written as well" if instance in written else "stored once"
            out.append(f"{instance.name} is tied to {instance.row.tied_to}: {how}")
    return out
