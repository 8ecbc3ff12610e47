"""Descriptions of a checkpoint's tensors, whatever number of files, ranks or pieces each is stored in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ckpt_convert.tensors.header import StoredTensor, WeightFile
from ckpt_convert.tensors.lazy import LazyTensor, Tile, from_source


class SourceTensor(NamedTuple):
    """A stored tensor to be mapped: ``location`` is the file (or rank) for messages."""

    key: str
    dtype: str
    tensor: LazyTensor
    location: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape


class Part(NamedTuple):
    """The stored part of a tensor, on one rank or in one piece: ``offset`` and ``nbytes`` are bytes in the file.

    ``origin`` is the index in the whole tensor at which the part starts, where the files state it
    (torch.distributed.checkpoint); ``offset`` is then that of the zip record with the part.
    """

    file: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    rank: int
    origin: tuple[int, ...] | None = None


class TensorInfo(NamedTuple):
    """A tensor of a checkpoint: its full shape, its dtype as safetensors spells it, and its stored parts.

    A dtype that safetensors lacks is spelled as in the file (GGUF's Q4_K). ``axis`` is the one that ranks split, None
    where each has the whole tensor. ``settled`` is False where that is unknown (no config, or a key of no table):
    ``shape`` and ``nbytes`` are then those of one rank. ``copies`` is the number of consecutive ranks that hold equal
    replicas of a split tensor's slice.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    parts: tuple[Part, ...]
    axis: int | None = None
    settled: bool = True
    copies: int = 1


def describe_tensors(
    pieces: Iterable[tuple[WeightFile, StoredTensor]],
    name: Callable[[WeightFile, StoredTensor], str],
    splits: Mapping[str, tuple[int | None, int]],
    on_ranks: bool,
) -> dict[str, TensorInfo]:
    """Every tensor by key; ``on_ranks`` is whether ranks may also split tensors that are not in ``splits``.

    ``splits`` gives for a key the axis that ranks split, and the number of consecutive ranks with equal replicas.
    """
    found: dict[str, TensorInfo] = {}
    parts: dict[str, list[Part]] = {}
    # 100,000 tensors have only a few dtypes and shapes.
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}
    for file, tensor in pieces:
        key = name(file, tensor)
        _, dtype, shape, offset, _, packed, box = tensor
        nbytes = packed if packed is not None else sizes.get((dtype, shape))
        if nbytes is None:
            nbytes = sizes[dtype, shape] = tensor.nbytes
        part = Part(file.name, offset, nbytes, shape, file.rank, box.origin if box else None)
        if key not in found:
            found[key] = TensorInfo(key, box.shape if box else shape, dtype, nbytes, (part,))
        elif key in parts:
            parts[key].append(part)
        else:
            parts[key] = [*found[key].parts, part]
    for key, several in parts.items():
        axis, copies = splits.get(key, (None, 1))
        found[key] = _joined(found[key]._replace(axis=axis, copies=copies), several, not on_ranks or key in splits)
    return found


def _joined(first: TensorInfo, parts: list[Part], settled: bool) -> TensorInfo:
    """``first``, which describes the first part, with all parts."""
    key, shape, dtype, nbytes, _, axis, _, copies = first
    if parts[0].origin is not None:
        parts.sort(key=lambda part: part.origin or ())
        return TensorInfo(key, shape, dtype, sum(part.nbytes for part in parts), tuple(parts))
    if axis is None or axis >= len(shape):
        return TensorInfo(key, shape, dtype, nbytes, tuple(parts), axis, settled)
    distinct = parts[::copies]
    size = sum(part.shape[axis] for part in distinct)
    shape = (*shape[:axis], size, *shape[axis + 1 :])
    nbytes = sum(part.nbytes for part in distinct)
    return TensorInfo(key, shape, dtype, nbytes, tuple(parts), axis, settled, copies)


def join_boxes(pieces: Iterable[tuple[int, StoredTensor]]) -> LazyTensor:
    """The tensor that consists of these numbered pieces with boxes."""
    tiles = []
    shape: tuple[int, ...] = ()
    for number, piece in pieces:
        if piece.box is not None:
            shape = piece.box.shape
            if piece.nbytes:
                tiles += [
                    Tile(piece.box.origin, number, tile.offset, tile.axes)
                    for tile in from_source(number, piece.shape, piece.strides).tiles
                ]
    return LazyTensor(shape, tuple(tiles))
