"""Filling a model in memory from a checkpoint of any format, tensor by tensor, in place."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch
import xxhash

from ckpt_convert import dtypes
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.mapping import Equality
from ckpt_convert.checkpointer.distributed.slices import Region, local_of, slice_of
from ckpt_convert.checkpointer.distributed.speaking import OWN
from ckpt_convert.convert import translate as translation
from ckpt_convert.convert.execute import byte_comparer
from ckpt_convert.convert.output import overflow_text
from ckpt_convert.convert.writing import TargetTensor
from ckpt_convert.errors import KeyMismatchError, TiedWeightsError
from ckpt_convert.storage.reader import DEFAULT_WORKERS
from ckpt_convert.tensors.blocks import BlockReader
from ckpt_convert.tensors.pool import run_threaded
from ckpt_convert.tensors.progress import ProgressCallback, ProgressCounter
from ckpt_convert.wording import indented_list

log = logging.getLogger("ckpt_convert")


@dataclass(frozen=True)
class LoadReport:
    """What was loaded into a model, and which of its tensors were left unchanged.

    tensors, bytes: how many tensors were loaded, and their size in the dtypes of the files.
    dtypes: the tensors by (dtype in the files, dtype in memory).
    missing: keys of the model that the checkpoint lacks. unexpected: keys of the checkpoint that the model lacks.
    mismatched: keys of both that do not fit, such as another shape, each with the reason.
    excluded: keys that ``include`` and ``exclude`` leave out.
    """

    tensors: int
    bytes: int
    dtypes: Mapping[tuple[str, str], int]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, str] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()

    @property
    def left_out(self) -> dict[str, str]:
        """Every key that was not loaded, with the reason."""
        return {
            **dict.fromkeys(self.missing, "the model has it, the checkpoint has not"),
            **dict.fromkeys(self.unexpected, "the checkpoint has it, the model has not"),
            **self.mismatched,
            **dict.fromkeys(self.excluded, "left out by include= or exclude="),
        }

    def describe(self) -> str:
        """One line: how many tensors, and in which dtypes."""
        said = ", ".join(
            f"{count} {there}" + ("" if there == here else f" as {here}")
            for (there, here), count in sorted(self.dtypes.items(), key=lambda item: -item[1])
        )
        return f"{self.tensors} tensors ({said})"

    def __str__(self) -> str:
        lines = [f"{key}: {reason}" for key, reason in self.left_out.items()]
        return f"loaded {self.describe()}" + (f"; {len(lines)} left out:{indented_list(lines)}" if lines else "")


@dataclass(frozen=True)
class ModelMatch:
    """How the tensors of a checkpoint match those of a model.

    ``targets`` are the tensors that both have, ``missing`` the keys that only the model has, ``unexpected`` those that
    only the checkpoint has; ``mismatched`` says of keys that both have why they do not fit.
    """

    targets: list[TargetTensor]
    missing: list[str]
    unexpected: list[str]
    mismatched: Mapping[str, str]

    @property
    def keys(self) -> list[str]:
        """The keys of both sides."""
        return [*(target.key for target in self.targets), *self.missing, *self.unexpected]

    def select(self, is_wanted: Callable[[str], bool]) -> ModelMatch:
        """The same for some of the keys."""
        return ModelMatch(
            [target for target in self.targets if is_wanted(target.key)],
            [key for key in self.missing if is_wanted(key)],
            [key for key in self.unexpected if is_wanted(key)],
            {key: reason for key, reason in self.mismatched.items() if is_wanted(key)},
        )

    def without(self, elsewhere: Collection[str]) -> ModelMatch:
        """The same for one of several ranks, of which others have these keys."""
        return replace(self, unexpected=[key for key in self.unexpected if key not in elsewhere])

    @property
    def problems(self) -> list[str]:
        """A line for each mismatch, alternating between both sides, as only the beginning of a long list is shown."""
        there = [f"{key}: the checkpoint has it, the model has not" for key in self.unexpected]
        here = [f"{key}: the model has it, the checkpoint has not" for key in self.missing]
        turns = [line for pair in zip_longest(there, here) for line in pair if line is not None]
        return [*turns, *(f"{key}: {reason}" for key, reason in self.mismatched.items())]


def source_targets(checkpoint: Identified, format: str) -> tuple[list[TargetTensor], set[str]]:
    """Every tensor of the checkpoint in ``format``, and the keys that a model with tied weights may lack.

    Raises UnsupportedFamilyError if the table has no such column, and TiedWeightsError if weights that the config ties
    differ.
    """
    model, source, path = checkpoint.model_for(format), str(checkpoint.format), str(checkpoint.place)
    translation.check_formats(model, path, source, format)
    equal = byte_comparer(checkpoint.stored)
    made = translation.translate(model, source, format, checkpoint.ranks, path, equal=equal, keep_tied=True)
    for check in made.checks:
        if not equal(check):
            raise TiedWeightsError(f"{path}: {check.message}")
    optional = {target.key for target in made.targets if target.instance.row.tied_to and made.dims["tied"]}
    return made.targets, optional


def match_model(checkpoint: Identified, tensors: Mapping[str, torch.Tensor], format: str) -> ModelMatch:
    """Match a checkpoint with the tensors of a model; no tensor is read."""
    column = checkpoint.model_for(format).family.detect_column(format, tensors)
    targets, optional = source_targets(checkpoint, column)
    optional |= {target.key for target in targets if not target.instance.row.required}
    known = {target.key: target for target in _with_prefix_of(tensors, targets)}
    missing = [key for key in tensors if key not in known]
    unexpected = [key for key in known if key not in tensors and key not in optional]
    mismatched = {
        key: f"expected {list(target.tensor.shape)}, found {list(tensors[key].shape)} in the model"
        for key, target in known.items()
        if key in tensors and tuple(tensors[key].shape) != target.tensor.shape
    }
    return ModelMatch([target for target in known.values() if target.key in tensors], missing, unexpected, mismatched)


def _with_prefix_of(keys: Collection[str], targets: list[TargetTensor]) -> list[TargetTensor]:
    """The targets under the keys of the model, where these have a prefix more or less.

    A base model (LlamaModel, BertModel) is saved without the "model." or "bert." that a model with a head has.
    """
    known = {target.key for target in targets}
    if not known.isdisjoint(keys):
        return targets
    if added := _prefix_before(keys, known):
        return [replace(target, key=added + target.key) for target in targets]
    removed = _prefix_before(known, keys)
    return [replace(target, key=target.key.removeprefix(removed)) for target in targets]


def _prefix_before(keys: Collection[str], others: Collection[str]) -> str:
    """What most of ``keys`` have before a key of ``others``; "" where no key ends in one of them."""
    counts = Counter(
        key[: at + 1]
        for key in keys
        for at, character in enumerate(key)
        if character == "." and key[at + 1 :] in others
    )
    return counts.most_common(1)[0][0] if counts else ""


def untied_sources(
    match: ModelMatch, tensors: Mapping[str, torch.Tensor], checkpoint: Identified, format: str
) -> dict[str, str]:
    """Tensors that are tied in the model but not in the checkpoint, of which the model would lose one: key and reason.

    An unknown family does not say what is tied: there, tensors of equal bytes are.
    """
    seen: dict[tuple[object, ...], TargetTensor] = {}
    out = {}
    by_bytes = bool(checkpoint.model_for(format).family.literal)
    for target in match.targets:
        tensor = tensors[target.key]
        other = seen.setdefault(_place(tensor), target)
        if local_of(tensor).numel() and other is not target and not (by_bytes and _equal(checkpoint, other, target)):
            out[target.key] = f"is tied to {other.key} in the model, but the checkpoint does not tie them"
    return out


def without_tied_aliases(tensors: Mapping[str, torch.Tensor], known: Collection[str]) -> dict[str, torch.Tensor]:
    """The tensors without those that are not ``known`` but share memory with a known one."""
    there = {_place(tensor) for key, tensor in tensors.items() if key in known and local_of(tensor).numel()}
    return {key: tensor for key, tensor in tensors.items() if key in known or _place(tensor) not in there}


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    tensor = local_of(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _equal(checkpoint: Identified, one: TargetTensor, other: TargetTensor) -> bool:
    pair = Equality(one.tensor, other.tensor, one.dtype, "")
    same = (one.dtype, one.tensor.shape) == (other.dtype, other.tensor.shape)
    return same and byte_comparer(checkpoint.stored)(pair)


def refuse_mismatch(match: ModelMatch, checkpoint: Identified, format: str) -> None:
    """Raise KeyMismatchError, which lists every mismatch of a model and a checkpoint."""
    if match.problems:
        raise KeyMismatchError(
            f"{checkpoint.place}: does not fit the model, whose keys should be those of the {format} format "
            f"(model_format={format!r}); strict=False loads what fits, exclude= leaves keys out:"
            f"{indented_list(match.problems)}"
        )


def load_tensors(
    checkpoint: Identified,
    tensors: Mapping[str, torch.Tensor],
    match: ModelMatch,
    *,
    workers: int = DEFAULT_WORKERS,
    progress: ProgressCallback | None = None,
    checksums: dict[str, str] | None = None,
) -> LoadReport:
    """Copy what matches into the tensors, in place, converted block by block; returns what was loaded.

    ``checksums`` takes the checksum of each tensor's values as they are read (in the source's dtype), by key.
    """
    targets = [target for target in match.targets if target.key not in match.mismatched]
    total = sum(dtypes.nbytes(target.dtype, local_of(tensors[target.key]).shape) for target in targets)
    counter = ProgressCounter("loading", total, progress)
    overflows: dict[str, int] = {}

    def start() -> Callable[[TargetTensor], None]:
        mover = BlockReader(checkpoint.stored)

        def fill(target: TargetTensor) -> None:
            digest = xxhash.xxh3_64() if checksums is not None else None
            if count := _fill(mover, target, tensors[target.key], counter, digest):
                overflows[target.key] = count
            if checksums is not None and digest is not None:
                checksums[target.key] = digest.hexdigest()

        return fill

    run_threaded(targets, workers, counter, start)
    if overflows:
        log.warning(
            "%s: %s in the model, whose dtype is too narrow for them",
            checkpoint.place,
            overflow_text(dict(sorted(overflows.items()))),
            extra=OWN,
        )
    pairs = Counter(
        (dtypes.DTYPES[target.dtype].torch, dtypes.torch_name(tensors[target.key].dtype)) for target in targets
    )
    return LoadReport(len(targets), total, dict(pairs))


def read_checksums(
    checkpoint: Identified, targets: Collection[TargetTensor], workers: int = DEFAULT_WORKERS
) -> dict[str, str]:
    """The ``checksums`` of ``load_tensors``, for tensors that are not loaded."""
    out: dict[str, str] = {}
    counter = ProgressCounter("reading", sum(dtypes.nbytes(one.dtype, one.tensor.shape) for one in targets), None)

    def start() -> Callable[[TargetTensor], None]:
        mover = BlockReader(checkpoint.stored)

        def read(target: TargetTensor) -> None:
            digest = xxhash.xxh3_64()
            for _, data in mover.blocks(target.tensor, target.dtype, target.dtype):
                digest.update(data)
                counter.add(len(data))
            out[target.key] = digest.hexdigest()

        return read

    run_threaded(targets, workers, counter, start)
    return out


def read_state_dict(checkpoint: Identified, format: str) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, converted, in its stored dtype; without the second key of tied weights."""
    targets, optional = source_targets(checkpoint, format)
    chosen = [target for target in targets if target.key not in optional]
    out = {
        target.key: torch.empty(target.tensor.shape, dtype=getattr(torch, dtypes.DTYPES[target.dtype].torch))
        for target in chosen
    }
    load_tensors(checkpoint, out, ModelMatch(chosen, [], [], {}))
    return out


