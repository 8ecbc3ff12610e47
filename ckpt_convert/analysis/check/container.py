"""One weight file that may be damaged: all its problems, and what can be read of it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ckpt_convert import containers
from ckpt_convert.containers import safetensors
from ckpt_convert.containers.pickle import torchpickle
from ckpt_convert.containers.pickle.torchpickle import PickledStorage, PickledTensor
from ckpt_convert.containers.torch_zip import torchzip, zipindex
from ckpt_convert.errors import CkptConvertError, UnreadableError
from ckpt_convert.storage.base import OpenFile, RangeReader, read_range
from ckpt_convert.storage.reader import unreadable_error
from ckpt_convert.tensors.header import Header

_END = b"PK\5\6"
_END_SIZE = 22
_DESCRIPTOR = b"PK\7\x08"
_LOCAL = struct.Struct("<4s5H3I2H")
_MAX_COMMENT = 1 << 16
_MAX_PICKLE = 1 << 24


@dataclass(frozen=True)
class SurveyedFile:
    """A file as far as it can be read; the header's offsets refer to ``reader``."""

    reader: RangeReader
    header: Header | None
    problems: tuple[str, ...]


class _Shortened:
    """The first ``size`` bytes of a file."""

    def __init__(self, reader: RangeReader, size: int) -> None:
        self.name, self.size, self._reader = reader.name, size, reader

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._reader.readinto(offset, buffer)


def survey_file(reader: OpenFile) -> SurveyedFile:
    """Read the header of a file of any container; errors become problems. Raises UnreadableError for I/O errors."""
    try:
        start = read_range(reader, 0, min(reader.size, 32))
        length = int.from_bytes(start[:8], "little")
        if start[8:9] == b"{" and length <= safetensors.MAX_HEADER:
            header, problems = safetensors.parse_leniently(reader)
            return SurveyedFile(reader, header, tuple(problems))
        if torchzip.is_zip(reader):
            return _zip(reader)
        return SurveyedFile(*containers.parse_header(reader), ())
    except UnreadableError:
        raise
    except CkptConvertError as error:
        return SurveyedFile(reader, None, (str(error),))
    except OSError as error:
        raise unreadable_error(error, reader.name) from error


def zip_members(reader: RangeReader) -> list[zipindex.Member]:
    """The members of a torch zip file."""
    return list(zipindex.list_members(reader).values())


def _zip(reader: OpenFile) -> SurveyedFile:
    try:
        return _named(reader, torchzip.parse(reader, foreign=True))
    except UnreadableError:
        raise
    except CkptConvertError as error:
        end = _end(reader)
        if end is None:
            text = f"{reader.name}: is truncated: it ends before the zip directory{_lacking(reader)}"
            return SurveyedFile(reader, None, (f"{text}; download or copy it again",))
        if end == reader.size:
            return SurveyedFile(reader, None, (str(error),))
        text = (
            f"{reader.name}: has {reader.size - end} bytes after the end of the zip archive; download or copy it again"
        )
        shortened = _Shortened(reader, end)
        try:
            return _named(shortened, torchzip.parse(shortened, foreign=True), text)
        except UnreadableError:
            raise
        except CkptConvertError as other:
            return SurveyedFile(reader, None, (text, str(other)))


def _named(reader: RangeReader, header: Header, *problems: str) -> SurveyedFile:
    """The file, with the globals that its pickle names although no tensor needs them as a problem."""
    asked = (str(torchpickle.refusal_error(reader.name, "data.pkl", *header.foreign)),) if header.foreign else ()
    return SurveyedFile(reader, header, (*problems, *asked))


def _end(reader: RangeReader) -> int | None:
    """The offset at which the last end-of-central-directory record ends, None if there is none."""
    size = min(reader.size, _MAX_COMMENT + _END_SIZE)
    tail = read_range(reader, reader.size - size, size)
    at = tail.rfind(_END)
    return None if at < 0 or at + _END_SIZE > len(tail) else reader.size - size + at + _END_SIZE


def _lacking(reader: RangeReader) -> str:
    """The least number of missing bytes, from the storages that the pickle at the start of the file names."""
    try:
        magic, *_, name_size, extra = _LOCAL.unpack(read_range(reader, 0, min(_LOCAL.size, reader.size)))
        start = _LOCAL.size + name_size + extra
        if magic != b"PK\3\4" or not read_range(reader, _LOCAL.size, name_size).endswith(b"/data.pkl"):
            return ""
        data = read_range(reader, start, min(reader.size - start, _MAX_PICKLE))
        end = data.find(_DESCRIPTOR)
        while end >= 0 and data[end + 8 : end + 12] != end.to_bytes(4, "little"):
            end = data.find(_DESCRIPTOR, end + 1)
        if end < 0:
            return ""
        needed = (
            start + end + sum(_storages(torchpickle.load_pickle(reader.name, data[:end], foreign=True).value).values())
        )
    except (CkptConvertError, struct.error, ValueError):
        return ""
    return f", and at least {needed - reader.size} bytes are missing" if needed > reader.size else ""


def _storages(value: object) -> dict[str, int]:
    found: dict[str, int] = {}
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if id(item) in seen:  # a pickle may refer to one list a million times
            continue
        seen.add(id(item))
        if isinstance(item, PickledTensor):
            storage: PickledStorage = item.storage
            found[storage.key] = storage.nbytes
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list | tuple):
            pending.extend(item)
    return found
