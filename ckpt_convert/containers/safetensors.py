"""The safetensors container: a length, a JSON header, and the tensors' bytes without gaps.

The format is specified in the README of github.com/huggingface/safetensors. Everything that its library refuses is
refused here, and also duplicate keys, unknown fields and a space before the brace, which it accepts.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, NoReturn

from ckpt_convert.dtypes import DTYPES, nbytes
from ckpt_convert.errors import CorruptFileError, KeyMismatchError, UsageError
from ckpt_convert.storage.base import RangeReader, read_range
from ckpt_convert.tensors.header import FileLayout, Header, StoredTensor

KIND = "safetensors"
MAX_HEADER = 100_000_000

_ORDER = {dtype.name: dtype.order for dtype in DTYPES.values() if dtype.order is not None}
"""The library writes the tensors sorted by dtype, in this order, and then by name."""

_MAX_DIMS = 64  # torch's and numpy's limit
_Entry = tuple[Any, tuple[Any, ...], tuple[Any, ...]]  # dtype, shape, data_offsets
_FIELDS = ("dtype", "shape", "data_offsets")
_FIELDS_OF = itemgetter(*_FIELDS)
_DAMAGED = (
    "the safetensors header is damaged or was written by a faulty program, so download the file again or save it again"
)


class _OddError(ValueError):
    """A problem of the header; ``parse`` adds the file's name."""


def parse(reader: RangeReader) -> Header:
    """Read and check the header; tensors are in the order of their offsets, empty ones in header order.

    Raises CorruptFileError if the header violates the format in any way, or does not match the size of the file.
    """
    length = _header_length(reader)
    raw = read_range(reader, 8, length)
    try:
        metadata, entries = _decode(raw)
        tensors = _tensors(entries, 8 + length)
    except _OddError as odd:
        raise CorruptFileError(f"{reader.name}: {odd}; {_DAMAGED}") from None
    end = tensors[-1].offset + tensors[-1].nbytes if tensors else 8 + length
    if end != reader.size:
        what = "it is truncated" if reader.size < end else "it has bytes after the last tensor"
        raise CorruptFileError(
            f"{reader.name}: the header describes a file of {end} bytes, but the file has {reader.size}: {what}, "
            "so download or copy it again"
        )
    return Header(KIND, reader.size, tuple(tensors), metadata)


def parse_leniently(reader: RangeReader) -> tuple[Header | None, list[str]]:
    """As ``parse``, for a damaged file: the header as far as it is readable, and a message for every problem.

    Tensors may then be beyond the end of the file. The header is None if it cannot be read at all.
    """
    try:
        length = _header_length(reader)
        metadata, entries = _decode(read_range(reader, 8, length))
    except CorruptFileError as error:
        return None, [str(error)]
    except _OddError as odd:
        return None, [f"{reader.name}: {odd}; {_DAMAGED}"]
    problems: list[str] = []
    sound: list[tuple[str, _Entry]] = []
    for key, entry in entries.items():
        try:
            _check_entry(key, entry)
            sound.append((key, entry))
        except _OddError as odd:
            problems.append(f"{reader.name}: {odd}; {_DAMAGED}")
    end, tensors = 8 + length, []
    for key, (dtype, shape, (begin, stop)) in sorted(sound, key=lambda item: item[1][2]):
        start = 8 + length + begin
        if start < end:
            problems.append(f"{reader.name}: {key!r} overlaps the tensors before it by {end - start} bytes; {_DAMAGED}")
        elif start > end and len(sound) == len(entries):
            problems.append(f"{reader.name}: {start - end} bytes before {key!r} belong to no tensor; {_DAMAGED}")
        tensors.append(StoredTensor(key, dtype, shape, start))
        end = max(end, 8 + length + stop)
    if reader.size < end:
        cut = [tensor.key for tensor in tensors if tensor.offset + tensor.nbytes > reader.size]
        problems.append(
            f"{reader.name}: is truncated: {end - reader.size} bytes are missing, the header describes a file of {end} "
            f"and it has {reader.size}, so {cut[0]} is cut"
            + (f" and {len(cut) - 1} more tensors are cut or absent" if len(cut) > 1 else "")
            + "; download or copy it again"
        )
    elif reader.size > end and len(sound) == len(entries):
        problems.append(
            f"{reader.name}: has {reader.size - end} bytes after the last tensor, the header describes a file of {end} "
            f"and it has {reader.size}; download or copy it again"
        )
    return Header(KIND, reader.size, tuple(tensors), metadata), problems


