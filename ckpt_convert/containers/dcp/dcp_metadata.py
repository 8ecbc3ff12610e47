"""Reads and checks the metadata of torch.distributed.checkpoint: tensors, their pieces, and the records of those.

Field names are those of torch 2.13 (torch/distributed/checkpoint/metadata.py and filesystem.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeGuard

from ckpt_convert.containers.dcp import DCP_INDEX
from ckpt_convert.containers.pickle import torchpickle
from ckpt_convert.containers.pickle.pickleglobals import DTypeName, ForeignObject, Global
from ckpt_convert.dtypes import DTYPES, torch_name
from ckpt_convert.errors import CorruptFileError
from ckpt_convert.storage.base import read_range
from ckpt_convert.storage.place import Place
from ckpt_convert.tensors.cover import covers, cut_axes

_OURS = "torch.distributed.checkpoint."
_MAX_METADATA = 1 << 29
_MAX_BYTES = 1 << 63
_MAX_DIMS = 64
_MAX_CUT = 8
"""Axes along which a tensor may be split: each dimension of a device mesh splits one."""

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Extent:
    """The record of a piece or an object: ``length`` bytes at ``offset`` of ``file``."""

    file: str
    offset: int
    length: int
    is_plain: bool  # no transform, such as compression, between the record and the file


@dataclass(frozen=True, slots=True)
class DcpTensor:
    """A tensor's dtype and full shape, and its pieces: origin → (sizes, record)."""

    dtype: str
    shape: Sizes
    pieces: dict[Sizes, tuple[Sizes, Extent]]


@dataclass(frozen=True)
class DcpMetadata:
    """The content of the metadata: tensors, and the records of other objects by key."""

    tensors: dict[str, DcpTensor]
    objects: dict[str, Extent | None]
    foreign: tuple[str, ...]
    version: str | None


def load_metadata(path: Place) -> DcpMetadata:
    """Read one metadata file; raises CorruptFileError if it is malformed."""
    with path.open() as file:
        if file.size > _MAX_METADATA:
            raise CorruptFileError(
                f"{path}: {file.size:,} bytes are far more than any checkpoint's metadata; is this the right file?"
            )
        loaded = torchpickle.load_pickle(file.name, read_range(file, 0, file.size), foreign=True, part=DCP_INDEX)
    try:
        return _metadata(loaded)
    except _OddError as odd:
        raise CorruptFileError(
            f"{path}: {odd}; this is no metadata of torch.distributed.checkpoint, or it is damaged: copy it again"
        ) from None


class _OddError(ValueError):
    """A problem of the metadata; ``load_metadata`` adds the file's name."""


def _metadata(loaded: torchpickle.LoadedPickle) -> DcpMetadata:
    root = _attributes(loaded.value, "metadata.Metadata")
    places: dict[tuple[str, Sizes | None], Extent] = {}
    for index, info in _dict(root.get("storage_data"), "storage_data").items():
        where = _attributes(index, "metadata.MetadataIndex")
        offset = where.get("offset")
        places[_text(where.get("fqn")), None if offset is None else _sizes(offset)] = _place(info)
    tensors = {}
    objects = {}
    for key, entry in _dict(root.get("state_dict_metadata"), "state_dict_metadata").items():
        if isinstance(entry, ForeignObject) and entry.name == _OURS + "metadata.BytesStorageMetadata":
            objects[_text(key)] = places.get((key, None))
        else:
            tensors[_text(key)] = _tensor(key, _attributes(entry, "metadata.TensorStorageMetadata"), places)
    foreign = tuple(name for name in loaded.foreign if not name.startswith(_OURS))
    version = root.get("version")
    return DcpMetadata(tensors, objects, foreign, version if isinstance(version, str) else None)


def _tensor(key: str, entry: Mapping[str, Any], places: Mapping[tuple[str, Sizes | None], Extent]) -> DcpTensor:
    dtype = _dtype(entry.get("properties"))
    shape = _sizes(entry.get("size"))
    chunks = entry.get("chunks")
    if not isinstance(chunks, list):
        raise _OddError(f"{key!r} should have a list of chunks")
    boxes = {}
    for chunk in chunks:
        held = _attributes(chunk, "metadata.ChunkStorageMetadata")
        origin, sizes = _sizes(held.get("offsets")), _sizes(held.get("sizes"))
        if prod(sizes) == 0 and prod(shape) > 0:
            continue  # a rank that holds nothing of the tensor
        place = places.get((key, origin))
        if place is None:
            raise _OddError(f"{key!r} should have its chunk at {list(origin)} in some file, but storage_data has none")
        boxes[origin] = (sizes, place)
    if dtype == "F4":  # torch counts pairs of 4-bit values, safetensors the values themselves
        shape, boxes = _double(shape), {_double(at): (_double(sizes), place) for at, (sizes, place) in boxes.items()}
    if prod(shape) * (DTYPES[dtype].bits if dtype in DTYPES else 8) >= _MAX_BYTES:
        raise _OddError(f"{key!r} of shape {list(shape)} is larger than anything")
    return DcpTensor(dtype, shape, boxes)


