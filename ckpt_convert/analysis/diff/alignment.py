"""Aligning two checkpoints: which tensor of one is which of the other, whatever formats they are in.

Through the family's table if both have the same one, else by key. No tensor is read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckpt_convert import dtypes
from ckpt_convert.checkpoint import mapping
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.mapping import Equality, LogicalTensor
from ckpt_convert.checkpoint.model import Model, model_from
from ckpt_convert.convert.writing import to_stored
from ckpt_convert.errors import AmbiguousFormatError, CkptConvertError, ConfigError, UnsupportedFamilyError
from ckpt_convert.formats import peft
from ckpt_convert.models.core.rope import reordered
from ckpt_convert.models.core.table import Instance
from ckpt_convert.tensors.header import GGUF
from ckpt_convert.tensors.lazy import LazyTensor, from_source, zeros
from ckpt_convert.wording import MORE, first_few


@dataclass(frozen=True, slots=True)
class TensorSide:
    """A tensor on one side: its key there, its full shape (ranks joined), and where its elements are stored.

    Values in blocks that cannot be decoded here (GGUF) are read as ``packed`` bytes.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    tensor: LazyTensor
    packed: bool = False

    @property
    def element(self) -> str:
        """The dtype of the elements of ``tensor``."""
        return "U8" if self.packed else self.dtype


@dataclass(frozen=True, slots=True)
class AlignedTensor:
    """The same tensor on both sides, None if a side lacks it.

    Both have the order of elements in which side a stores them. ``replicas`` are pairs of tensors within one side (0
    for a, 1 for b) that have to be equal: what every rank holds. ``reordered`` is b's tensor with its rows as stored,
    and with each RoPE permutation applied to them.
    """

    a: TensorSide | None
    b: TensorSide | None
    replicas: tuple[tuple[int, Equality], ...] = ()
    reordered: tuple[LazyTensor, ...] = ()


@dataclass(frozen=True)
class Alignment:
    """Two checkpoints tensor by tensor; ``aligned_by`` is "mapping" (through the family's table) or "keys"."""

    aligned_by: str
    pairs: Sequence[AlignedTensor]
    models: tuple[Model | None, Model | None]
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Side:
    """One checkpoint read through a table: tensors by row, unmapped ones by key, replicas on ranks by key."""

    tensors: Mapping[Instance, LogicalTensor]
    rest: Mapping[str, TensorSide]
    omitted: frozenset[Instance]
    copies: Mapping[str, Sequence[Equality]] = field(default_factory=dict)
    misfits: int = 0


def align(a: Identified, b: Identified) -> Alignment:
    """Pair the tensors of two checkpoints.

    A side without a config is read with the other's. Raises ConfigError, AmbiguousFormatError or UnsupportedFamilyError
    where the formats differ and nothing says how one is read as the other, KeyMismatchError for files that contradict
    each other.
    """
    notices = [f"{checkpoint.place}: {text}" for checkpoint in (a, b) for text in checkpoint.key_notices]
    models = _models(a, b, notices)
    left, right = models
    if left is not None and right is not None and left.family.name == right.family.name:
        return _through_table(a, b, left, right, notices)
    names_a: Mapping[str, TensorSide] = _by_key(a)
    names_b: Mapping[str, TensorSide] = _by_key(b)
    if not names_a.keys() & names_b.keys():
        names_a = _without_prefix(a, names_a, names_b, notices)
        names_b = _without_prefix(b, names_b, names_a, notices)
    unknown = a.format is None or b.format is None
    if a.format != b.format and not (unknown and names_a.keys() & names_b.keys()):
        _refuse(a, b, models)
    pairs = [AlignedTensor(half, names_b.get(name)) for name, half in names_a.items()]
    pairs += [AlignedTensor(None, half) for name, half in names_b.items() if name not in names_a]
    return Alignment("keys", pairs, models, tuple(notices))


def _without_prefix(
    checkpoint: Identified, names: Mapping[str, TensorSide], others: Mapping[str, TensorSide], notices: list[str]
) -> Mapping[str, TensorSide]:
    """The keys without a prefix, if they then are those of the other side.

    The state of a training run adds a prefix ("model.…"), and a base model lacks one (no "model.").
    """
    longest = max(names, key=len, default="")
    parts = longest.split(".")
    prefixes = (".".join(parts[:count]) + "." for count in range(1, len(parts)))
    prefix = next((prefix for prefix in prefixes if longest.removeprefix(prefix) in others), None)
    if prefix is None:
        return names
    stripped = {name.removeprefix(prefix): half for name, half in names.items()}
    if len(stripped) != len(names):
        return names
    notices.append(f"{checkpoint.place}: its keys are compared without {prefix!r} before them")
    return stripped


