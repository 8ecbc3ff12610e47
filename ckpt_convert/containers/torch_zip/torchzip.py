"""torch.save's zip container: its header without its tensors' bytes, and without torch."""

from __future__ import annotations

from ckpt_convert.containers.flatten import flatten
from ckpt_convert.containers.pickle import torchpickle
from ckpt_convert.containers.pickle.torchpickle import PickledStorage, PickledTensor
from ckpt_convert.containers.torch_zip.torchzip_build import KIND, build
from ckpt_convert.containers.torch_zip.zipindex import Member, list_members
from ckpt_convert.dtypes import DTYPES
from ckpt_convert.errors import CorruptFileError
from ckpt_convert.storage.base import RangeReader, read_range
from ckpt_convert.tensors.header import ChecksummedRange, Header, StoredTensor

__all__ = ["KIND", "build", "is_zip", "parse", "view"]

_MAX_PICKLE = 1 << 29
_MAX_BYTES = 1 << 63


def is_zip(reader: RangeReader) -> bool:
    """Whether the file starts with the magic number of a zip file."""
    return reader.size >= 4 and read_range(reader, 0, 4) in (b"PK\3\4", b"PK\5\6")


def parse(reader: RangeReader, *, foreign: bool = False) -> Header:
    """Read and check the header; tensors are in the order of the pickle, nested keys joined with ".".

    Offsets are absolute, in bytes. ``checksummed`` has every member that the pickle refers to, in file order. Raises
    CorruptFileError if archive, pickle and sizes disagree, UnsafeFileError if the pickle needs more than tensors and
    plain data; with ``foreign``, the header lists the classes that it names instead.
    """
    found = list_members(reader)
    root = _root(reader, found)
    _check_byteorder(reader, found.get(f"{root}/byteorder"))
    record = found[f"{root}/data.pkl"]
    if record.size > _MAX_PICKLE:
        raise CorruptFileError(
            f"{reader.name}: data.pkl has {record.size} bytes, far more than the {_MAX_PICKLE} that any checkpoint "
            "needs; it holds more than tensors, so save a plain state dict"
        )
    data = read_range(reader, record.offset, record.size)
    loaded = torchpickle.load_pickle(reader.name, data, foreign=foreign)
    # Every value takes at least a byte, so a pickle that expands to more values is malicious.
    flat = flatten(reader.name, loaded.value, PickledTensor, len(data))
    used: dict[str, Member] = {}
    stored = []
    for key, tensor in flat.tensors.items():
        member = _member(reader, found, f"{root}/data/{tensor.storage.key}", key, tensor.storage)
        used[member.name] = member
        stored.append(view(reader, key, tensor, member.offset))
    checksummed = sorted((m.offset, m.size, m.crc, m.places) for m in used.values())
    return Header(
        KIND,
        reader.size,
        tuple(stored),
        objects=flat.objects,
        values=flat.values,
        checksummed=tuple(ChecksummedRange(*m) for m in checksummed),
        foreign=loaded.foreign,
    )


def _root(reader: RangeReader, found: dict[str, Member]) -> str:
    roots = {name.partition("/")[0] for name in found}
    pickles = [name for name in found if name.endswith("/data.pkl")]
    if len(roots) != 1 or len(pickles) != 1 or pickles[0].count("/") != 1:
        raise CorruptFileError(
            f"{reader.name}: a zip file of torch.save has one folder with one data.pkl, but this one has the folders "
            f"{sorted(roots)[:5]} and {len(pickles)} data.pkl; it was not written by torch.save"
        )
    return roots.pop()


def _check_byteorder(reader: RangeReader, record: Member | None) -> None:
    if record is None:  # torch before 2.1 did not record it
        return
    order = read_range(reader, record.offset, min(record.size, 16))
    if order != b"little":
        raise CorruptFileError(
            f"{reader.name}: the byte order should be 'little', but is {order!r}; load the file with torch on the "
            "machine that wrote it and save it with torch.serialization.set_default_load_endianness in mind"
        )


def _member(reader: RangeReader, found: dict[str, Member], name: str, key: str, storage: PickledStorage) -> Member:
    member = found.get(name)
    if member is None:
        raise CorruptFileError(f"{reader.name}: {key!r} should be in {name!r}, but there is no such member; copy again")
    if storage.nbytes != member.size:
        raise CorruptFileError(
            f"{reader.name}: {key!r} has a storage of {storage.nbytes} bytes, but {name!r} has {member.size}; "
            "the file is damaged, so download or copy it again"
        )
    return member


def view(reader: RangeReader, key: str, tensor: PickledTensor, start: int) -> StoredTensor:
    """Check that a view is within its storage, which starts at byte ``start``."""
    storage, dtype, offset, shape, strides = tensor
    # torch counts pairs of 4-bit values, safetensors the values themselves
    item = max(DTYPES[dtype].bits // 8, 1)
    last = offset
    count = 1
    negative = offset < 0 or len(shape) != len(strides)
    plain = True
    for size, stride in zip(reversed(shape), reversed(strides), strict=False):
        negative = negative or size < 0 or stride < 0
        last += (size - 1) * stride
        plain = plain and (size == 1 or stride == count)
        count *= size
    needed = item * (last + 1 if count else offset)
    if negative or needed > storage.nbytes or item * count >= _MAX_BYTES:
        raise CorruptFileError(
            f"{reader.name}: {key!r} of shape {shape}, strides {strides} and offset {offset} should lie within the "
            f"{storage.nbytes} bytes of its storage, but does not; the file is damaged, so download or copy it again"
        )
    plain = plain or not count
    if DTYPES[dtype].bits == 4:
        if not plain or not shape:
            raise CorruptFileError(
                f"{reader.name}: {key!r} packs two numbers to a byte and is not dense; save tensor.contiguous()"
            )
        shape = (*shape[:-1], 2 * shape[-1])
    return StoredTensor(key, dtype, shape, start + offset * item, None if plain else strides)