def _double(shape: Sizes) -> Sizes:
    return (*shape[:-1], 2 * shape[-1]) if shape else shape


def _dtype(properties: object) -> str:
    if not isinstance(properties, ForeignObject) or properties.name != _OURS + "metadata.TensorProperties":
        raise _OddError("a tensor should have TensorProperties")
    state = properties.state
    found = state[0] if isinstance(state, tuple) and state else properties.attributes.get("dtype")
    if isinstance(found, DTypeName):
        return found.name
    if isinstance(found, Global):
        return torch_name(found.name)
    raise _OddError("a tensor should have a dtype")


def _place(info: object) -> Extent:
    found = _attributes(info, "filesystem._StorageInfo")
    offset, length = found.get("offset"), found.get("length")
    if not _is_size(offset) or not _is_size(length):
        raise _OddError("a record should lie at an offset and have a length, of 63 bits each at most")
    return Extent(_text(found.get("relative_path")), offset, length, not found.get("transform_descriptors"))


def _attributes(value: object, kind: str) -> Mapping[str, Any]:
    if not isinstance(value, ForeignObject) or value.name != _OURS + kind:
        what = value.name if isinstance(value, ForeignObject) else type(value).__name__
        raise _OddError(f"expected {_OURS}{kind}, found {what}")
    return value.attributes


def _dict(value: object, what: str) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise _OddError(f"{what} should be a dict, but is {type(value).__name__}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _OddError(f"expected a name, found {type(value).__name__}")
    return value


def _sizes(value: object) -> Sizes:
    if not isinstance(value, tuple) or len(value) > _MAX_DIMS or not all(map(_is_size, value)):
        raise _OddError(f"expected sizes or offsets, {_MAX_DIMS} at most, found {type(value).__name__}")
    return tuple(value)


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _MAX_BYTES


def merge_metadata(found: Sequence[DcpMetadata], what: str) -> DcpMetadata:
    """Merge the metadata of all ranks; of replicas, the first is used."""
    first, *rest = found
    for other in rest:
        for key, tensor in other.tensors.items():
            known = first.tensors.setdefault(key, DcpTensor(tensor.dtype, tensor.shape, {}))
            if (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
                raise CorruptFileError(
                    f"{what}: {key!r} is {known.dtype} {list(known.shape)} on one rank and {tensor.dtype} "
                    f"{list(tensor.shape)} on another; the files are not of one checkpoint"
                )
            for origin, piece in tensor.pieces.items():
                known.pieces.setdefault(origin, piece)
        for name, place in other.objects.items():
            first.objects.setdefault(name, place)
    foreign = dict.fromkeys(name for metadata in found for name in metadata.foreign)
    return DcpMetadata(first.tensors, first.objects, tuple(foreign), first.version)


def check_cover(what: str, tensor: DcpTensor) -> None:
    """Raise CorruptFileError unless the pieces cover their tensor exactly, each element once."""
    shape = tensor.shape
    boxes = [(origin, sizes) for origin, (sizes, _) in tensor.pieces.items()]
    for origin, sizes in boxes:
        fits = len(origin) == len(sizes) == len(shape)
        if not fits or any(at + size > full for at, size, full in zip(origin, sizes, shape, strict=True)):
            raise CorruptFileError(
                f"{what} of shape {list(shape)} has a piece of {list(sizes)} at {list(origin)}, which does not lie in "
                "it; the metadata is damaged, so copy it again"
            )
    held, wanted = sum(prod(sizes) for _, sizes in boxes), prod(shape)
    if held == wanted and len(cut := cut_axes(boxes, shape)) > _MAX_CUT:
        raise CorruptFileError(
            f"{what} of shape {list(shape)} is cut across {len(cut)} axes, expected {_MAX_CUT} at most"
        )
    if held != wanted or not boxes or not covers(boxes, shape):
        raise CorruptFileError(
            f"{what} of shape {list(shape)} has {wanted:,} elements, but its {len(boxes)} pieces hold {held:,}"
            f"{' and overlap' if held == wanted else ''}; the save was cut short, or a rank's metadata is missing"
        )
