"""How tensors lie in files: reading a file's header, and laying out a new file byte by byte."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt_convert.containers import gguf, safetensors
from ckpt_convert.containers.layout import MAX_LITERALS, RecordedFile, capture_layout, find_gaps
from ckpt_convert.errors import CorruptFileError
from ckpt_convert.storage.base import RangeReader, read_range
from ckpt_convert.tensors.header import ChecksummedRange, FileLayout, Header, StoredTensor

__all__ = [
    "MAX_LITERALS",
    "ChecksummedRange",
    "FileLayout",
    "Header",
    "StoredTensor",
    "capture_layout",
    "parse_header",
    "parse_layout",
]

_KNOWN = (
    (b"version https://git-lfs", "it is a git-lfs pointer, not the file itself; run git lfs pull in its repository"),
    (b"<!doctype html", "it is a web page, so its download failed; download it again, logged in where it needs that"),
    (b"<html", "it is a web page, so its download failed; download it again, logged in where it needs that"),
)


def parse_header(reader: RangeReader, *, foreign: bool = False) -> tuple[RangeReader, Header]:
    """Read the header of a container file of any kind, told by its content.

    Returns the reader with it. A pickle that asks for objects of unknown classes is refused, or, with ``foreign``, read
    around them. Raises CorruptFileError when the file is of no known kind, and whatever the parser of its kind raises.
    """
    start = read_range(reader, 0, min(reader.size, 32))
    # The first bytes of a safetensors file are a number, and may be the magic of anything: look at the brace first.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= safetensors.MAX_HEADER:
        return reader, safetensors.parse(reader)
    if start.startswith(gguf.MAGIC):
        return reader, gguf.parse(reader)
    from ckpt_convert.containers.torch_zip import torchzip  # pickle and zip take a while to import, often in vain

    if torchzip.is_zip(reader):
        return reader, torchzip.parse(reader, foreign=foreign)
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        from ckpt_convert.containers import legacy

        return reader, legacy.parse(reader, foreign=foreign)
    raise CorruptFileError(f"{reader.name}: {_guess(start)}")


def parse_layout(name: str, size: int, literals: Sequence[tuple[int, bytes]]) -> FileLayout:
    """Read a layout back from what ``capture`` or a ``build`` made of it, checking it as the file was checked.

    Raises CorruptFileError when a byte that the header needs is missing, or when ``literals`` are not exactly the
    bytes of the file (``size`` bytes, called ``name``) that belong to no tensor.
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