def build(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str], *, alignment: int = 8
) -> FileLayout:
    """Lay out a file that holds ``tensors`` (key, dtype, shape) in the given order.

    The header is the one that the safetensors library writes for tensors in ``serialized_order``: compact JSON, padded
    with spaces so that the tensors start at a multiple of ``alignment`` bytes (8 in the library). Raises
    KeyMismatchError for a duplicate key, UsageError for what the format cannot express.
    """
    _check_keys([key for key, _, _ in tensors])
    document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for key, dtype, shape in tensors:
        if dtype not in _ORDER:
            raise UsageError(f"{key}: safetensors has no dtype {dtype}; cast the tensor, or write a .pth file")
        end = position + nbytes(dtype, shape)
        document[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    try:
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{error.object!r} is no valid Unicode, which safetensors' header needs; rename it") from None
    text += b" " * (-(8 + len(text)) % alignment)
    if len(text) > MAX_HEADER:
        raise UsageError(
            f"a header of {len(text)} bytes for {len(tensors)} tensors is larger than the {MAX_HEADER} that "
            "safetensors allows; split the file into more shards"
        )
    start = 8 + len(text)
    stored = []
    position = start
    for key, dtype, shape in tensors:
        stored.append(StoredTensor(key, dtype, tuple(shape), position))
        position += nbytes(dtype, shape)
    header = Header(KIND, position, tuple(stored), dict(metadata))
    return FileLayout(header, ((0, len(text).to_bytes(8, "little") + text),))


def serialized_order(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Sort (key, dtype, shape) as the safetensors library does when it writes: by dtype, then by key.

    The order of the dtypes is that of safetensors 0.8.
    """
    return sorted(tensors, key=lambda tensor: (_ORDER.get(tensor[1], len(_ORDER)), tensor[0]))


def _check_keys(keys: Sequence[str]) -> None:
    if "__metadata__" in keys:
        raise UsageError("a tensor is called __metadata__, which safetensors keeps for the header; rename it")
    if len(set(keys)) != len(keys):
        twice = sorted(key for key, count in Counter(keys).items() if count > 1)
        raise KeyMismatchError(f"keys should be unique in a file, but these are given twice: {', '.join(twice)}")


def _header_length(reader: RangeReader) -> int:
    if reader.size < 8:
        raise CorruptFileError(
            f"{reader.name}: a safetensors file starts with 8 bytes of header length, but the file has {reader.size}; "
            "it is truncated, so download or copy it again"
        )
    length = int.from_bytes(read_range(reader, 0, 8), "little")
    if length > MAX_HEADER:
        raise CorruptFileError(
            f"{reader.name}: the header should be {length} bytes long, but safetensors allows {MAX_HEADER}; "
            "this is no safetensors file, or a damaged one"
        )
    if 8 + length > reader.size:
        raise CorruptFileError(
            f"{reader.name}: the header should end at byte {8 + length}, but the file has {reader.size} bytes; "
            "it is truncated, so download or copy it again"
        )
    return length


def _decode(raw: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    if not raw.startswith(b"{"):
        raise _OddError(f"the header should start with '{{', but starts with {raw[:16]!r}")
    try:
        text = raw.decode("utf-8")
        entries = _decode_fast(text) or json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except _OddError:
        raise
    except UnicodeDecodeError as error:
        raise _OddError(f"the header should be UTF-8, but {error}") from None
    except RecursionError:
        raise _OddError("the header is nested far deeper than any safetensors header") from None
    except ValueError as error:
        raise _OddError(f"the header should be JSON, but {error}") from None
    if not isinstance(entries, dict):
        raise _OddError("the header should map keys to tensors, but is a single tensor's entry")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise _OddError("__metadata__ should map strings to strings, but it does not")
    if b"\\u" in raw:  # only an escape can encode half a surrogate pair, which is not valid Unicode
        _check_unicode([*entries, *metadata, *metadata.values()])
    return metadata, entries


def _decode_fast(text: str) -> dict[str, Any] | None:
    """Decode a header as ``_object`` does, in half the time; None if it may be malformed, or has colons in strings."""
    try:
        found = json.loads(text, parse_constant=_no_constant)
        metadata = found.pop("__metadata__", None)
        dtypes, shapes, spans = zip(*map(_FIELDS_OF, found.values()), strict=True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if set(map(type, chain(shapes, spans))) != {list} or not (metadata is None or isinstance(metadata, dict)):
        return None
    # Colons follow keys, or are within strings. If there are only as many as there are keys, no key was duplicated and
    # no entry has a fourth field.
    if text.count(":") != 4 * len(found) + (1 + len(metadata) if metadata is not None else 0):
        return None
    entries = zip(dtypes, map(tuple, shapes), map(tuple, spans), strict=True)
    decoded: dict[str, Any] = dict(zip(found, entries, strict=True))
    decoded["__metadata__"] = metadata or {}
    return decoded


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Entry:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _OddError(f"the key {twice!r} should stand in the header once, but it stands there twice")
    if found.keys() == set(_FIELDS) and isinstance(found["shape"], list) and isinstance(found["data_offsets"], list):
        # The garbage collector does not track tuples of plain values: with 100,000 tensors that halves the time.
        return found["dtype"], tuple(found["shape"]), tuple(found["data_offsets"])
    return found


def _no_constant(text: str) -> NoReturn:
    raise _OddError(f"the header should be JSON, but holds {text}")


def _check_unicode(strings: Iterable[str]) -> None:
    for string in strings:
        try:
            string.encode()
        except UnicodeEncodeError:
            raise _OddError(f"{string!r} is no valid Unicode") from None


def _tensors(entries: dict[str, Any], start: int) -> list[StoredTensor]:
    _check_entries(entries)
    position = 0
    tensors = []
    kinds: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]] = {}  # few differ: shared
    # The sort is stable: empty tensors stay in header order.
    for key, (dtype, shape, (begin, end)) in sorted(entries.items(), key=lambda item: item[1][2]):
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise _OddError(f"{key!r} should start at offset {position}, but starts at {begin}, which {what}")
        tensors.append(StoredTensor(key, *kinds.setdefault((dtype, shape), (dtype, shape)), start + begin))
        position = end
    return tensors


def _check_entries(entries: dict[str, Any]) -> None:
    """``_check_entry`` for every entry, shortened for those of a known dtype and shape with the same span."""
    if not _are_plain(entries.values()):
        for key, entry in entries.items():
            _check_entry(key, entry)
        return
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}
    for key, entry in entries.items():
        dtype, shape, (begin, end) = entry
        if sizes.get((dtype, shape)) != end - begin or begin < 0 or end >= 2**63:
            _check_entry(key, entry)
            sizes[dtype, shape] = end - begin


def _are_plain(entries: Collection[Any]) -> bool:
    """Whether all entries have the right types, so that equal entries pass the same checks.

    In Python, JSON's true and 1.0 equal the integer 1.
    """
    if set(map(type, entries)) - {tuple}:
        return False
    dtypes, shapes, spans = zip(*entries, strict=True) if entries else ((), (), ())
    numbers = chain(chain.from_iterable(shapes), chain.from_iterable(spans))
    return set(map(type, dtypes)) <= {str} and set(map(type, numbers)) <= {int} and set(map(len, spans)) <= {2}


def _check_entry(key: str, entry: Any) -> None:
    if not isinstance(entry, tuple):
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise _OddError(f"{key!r} should have dtype and the lists shape and data_offsets, but has {found!s:.200}")
    dtype, shape, offsets = entry
    if not isinstance(dtype, str) or dtype not in _ORDER:
        raise _OddError(f"{key!r} should have a dtype that safetensors knows, but has {dtype!r:.200}")
    if not _sizes(shape) or len(shape) > _MAX_DIMS:
        raise _OddError(
            f"{key!r} should have {_MAX_DIMS} non-negative integers at most as shape, but has {shape!r:.200}"
        )
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _OddError(f"{key!r} should have two ascending data_offsets, but has {offsets!r:.200}")
    bits = DTYPES[dtype].bits * math.prod(shape)
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _OddError(
            f"{key!r} is {dtype} of shape {list(shape)}, which takes {bits} bits, "
            f"but its data_offsets {list(offsets)} span {8 * (offsets[1] - offsets[0])}"
        )


def _sizes(values: tuple[Any, ...]) -> bool:
    # In Python, JSON's true and 1.0 equal the integer 1, so compare the exact type.
    return not values or (set(map(type, values)) == {int} and 0 <= min(values) <= max(values) < 2**63)
