"""Translating between formats: read through a column of the family's table, decide ties, write through another column.

Files, state dicts, models in memory and comparisons all use this. Only tensors that decide about ties are read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from ckpt_convert.checkpoint import mapping
from ckpt_convert.checkpoint.mapping import Equality, LogicalTensors
from ckpt_convert.checkpoint.model import Model
from ckpt_convert.checkpoint.tensor_info import SourceTensor
from ckpt_convert.convert import ties, writing
from ckpt_convert.convert.ties import EqualBytes, Ties
from ckpt_convert.convert.writing import Original, TargetTensor
from ckpt_convert.errors import UnsupportedFamilyError
from ckpt_convert.models.core.table import Dims, Instance
from ckpt_convert.tensors.lazy import zeros

Ranks = Sequence[Mapping[str, SourceTensor]]

_OWN_FILES = (
    "if the keys are those of another layout, name it (model_format=); a model of other tensors than its source's is "
    "saved once by itself (save_pretrained), and that made the source"
)


@dataclass(frozen=True)
class SourceReading:
    """Tensors read through the column of ``format``, and the decision about ties."""

    format: str
    logicals: LogicalTensors
    ties: Ties

    @property
    def model(self) -> Model:
        """The model of the weights, with the decision about ties."""
        return self.ties.model


@dataclass(frozen=True)
class Translation:
    """Tensors translated to another format.

    ``targets`` are in the order of the table; ``unmapped`` are instances that the target cannot hold. ``checks`` are
    pairs that must be equal for the translation to be valid; ``losses`` pair each tensor that is left out although the
    model computes with it with zeros. ``dims`` are those of the target.
    """

    reading: SourceReading
    dims: Dims
    targets: list[TargetTensor]
    unmapped: list[Instance]
    checks: list[Equality]
    losses: list[Equality]

    @property
    def logicals(self) -> LogicalTensors:
        return self.reading.logicals

    @property
    def ties(self) -> list[str]:
        """A line for each tied row on how it is written."""
        written = {target.instance for target in self.targets}
        return ties.describe_ties(self.reading.ties, self.dims, self.logicals, written)


def check_formats(model: Model, source_name: str, *formats: str) -> None:
    """Raise UnsupportedFamilyError for a format that the family lacks, ConfigError for RoPE that it cannot express."""
    family = model.family
    for format in formats:
        if not family.has_column(format):
            raise UnsupportedFamilyError(
                f"{source_name}: the {family.name} table has no {format} column; it has {', '.join(family.formats)}"
            )
    family.check_rotation(model.config, *formats)


def read_source(
    model: Model,
    format: str,
    ranks: Ranks,
    source_name: str,
    equal: EqualBytes | None = None,
    way: str | None = None,
) -> SourceReading:
    """Read stored tensors through their column; ``equal`` compares two tensors where their bytes decide about ties.

    Raises KeyMismatchError or ShapeMismatchError naming every missing, unexpected and misshapen tensor, and the ``way``
    out.
    """
    known = ties.presumed_untied(model)
    logicals = mapping.read_column(known.family, format, known.dims, ranks, source_name, way)
    return SourceReading(format, logicals, ties.decide_ties(model, logicals, equal))


def read_model(model: Model, format: str, tensors: Mapping[str, SourceTensor]) -> SourceReading:
    """``read_source`` for the tensors of a model in training, which are to be saved in the files of its source."""
    return read_source(model, format, [tensors], "the model in memory", way=_OWN_FILES)


def write_target(
    reading: SourceReading,
    format: str,
    source_name: str,
    *,
    dims: Dims | None = None,
    ranks: int = 1,
    keep_tied: bool | Collection[str] | None = None,
    wants_key: Callable[[str], bool] = lambda key: True,
    originals: Mapping[Instance, Original] | None = None,
) -> Translation:
    """Write tensors that were read through another column.

    ``dims`` are those of the target where they differ from the model's; ``keep_tied`` is whether to write keys that the
    format omits when weights are tied, or which of them (None: as in the source); ``wants_key`` decides for each
    all-zeros key whether to write it; ``originals`` goes into the targets. Raises what ``writing.write_column`` does.
    """
    family, logicals = reading.model.family, reading.logicals
    dims = dims or reading.model.dims
    if format != reading.format:
        writing.fill_zeros(family, format, dims, logicals, wants_key)
    made = writing.write_column(
        family, format, dims, logicals, ranks=ranks, keep_tied=keep_tied, source_name=source_name, originals=originals
    )
    checks = [*logicals.replica_checks, *reading.ties.checks(made.tie_checks)]
    lost = [logicals.tensors[instance] for instance in made.unmapped if instance.row.zeros is not None]
    losses = [Equality(one.tensor, zeros(one.tensor.shape), one.dtype, "", one.key) for one in lost]
    return Translation(reading, dims, made.targets, made.unmapped, checks, losses)


def translate(
    model: Model,
    source: str,
    target: str,
    stored: Ranks,
    source_name: str,
    *,
    equal: EqualBytes | None,
    dims: Callable[[Dims], Dims] = lambda dims: dims,
    ranks: int = 1,
    keep_tied: bool | None = None,
) -> Translation:
    """``read_source`` and ``write_target`` in one; raises what these do."""
    reading = read_source(model, source, stored, source_name, equal)
    return write_target(reading, target, source_name, dims=dims(reading.model.dims), ranks=ranks, keep_tied=keep_tied)
