"""Writes ``.metadata`` of torch.distributed.checkpoint without torch: the file and offset of each tensor.

The objects are those that torch 2.13's ``DefaultSavePlanner`` makes for a dict of whole tensors
(``create_default_global_save_plan`` in torch/distributed/checkpoint/default_planner.py), and the bytes those that
``pickle.dumps`` gives of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ckpt_convert.containers.pickle import pickle_writer
from ckpt_convert.containers.pickle.pickle_writer import Call, Constant, Global, Instance, Items, Text
from ckpt_convert.dtypes import DTYPES

_METADATA = "torch.distributed.checkpoint.metadata"
_STORAGE_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_METADATA_INDEX = Global(_METADATA, "MetadataIndex")
_TENSOR, _CHUNK = Global(_METADATA, "TensorStorageMetadata"), Global(_METADATA, "ChunkStorageMetadata")
_PROPERTIES = Global(_METADATA, "TensorProperties")
_SIZE = Global(Text("torch"), "Size")
_STRIDED = Constant(Global("torch.serialization", "_get_layout"), ("torch.strided",))
_CONTIGUOUS = Constant(Global(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
_DTYPES = {name: Global("torch", dtype.torch) for name, dtype in DTYPES.items()}


class PlacedTensor(NamedTuple):
    """A whole tensor, its shape as torch counts, and its record: ``length`` bytes at ``offset`` of ``file``."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


def render_metadata(tensors: Sequence[PlacedTensor]) -> bytes:
    """The content of ``.metadata`` for these tensors, whose keys differ."""
    keys = [Text(tensor.key) for tensor in tensors]
    files = {name: Text(name) for name in dict.fromkeys(tensor.file for tensor in tensors)}
    found = {
        "state_dict_metadata": Items(len(keys), zip(keys, map(_described, tensors), strict=True)),
        "planner_data": Items(len(keys), ((key, (key,)) for key in keys)),
        "storage_data": Items(len(keys), _places(keys, files, tensors)),
        "storage_meta": None,
        "version": None,
    }
    return pickle_writer.dumps(Instance(Global(_METADATA, "Metadata"), found))


def _described(tensor: PlacedTensor) -> Instance:
    """TensorStorageMetadata: dtype, shape, and a single chunk."""
    properties = (_DTYPES[tensor.dtype], _STRIDED, False, _CONTIGUOUS, False)
    chunk = {"offsets": _size(_origin(tensor)), "sizes": _size(tensor.shape)}
    return Instance(
        _TENSOR,
        {
            "properties": Instance(_PROPERTIES, properties),
            "size": _size(tensor.shape),
            "chunks": [Instance(_CHUNK, chunk)],
        },
    )


def _places(
    keys: Sequence[Text], files: dict[str, Text], tensors: Sequence[PlacedTensor]
) -> Iterator[tuple[Instance, Instance]]:
    for key, tensor in zip(keys, tensors, strict=True):
        index = {"fqn": key, "index": 0, "offset": _size(_origin(tensor))}
        place = {"relative_path": files[tensor.file], "offset": tensor.offset, "length": tensor.length}
        yield Instance(_METADATA_INDEX, index), Instance(_STORAGE_INFO, place)


def _origin(tensor: PlacedTensor) -> tuple[int, ...]:
    return (0,) * len(tensor.shape)


def _size(values: tuple[int, ...]) -> Call:
    return Call(_SIZE, (values,))