def _fill(
    mover: BlockReader,
    target: TargetTensor,
    tensor: torch.Tensor,
    counter: ProgressCounter,
    digest: xxhash.xxh3_64 | None = None,
) -> int:
    """Copy a tensor in place, its bytes also into ``digest``; returns how many finite values have become infinite.

    Of one that is split over processes, what this process has is read, and nothing else.
    """
    local = local_of(tensor)
    regions = slice_of(target.key, tensor).regions()
    return sum(_fill_region(mover, target, region, local, counter, digest) for region in regions)


def _fill_region(
    mover: BlockReader,
    target: TargetTensor,
    region: Region,
    local: torch.Tensor,
    counter: ProgressCounter,
    digest: xxhash.xxh3_64 | None,
) -> int:
    dtype = getattr(torch, dtypes.DTYPES[target.dtype].torch)
    source, into = target.tensor, local
    for axis, size in enumerate(region.shape):
        source, into = source.narrow(axis, region.origin[axis], size), into.narrow(axis, region.local[axis], size)
    dense = into if into.is_contiguous() else torch.empty(into.shape, dtype=dtype)
    flat = dense.view(-1)
    count = 0
    with torch.no_grad():
        for offset, data in mover.blocks(source, target.dtype, target.dtype):
            if digest is not None:
                digest.update(data)
            block = torch.frombuffer(data, dtype=torch.uint8).view(dtype)
            start = offset // dtype.itemsize
            part = flat[start : start + block.numel()]
            part.copy_(block)
            count += _overflowed(block, part)
            counter.add(len(data))
        if dense is not into:
            into.copy_(dense)
            count += _overflowed(dense, into)
    return count


def _overflowed(values: torch.Tensor, made: torch.Tensor) -> int:
    """How many elements are finite and have become infinite in what was made of them."""
    is_cast = values.dtype != made.dtype and values.is_floating_point() and made.is_floating_point()
    if not is_cast or torch.finfo(made.dtype).max >= torch.finfo(values.dtype).max:
        return 0
    infinite = torch.isinf(made)
    if not infinite.any():
        return 0
    wide = values if values.dtype.itemsize > 1 else values.float()  # torch asks no such thing of single bytes
    return int((infinite & torch.isfinite(wide.to(made.device))).sum())
