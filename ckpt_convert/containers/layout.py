"""The layout of an existing container file: everything except its tensors' bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from ckpt_convert.errors import CorruptFileError
from ckpt_convert.storage.base import RangeReader, read_range
from ckpt_convert.tensors.header import FileLayout, Header, StoredTensor

MAX_LITERALS = 1 << 30


def capture_layout(reader: RangeReader, header: Header) -> FileLayout | None:
    """Read every byte of the file that belongs to no tensor.

    Returns None if the file cannot be rebuilt from these and its tensors: a legacy file, tensors that overlap in part
    (two keys for the same bytes are fine), views with gaps or repetitions (permuted dense strides are fine), or more
    than ``MAX_LITERALS`` bytes that belong to no tensor (storages of which only a part is used).
    """
    gaps = find_gaps(header)
    if gaps is None or sum(end - start for start, end in gaps) > MAX_LITERALS:
        return None
    return FileLayout(header, tuple((start, read_range(reader, start, end - start)) for start, end in gaps))


def find_gaps(header: Header) -> list[tuple[int, int]] | None:
    """The (start, end) of each byte range that belongs to no tensor; None as for ``capture_layout``."""
    if header.kind == "legacy":
        return None
    extents = set()
    for tensor in header.tensors:
        if not tensor.nbytes:
            continue
        if not _dense(tensor):
            return None
        extents.add((tensor.offset, tensor.offset + tensor.nbytes))
    gaps = []
    position = 0
    for start, end in sorted(extents):
        if start < position:
            return None
        if start > position:
            gaps.append((position, start))
        position = end
    if position < header.size:
        gaps.append((position, header.size))
    return gaps


def _dense(tensor: StoredTensor) -> bool:
    """Whether the elements fill their extent without gaps, each once."""
    if tensor.strides is None:
        return True
    step = 1
    for stride, size in sorted(zip(tensor.strides, tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != step:
            return False
        step *= size
    return True


class RecordedFile:
    """A reader of recorded byte ranges of a file; reading any other byte is an error."""

    def __init__(self, name: str, size: int, literals: Iterable[tuple[int, bytes]]) -> None:
        self.name = name
        self.size = size
        self.runs = _joined(name, size, literals)
        self._starts = [start for start, _ in self.runs]

    def readinto(self, offset: int, buffer: memoryview) -> None:
        number = bisect_right(self._starts, offset) - 1
        if len(buffer) == 0:
            return
        start, data = self.runs[number] if number >= 0 else (0, b"")
        if offset < start or offset + len(buffer) > start + len(data):
            raise CorruptFileError(
                f"{self.name}: bytes {offset} to {offset + len(buffer)} are needed to read the recorded layout, but "
                "were not recorded; the record is damaged, so convert the original checkpoint again"
            )
        buffer[:] = data[offset - start : offset - start + len(buffer)]


def _joined(name: str, size: int, literals: Iterable[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Join adjacent ranges, so that a read may span them."""
    runs: list[tuple[int, list[bytes]]] = []
    position = 0
    for offset, data in literals:
        if offset < position or offset + len(data) > size:
            raise CorruptFileError(
                f"{name}: the recorded bytes {offset} to {offset + len(data)} should follow byte {position} and end by "
                f"{size}, but do not; the record is damaged, so convert the original checkpoint again"
            )
        if not data:
            continue
        if runs and offset == position:
            runs[-1][1].append(data)
        else:
            runs.append((offset, [data]))
        position = offset + len(data)
    return [(start, b"".join(parts)) for start, parts in runs]
