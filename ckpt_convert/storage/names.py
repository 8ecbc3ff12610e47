"""Checks of names: those in files must stay inside their directory, paths from users must be local.

Also the names of the parts of an unfinished output.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Protocol, Self, TypeVar

from ckpt_convert.errors import UnsafeFileError, UsageError

MAX_NAME_BYTES = 255
"""The longest name that file systems accept, in bytes."""

_ADDRESS = (
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://"
    r"|(?P<known>s3a?|gs|gcs|az|abfss?|adl|wasbs?|r2|oss|hdfs|dbfs|hf|https?|s?ftp|file|memory):/"
)
"""A URL, also after ``Path`` has collapsed its two slashes to one."""

JOURNAL = ".ckpt-convert-journal"
"""A file in every directory that is being written: the finished pieces and their checksums."""


PARTIAL, REPLACED, DELETED = ".partial", ".replaced", ".deleted"
"""Suffixes of the hidden directories in which an output is written, replaced and removed."""


def check_name(name: str, named_by: str) -> str:
    """Return a relative file name that cannot leave its directory; raises UnsafeFileError for any other."""
    path = PurePosixPath(name)
    bad = (
        not name
        or str(path) != name
        or name == "."
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or (name[1:2] == ":" and name[0].isascii() and name[0].isalpha())  # a drive
    )
    if bad or any(ord(char) < 32 or ord(char) == 127 for char in name):
        raise UnsafeFileError(
            f"{named_by}: names the file {name!r}, which is no plain name inside the directory; "
            "the checkpoint is damaged or malicious, do not use it"
        )
    if any(len(part.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES for part in path.parts):
        raise UnsafeFileError(
            f"{named_by}: names a file {name[:60]!r}…, which is longer than the {MAX_NAME_BYTES} bytes that file "
            "systems take; rename it where it was made, or download it again"
        )
    return name


def is_safe_name(name: str) -> bool:
    """Whether a name refers to the same file inside its directory on every system."""
    try:
        check_name(name, "")
    except UnsafeFileError:
        return False
    return True


def is_web_url(text: str) -> bool:
    """Whether a text is the URL of something on a web server."""
    return text[:8].lower().startswith(("https://", "http://"))


def local_path(given: str | os.PathLike[str], what: str = "") -> Path:
    """The path that somebody gives for ``what``, with ``~`` as the home directory.

    Raises UsageError for the address of a store or a web server, and for a name that no file system takes.
    """
    text = os.fspath(given)
    label = f"{what} {text}" if what else text
    if ":/" in text and (match := re.match(_ADDRESS, text)) is not None:
        scheme = (match["scheme"] or match["known"]).lower()
        if scheme == "file":
            way = "give the path alone"
        elif scheme == "hf":
            way = "give it as a text" if not what else "write to a directory, and upload that with `hf upload`"
        elif match["known"] in ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "https", "http"):
            way = "give it as a text, since a `Path` takes a slash away"
        else:
            way = "use a directory of this machine, and copy it from there or to there with the store's own tools"
        raise UsageError(f"{label}: {scheme}:// addresses are not supported; {way}")
    path = Path(os.path.expanduser(text))
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in path.parts):
        raise UsageError(f"{label[:60]}…: has a name of more than the {MAX_NAME_BYTES} bytes that file systems take")
    return path


class _Named(Protocol):
    """A path, or a place."""

    @property
    def name(self) -> str: ...

    def with_name(self, name: str, /) -> Self: ...


_Name = TypeVar("_Name", bound=_Named)


def partial_path(destination: _Name) -> _Name:
    """The directory beside ``destination`` in which the output is written."""
    return destination.with_name(f".{destination.name}{PARTIAL}")


def replaced_path(destination: _Name) -> _Name:
    """The directory beside ``destination`` to which the old output is moved while the new one takes its name."""
    return destination.with_name(f".{destination.name}{REPLACED}")
