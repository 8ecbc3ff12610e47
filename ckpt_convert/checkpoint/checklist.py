"""Meta's checklist.chk: the hashes of a checkpoint's files, one line `<hash>  <file>` each, as md5sum writes them.

Meta's download scripts of Llama 1 to 3 have md5; `llama_models` (`cli/verify_download.py`) reads sha256.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from ckpt_convert.errors import CheckpointNotFoundError, CorruptFileError, UnsafeFileError
from ckpt_convert.storage.base import read_blocks
from ckpt_convert.storage.place import Place

CHECKLIST = "checklist.chk"
Algorithm = Literal["md5", "sha256"]

_LIMIT = 1 << 24
_LINE = re.compile(r"([0-9a-fA-F]+) [ *](.+)")
_ALGORITHMS: dict[int, Algorithm] = {32: "md5", 64: "sha256"}


@dataclass(frozen=True)
class HashMismatch:
    """One listed file whose hash differs; ``found`` is its hash, or says what is there instead."""

    file: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.file}: expected {self.expected}, found {self.found}; download it again"


def parse_checklist(text: str) -> dict[str, str]:
    """Read a checklist into hashes (lower case) by file name, in the order of the lines.

    Raises CorruptFileError for a line that is not `<hash>  <file>` with an md5 or sha256, for a file with two hashes,
    and for two kinds of hash in one list; UnsafeFileError for a name that leaves the directory.
    """
    entries: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip("\r\t \ufeff")
        if not line:
            continue
        found = _LINE.fullmatch(line)
        if found is None or len(found[1]) not in _ALGORITHMS:
            raise _corrupt(f"line {number}: expected `<md5 or sha256>  <file>`, found {line[:120]!r}")
        digest, name = found[1].lower(), found[2].removeprefix("./")
        _check_name(name)
        if entries.setdefault(name, digest) != digest:
            raise _corrupt(f"line {number}: expected one hash for {name!r}, found {entries[name]} and {digest}")
    hash_algorithm(entries)
    return entries


def hash_algorithm(parsed: Mapping[str, str]) -> Algorithm:
    """The hash algorithm of a checklist; md5, Meta's default, for an empty one.

    Raises CorruptFileError when the hashes are of neither kind, or of both.
    """
    lengths = {len(digest) for digest in parsed.values()} or {32}
    if len(lengths) > 1 or not lengths <= _ALGORITHMS.keys():
        raise _corrupt(f"expected hashes of 32 (md5) or 64 (sha256) digits, found {sorted(lengths)}")
    return _ALGORITHMS[lengths.pop()]


def render_checklist(entries: Mapping[str, str]) -> bytes:
    """The bytes of a checklist, in the order of ``entries`` (file name to hash); the inverse of ``parse_checklist``.

    Raises what ``parse_checklist`` does for names and hashes that a checklist cannot hold.
    """
    text = "".join(f"{digest}  {name}\n" for name, digest in entries.items())
    if parse_checklist(text) != {name.removeprefix("./"): digest.lower() for name, digest in entries.items()}:
        raise _corrupt(f"expected names that fit on a line, found {list(entries)[:4]!r}")
    return text.encode()


def hash_file(path: Place, kind: Algorithm, *, advance: Callable[[int], None] | None = None) -> str:
    """Hash a file in blocks of 1 MiB; ``advance`` is called with the bytes of each.

    hashlib releases the GIL. Raises what ``Place.open`` does when the file cannot be read.
    """
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open() as file:
        for block in read_blocks(file):
            digest.update(block)
            if advance is not None:
                advance(len(block))
    return digest.hexdigest()


def hash_files(directory: Place, names: Iterable[str], kind: Algorithm = "md5") -> dict[str, str]:
    """The entries of a checklist for existing files.

    Raises UnsafeFileError for a name that leaves the directory.
    """
    listed = list(names)
    for name in listed:
        _check_name(name)
    return {name: hash_file(directory / name, kind) for name in listed}


def check_hashes(
    directory: Place, entries: Mapping[str, str] | None = None, *, advance: Callable[[int], None] | None = None
) -> list[HashMismatch]:
    """Hash the files that a checklist names and return those that are missing or differ.

    ``entries`` default to the directory's checklist.chk. Raises CheckpointNotFoundError when there is no checklist, and
    what ``parse_checklist`` does.
    """
    listed = _read(directory / CHECKLIST) if entries is None else entries
    for name in listed:
        _check_name(name)
    kind = hash_algorithm(listed)
    return [
        HashMismatch(name, f"{kind} {expected.lower()}", found)
        for name, expected in listed.items()
        if (found := _found(directory, name, kind, advance)) != f"{kind} {expected.lower()}"
    ]


def _found(directory: Place, name: str, kind: Algorithm, advance: Callable[[int], None] | None) -> str:
    try:
        return f"{kind} {hash_file(directory.resolve_member(name, CHECKLIST), kind, advance=advance)}"
    except CheckpointNotFoundError:
        return "no such file"
    except UnsafeFileError:
        return (
            "a link that leaves the directory"
            if (directory / name).is_regular_file()
            else "something that is not a file"
        )


def _read(path: Place) -> dict[str, str]:
    if not path.is_present():
        raise CheckpointNotFoundError(
            f"{path}: expected a list of hashes, found no such file; without one there is nothing to check against"
        )
    data = path.read(_LIMIT)
    try:
        return parse_checklist(data.decode())
    except UnicodeDecodeError:
        raise _corrupt(f"expected UTF-8 text, found {data[:40]!r}") from None


def _check_name(name: str) -> None:
    """Raise UnsafeFileError for a name that could leave the directory that it is joined to, on any system."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0] or not name.isprintable():
        raise UnsafeFileError(
            f"{CHECKLIST}: expected the name of a file in its directory, found {name!r}; remove that line"
        )


def _corrupt(what: str) -> CorruptFileError:
    return CorruptFileError(f"{CHECKLIST}: {what}; download it again or remove it")