def _through_table(a: Identified, b: Identified, left: Model, right: Model, notices: list[str]) -> Alignment:
    format = str(a.format)
    left.family.check_rotation(left.config, format, str(b.format))
    side_a, side_b = _read(a, left), _read(b, right)
    for checkpoint, side in ((a, side_a), (b, side_b)):
        if side.misfits:
            notices.append(
                f"{checkpoint.place}: {side.misfits} tensors do not fit its config; `ckpt-convert verify` lists them"
            )
    pairs: list[AlignedTensor] = []
    rest_a, rest_b = dict(side_a.rest), dict(side_b.rest)
    as_zeros: dict[str, list[str]] = {"a": [], "b": []}
    for instance in dict.fromkeys([*side_a.tensors, *side_b.tensors]):
        ours, theirs = side_a.tensors.get(instance), side_b.tensors.get(instance)
        if instance in side_a.omitted and instance in side_b.omitted:
            continue
        one = ours or theirs
        if one is not None and (ours is None or theirs is None):
            where, format_there = ("a", str(b.format)) if theirs is None else ("b", str(a.format))
            if instance.row.derived:
                notices.append(f"{one.key} is only in {where}: the config determines what it holds")
                continue
            if instance.row.zeros is not None:
                as_zeros[where].append(one.key)
                absent = replace(one, tensor=zeros(one.tensor.shape))
                ours, theirs = ours or absent, theirs or absent
            elif not instance.row.required and instance.row.column(format_there) is None:
                text = f"{one.key} is only in {where}: the {format_there} format has no place for it"
                notices.append(f"{text}, and its models do without")
                continue
        half_a = _half(instance, format, left, ours) or rest_a.pop(str(instance.key(format)), None)
        half_b = _half(instance, format, left, theirs) or rest_b.pop(str(instance.key(str(b.format))), None)
        copies = [(0, check) for check in side_a.copies.get(half_a.key, ())] if half_a else []
        copies += [(1, check) for check in side_b.copies.get(half_b.key, ())] if half_b else []
        pairs.append(AlignedTensor(half_a, half_b, tuple(copies), _reordered(instance, left, b, half_b)))
    if a.format == b.format:
        pairs += [AlignedTensor(half, rest_b.pop(key, None)) for key, half in rest_a.items()]
        rest_a = {}
    pairs += [AlignedTensor(half, None) for half in rest_a.values()]
    pairs += [AlignedTensor(None, half) for half in rest_b.values()]
    for where, keys in as_zeros.items():
        if keys:
            what = f"{first_few(keys, 1, MORE)}, only in {where}"
            notices.append(f"compared with zeros, which the other side computes with: {what}")
    return Alignment("mapping", pairs, (left, right), tuple(notices))


def _read(checkpoint: Identified, model: Model) -> _Side:
    format = str(checkpoint.format)
    logicals, findings = mapping.examine_column(model.family, format, model.dims, checkpoint.ranks)
    copies: dict[str, list[Equality]] = {}
    for check in logicals.replica_checks:
        copies.setdefault(check.key, []).append(check)
    fit = {instance.key(format) for instance in logicals.tensors}
    names = checkpoint.names
    loose = [key for key in checkpoint.tensors if names.of(key) not in fit and checkpoint.is_weight(key)]
    rest = {name: half for key in loose for name, half in _halves(checkpoint, key)}
    misfits = sum(finding.check == "shape" for finding in findings)
    return _Side(logicals.tensors, rest, frozenset(logicals.omitted_ties), copies, misfits)


def _half(instance: Instance, format: str, model: Model, logical: LogicalTensor | None) -> TensorSide | None:
    """A logical tensor in the element order in which ``format`` stores it."""
    if logical is None:
        return None
    column = instance.row.column(format)
    tensor = to_stored(instance, logical, column, model.dims) if column else logical.tensor
    return TensorSide(logical.key, tensor.shape, logical.dtype, _nbytes(tensor, logical.dtype), tensor)


