"""Container files: reading their headers, and laying out new files byte by byte."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckpt_convert.containers import safetensors
from ckpt_convert.containers.layout import MAX_LITERALS, RecordedFile, capture_layout, find_gaps
from ckpt_convert.errors import CorruptFileError
from ckpt_convert.storage.base import JoinsRanges, RangeReader, read_range
from ckpt_convert.tensors.header import ChecksummedRange, FileLayout, Header, StoredTensor

__all__ = [
    "MAX_LITERALS",
    "ChecksummedRange",
    "FileLayout",
    "Header",
    "StoredTensor",
    "capture_layout",
    "join_small",
    "parse_header",
    "parse_layout",
]

_GGUF = b"GGUF"
_KNOWN = (
    (b"version https://git-lfs", "it is a git-lfs pointer, not the file itself; run git lfs pull in its repository"),
    (b"<!doctype html", "it is a web page, so its download failed; download it again, logged in where it needs that"),
    (b"<html", "it is a web page, so its download failed; download it again, logged in where it needs that"),
)


def parse_header(reader: RangeReader, *, foreign: bool = False) -> tuple[RangeReader, Header]:
    """Read the header of a container file, whose kind is detected from its content.

    Returns the reader with it. A pickle that names unknown classes is refused; with ``foreign``, such objects are
    skipped. Raises CorruptFileError if the file is of no known kind, and as the parser of its kind does.
    """
    header = _parse(reader, foreign)
    join_small(reader, header.tensors)
    return reader, header


def _parse(reader: RangeReader, foreign: bool) -> Header:
    start = read_range(reader, 0, min(reader.size, 32))
    # A safetensors file starts with a length, which may equal any magic number: look for the brace first.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= safetensors.MAX_HEADER:
        return safetensors.parse(reader)
    if start.startswith(_GGUF):
        from ckpt_convert.containers import gguf

        return gguf.parse(reader)
    from ckpt_convert.containers.torch_zip import torchzip  # slow to import, and often not needed

    if torchzip.is_zip(reader):
        return torchzip.parse(reader, foreign=foreign)
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        from ckpt_convert.containers import legacy

        return legacy.parse(reader, foreign=foreign)
    raise CorruptFileError(f"{reader.name}: {_guess(start)}")


def join_small(reader: RangeReader, tensors: Iterable[StoredTensor]) -> None:
    """Have the small ones of these tensors read together where they are neighbors in a file of a store."""
    if isinstance(reader, JoinsRanges):
        reader.join((tensor.offset, tensor.offset + tensor.nbytes) for tensor in tensors if tensor.strides is None)


def parse_layout(name: str, size: int, literals: Sequence[tuple[int, bytes]]) -> FileLayout:
    """Restore a layout from the literals of ``capture_layout`` or ``build``, with all the checks of a file.

    ``name`` and ``size`` are those of the file. Raises CorruptFileError if a byte of the header is missing, or if
    ``literals`` are not exactly the bytes that belong to no tensor.
    """
    recorded = RecordedFile(name, size, literals)
    _, header = parse_header(recorded)
    gaps = find_gaps(header)
    if gaps is None or gaps != [(start, start + len(data)) for start, data in recorded.runs]:
        raise CorruptFileError(
            f"{name}: the recorded bytes should be those that belong to no tensor, but are not; "
            "the record is damaged, so convert the original checkpoint again"
        )
    return FileLayout(header, tuple(recorded.runs))


def _guess(start: bytes) -> str:
    if not start:
        return "the file is empty; download or copy it again"
    for magic, meaning in _KNOWN:
        if start.lower().startswith(magic.lower()):
            return meaning
    return (
        f"expected a safetensors, torch or GGUF file, but it starts with {start[:16]!r}; "
        "it is damaged or of another kind, so download it again or leave it out"
    )
