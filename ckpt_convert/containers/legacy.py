"""torch's files from before 1.6, read without torch: a sequence of pickles, then the storages.

The pickles are a magic number, the protocol, facts about the machine, the object, and the keys of its storages in file
order. Each storage is the number of its elements in eight bytes, then the elements (torch 2.13,
torch/serialization.py, ``_legacy_save``).
"""

from __future__ import annotations

from ckpt_convert.containers.flatten import flatten
from ckpt_convert.containers.pickle import torchpickle
from ckpt_convert.containers.pickle.torchpickle import LoadedPickle, PickledStorage, PickledTensor
from ckpt_convert.containers.torch_zip.torchzip import view
from ckpt_convert.errors import CorruptFileError
from ckpt_convert.storage.base import RangeReader, read_range
from ckpt_convert.tensors.header import Header

KIND = "legacy"

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_PICKLES = 5
_WINDOW, _MAX_WINDOW = 1 << 20, 1 << 29
"""Bytes that are read for the pickles at first, and at most: their end is not recorded."""


def parse(reader: RangeReader, *, foreign: bool = False) -> Header:
    """Read and check the header; tensors are in the order of the pickle, nested keys joined with ".".

    Raises CorruptFileError if pickles, storages and size disagree, UnsafeFileError if a pickle needs more than tensors
    and plain data; with ``foreign``, the header lists the classes that it names instead.
    """
    (_, protocol, machine, root, keys), end = _pickles(reader, foreign)
    if protocol.value != _PROTOCOL:
        raise CorruptFileError(f"{reader.name}: its protocol should be {_PROTOCOL}; torch reads no other either")
    if not isinstance(machine.value, dict) or machine.value.get("little_endian") is not True:
        raise CorruptFileError(
            f"{reader.name}: its byte order should be little; load the file with torch on the machine that wrote it, "
            "and save it again"
        )
    starts = _starts(reader, root, keys.value, end)
    # Every value takes at least a byte, so a pickle that expands to more values is malicious.
    found = flatten(reader.name, root.value, PickledTensor, end)
    stored = []
    for key, tensor in found.tensors.items():
        start = starts.get(tensor.storage.key)
        if start is None or tensor.storage.nbytes != root.storages[tensor.storage.key].nbytes:
            raise _damaged(reader, f"{key!r} should lie in a storage that the file has")
        stored.append(view(reader, key, tensor, start))
    return Header(KIND, reader.size, tuple(stored), objects=found.objects, values=found.values, foreign=root.foreign)


def _pickles(reader: RangeReader, foreign: bool) -> tuple[list[LoadedPickle], int]:
    """The pickles, and the offset of the storages; the window is doubled until it contains all pickles."""
    data = read_range(reader, 0, min(reader.size, _WINDOW))
    (first,), _ = torchpickle.load_row(reader.name, data, 1)
    if first.value != _MAGIC:
        raise CorruptFileError(f"{reader.name}: is a pickle, but none that torch.save wrote, so it is no checkpoint")
    while True:
        try:
            return torchpickle.load_row(reader.name, data, _PICKLES, foreign=foreign)
        except CorruptFileError:
            more = min(reader.size, _MAX_WINDOW, 2 * len(data)) - len(data)
            if more == 0:
                raise
            data += read_range(reader, len(data), more)


def _starts(reader: RangeReader, root: LoadedPickle, keys: object, position: int) -> dict[str, int]:
    """The offset of each storage's bytes, by its key."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise _damaged(reader, "the last pickle should be the keys of the storages")
    starts = {}
    for key in keys:
        storage: PickledStorage | None = root.storages.get(key)
        if storage is None:
            raise _damaged(reader, f"storage {key!r} should be one that the object uses")
        end = position + 8 + storage.nbytes
        if end > reader.size:
            raise _damaged(reader, f"storage {key!r} should end at byte {end}, but the file has {reader.size}")
        count = int.from_bytes(read_range(reader, position, 8), "little")
        if count != storage.numel:
            raise _damaged(reader, f"storage {key!r} should have {storage.numel} elements, but has {count}")
        starts[key], position = position + 8, end
    return starts


def _damaged(reader: RangeReader, problem: str) -> CorruptFileError:
    return CorruptFileError(f"{reader.name}: {problem}; the file is damaged, so download or copy it again")