def _reordered(instance: Instance, model: Model, b: Identified, half: TensorSide | None) -> tuple[LazyTensor, ...]:
    turned = instance.row.rotation(model.dims)
    if half is None or turned is None or half.shape != instance.row.sizes(model.dims):
        return ()
    tensor, _ = b.joined(half.key)
    if tensor.shape != half.shape:
        return ()  # it is fused or stacked with others
    return tensor, *(reordered(tensor, *turned, inverse=inverse) for inverse in (False, True))


def _by_key(checkpoint: Identified) -> dict[str, TensorSide]:
    weights = filter(checkpoint.is_weight, checkpoint.tensors)
    return {name: half for key in weights for name, half in _halves(checkpoint, key)}


def _halves(checkpoint: Identified, key: str) -> list[tuple[str, TensorSide]]:
    """A tensor by its key in the format; if it is unknown how ranks are joined, each rank's slice by itself."""
    info, key = checkpoint.tensors[key], checkpoint.names.of(key)
    if info.dtype not in dtypes.DTYPES:
        number = checkpoint.ranks[0][key].tensor.tiles[0].source
        return [
            (
                key,
                TensorSide(key, info.shape, info.dtype, info.nbytes, from_source(number, (info.nbytes,)), packed=True),
            )
        ]
    if info.settled:
        tensor, dtype = checkpoint.joined(key)
        return [(key, TensorSide(key, tensor.shape, dtype, info.nbytes, tensor))]
    out = []
    for rank, tensors in enumerate(checkpoint.ranks):
        if (source := tensors.get(key)) is not None:
            name = f"{key} (rank {rank})"
            out.append(
                (
                    name,
                    TensorSide(name, source.shape, source.dtype, _nbytes(source.tensor, source.dtype), source.tensor),
                )
            )
    return out


def _models(a: Identified, b: Identified, notices: list[str]) -> tuple[Model | None, Model | None]:
    left, right = _model(a), _model(b)
    if left is None and right is not None:
        left = _borrowed(a, right, b, notices)
    elif right is None and left is not None:
        right = _borrowed(b, left, a, notices)
    return left, right


def _model(checkpoint: Identified) -> Model | None:
    try:
        return checkpoint.model
    except CkptConvertError:
        return None


def _borrowed(checkpoint: Identified, model: Model, owner: Identified, notices: list[str]) -> Model | None:
    """The model of a checkpoint that has no config, read with the other's."""
    if checkpoint.format is None or checkpoint.config is not None or checkpoint.params is not None:
        return None
    if checkpoint.format not in model.family.formats:
        return None
    try:
        found = model_from(
            model.config,
            str(owner.place),
            checkpoint.format,
            checkpoint.ranks,
            checkpoint.hints.options,
            family=model.family.name,
        )
    except CkptConvertError:
        return None
    notices.append(f"{checkpoint.place}: has no config, and is read with that of {owner.place}")
    return found


def _refuse(a: Identified, b: Identified, models: tuple[Model | None, Model | None]) -> None:
    """Raise the error that explains why two checkpoints of different layouts cannot be compared."""
    left, right = models
    for checkpoint in (a, b):
        if checkpoint.directory.kind == peft.KIND:
            raise UnsupportedFamilyError(
                f"{checkpoint.place}: is a PEFT adapter, which holds changes to a model, not its weights; merge it "
                "into its base model first (peft's merge_and_unload), then compare that"
            )
        is_gguf = any(file.header.kind == GGUF for file in checkpoint.files)
        if checkpoint.format is None and (is_gguf or checkpoint.directory.kind is not None):
            raise UnsupportedFamilyError(
                f"{checkpoint.place}: {checkpoint.why}, and none of its keys is one of the other side; "
                "`ckpt-convert inspect` shows the keys of each"
            )
    if left is not None and right is not None:
        raise UnsupportedFamilyError(
            f"{a.place} is a {left.family.name} in the {a.format} format, {b.place} a {right.family.name} in the "
            f"{b.format} format: no table maps one to the other; compare checkpoints of one family, or of one format"
        )
    for checkpoint, model in ((a, left), (b, right)):
        if model is None and checkpoint.format is None:
            raise AmbiguousFormatError(
                f"{checkpoint.place}: {checkpoint.why}, and the other side is of another layout; say which format it "
                "is (`format_a=`, `format_b=`)"
            )
    for checkpoint, model in ((a, left), (b, right)):
        if model is None:
            _ = checkpoint.model  # raises what is missing
    raise ConfigError(f"{a.place}, {b.place}: nothing says how one is read as the other; give a config")


def _nbytes(tensor: LazyTensor, dtype: str) -> int:
    return dtypes.nbytes(dtype, tensor.shape)
